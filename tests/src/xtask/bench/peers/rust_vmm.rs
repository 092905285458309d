//! `tests/peers/rust-vmm-null`: a null device on the rust-vmm crates, spinning or on epoll.

use super::{build, drive, program, serve, vhost_takes};
use crate::xtask::bench::case::{Case, Disk, Wait};
use crate::xtask::bench::contender::Contender;
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use anyhow::Result;

/// A device on Rust's virtio crates.
pub(crate) struct Null;

impl Contender for Null {
    fn name(&self) -> &'static str {
        "rust-vmm null"
    }

    fn prepare(&self) -> Result<()> {
        build()
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        // It gives up spinning after a while, so it is the adaptive kind.
        let backend = if case.backend == Wait::Event { Wait::Event } else { Wait::Adaptive };
        (vhost_takes(case) && case.disk == Disk::Null).then_some(Case { backend, ..*case })
    }

    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample> {
        let socket = place.dir().join("rust-vmm.sock");
        let mode = if case.backend == Wait::Event { "epoll" } else { "spin" };
        let mut command = meter.backend();
        command.arg(program("rust-vmm-null")).arg(&socket).arg(mode);
        let server = serve("rust-vmm-null", place, &socket, &mut command)?;
        drive(case, meter, &socket, &server)
    }
}
