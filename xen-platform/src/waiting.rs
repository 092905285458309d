//! How long to look at a ring before sleeping at its event channel.

use std::time::{Duration, Instant};

/// The longest that [`Waiting::default`] spins: some five times what a sleep and its wake-up cost.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(50);

/// Looks at the clock only once in this many rounds: a round takes tens of nanoseconds, as does a look.
const ROUNDS_PER_LOOK: u32 = 32;
/// One who never sleeps looks only for the sake of others: in a domain whose clock user space cannot
/// read, looking is a system call.
const POLLS_PER_LOOK: u32 = 1024;
/// While spinning does not pay, one sleep in this many is timed, to see whether it would.
const SLEEPS_PER_LOOK: u32 = 8;
/// What spinning starts with once it seems to pay.
const FIRST_BUDGET: Duration = Duration::from_micros(5);
/// Nothing between two looks takes so long, unless something else had the CPU.
const PREEMPTED: Duration = Duration::from_micros(500);
/// Somebody else ran if giving up the CPU took longer than this; nobody, if less.
const OTHERS_RAN: Duration = Duration::from_micros(3);
/// So many times in a row nobody wanted the CPU, before it is ours alone again.
const PATIENCE: u32 = 32;

/// What a thread does while its ring has nothing for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waiting {
    /// Spin until there is something. Takes a CPU of its own.
    Poll,
    /// Sleep at once.
    Event,
    /// Spin for a while, at most this long and less where it does not pay, then sleep.
    Adaptive(Duration),
}

impl Default for Waiting {
    fn default() -> Self {
        Self::Adaptive(DEFAULT_SPIN)
    }
}

/// Decides between spinning and sleeping. One thread's.
///
/// The budget for spinning grows and shrinks as that of KVM's halt polling: what matters is whether
/// the wait, spinning and sleeping together, was short enough for spinning alone.
///
/// A thread that is preempted while it spins gives its CPU up between two looks, for as long as
/// there is somebody who takes it: of several that spin on one CPU, whoever has work would wait for
/// the others' time slices, milliseconds each.
#[derive(Debug)]
pub struct Spin {
    waiting: Waiting,
    budget: Duration,
    /// When this spin began, moved on by what others have used of it.
    since: Option<Instant>,
    /// The last look at the clock in this spin.
    looked: Option<Instant>,
    rounds: u32,
    sleeps: u32,
    /// Times that the CPU will be given up without anybody taking it; 0 while it is ours.
    patience: u32,
    yields: u64,
}

impl Spin {
    /// Starts with the whole budget.
    pub fn new(waiting: Waiting) -> Self {
        let budget = match waiting {
            Waiting::Adaptive(most) => most,
            Waiting::Event | Waiting::Poll => Duration::ZERO,
        };
        let (since, looked) = (None, None);
        Self { waiting, budget, since, looked, rounds: 0, sleeps: 0, patience: 0, yields: 0 }
    }

    /// Whether it sleeps at once when there is nothing to do.
    pub fn is_off(&self) -> bool {
        self.waiting != Waiting::Poll && self.budget.is_zero()
    }

    /// Times that the CPU was given up, each by a system call.
    pub fn yields(&self) -> u64 {
        self.yields
    }

    /// There was nothing to do: whether to look again rather than sleep. Pauses before it says so.
    pub fn again(&mut self) -> bool {
        if self.is_off() {
            if let Waiting::Adaptive(_) = self.waiting {
                self.sleeps = self.sleeps.wrapping_add(1);
                self.since = self.sleeps.is_multiple_of(SLEEPS_PER_LOOK).then(Instant::now);
            }
            return false;
        }
        let alone = self.waiting == Waiting::Poll && self.patience == 0;
        let rounds = if alone { POLLS_PER_LOOK } else { ROUNDS_PER_LOOK };
        self.rounds = self.rounds.wrapping_add(1);
        if self.rounds.is_multiple_of(rounds) && !self.look() {
            return false;
        }
        std::hint::spin_loop();
        true
    }

    /// Looks at the clock: whether the budget allows another round.
    fn look(&mut self) -> bool {
        let now = Instant::now();
        let gap = now - self.looked.unwrap_or(now);
        let mut since = self.since.unwrap_or(now);
        if gap >= PREEMPTED {
            self.patience = PATIENCE;
            since += gap;
        }
        let mut looked = now;
        let spent = matches!(self.waiting, Waiting::Adaptive(_)) && now - since >= self.budget;
        if !spent && self.patience > 0 {
            std::thread::yield_now();
            self.yields += 1;
            looked = Instant::now();
            let away = looked - now;
            self.patience = if away >= OTHERS_RAN { PATIENCE } else { self.patience - 1 };
            since += away;
        }
        (self.since, self.looked) = (Some(since), Some(looked));
        !spent
    }

    /// There was something to do, found while spinning.
    pub fn found(&mut self) {
        (self.since, self.looked) = (None, None);
        self.rounds = 0;
    }

    /// There was something to do, after a sleep.
    pub fn woken(&mut self) {
        if let (Waiting::Adaptive(most), Some(since)) = (self.waiting, self.since) {
            if since.elapsed() > most {
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
