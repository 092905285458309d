//! A disk that fails.

use super::{Completion, Geometry, Op, OpKind, Queue, QueueSetup, Storage, Woken};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use xenstore_glue::disk::Faulty as Kind;

/// Fails some of another disk's operations with EIO, without starting them. The choice is pseudo-random and
/// the same every time.
pub(super) struct Faulty {
    share: Share,
    inner: Arc<dyn Storage>,
    /// Queues opened so far: each draws a sequence of its own.
    queues: AtomicU64,
}

/// Which operations fail.
#[derive(Clone, Copy)]
struct Share {
    /// `None` for any.
    kind: Option<Kind>,
    parts_per_million: u32,
}

impl Faulty {
    pub(super) fn new(kind: Option<Kind>, parts_per_million: u32, inner: Arc<dyn Storage>) -> Self {
        let share = Share { kind, parts_per_million };
        Self { share, inner, queues: AtomicU64::new(0) }
    }
}

impl Storage for Faulty {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.inner.refresh()
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(FaultyQueue {
            share: self.share,
            inner: self.inner.open_queue(setup)?,
            seed: self.queues.fetch_add(1, Ordering::Relaxed) << 32,
            seen: 0,
        }))
    }
}

struct FaultyQueue {
    share: Share,
    inner: Box<dyn Queue>,
    seed: u64,
    /// Operations of the chosen kind.
    seen: u64,
}

impl FaultyQueue {
    fn fails(&mut self, kind: OpKind) -> bool {
        let kind = match kind {
            OpKind::Read => Kind::Read,
            OpKind::Write => Kind::Write,
            OpKind::Flush => Kind::Flush,
            OpKind::Discard { .. } => Kind::Discard,
        };
        if self.share.kind.is_some_and(|chosen| chosen != kind) {
            return false;
        }
        self.seen += 1;
        let draw = mix(self.seed.wrapping_add(self.seen)) % 1_000_000;
        draw < self.share.parts_per_million.into()
    }
}

/// The output function of SplitMix64: as good as random, and the same every time.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Queue for FaultyQueue {
    fn submit(&mut self, op: Op<'_>, done: &mut Vec<Completion>) {
        if self.fails(op.kind) {
            done.push(Completion { tag: op.tag, result: Err(libc::EIO) });
        } else {
            self.inner.submit(op, done);
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.inner.reap(done);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        self.inner.poll(done)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken> {
        self.inner.wait(timeout)
    }

    fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        self.inner.share(shared)
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn due(&mut self) -> Option<Instant> {
        self.inner.due()
    }

    fn is_left_to_threads(&self) -> bool {
        self.inner.is_left_to_threads()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn system_calls(&self) -> u64 {
        self.inner.system_calls()
    }
}
