//! The atomics, or loom's in their place.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

#[cfg(not(loom))]
pub(crate) use {
    alloc::sync::Arc,
    core::sync::atomic::{AtomicU32, Ordering},
};

/// A value on a cache line of its own (a pair of lines, since CPUs fetch two).
#[repr(align(128))]
#[derive(Debug)]
pub(crate) struct Aligned<T>(pub(crate) T);

/// What the two halves of one side know of each other: how far each has got.
///
/// Each index has one writer and one reader, so no lock around the ring is needed.
#[derive(Debug)]
pub(crate) struct Halves {
    /// Requests pushed (frontend) or taken (backend).
    pub(crate) requests: Aligned<AtomicU32>,
    /// Responses taken (frontend) or pushed (backend).
    pub(crate) responses: Aligned<AtomicU32>,
}

impl Halves {
    pub(crate) fn starting_at(index: u32) -> Arc<Self> {
        Arc::new(Self {
            requests: Aligned(AtomicU32::new(index)),
            responses: Aligned(AtomicU32::new(index)),
        })
    }
}
