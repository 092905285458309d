//! Sleeping, and for how long.

use crate::stats::Counters;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Sleeps until one of the descriptors is readable. Returning early, or failing, is harmless: the
/// caller looks again either way.
pub(crate) fn sleep(fds: &[BorrowedFd<'_>; 2], timeout: Option<Duration>, counters: &Counters) {
    let timeout = timeout.map_or(PollTimeout::NONE, |t| {
        // A remainder below a millisecond must not become a busy loop.
        let millis = t.as_micros().div_ceil(1000);
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
    });
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    counters.sleeps.add(1);
    counters.syscalls.add(1);
    let _ = poll(&mut fds, timeout);
}

/// When waiting ends. Time runs from when one first asks how much is left: the clock is not read before.
#[derive(Debug)]
pub(crate) struct Deadline {
    timeout: Option<Duration>,
    at: Option<Instant>,
}

impl Deadline {
    /// `timeout` after the first question, or never.
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        Self { timeout, at: None }
    }

    /// The time left: `Some(None)` without a limit, `None` when it is over.
    pub(crate) fn left(&mut self) -> Option<Option<Duration>> {
        let Some(timeout) = self.timeout else { return Some(None) };
        let now = Instant::now();
        let left = match self.at {
            Some(at) => at.checked_duration_since(now)?,
            None => {
                self.at = now.checked_add(timeout);
                timeout
            }
        };
        (!left.is_zero()).then_some(Some(left))
    }
}
