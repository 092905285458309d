//! A disk of limited throughput.

use super::delay::{earliest, sooner};
use super::{Completion, Geometry, IoVecs, Op, OpKind, Queue, QueueSetup, Storage, Woken};
use std::collections::VecDeque;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How much unused time is made up for: enough for a ring that wakes up late to reach the limit, too little
/// for an idle disk's burst to be taken for the rate.
const BURST: Duration = Duration::from_millis(10);

/// What a limit counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Operations of any kind.
    Operations,
    /// Bytes read and written.
    Bytes,
}

/// Holds back operations on their way to another disk.
pub(super) struct Limited {
    bucket: Arc<Bucket>,
    inner: Arc<dyn Storage>,
}

impl Limited {
    /// Admits `rate` units a second, at least one.
    pub(super) fn new(rate: u64, unit: Unit, inner: Arc<dyn Storage>) -> Self {
        let rate = NonZeroU64::new(rate).unwrap_or(NonZeroU64::MIN);
        let bucket = Bucket { epoch: Instant::now(), rate, unit, paid: AtomicU64::new(0) };
        Self { bucket: Arc::new(bucket), inner }
    }

    /// Bytes are counted by the buffers they lie in, so there must be some: even a `null` disk's data is
    /// moved.
    fn counted(&self, geometry: Geometry) -> Geometry {
        let moves_data = geometry.moves_data || self.bucket.unit == Unit::Bytes;
        Geometry { moves_data, ..geometry }
    }
}

/// A token bucket, stored as the time at which all that was admitted is paid for (the generic cell rate
/// algorithm): one word, which rings share without a lock.
struct Bucket {
    epoch: Instant,
    /// Units a second.
    rate: NonZeroU64,
    unit: Unit,
    /// Nanoseconds since the epoch.
    paid: AtomicU64,
}

impl Bucket {
    /// When `op` may start. This reserves its share: later callers start later.
    fn admit(&self, op: &Op<'_>, now: Instant) -> Instant {
        const SECOND: u128 = 1_000_000_000;
        let amount = match self.unit {
            Unit::Operations => 1,
            Unit::Bytes => op.transfer(),
        };
        let cost = u128::from(amount) * SECOND / u128::from(self.rate.get());
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let earliest = now.duration_since(self.epoch).saturating_sub(BURST).as_nanos();
        let start = |paid: u64| paid.max(u64::try_from(earliest).unwrap_or(u64::MAX));
        let update = |paid| Some(start(paid).saturating_add(cost));
        let (Ok(paid) | Err(paid)) =
            self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
        self.epoch + Duration::from_nanos(start(paid))
    }
}

impl Storage for Limited {
    fn geometry(&self) -> Geometry {
        self.counted(self.inner.geometry())
    }

    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.counted(self.inner.refresh()?))
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        let held = VecDeque::with_capacity(setup.depth);
        let buffers = vec![IoVecs::new(); setup.depth];
        let inner = self.inner.open_queue(setup)?;
        let (bucket, hurried) = (self.bucket.clone(), false);
        Ok(Box::new(LimitedQueue { bucket, inner, held, buffers, hurried }))
    }
}

struct LimitedQueue {
    bucket: Arc<Bucket>,
    inner: Box<dyn Queue>,
    /// Operations and when they may start, soonest first as the bucket's time does not go back.
    held: VecDeque<(Instant, Held)>,
    /// Their memory, by tag.
    buffers: Vec<IoVecs>,
    /// Nothing is held back any more.
    hurried: bool,
}

/// An operation without its memory.
struct Held {
    tag: u16,
    kind: OpKind,
    offset: u64,
}

impl LimitedQueue {
    fn release(&mut self, now: Instant, done: &mut Vec<Completion>) {
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            if let Some((_, Held { tag, kind, offset })) = self.held.pop_front() {
                let buffers = &self.buffers[usize::from(tag)];
                self.inner.submit(Op { tag, kind, offset, buffers }, done);
            }
        }
    }
}

impl Queue for LimitedQueue {
    fn submit(&mut self, op: Op<'_>, done: &mut Vec<Completion>) {
        let now = Instant::now();
        let admitted = self.bucket.admit(&op, now);
        let due = if self.hurried { now } else { admitted };
        let Op { tag, kind, offset, buffers } = op;
        let kept = &mut self.buffers[usize::from(tag)];
        kept.clear();
        kept.extend_from_slice(buffers);
        self.held.push_back((due, Held { tag, kind, offset }));
        self.release(now, done);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if !self.held.is_empty() {
            self.release(Instant::now(), done);
        }
        self.inner.reap(done);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        if !self.held.is_empty() {
            self.release(Instant::now(), done);
        }
        self.inner.poll(done)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken> {
        self.inner.wait(sooner(timeout, &self.held))
    }

    fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        self.inner.share(shared)
    }

    /// What it lets through is paid for all the same: the disk's next operations wait the longer. So a guest
    /// gains nothing by closing its disk, and cannot make others wait until the limit allows it.
    fn hurry(&mut self) {
        self.hurried = true;
        let now = Instant::now();
        self.held.iter_mut().for_each(|(due, _)| *due = now);
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
