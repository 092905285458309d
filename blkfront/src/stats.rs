//! Counters with one writer each.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A counter that one thread writes and any may read: no locked instruction.
#[derive(Default, Debug)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of a ring or a vCPU, on cache lines of their own.
        #[derive(Default, Debug)]
        #[repr(align(128))]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        /// What a ring or a vCPU has done since the disk was opened.
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.get(),)* }
            }
        }

        impl std::ops::AddAssign for Stats {
            fn add_assign(&mut self, other: Self) {
                $(self.$name = self.$name.wrapping_add(other.$name);)*
            }
        }

        impl std::ops::Sub for Stats {
            type Output = Self;
            fn sub(self, earlier: Self) -> Self {
                Self { $($name: self.$name.wrapping_sub(earlier.$name),)* }
            }
        }
    };
}

counters! {
    /// I/Os submitted.
    ios,
    /// Requests that were put on the ring.
    requests,
    /// Responses taken.
    responses,
    /// I/Os that joined another's request.
    merges,
    /// Requests an I/O needed beyond its first, because it was longer than a request may be.
    splits,
    /// Requests that found the ring (or the staging queue to its owner) full and waited for a slot.
    requeues,
    /// Requests that a backend left unanswered; they are issued again if it comes back.
    lost,
    /// Events sent to the backend.
    kicks_sent,
    /// Batches published without an event, because the backend was awake.
    kicks_avoided,
    /// Events received.
    events,
    /// Times the thread slept.
    sleeps,
    /// Turns of a spin loop.
    spins,
    /// System calls made, for events and sleeping.
    syscalls,
    /// Wake-ups sent between a vCPU and the thread that owns its ring.
    wakeups,
    /// Lock acquisitions on the I/O path that had to wait. A lock is taken there only around a change of
    /// backend.
    contended,
}
