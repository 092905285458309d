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

/// A value on a cache line (pair, since CPUs fetch two) of its own.
#[repr(align(128))]
#[derive(Debug)]
pub(crate) struct Aligned<T>(pub(crate) T);

/// What the two halves of one side know of each other: how far each has come.
///
/// Each index has one writer and one reader, so there is nothing to contend for. This is all that
/// stands where a lock around the whole ring used to be.
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
