//! fio's io_uring engine on the same file or device, on one CPU.

use crate::xtask::bench::case::{Case, Disk, Wait};
use crate::xtask::bench::contender::{CLIENT_CPU, Contender};
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::{BYTES, Place};
use crate::xtask::bench::sample::Sample;
use crate::xtask::packages::Need;
use anyhow::{Context, Result};
use serde_json::Value;
use std::process::Command;

/// fio, and its package.
pub(crate) const NEEDS: &[Need] = &[("/usr/bin/fio", "fio")];

/// The limit of files and devices.
pub(crate) struct Fio;

/// fio on the clients' CPU, for one job and as long as the meter says.
pub(crate) fn fio(case: &Case, meter: &Meter) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--thread", "--output-format=json", "--norandommap"]);
    command.args(["--randrepeat=0", "--time_based"]).args(case.job.options());
    // Latencies from submission on, as the others': an I/O on the page cache is over before it is submitted, for
    // what fio calls completion latency. Reads and writes together.
    command.args(["--lat_percentiles=1", "--clat_percentiles=0", "--unified_rw_reporting=1"]);
    // Otherwise fio would begin by dropping the file from the page cache.
    command.arg("--invalidate=0");
    command.arg(format!("--iodepth={}", case.depth)).arg(format!("--size={BYTES}"));
    command.arg(format!("--runtime={}ms", meter.time.as_millis()));
    command.arg(format!("--ramp_time={}ms", meter.ramp().as_millis()));
    command.arg(format!("--cpus_allowed={CLIENT_CPU}"));
    command
}

/// IOPS and latencies of [`fio`]'s report.
pub(crate) fn read_fio(report: &Value) -> Result<Sample> {
    let job = report.pointer("/jobs/0/mixed").context("fio's report has no job")?;
    let number =
        |pointer: &str| job.pointer(pointer).and_then(Value::as_f64).context("fio's report");
    let micros =
        |which: &str| number(&format!("/lat_ns/percentile/{which}")).map(|ns| Some(ns / 1e3));
    Ok(Sample {
        iops: number("/iops")?,
        p50_us: micros("50.000000")?,
        p99_us: micros("99.000000")?,
        p99_9_us: micros("99.900000")?,
        ..Sample::default()
    })
}

impl Contender for Fio {
    fn name(&self) -> &'static str {
        "fio, io_uring, one CPU"
    }

    fn needs(&self) -> &'static [Need] {
        NEEDS
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        let takes = case.is_plain() && case.rings == 1 && case.disk != Disk::Null;
        takes.then_some(case.waiting(Wait::Event))
    }

    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample> {
        let path = place.path(case.disk)?.context("a null disk")?;
        let mut command = fio(case, meter);
        command.arg("--ioengine=io_uring").arg(format!("--filename={}", path.display()));
        command.arg("--registerfiles=1");
        if case.disk == Disk::CachedFile {
            // One system call for many I/Os makes it 1.3 times as fast here, but 0.4 times on a loop
            // device.
            command.args(["--direct=0", "--iodepth_batch_submit=16"]);
            command.arg("--iodepth_batch_complete_min=1");
            command.arg(format!("--iodepth_batch_complete_max={}", case.depth));
        } else {
            // Registered buffers spare a look-up of their pages; copying to them is no faster.
            command.args(["--direct=1", "--fixedbufs=1"]);
        }
        let observed = meter.observe(vec![command], &[], || Ok(()))?;
        let mut sample = read_fio(observed.reports.first().context("no report")?)?;
        observed.share(&mut sample);
        sample.backend = Default::default();
        Ok(sample)
    }
}
