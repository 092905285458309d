//! How long to look at a ring before sleeping at its event channel.

use std::time::{Duration, Instant};

/// The longest spin of [`Waiting::default`]: some five times what a sleep and its wake-up cost, and twice
/// that cost in a virtual machine. Longer spins take CPUs from kernel threads that disks wait for, such as
/// a loop device's.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(50);

/// Rounds between two looks at the clock, or two yields: a round takes tens of nanoseconds, and so does a
/// look, unless user space cannot read the domain's clock and makes a system call.
const ROUNDS_PER_LOOK: u32 = 32;
/// While spinning does not pay, one wait in this many is spun through, to see whether it would. (The length
/// of a sleep says less: a wait of 45 µs takes 70 with the wake-up.)
const SLEEPS_PER_TRIAL: u32 = 32;
/// A budget below this counts as none.
const LEAST_BUDGET: Duration = Duration::from_micros(1);

/// This many events in a row that brought nothing are a storm (XSA-332, XSA-391)...
pub const STORM_EVENTS: u32 = 16;
/// ...and from then on events are taken no faster than this, until one brings something.
pub const STORM_PAUSE: Duration = Duration::from_millis(1);

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

/// Decides between spinning and sleeping, for one thread.
///
/// The budget for spinning grows and shrinks as that of KVM's halt polling: what matters is whether
/// the wait, spinning and sleeping together, was short enough for spinning alone.
#[derive(Debug)]
pub struct Spin {
    waiting: Waiting,
    budget: Duration,
    /// When this spin began.
    since: Option<Instant>,
    rounds: u32,
    sleeps: u32,
}

impl Spin {
    /// Starts with the whole budget.
    pub fn new(waiting: Waiting) -> Self {
        let budget = match waiting {
            Waiting::Adaptive(most) => most,
            Waiting::Event | Waiting::Poll => Duration::ZERO,
        };
        Self { waiting, budget, since: None, rounds: 0, sleeps: 0 }
    }

    /// Whether it sleeps at once when there is nothing to do.
    pub fn is_off(&self) -> bool {
        self.may_sleep() && self.budget.is_zero()
    }

    /// Whether it ever sleeps.
    pub fn may_sleep(&self) -> bool {
        self.waiting != Waiting::Poll
    }

    /// To be called when there was nothing to do: pauses, and returns whether to look again rather than
    /// sleep.
    ///
    /// The work waited for may be `left_to_others`, which may have no other CPU. A thread that polls then
    /// yields from time to time. One that sleeps does not: a sleeper is woken at once, while one that
    /// yielded waits until the scheduler takes the CPU from the other.
    pub fn again(&mut self, left_to_others: impl FnOnce() -> bool) -> bool {
        if self.is_off() {
            let Waiting::Adaptive(most) = self.waiting else { return false };
            self.sleeps = self.sleeps.wrapping_add(1);
            if !self.sleeps.is_multiple_of(SLEEPS_PER_TRIAL) {
                return false;
            }
            self.budget = most;
        }
        self.rounds = self.rounds.wrapping_add(1);
        if self.rounds.is_multiple_of(ROUNDS_PER_LOOK) {
            if self.may_sleep() {
                let now = Instant::now();
                let since = *self.since.get_or_insert(now);
                if now - since >= self.budget {
                    return false;
                }
            } else if left_to_others() {
                std::thread::yield_now();
                return true;
            }
        }
        std::hint::spin_loop();
        true
    }

    /// There was something to do, found while spinning.
    pub fn found(&mut self) {
        self.since = None;
        self.rounds = 0;
    }

    /// There was something to do, after a sleep.
    pub fn woken(&mut self) {
        if let (Waiting::Adaptive(most), Some(since)) = (self.waiting, self.since) {
            if since.elapsed() > most {
                // Halved, not dropped: one long wait says little about the next.
                self.budget /= 2;
                if self.budget < LEAST_BUDGET {
                    self.budget = Duration::ZERO;
                }
            } else {
                self.budget = (self.budget * 2).min(most);
            }
        }
        self.found();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(200);

    /// Waits for what comes after `wait`, spinning and then sleeping.
    fn wait_for(spin: &mut Spin, wait: Duration) {
        let begin = Instant::now();
        while spin.again(|| false) {
            if begin.elapsed() >= wait {
                return spin.found();
            }
        }
        std::thread::sleep(wait.saturating_sub(begin.elapsed()));
        spin.woken();
    }

    #[test]
    fn spinning_ends_while_it_does_not_pay_and_comes_back_when_it_does() {
        let mut spin = Spin::new(Waiting::Adaptive(MOST));
        assert!(!spin.is_off() && spin.again(|| false));
        // Far longer than any budget, each time.
        let waits = (0..100).take_while(|_| {
            wait_for(&mut spin, 2 * MOST);
            !spin.is_off()
        });
        assert!(waits.count() < 10, "halved until it is off");
        assert!(!spin.again(|| false), "sleeps at once");
        // Now spinning would pay. Several tries, as the machine may be busy.
        let tries = (0..100 * SLEEPS_PER_TRIAL).take_while(|_| {
            wait_for(&mut spin, MOST / 2);
            spin.is_off()
        });
        assert!(tries.count() < 100 * SLEEPS_PER_TRIAL as usize, "never tried again");
        assert!(spin.again(|| false));
    }

    #[test]
    fn who_polls_never_sleeps_and_who_waits_for_events_never_spins() {
        let (mut poll, mut event) = (Spin::new(Waiting::Poll), Spin::new(Waiting::Event));
        for _ in 0..10 * ROUNDS_PER_LOOK {
            assert!(poll.again(|| false) && !poll.is_off());
            assert!(!event.again(|| false) && event.is_off());
            event.woken();
        }
    }
}
