//! Sleeping.

use crate::stats::Counters;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Sleeps until one of the descriptors is readable. Returning early, or failing, is harmless: the
/// caller looks again either way.
pub(crate) fn sleep(fds: &[BorrowedFd<'_>; 2], timeout: Option<Duration>, counters: &Counters) {
    let timeout = timeout.map_or(PollTimeout::NONE, |t| {
        // A rest below a millisecond must not become a busy loop.
        let millis = t.as_micros().div_ceil(1000);
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
    });
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    counters.sleeps.add(1);
    counters.syscalls.add(1);
    let _ = poll(&mut fds, timeout);
}
