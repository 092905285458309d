//! Memory that a peer may write at any moment.

use alloc::sync::Arc;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU32;

/// Pages shared with a peer that is not trusted.
///
/// # Safety
/// `base()` must be page-aligned, and `len()` bytes from there valid for reads and writes for as long
/// as the value lives. In pages mapped read-only, a write may fault instead and end the process; it
/// never changes anything else. Nobody in this process may hold a Rust reference to any of those
/// bytes, except through atomics.
pub unsafe trait SharedMemory: Send + Sync {
    /// The first byte.
    fn base(&self) -> NonNull<u8>;
    /// Length in bytes, a multiple of [`crate::abi::PAGE_SIZE`].
    fn len(&self) -> usize;
    /// Whether there are no pages at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A range of [`SharedMemory`], checked once against its bounds.
#[derive(Clone)]
pub struct Window {
    memory: Arc<dyn SharedMemory>,
    offset: usize,
    len: usize,
}

impl Window {
    /// Bytes `offset..offset + len`, or `None` if they are not all within the memory.
    pub fn new(memory: Arc<dyn SharedMemory>, offset: usize, len: usize) -> Option<Self> {
        (offset.checked_add(len)? <= memory.len()).then_some(Self { memory, offset, len })
    }

    /// Copies out of the shared memory once. The source may change during the copy; the result does not.
    ///
    /// # Panics
    /// If `to` is not as long as the window.
    pub fn read(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len, "a window is read whole");
        // SAFETY: `new` checked the range, `memory` is alive, and `to` is ours alone.
        unsafe { copy_volatile(self.as_ptr(), to.as_mut_ptr(), self.len) }
    }

    /// Copies into the shared memory.
    ///
    /// # Panics
    /// If `from` is not as long as the window.
    pub fn write(&self, from: &[u8]) {
        assert_eq!(from.len(), self.len, "a window is written whole");
        // SAFETY: as in `read`, the other way round.
        unsafe { copy_volatile(from.as_ptr(), self.as_ptr(), self.len) }
    }

    /// Where the window starts in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.base().as_ptr().wrapping_add(self.offset)
    }
}

/// [`SharedMemory`] as 32-bit words.
#[derive(Clone)]
pub struct Words {
    base: NonNull<AtomicU32>,
    len: usize,
    _memory: Arc<dyn SharedMemory>,
}

// SAFETY: the memory outlives the pointer and is touched only through atomics, from any thread.
unsafe impl Send for Words {}
// SAFETY: as for Send.
unsafe impl Sync for Words {}

impl Words {
    /// All words of the memory.
    pub fn new(memory: Arc<dyn SharedMemory>) -> Self {
        let len = memory.len() / size_of::<AtomicU32>();
        Self { base: memory.base().cast(), len, _memory: memory }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} words at {:p}", self.len, self.base)
    }
}

impl Deref for Words {
    type Target = [AtomicU32];

    fn deref(&self) -> &[AtomicU32] {
        // SAFETY: the contract of `SharedMemory`: aligned, valid for `len` words as long as `_memory`
        // is alive, and reached through atomics alone.
        unsafe { core::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

/// Copies `len` bytes while a peer may be changing either side.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, and they must not overlap.
/// Either may be written by another process at the same time.
pub unsafe fn copy_volatile(from: *const u8, to: *mut u8, len: usize) {
    // A plain memcpy may be split, widened or, in principle, read twice. What must not happen is that
    // the compiler assumes the source still equals the copy. Passing both pointers through an opaque
    // barrier prevents that and keeps the CPU's fast copy.
    let from = core::hint::black_box(from);
    let to = core::hint::black_box(to);
    // SAFETY: the caller's obligations.
    unsafe { core::ptr::copy_nonoverlapping(from, to, len) };
}
