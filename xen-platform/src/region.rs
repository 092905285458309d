//! Page-aligned memory of this process, for bounce buffers.

use crate::{Error, Result};
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{SharedMemory, copy_volatile};
use std::num::NonZeroUsize;
use std::ops::Range;
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

    /// Gives the memory behind some pages back to the kernel: they read as zeroes from then on.
    ///
    /// # Errors
    /// When the pages are not all within the region; then nothing is given back.
    pub fn release(&self, pages: Range<usize>) -> Result<()> {
        use nix::sys::mman::{MmapAdvise, madvise};
        let failed = |e| Error::io(format!("release pages {pages:?}"), e);
        let (first, end) = (pages.start, pages.end);
        if first > end || end > self.len / PAGE_SIZE {
            return Err(failed(nix::Error::EINVAL));
        }
        let at = self.base.as_ptr().wrapping_add(first * PAGE_SIZE);
        let at = NonNull::new(at).ok_or_else(|| failed(nix::Error::EINVAL))?;
        let len = (end - first) * PAGE_SIZE;
        // SAFETY: whole pages of our own private mapping; whoever uses them goes through raw
        // pointers and expects them to change.
        unsafe { madvise(at.cast(), len, MmapAdvise::MADV_DONTNEED) }.map_err(failed)
    }

    /// Makes `len` bytes from `offset` read as zeroes and gives the pages that lie wholly in them back to the kernel.
    ///
    /// # Errors
    /// When the kernel does not take them.
    ///
    /// # Panics
    /// If the region does not reach so far.
    pub fn clear(&self, offset: usize, len: usize) -> Result<()> {
        use nix::sys::mman::{MmapAdvise, madvise};
        static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        assert!(offset <= self.len && len <= self.len - offset, "clear within the region");
        let end = offset + len;
        let first_page = offset.next_multiple_of(PAGE_SIZE).min(end);
        let last_page = (end - end % PAGE_SIZE).max(first_page);
        for (start, end) in [(offset, first_page), (last_page, end)] {
            let target = self.base.as_ptr().wrapping_add(start);
            // SAFETY: checked above to lie in the mapping; both edges are shorter than a page.
            unsafe { copy_volatile(ZEROES.as_ptr(), target, end - start) }
        }
        if first_page == last_page {
            return Ok(());
        }
        // SAFETY: `first_page` is an offset into the mapping.
        let start = unsafe { self.base.add(first_page) }.cast();
        // SAFETY: whole pages of the private mapping, which nobody holds a reference into: they
        // read as zeroes from now on.
        unsafe { madvise(start, last_page - first_page, MmapAdvise::MADV_DONTNEED) }
            .map_err(|e| Error::io(format!("clear {len} bytes at {offset}"), e))
    }
}

impl Drop for LocalRegion {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are the mapping made in `new`, and nothing refers into it any
        // more. A failure would mean they are not, and leaves the memory mapped.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring_proto::Window;
    use std::sync::Arc;

    #[test]
    fn released_pages_are_zero_and_the_others_are_not() {
        let region = Arc::new(LocalRegion::new(3).expect("memory"));
        let all = Window::new(Arc::clone(&region) as Arc<dyn SharedMemory>, 0, 3 * PAGE_SIZE);
        let all = all.expect("within");
        all.write(&[1; 3 * PAGE_SIZE]);
        region.release(1..2).expect("within");
        let mut bytes = [0; 3 * PAGE_SIZE];
        all.read(&mut bytes);
        assert_eq!(bytes[..PAGE_SIZE], [1; PAGE_SIZE]);
        assert_eq!(bytes[PAGE_SIZE..2 * PAGE_SIZE], [0; PAGE_SIZE]);
        assert_eq!(bytes[2 * PAGE_SIZE..], [1; PAGE_SIZE]);
        assert!(region.release(2..4).is_err());
    }
}
