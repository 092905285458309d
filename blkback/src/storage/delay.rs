//! A disk with added latency.

use super::{Completion, Geometry, Op, Queue, QueueSetup, Storage, Woken};
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Holds back the completions of another disk.
pub(super) struct Delay {
    pub(super) time: Duration,
    pub(super) inner: Arc<dyn Storage>,
}

impl Storage for Delay {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.inner.refresh()
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        let depth = setup.depth;
        Ok(Box::new(DelayQueue {
            time: self.time,
            inner: self.inner.open_queue(setup)?,
            fresh: Vec::with_capacity(depth),
            held: VecDeque::with_capacity(depth),
        }))
    }
}

struct DelayQueue {
    time: Duration,
    inner: Box<dyn Queue>,
    /// Scratch, empty between calls.
    fresh: Vec<Completion>,
    /// Soonest first, as all are held for the same time.
    held: VecDeque<(Instant, Completion)>,
}

impl DelayQueue {
    fn hold(&mut self) {
        if !self.fresh.is_empty() {
            let due = Instant::now() + self.time;
            self.held.extend(self.fresh.drain(..).map(|completion| (due, completion)));
        }
    }

    fn release(&mut self, done: &mut Vec<Completion>) {
        if !self.held.is_empty() {
            let now = Instant::now();
            while self.held.front().is_some_and(|(due, _)| *due <= now) {
                done.extend(self.held.pop_front().map(|(_, completion)| completion));
            }
        }
    }
}

impl Queue for DelayQueue {
    fn submit(&mut self, op: Op<'_>, _done: &mut Vec<Completion>) {
        self.inner.submit(op, &mut self.fresh);
        self.hold();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.inner.reap(&mut self.fresh);
        self.hold();
        self.release(done);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        self.inner.poll(&mut self.fresh)?;
        self.hold();
        self.release(done);
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken> {
        self.inner.wait(sooner(timeout, &self.held))
    }

    fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        self.inner.share(shared)
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn due(&mut self) -> Option<Instant> {
        earliest(&self.held, self.inner.due())
    }

    fn is_left_to_threads(&self) -> bool {
        self.inner.is_left_to_threads()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.inner.in_flight()
    }

    fn system_calls(&self) -> u64 {
        self.inner.system_calls()
    }
}

/// Held items and when they are due, soonest first.
type Held<T> = VecDeque<(Instant, T)>;

/// The timeout, shortened if the first held item is due earlier.
pub(super) fn sooner<T>(timeout: Option<Duration>, held: &Held<T>) -> Option<Duration> {
    let left = |(due, _): &(Instant, T)| due.saturating_duration_since(Instant::now());
    timeout.into_iter().chain(held.front().map(left)).min()
}

/// When the first held item is due, or what is behind it, whichever is earlier.
pub(super) fn earliest<T>(held: &Held<T>, behind: Option<Instant>) -> Option<Instant> {
    held.front().map(|(due, _)| *due).into_iter().chain(behind).min()
}
