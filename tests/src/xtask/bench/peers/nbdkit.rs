//! nbdkit's null plugin through fio's nbd engine: a socket in place of shared memory.

use super::serve;
use crate::xtask::bench::case::{Case, Disk, Wait};
use crate::xtask::bench::contender::Contender;
use crate::xtask::bench::limits::fio::{fio, read_fio};
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use crate::xtask::packages::Need;
use anyhow::{Context, Result};

/// NBD on a unix socket.
pub(crate) struct Nbdkit;

impl Contender for Nbdkit {
    fn name(&self) -> &'static str {
        "nbdkit null"
    }

    fn needs(&self) -> &'static [Need] {
        &[("/usr/bin/nbdkit", "nbdkit"), ("/usr/bin/fio", "fio")]
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        let takes = case.is_plain() && case.rings == 1 && case.disk == Disk::Null;
        takes.then_some(case.waiting(Wait::Event))
    }

    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample> {
        let socket = place.dir().join("nbdkit.sock");
        let mut command = meter.backend();
        command.arg("nbdkit").args(["--foreground", "--unix"]).arg(&socket).args(["null", "64G"]);
        let server = serve("nbdkit", place, &socket, &mut command)?;
        let mut client = fio(case, meter);
        client.arg("--ioengine=nbd");
        client.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
        let observed = meter.observe(vec![client], &[server.pid()], || Ok(()))?;
        let mut sample = read_fio(observed.reports.first().context("no report")?)?;
        observed.share(&mut sample);
        Ok(sample)
    }
}
