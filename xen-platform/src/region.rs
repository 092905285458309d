//! Page-aligned memory of this process, for bounce buffers.

use crate::{Error, Mapping, Result};
use nix::sys::mman::{MmapAdvise, madvise};
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{SharedMemory, copy_volatile};
use std::ops::Range;
use std::ptr::NonNull;

/// Anonymous, zeroed, page-aligned memory that the kernel backs only where it is touched.
///
/// It implements [`SharedMemory`] although no peer sees it: the kernel and grant copies write it
/// behind the compiler's back just the same.
#[derive(Debug)]
pub struct LocalRegion(Mapping);

// SAFETY: the mapping keeps the promises.
unsafe impl SharedMemory for LocalRegion {
    fn base(&self) -> NonNull<u8> {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl LocalRegion {
    /// Reserves `pages` pages.
    ///
    /// # Errors
    /// When the address space or the overcommit limit is used up, or `pages` is 0 or absurd.
    pub fn new(pages: usize) -> Result<Self> {
        let reserved = Mapping::anonymous(pages);
        reserved.map(Self).map_err(|e| Error::io(format!("reserve {pages} pages"), e))
    }

    /// Gives the memory behind some pages back to the kernel: they read as zeroes from then on.
    ///
    /// # Errors
    /// When the pages are not all within the region; then nothing is given back.
    pub fn release(&self, pages: Range<usize>) -> Result<()> {
        let failed = |e| Error::io(format!("release pages {pages:?}"), e);
        let (first, end) = (pages.start, pages.end);
        if first > end || end > self.len() / PAGE_SIZE {
            return Err(failed(nix::Error::EINVAL));
        }
        let at = self.base().map_addr(|at| at.saturating_add(first * PAGE_SIZE));
        let len = (end - first) * PAGE_SIZE;
        // SAFETY: whole pages of our own private mapping; whoever uses them goes through raw
        // pointers and expects them to change.
        unsafe { madvise(at.cast(), len, MmapAdvise::MADV_DONTNEED) }.map_err(failed)
    }

    /// Makes `len` bytes from `offset` read as zeroes; pages that lie wholly in them are given back to the
    /// kernel.
    ///
    /// # Errors
    /// When the kernel does not take them.
    ///
    /// # Panics
    /// If the region ends before the range does.
    pub fn clear(&self, offset: usize, len: usize) -> Result<()> {
        static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        assert!(offset <= self.len() && len <= self.len() - offset, "clear within the region");
        let end = offset + len;
        let first_page = offset.next_multiple_of(PAGE_SIZE).min(end);
        let last_page = (end - end % PAGE_SIZE).max(first_page);
        for (start, end) in [(offset, first_page), (last_page, end)] {
            let target = self.base().as_ptr().wrapping_add(start);
            // SAFETY: checked above to lie in the mapping; both edges are shorter than a page.
            unsafe { copy_volatile(ZEROES.as_ptr(), target, end - start) }
        }
        if first_page == last_page {
            return Ok(());
        }
        self.release(first_page / PAGE_SIZE..last_page / PAGE_SIZE)
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
