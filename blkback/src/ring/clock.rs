//! Timestamps, taken in a share of the rounds.

use std::num::NonZeroU64;
use std::time::Instant;

/// One round in so many is timed. Reading the clock costs as much as half a request, and a system call
/// in a domain whose clock user space cannot read (no vDSO).
pub const TIMED_ROUNDS: u32 = 8;

/// Nanoseconds since the ring started.
pub(super) type Nanos = NonZeroU64;

/// The clock of a ring's thread.
#[derive(Debug)]
pub(super) struct Clock {
    epoch: Instant,
    rounds: u32,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now(), rounds: 0 }
    }

    pub(super) fn now(&self) -> Nanos {
        NonZeroU64::MIN.saturating_add(self.epoch.elapsed().as_nanos() as u64)
    }

    /// The time, if the current round is timed.
    pub(super) fn sample(&self) -> Option<Nanos> {
        self.rounds.is_multiple_of(TIMED_ROUNDS).then(|| self.now())
    }

    /// The time, if the next round is timed.
    pub(super) fn sample_next(&self) -> Option<Nanos> {
        self.rounds.wrapping_add(1).is_multiple_of(TIMED_ROUNDS).then(|| self.now())
    }

    /// Starts the next round.
    pub(super) fn tick(&mut self) {
        self.rounds = self.rounds.wrapping_add(1);
    }

    /// Nanoseconds from `then` until now.
    pub(super) fn since(&self, then: Nanos) -> u64 {
        self.now().get().saturating_sub(then.get())
    }
}
