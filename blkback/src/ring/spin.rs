//! How long to look at the ring before sleeping.

use std::time::{Duration, Instant};

/// Looks at the clock only once in this many rounds: a round takes tens of nanoseconds, as does a look.
const ROUNDS_PER_LOOK: u32 = 32;
/// While spinning does not pay, one sleep in this many is timed, to see whether it would: in a domain
/// whose clock user space cannot read, looking is a system call.
const SLEEPS_PER_LOOK: u32 = 8;
/// What spinning starts with once it seems to pay.
const FIRST_BUDGET: Duration = Duration::from_micros(5);

/// How a ring's thread waits for requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Sleep at once.
    Event,
    /// Look for up to so long first, as long as that pays.
    Adaptive(Duration),
    /// Never sleep.
    Poll,
}

/// The budget for spinning, grown and shrunk as KVM does with halt polling: what matters is whether
/// the wait, spinning and sleeping together, was short enough for spinning alone.
#[derive(Debug)]
pub(super) struct Spin {
    wait: Wait,
    budget: Duration,
    since: Option<Instant>,
    rounds: u32,
    sleeps: u32,
}

impl Spin {
    pub(super) fn new(wait: Wait) -> Self {
        let budget = match wait {
            Wait::Adaptive(most) => most,
            Wait::Event | Wait::Poll => Duration::ZERO,
        };
        Self { wait, budget, since: None, rounds: 0, sleeps: 0 }
    }

    /// Whether it sleeps at once when there is nothing to do.
    pub(super) fn is_off(&self) -> bool {
        self.wait != Wait::Poll && self.budget.is_zero()
    }

    /// There was nothing to do: whether to look again rather than sleep.
    pub(super) fn again(&mut self) -> bool {
        match self.wait {
            Wait::Poll => true,
            Wait::Event => false,
            Wait::Adaptive(_) if self.budget.is_zero() => {
                self.sleeps = self.sleeps.wrapping_add(1);
                self.since = self.sleeps.is_multiple_of(SLEEPS_PER_LOOK).then(Instant::now);
                false
            }
            Wait::Adaptive(_) => {
                if self.rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                    let now = Instant::now();
                    let since = *self.since.get_or_insert(now);
                    if now - since >= self.budget {
                        return false;
                    }
                }
                self.rounds = self.rounds.wrapping_add(1);
                true
            }
        }
    }

    /// There was something to do, found while spinning.
    pub(super) fn found(&mut self) {
        self.since = None;
        self.rounds = 0;
    }

    /// There was something to do, after a sleep.
    pub(super) fn woken(&mut self) {
        if let (Wait::Adaptive(most), Some(since)) = (self.wait, self.since) {
            let waited = since.elapsed();
            if waited > most {
                // Halving, not zero: one long pause says little about the next.
                self.budget /= 2;
                if self.budget < FIRST_BUDGET / 4 {
                    self.budget = Duration::ZERO;
                }
            } else {
                self.budget = (self.budget * 2).max(FIRST_BUDGET).min(most);
            }
        }
        self.found();
    }
}
