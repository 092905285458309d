//! Files that processes share as memory.

use crate::{Error, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

/// A whole file, mapped shared and writable. What is stored in it is there for whoever maps the file
/// next, however this process ends.
///
/// Whoever makes the file shorter kills, by SIGBUS, all who use it: it must be out of others' reach.
#[derive(Debug)]
pub struct SharedFile {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value and is reached only through raw pointers and atomics.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

// SAFETY: `map` maps `len` bytes, page-aligned, until `drop`; nobody makes references into them but
// through atomics.
unsafe impl SharedMemory for SharedFile {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn len(&self) -> usize {
        self.len.get()
    }
}

impl SharedFile {
    /// Maps `file`.
    ///
    /// # Errors
    /// When the kernel refuses, or the file is not a number of whole pages.
    pub fn map(file: BorrowedFd<'_>) -> Result<Self> {
        let failed = |e| Error::io("map a file of shared memory", e);
        let size = nix::sys::stat::fstat(file).map_err(failed)?.st_size;
        let len = usize::try_from(size)
            .ok()
            .filter(|len| len.is_multiple_of(PAGE_SIZE))
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| failed(nix::Error::EINVAL))?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel places a new mapping, which aliases nothing of this process's.
        let base = unsafe { mmap(None, len, prot, flags, file, 0) }.map_err(failed)?;
        Ok(Self { base: base.cast(), len })
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; whoever holds a pointer into it borrows this value.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}
