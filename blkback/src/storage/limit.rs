//! A disk that takes only so much a second.

use super::delay::sooner;
use super::{Completion, Geometry, Limits, Op, Queue, QueueCounters, QueueSetup, Storage};
use std::collections::VecDeque;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Unused time that is made up for: a ring that wakes up late still reaches the limit, and what an
/// idle disk saves up is over before anyone takes it for the rate.
const BURST: Duration = Duration::from_millis(10);

/// Holds back operations on their way to another disk.
pub(super) struct Limited {
    buckets: Arc<Buckets>,
    inner: Arc<dyn Storage>,
}

impl Limited {
    pub(super) fn new(limits: Limits, inner: Arc<dyn Storage>) -> Self {
        let buckets = Buckets {
            epoch: Instant::now(),
            operations: limits.operations.map(Bucket::new),
            bytes: limits.bytes.map(Bucket::new),
        };
        Self { buckets: Arc::new(buckets), inner }
    }
}

/// Shared by the queues of a disk.
struct Buckets {
    epoch: Instant,
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Buckets {
    /// Takes an operation of `bytes` into account; the time at which it may start.
    fn admit(&self, bytes: u64, now: Instant) -> Instant {
        let now = u64::try_from((now - self.epoch).as_nanos()).unwrap_or(u64::MAX);
        let admit = |bucket: &Option<Bucket>, amount| {
            bucket.as_ref().map_or(0, |bucket| bucket.admit(amount, now))
        };
        let start = admit(&self.operations, 1).max(admit(&self.bytes, bytes));
        self.epoch + Duration::from_nanos(start)
    }
}

/// A token bucket, kept as the time at which all that was admitted will have been paid for (the
/// generic cell rate algorithm): one word, so that rings share it without a lock.
struct Bucket {
    per_second: NonZeroU64,
    /// Nanoseconds since the epoch.
    paid: AtomicU64,
}

impl Bucket {
    fn new(per_second: NonZeroU64) -> Self {
        Self { per_second, paid: AtomicU64::new(0) }
    }

    /// The time, in nanoseconds since the epoch, from which `amount` may be used. It is reserved:
    /// who asks later starts later.
    fn admit(&self, amount: u64, now: u64) -> u64 {
        const SECOND: u128 = 1_000_000_000;
        let cost = u128::from(amount) * SECOND / u128::from(self.per_second.get());
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let earliest = now.saturating_sub(BURST.as_nanos() as u64);
        let start = |paid: u64| paid.max(earliest);
        let update = |paid| Some(start(paid).saturating_add(cost));
        match self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update) {
            Ok(paid) | Err(paid) => start(paid),
        }
    }
}

impl Storage for Limited {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.inner.refresh()
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        let held = VecDeque::with_capacity(setup.depth);
        let inner = self.inner.open_queue(setup)?;
        Ok(Box::new(LimitedQueue { buckets: self.buckets.clone(), inner, held }))
    }
}

struct LimitedQueue {
    buckets: Arc<Buckets>,
    inner: Box<dyn Queue>,
    /// Operations and when they may start, soonest first as a bucket's time does not go back.
    held: VecDeque<(Instant, Op)>,
}

impl LimitedQueue {
    fn release(&mut self, now: Instant, done: &mut Vec<Completion>) {
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            if let Some((_, op)) = self.held.pop_front() {
                self.inner.submit(op, done);
            }
        }
    }
}

impl Queue for LimitedQueue {
    fn submit(&mut self, op: Op, done: &mut Vec<Completion>) {
        let now = Instant::now();
        let due = self.buckets.admit(op.transfer(), now);
        self.held.push_back((due, op));
        self.release(now, done);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        if !self.held.is_empty() {
            self.release(Instant::now(), done);
        }
        self.inner.poll(done)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.wait(sooner(timeout, self.held.front().map(|(due, _)| *due)))
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.inner.in_flight()
    }

    fn counters(&self) -> QueueCounters {
        self.inner.counters()
    }
}
