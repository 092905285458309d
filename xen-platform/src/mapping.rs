//! Memory that the kernel maps for us. All of it is mapped and unmapped here.

use crate::{Access, MappedGrants};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::fmt::Debug;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

/// Pages mapped into our address space until this is dropped. Those of a file are shared: what is stored in
/// them is there for whoever maps the file next, however this process ends.
///
/// Truncating such a file kills all its users by SIGBUS, so it must be out of others' reach. A write to a
/// read-only mapping faults, and corrupts nothing.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the pages belong to this value and are reached only through raw pointers and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

// SAFETY: `base` and `len` are whole pages that mmap gave, mapped until `drop`: a write faults where they
// are read-only. No references into them are made but to atomics.
unsafe impl SharedMemory for Mapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn len(&self) -> usize {
        self.len.get()
    }
}

impl Mapping {
    /// A whole file, to read and write.
    ///
    /// # Errors
    /// When the kernel refuses, or the file is not a number of whole pages.
    pub fn whole(file: BorrowedFd<'_>) -> io::Result<Self> {
        let size = nix::sys::stat::fstat(file)?.st_size;
        match usize::try_from(size) {
            Ok(bytes) if bytes.is_multiple_of(PAGE_SIZE) => {
                Self::of(file, 0, bytes / PAGE_SIZE, Access::ReadWrite)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// `pages` pages of a file, from byte `offset` on.
    ///
    /// # Errors
    /// When the kernel refuses, or there are no pages.
    pub fn of(file: impl AsFd, offset: u64, pages: usize, access: Access) -> io::Result<Self> {
        let (len, offset) = (bytes(pages)?, file_offset(offset)?);
        let flags = MapFlags::MAP_SHARED;
        // SAFETY: the kernel places a new mapping, which aliases nothing of this process's.
        let base = unsafe { mmap(None, len, protection(access), flags, file, offset) }?;
        Ok(Self { base: base.cast(), len })
    }

    /// `pages` private, zeroed pages, which take memory only when they are touched.
    pub(crate) fn anonymous(pages: usize) -> io::Result<Self> {
        let len = bytes(pages)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: as in `of`.
        let base = unsafe { mmap_anonymous(None, len, protection(Access::ReadWrite), flags) }?;
        Ok(Self { base: base.cast(), len })
    }

    /// Maps a file's pages, from byte `offset` on, in place of `pages`.
    pub(crate) fn replace(
        &mut self,
        pages: Range<usize>,
        file: impl AsFd,
        offset: u64,
        access: Access,
    ) -> io::Result<()> {
        let (len, offset) = (bytes(pages.len())?, file_offset(offset)?);
        if pages.end > self.len.get() / PAGE_SIZE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = self.base.addr().saturating_add(pages.start * PAGE_SIZE);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: these are pages of this mapping, as checked, and nobody else has it.
        unsafe { mmap(Some(at), len, protection(access), flags, file, offset) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what mmap gave; whoever holds a pointer into it borrows this value.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}

fn bytes(pages: usize) -> io::Result<NonZeroUsize> {
    let bytes = pages.checked_mul(PAGE_SIZE).and_then(NonZeroUsize::new);
    bytes.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn protection(access: Access) -> ProtFlags {
    match access {
        Access::ReadOnly => ProtFlags::PROT_READ,
        Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
    }
}

/// A mapping, and what must live as long.
#[derive(Debug)]
pub(crate) struct Kept<T> {
    // Dropped in this order.
    mapping: Mapping,
    pub(crate) by: T,
}

impl<T> Kept<T> {
    pub(crate) fn new(mapping: Mapping, by: T) -> Self {
        Self { mapping, by }
    }
}

// SAFETY: the mapping keeps the promises, also for read-only pages.
unsafe impl<T: Send + Sync> SharedMemory for Kept<T> {
    fn base(&self) -> NonNull<u8> {
        self.mapping.base()
    }
    fn len(&self) -> usize {
        SharedMemory::len(&self.mapping)
    }
}

impl<T: Send + Sync + Debug> MappedGrants for Kept<T> {}
