//! Instructions of a process, as valgrind's callgrind counts them: those in user space, also on machines that
//! hide their CPUs' counters.

use crate::xtask::packages::Need;
use crate::xtask::target;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::process::Command;
use xen_blk_tests::process::{run as output, wait_until};

/// Valgrind.
pub(super) const NEEDS: &[Need] = &[("/usr/bin/callgrind_control", "valgrind")];

/// Has glibc clear and copy memory by vectors whatever its size: callgrind counts a string instruction once
/// per byte.
const NO_STRING_INSTRUCTIONS: &str =
    "glibc.cpu.x86_rep_movsb_threshold=0x7fffffff:glibc.cpu.x86_rep_stosb_threshold=0x7fffffff";

/// Where a process leaves its counts when it ends. There is one at a time.
fn counts() -> PathBuf {
    target().join("bench/callgrind.out")
}

/// A command that runs the program it is given, and counts.
pub(super) fn counting() -> Command {
    // Counts of an earlier process would be taken for this one's. There may be none.
    let _ = std::fs::remove_file(counts());
    let mut command = Command::new("valgrind");
    // One thread runs at a time; one that polls must not keep the others from it.
    command.args(["-q", "--tool=callgrind", "--fair-sched=yes"]);
    command.arg(format!("--callgrind-out-file={}", counts().display()));
    command.env("GLIBC_TUNABLES", NO_STRING_INSTRUCTIONS);
    command
}

/// Starts counting anew in a process that counts.
pub(super) fn restart(pid: u32) -> Result<()> {
    output(Command::new("callgrind_control").args(["--zero", &pid.to_string()])).map(drop)
}

/// Ends a process that counts, unless it has ended with its client.
pub(super) fn end(pid: u32) -> Result<()> {
    // It fails if it has ended.
    let _ = kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM);
    wait_until("the counted process ends", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        // A zombie until whoever started it waits for it.
        Ok(status.map_or(true, |status| status.contains("State:\tZ")))
    })
}

/// What a process that has ended counted.
pub(super) fn counted() -> Result<f64> {
    let profile = std::fs::read_to_string(counts()).context("callgrind left no counts")?;
    let total = profile.lines().find_map(|line| line.strip_prefix("totals: "));
    Ok(total.context("no total")?.trim().parse()?)
}
