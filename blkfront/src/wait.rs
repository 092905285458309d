//! Waiting: a spin that pays, then sleep.

use crate::Waiting;
use crate::stats::Counters;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Turns of the spin loop between two looks at the clock, which costs as much as several turns.
const TURNS_PER_LOOK: u32 = 32;
/// A spin that never pays is still tried for this fraction of its maximum, or it would never be found
/// to pay again.
const MIN_FRACTION: u32 = 16;

/// Decides between spinning and sleeping.
#[derive(Debug)]
pub(crate) struct Spinner {
    waiting: Waiting,
    budget: Duration,
    turns: u32,
    since: Option<Instant>,
}

impl Spinner {
    pub(crate) fn new(waiting: Waiting) -> Self {
        let budget = match waiting {
            Waiting::Adaptive(most) => most,
            Waiting::Poll => Duration::MAX,
            Waiting::Event => Duration::ZERO,
        };
        Self { waiting, budget, turns: 0, since: None }
    }

    /// Whether it never sleeps.
    pub(crate) fn is_endless(&self) -> bool {
        self.waiting == Waiting::Poll
    }

    /// Whether enough turns have passed since the clock was looked at.
    pub(crate) fn is_time_to_look(&self) -> bool {
        self.turns.is_multiple_of(TURNS_PER_LOOK)
    }

    /// There was nothing: spins a turn, and says whether to look again (or else sleep).
    pub(crate) fn spin(&mut self, counters: &Counters) -> bool {
        if self.waiting == Waiting::Event {
            return false;
        }
        counters.spins.add(1);
        std::hint::spin_loop();
        self.turns = self.turns.wrapping_add(1);
        if self.waiting == Waiting::Poll || !self.is_time_to_look() {
            return true;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.budget {
            return true;
        }
        if let Waiting::Adaptive(most) = self.waiting {
            self.budget = (self.budget / 2).max(most / MIN_FRACTION);
        }
        self.reset();
        false
    }

    /// There was something after all.
    pub(crate) fn paid(&mut self) {
        if let (Waiting::Adaptive(most), Some(_)) = (self.waiting, self.since) {
            self.budget = self.budget.saturating_mul(2).min(most);
        }
        self.reset();
    }

    fn reset(&mut self) {
        self.turns = 0;
        self.since = None;
    }
}

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
