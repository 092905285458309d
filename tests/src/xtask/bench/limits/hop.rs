//! The bare ring hop: `ring-proto/examples/hop.c`, requests and responses between two CPUs by the macros
//! of Xen's `ring.h`, with no I/O, no buffers and no mistrust.

use crate::xtask::bench::case::{BASE, Case};
use crate::xtask::bench::contender::Contender;
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use crate::xtask::packages::Need;
use crate::xtask::{root, target};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;
use xen_blk_tests::process::run as output;

/// The largest depth a one-page ring holds.
const ONE_PAGE: u32 = 32;

/// The limit of polled rings.
pub(crate) struct Hop;

fn program() -> PathBuf {
    target().join("bench/hop")
}

impl Contender for Hop {
    fn name(&self) -> &'static str {
        "bare ring hop, C"
    }

    fn needs(&self) -> &'static [Need] {
        &[
            ("/usr/bin/cc", "gcc"),
            ("/usr/include/stdio.h", "libc6-dev"),
            ("/usr/include/xen/io/blkif.h", "libxen-dev"),
        ]
    }

    fn prepare(&self) -> Result<()> {
        std::fs::create_dir_all(target().join("bench"))?;
        output(
            Command::new("cc")
                .args(["-std=gnu11", "-O3", "-pthread", "-D__XEN_TOOLS__", "-o"])
                .args([program(), root().join("ring-proto/examples/hop.c")]),
        )?;
        Ok(())
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        (*case == Case { depth: case.depth, ..BASE }).then_some(*case)
    }

    fn measure(&self, case: &Case, meter: &Meter, _place: &Place) -> Result<Sample> {
        let order = if case.depth > ONE_PAGE { 2 } else { 0 };
        let arguments = [u128::from(case.depth), order, meter.time.as_nanos()];
        let rate = output(Command::new(program()).args(arguments.map(|n| n.to_string())))?;
        Ok(Sample::rate(rate.trim().parse().context("the hop's rate")?))
    }
}
