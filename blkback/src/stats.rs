//! Counters of a ring, written by its thread alone and read by anyone.

use ring_proto::Reason;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number with one writer: adding is a load and a store, not a locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the ring's own thread may.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Overwrites the value. Only the ring's own thread may.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counts of values by power of two: bucket `b` holds values whose highest bit is bit `b - 1`.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; Self::BUCKETS],
    sum: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()), sum: Counter::default() }
    }
}

impl Histogram {
    /// Values from 2^39 on (9 minutes, where nanoseconds are counted) share the last bucket.
    pub const BUCKETS: usize = 40;

    /// Counts `value` `times` times.
    pub fn record(&self, value: u64, times: u64) {
        let bucket = (u64::BITS - value.leading_zeros()) as usize;
        self.buckets[bucket.min(Self::BUCKETS - 1)].add(times);
        self.sum.add(value.saturating_mul(times));
    }

    /// How many values were at most `2^bucket - 1`, not counting smaller buckets.
    pub fn buckets(&self) -> impl Iterator<Item = u64> + '_ {
        self.buckets.iter().map(Counter::get)
    }

    /// Sum of all values.
    pub fn sum(&self) -> u64 {
        self.sum.get()
    }
}

/// What one ring has done. The first seven are named as Linux's backend names them in sysfs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct RingStats {
    /// Requests that had to wait because no buffer was free.
    pub oo_req: Counter,
    /// Reads.
    pub rd_req: Counter,
    /// Writes, barriers with data and flushes with data included.
    pub wr_req: Counter,
    /// Flushes and barriers.
    pub f_req: Counter,
    /// Discards.
    pub ds_req: Counter,
    /// 512-byte sectors read.
    pub rd_sect: Counter,
    /// 512-byte sectors written.
    pub wr_sect: Counter,
    /// Requests among the above that were indirect.
    pub indirect_req: Counter,
    /// Requests answered with an error because the device failed.
    pub device_errors: Counter,
    /// Requests answered with an error because a grant was refused.
    pub grant_errors: Counter,
    /// Requests refused, by [`Reason::kind`].
    pub refused: [Counter; Reason::KINDS],
    /// Events received.
    pub events: Counter,
    /// Events received that brought no request.
    pub spurious_events: Counter,
    /// Events sent.
    pub kicks: Counter,
    /// Batches of responses for which the frontend wanted no event.
    pub kicks_saved: Counter,
    /// Times the thread went to sleep.
    pub sleeps: Counter,
    /// System calls for the disk, for sleeping and for events received. On top is one for each event sent.
    pub system_calls: Counter,
    /// Pages moved by grant copy.
    pub grant_copies: Counter,
    /// Pages mapped.
    pub grant_maps: Counter,
    /// Segments whose page was mapped already.
    pub persistent_hits: Counter,
    /// Persistent grants given up to make room, or unused for long.
    pub persistent_evictions: Counter,
    /// Persistent grants held now.
    pub persistent_held: Counter,
    /// Requests taken from the ring at a time.
    pub batch: Histogram,
    // Of one round in [`TIMED_ROUNDS`](crate::ring::TIMED_ROUNDS):
    /// Nanoseconds from an event to when its requests were taken.
    pub ring_wait: Histogram,
    /// Nanoseconds from when a request was taken to when the device had done it.
    pub device: Histogram,
    /// Nanoseconds from when the device was done to when the frontend could see the response.
    pub completion: Histogram,
}
