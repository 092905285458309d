//! The daemon's own resource usage.

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The process as a whole. Values that the kernel does not provide are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// When it started, in seconds since 1970.
    pub start_time_s: u64,
    /// How long it has run; in a [`super::Snapshot`], at the time it was taken.
    pub uptime_ms: u64,
    /// Processor time of all threads, user and system.
    pub cpu_ms: u64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// The limit of open file descriptors.
    pub max_fds: u64,
}

/// When the process started.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    instant: Instant,
    time_s: u64,
}

impl Clock {
    /// Starts counting.
    pub fn start() -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { instant: Instant::now(), time_s: time.as_secs() }
    }

    pub(super) fn process(&self) -> Process {
        Process {
            start_time_s: self.time_s,
            uptime_ms: u64::try_from(self.instant.elapsed().as_millis()).unwrap_or(u64::MAX),
            cpu_ms: cpu_ms().unwrap_or(0),
            resident_bytes: resident_bytes().unwrap_or(0),
            open_fds: open_fds().unwrap_or(0),
            max_fds: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
        }
    }
}

fn cpu_ms() -> Option<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let ms = |time: TimeVal| u64::try_from(time.num_milliseconds()).unwrap_or(0);
    Some(ms(usage.user_time()) + ms(usage.system_time()))
}

/// The second number of statm, in pages: proc(5).
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    pages.checked_mul(u64::try_from(page).ok()?)
}

fn open_fds() -> Option<u64> {
    let count = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them is the directory just read.
    u64::try_from(count.saturating_sub(1)).ok()
}
