//! Page-aligned memory of this process, for bounce buffers.

use crate::{Error, Result};
use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

/// Anonymous, zeroed, page-aligned memory that the kernel backs only where it is touched.
///
/// It implements [`SharedMemory`] although no peer sees it: the kernel and grant copies write it
/// behind the compiler's back just the same.
#[derive(Debug)]
pub struct LocalRegion {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is private to this value and reached only through raw pointers.
unsafe impl Send for LocalRegion {}
// SAFETY: as above; no method hands out a reference into the mapping.
unsafe impl Sync for LocalRegion {}

// SAFETY: mmap gives `len` bytes, page-aligned, until `drop`; no references into it are made.
unsafe impl SharedMemory for LocalRegion {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn len(&self) -> usize {
        self.len
    }
}

impl LocalRegion {
    /// Reserves `pages` pages.
    ///
    /// # Errors
    /// When the address space or the overcommit limit is used up, or `pages` is 0 or absurd.
    pub fn new(pages: usize) -> Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let len = pages.checked_mul(PAGE_SIZE).and_then(NonZeroUsize::new).ok_or_else(|| {
            Error::io(format!("reserve {pages} pages"), std::io::ErrorKind::InvalidInput)
        })?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping, placed by the kernel, aliases nothing.
        let base = unsafe {
            mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)
        }
        .map_err(|e| Error::io(format!("reserve {pages} pages"), e))?;
        Ok(Self { base: base.cast(), len: len.get() })
    }
}

impl Drop for LocalRegion {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are the mapping made in `new`, and nothing refers into it any
        // more. A failure would mean they are not, and leaves the memory mapped.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}
