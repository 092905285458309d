//! How a ring sleeps, and what wakes it. Alone on its thread, it sleeps in the storage queue's wait,
//! which is one system call; among others, in the thread's epoll.

use super::setup::Exit;
use super::thread::unmap;
use super::worker::Worker;
use crate::storage::Woken;
use ring_proto::RingError;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use xen_platform::{STORM_EVENTS, STORM_PAUSE};

/// A ring that has been idle for this long gives up its persistent grants (`xen_blkif_pgrant_timeout`
/// of Linux's backend).
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A ring's sleeping state.
pub(super) struct Sleep {
    /// Consecutive events after which no request was taken, as there was none or it had to wait.
    in_vain: u32,
    /// Until when to take no event, after too many in vain.
    rest: Option<Instant>,
    /// An event may have been taken: the next comes only once the channel is unmasked.
    masked: bool,
    /// There were requests since the last sleep among others...
    used: bool,
    /// ...and none since then.
    idle_since: Instant,
    /// The idle time-out has been handled.
    quiet: bool,
    /// System calls for sleeping that were not made by its queue.
    pub(super) calls: u64,
}

impl Default for Sleep {
    fn default() -> Self {
        Self {
            in_vain: 0,
            rest: None,
            masked: true,
            used: false,
            idle_since: Instant::now(),
            quiet: false,
            calls: 0,
        }
    }
}

impl Sleep {
    /// Notes that there were requests.
    pub(super) fn used(&mut self) {
        self.in_vain = 0;
        self.used = true;
        self.quiet = false;
    }
}

impl Worker {
    /// Asks for an event, and returns whether there are requests after all.
    pub(super) fn final_check(&mut self) -> Result<bool, RingError> {
        if self.draining || self.barrier || self.inflight.waiting() > 0 {
            // No request will be taken, at least until the device completes something: ask for no event.
            return Ok(false);
        }
        self.requests.final_check()
    }

    /// Sleeps as the thread's only ring. Returns what woke it; [`Woken::Descriptor`] was no event of its own.
    pub(super) fn sleep(&mut self) -> Result<Woken, Exit> {
        if let Some(rest) = self.sleep.rest.take() {
            std::thread::sleep(rest.saturating_duration_since(Instant::now()));
        }
        self.unmask()?;
        let timeout = (!self.sleep.quiet && self.in_flight == 0).then_some(IDLE_TIMEOUT);
        self.stats.sleeps.add(1);
        let woken = self.queue.wait(timeout)?;
        if timeout.is_some() && woken == Woken::Time {
            self.give_up();
        }
        self.woke(woken)
    }

    /// Starts or stops sharing its thread. While shared, the descriptor that its disk signals (returned
    /// here) and its event channel tell when there may be something to do.
    pub(super) fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        // The queue may have taken an event.
        self.sleep.masked = true;
        self.queue.share(shared)
    }

    /// Prepares for a sleep among others: whether events shall wake it.
    pub(super) fn arm(&mut self, now: Instant) -> Result<bool, Exit> {
        if self.sleep.rest.is_some_and(|rest| rest > now) {
            return Ok(false);
        }
        self.sleep.rest = None;
        self.unmask()?;
        Ok(true)
    }

    /// The thread was woken for this ring, by its event channel or by its disk. Returns by which.
    pub(super) fn rouse(&mut self, at_channel: bool) -> Result<Woken, Exit> {
        self.stats.sleeps.add(1);
        self.sleep.calls += 1;
        self.woke(if at_channel { Woken::Descriptor } else { Woken::Device })
    }

    /// When to look at it again even if nothing wakes it. Handles the idle time-out first.
    pub(super) fn due(&mut self, now: Instant) -> Option<Instant> {
        if std::mem::take(&mut self.sleep.used) {
            self.sleep.idle_since = now;
        }
        let waits = !self.sleep.quiet && self.in_flight == 0;
        let mut idle = waits.then(|| self.sleep.idle_since + IDLE_TIMEOUT);
        if idle.take_if(|idle| *idle <= now).is_some() {
            self.give_up();
        }
        idle.into_iter().chain(self.sleep.rest).chain(self.queue.due()).min()
    }

    fn give_up(&mut self) {
        unmap(self.data.purge(), self.alive.clone());
        self.sleep.quiet = true;
    }

    /// Lets the next event through.
    fn unmask(&mut self) -> Result<(), Exit> {
        if std::mem::take(&mut self.sleep.masked) {
            self.sleep.calls += u64::from(self.channel.unmask()?);
        }
        Ok(())
    }

    fn woke(&mut self, mut woken: Woken) -> Result<Woken, Exit> {
        if woken == Woken::Descriptor {
            self.sleep.calls += 1;
            // Even if there is no event: the unmask that the queue was to do may have failed.
            self.sleep.masked = true;
            if self.channel.take()? {
                woken = Woken::Event;
            }
        }
        if woken == Woken::Event {
            self.stats.events.add(1);
            self.sleep.quiet = false;
            self.sleep.in_vain = self.sleep.in_vain.saturating_add(1);
            if self.sleep.in_vain >= STORM_EVENTS {
                self.sleep.rest = Some(Instant::now() + STORM_PAUSE);
            }
            if self.draining || self.requests.poll()? == 0 {
                self.stats.spurious_events.add(1);
            } else {
                self.woken = self.clock.sample_next();
            }
        } else {
            // We will poll for the next requests, at least for a while.
            self.requests.withdraw();
        }
        Ok(woken)
    }
}
