//! The memory of an operation: pieces of bounce buffers or of granted pages.

use ring_proto::{SharedMemory, copy_volatile};

/// A piece of memory that an operation reads or writes, laid out as `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an IoVec is an address and a length; the contract of `new` makes the memory usable from any thread.
unsafe impl Send for IoVec {}

/// The pieces of one operation, in order. Reused from operation to operation so that none allocates.
pub type IoVecs = Vec<IoVec>;

impl IoVec {
    /// Describes `len` bytes at `base`.
    ///
    /// # Safety
    /// The memory must stay valid for reads and writes for as long as an operation that holds this
    /// is in flight, and nobody may hold a Rust reference into it.
    pub const unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Address of the first byte.
    pub const fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// What is left after the first `bytes`.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn advanced(self, bytes: usize) -> Self {
        assert!(bytes <= self.len(), "advance within the piece");
        Self(libc::iovec {
            iov_base: self.base().wrapping_add(bytes).cast(),
            iov_len: self.len() - bytes,
        })
    }

    /// Fills the memory from `from`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn fill(&self, from: &[u8]) {
        assert_eq!(from.len(), self.len(), "a piece is filled whole");
        // SAFETY: `new`'s contract makes the memory writable; a peer may write it too, hence no reference.
        unsafe { copy_volatile(from.as_ptr(), self.base(), from.len()) }
    }

    /// Copies the memory to `to`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len(), "a piece is read whole");
        // SAFETY: `new`'s contract makes the memory readable; a peer may write it too, hence no reference.
        unsafe { copy_volatile(self.base(), to.as_mut_ptr(), to.len()) }
    }

    /// Fills the memory from `from`, starting at byte `offset` there.
    ///
    /// # Panics
    /// If `from` does not reach that far.
    pub(crate) fn fill_from(&self, from: &impl SharedMemory, offset: usize) {
        let source = piece(from, offset, self.len());
        // SAFETY: `piece` checked the range in `from`, `new`'s contract covers ours. They are different
        // mappings: a disk or bounce buffers on one side, what a request names on the other.
        unsafe { copy_volatile(source, self.base(), self.len()) }
    }

    /// Copies the memory to `to`, starting at byte `offset` there.
    ///
    /// # Panics
    /// If `to` does not reach that far.
    pub(crate) fn copy_into(&self, to: &impl SharedMemory, offset: usize) {
        let target = piece(to, offset, self.len());
        // SAFETY: as in `fill_from`, the other way round.
        unsafe { copy_volatile(self.base(), target, self.len()) }
    }
}

/// Address of byte `offset` of `memory`, which `len` bytes must follow.
fn piece(memory: &impl SharedMemory, offset: usize, len: usize) -> *mut u8 {
    assert!(
        offset.checked_add(len).is_some_and(|end| end <= memory.len()),
        "the piece lies within the memory"
    );
    memory.base().as_ptr().wrapping_add(offset)
}
