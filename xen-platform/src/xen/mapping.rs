//! What mmap gives of gntdev and gntalloc.

use crate::Access;
use nix::Error as Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

/// Pages of a device, mapped until this is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value and is reached only through raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

// SAFETY: `new` maps `len` bytes, page-aligned, until `drop`; nobody makes references into them. A
// read-only mapping faults when written: it never corrupts. A domain that dies leaves its granted
// pages to those who map them.
unsafe impl SharedMemory for Mapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn len(&self) -> usize {
        self.len.get()
    }
}

impl Mapping {
    /// Maps what the device calls `index`.
    pub(super) fn new(
        file: &File,
        index: u64,
        pages: usize,
        access: Access,
    ) -> Result<Self, Errno> {
        let len = pages.checked_mul(PAGE_SIZE).and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        let offset = i64::try_from(index).map_err(|_| Errno::EOVERFLOW)?;
        let prot = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: the kernel places a new mapping, which aliases nothing of this process's.
        let base = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { base: base.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; whoever holds a pointer into it borrows this value.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}
