//! CPU time of other processes.

use anyhow::{Context, Result};
use std::time::Duration;

/// CPU time, user and system, that a process and its threads have used so far.
///
/// # Errors
/// When there is no such process.
pub fn used(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses, which may contain anything.
    let (_, rest) = stat.rsplit_once(')').context("/proc stat")?;
    let ticks = |n: usize| -> Result<u64> {
        // Fields are numbered from 1 in proc(5); `rest` starts with the third.
        Ok(rest.split_whitespace().nth(n - 3).context("/proc stat")?.parse()?)
    };
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
    let total = ticks(14)? + ticks(15)?;
    Ok(Duration::from_secs_f64(total as f64 / per_second as f64))
}
