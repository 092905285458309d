//! Other user-space block devices, each driven by the client it is made for.

pub(super) mod nbdkit;
pub(super) mod qemu;
pub(super) mod rust_vmm;

use super::case::{Case, Job, Wait};
use super::contender::{CLIENT_CPU, read_report, seed};
use super::meter::Meter;
use super::place::{BYTES, Place};
use super::sample::Sample;
use crate::xtask::{cargo, root, step, target};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use xen_blk_tests::process::{Process, wait_until};

/// One of the programs in `tests/peers`.
fn program(name: &str) -> PathBuf {
    target().join("peers/release").join(name)
}

/// Builds `tests/peers`.
fn build() -> Result<()> {
    let mut command = cargo(&["build", "--release", "--quiet", "--locked"]);
    command.current_dir(root().join("tests/peers")).env("CARGO_TARGET_DIR", target().join("peers"));
    step("build the peers and their client", &mut command)
}

/// Whether `blkio-bench` can do the case on a device of one queue.
fn vhost_takes(case: &Case) -> bool {
    let client = matches!(case.client, Wait::Poll | Wait::Event);
    case.is_plain() && case.rings == 1 && case.job != Job::Iometer && client
}

/// Starts a server, and waits until its socket is there. A socket from before is removed first.
fn serve(name: &str, place: &Place, socket: &Path, command: &mut Command) -> Result<Process> {
    if socket.exists() {
        std::fs::remove_file(socket)?;
    }
    let mut server = Process::start(name, place.dir(), command)?;
    wait_until(name, || {
        anyhow::ensure!(server.is_running()?, "{name} ended:\n{}", server.log());
        Ok(socket.exists())
    })?;
    Ok(server)
}

/// Loads a vhost-user-blk device with `blkio-bench`.
fn drive(case: &Case, meter: &Meter, socket: &Path, server: &Process) -> Result<Sample> {
    let mut command = Command::new(program("blkio-bench"));
    let (rw, bs) = match case.job {
        Job::RandomRead => ("randread", "4096"),
        Job::RandomWrite => ("randwrite", "4096"),
        Job::SequentialRead => ("read", "131072"),
        Job::Iometer => anyhow::bail!("blkio-bench has no mix"),
    };
    command.arg(socket).args(["--rw", rw, "--bs", bs, "--iodepth", &case.depth.to_string()]);
    command.args(["--size", &BYTES.to_string(), "--cpu", &CLIENT_CPU.to_string()]);
    command.args(["--runtime", &meter.time.as_secs_f64().to_string()]);
    command.args(["--ramp", &meter.ramp().as_secs_f64().to_string()]);
    command.args(["--seed", &seed().to_string()]);
    if case.client == Wait::Poll {
        command.arg("--poll");
    }
    let observed = meter.observe(vec![command], &[server.pid()], || Ok(()))?;
    let mut sample = read_report(observed.reports.first().context("no report")?)?;
    observed.share(&mut sample);
    Ok(sample)
}
