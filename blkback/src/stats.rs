//! Counters of a ring, written only by its thread and read by anyone.

use ring_proto::Reason;
use serde::{Deserialize, Serialize};
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

/// Defines [`RingStats`], and [`Counts`] with its monotonic counters, so that each counter is named once
/// for the ring, JSON, Prometheus and the table.
macro_rules! counters {
    ($($name:ident: $help:literal,)*) => {
        /// What one ring has done. The first seven are named as Linux's backend names them in sysfs.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct RingStats {
            $(#[doc = $help] pub $name: Counter,)*
            /// Requests refused, by [`Reason::kind`].
            pub refused: [Counter; Reason::KINDS],
            /// Persistent grants held now.
            pub persistent_held: Counter,
            /// Requests taken from the ring at a time.
            pub batch: Histogram,
            // Measured in one round out of [`TIMED_ROUNDS`](crate::ring::TIMED_ROUNDS):
            /// Nanoseconds from an event to when its requests were taken.
            pub ring_wait: Histogram,
            /// Nanoseconds from when a request was taken to when the device had done it.
            pub device: Histogram,
            /// Nanoseconds from when the device was done to when the frontend could see the response.
            pub completion: Histogram,
        }

        /// The monotonic counters, named as in [`RingStats`].
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counts {
            $(#[doc = $help] pub $name: u64,)*
        }

        impl Counts {
            /// Names and descriptions, in the order of [`Counts::values`].
            pub(crate) const FIELDS: [(&str, &str); [$($help),*].len()] =
                [$((stringify!($name), $help)),*];

            pub(crate) fn values(&self) -> [u64; Self::FIELDS.len()] {
                [$(self.$name),*]
            }

            pub(crate) fn read(stats: &RingStats) -> Self {
                Self { $($name: stats.$name.get()),* }
            }

            pub(crate) fn with(&self, other: &Self, op: fn(u64, u64) -> u64) -> Self {
                Self { $($name: op(self.$name, other.$name)),* }
            }
        }
    };
}

counters! {
    oo_req: "Requests that waited because no buffer was free.",
    rd_req: "Reads.",
    wr_req: "Writes, flushes and barriers with data included.",
    f_req: "Flushes and barriers.",
    ds_req: "Discards.",
    rd_sect: "512-byte sectors read.",
    wr_sect: "512-byte sectors written.",
    indirect_req: "Reads and writes that were indirect.",
    device_errors: "Requests that failed because the device did.",
    grant_errors: "Requests that failed because a grant was refused.",
    events: "Events received.",
    spurious_events: "Events received that brought no request.",
    kicks: "Events sent.",
    kicks_saved: "Batches of responses for which the frontend wanted no event.",
    sleeps: "Times the ring's thread went to sleep.",
    system_calls: "System calls for the disk, for sleeping and for events received.",
    grant_copies: "Pages moved by grant copy.",
    grant_maps: "Pages mapped.",
    persistent_hits: "Segments whose page was mapped already.",
    persistent_evictions: "Persistent grants given up to make room, or unused for long.",
}
