//! Files of memory that domains share, and their mappings.

use crate::{Access, Error, Result};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

/// A sparse, zeroed file of `bytes` bytes that has no name.
///
/// It is sealed at its size: a process that could shrink it would kill, by SIGBUS, every other that
/// maps it.
pub(super) fn memory_file(name: &str, bytes: usize) -> Result<OwnedFd> {
    let failed = |e| Error::io(format!("create {bytes} bytes of memory for {name}"), e);
    let size = i64::try_from(bytes).map_err(|_| failed(nix::Error::EFBIG))?;
    let file =
        memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).map_err(failed)?;
    nix::unistd::ftruncate(&file, size).map_err(failed)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
    Ok(file)
}

/// Gives the memory behind `frames` back to the kernel: they read as zeroes from then on.
pub(super) fn discard_frames(file: impl AsFd, frames: &[u32]) -> Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for run in runs(frames) {
        i64::try_from(run.bytes.get())
            .map_err(|_| nix::Error::EFBIG)
            .and_then(|bytes| fallocate(file.as_fd(), mode, run.offset(), bytes))
            .map_err(|e| Error::io(format!("zero {} bytes", run.bytes), e))?;
    }
    Ok(())
}

/// Consecutive frames of a memory file.
struct Run {
    first: u32,
    bytes: NonZeroUsize,
}

impl Run {
    /// In bytes. Frame numbers have 32 bits, so it always fits.
    fn offset(&self) -> i64 {
        i64::from(self.first) << PAGE_SIZE.trailing_zeros()
    }
}

fn runs(frames: &[u32]) -> impl Iterator<Item = Run> + '_ {
    frames.chunk_by(|a, b| a.checked_add(1) == Some(*b)).filter_map(|run| {
        let bytes = NonZeroUsize::new(run.len().checked_mul(PAGE_SIZE)?)?;
        Some(Run { first: *run.first()?, bytes })
    })
}

/// Frames of a memory file, mapped one after the other.
#[derive(Debug)]
pub(super) struct FrameMapping {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value and is reached only through raw pointers.
unsafe impl Send for FrameMapping {}
// SAFETY: as above.
unsafe impl Sync for FrameMapping {}

// SAFETY: `new` maps `len` bytes, page-aligned, until `drop`; nobody makes references into them. A
// read-only mapping faults when written, as it does on Xen: it never corrupts.
unsafe impl SharedMemory for FrameMapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn len(&self) -> usize {
        self.len.get()
    }
}

impl FrameMapping {
    /// Maps `frames`, each of which must lie within `file`.
    pub(super) fn new(file: BorrowedFd<'_>, frames: &[u32], access: Access) -> Result<Self> {
        let pages = frames.len();
        let failed = |e| Error::io(format!("map {pages} granted pages"), e);
        let len = pages
            .checked_mul(PAGE_SIZE)
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| failed(nix::Error::EINVAL))?;
        let reserve = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel places a new mapping, which aliases nothing of this process's.
        let base =
            unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, reserve) }.map_err(failed)?;
        let mapping = Self { base: base.cast(), len };
        let prot = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        let mut at = base.addr();
        for run in runs(frames) {
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: the runs add up to `len`, so this replaces a part of the reservation above,
            // to which nobody has a pointer yet.
            unsafe { mmap(Some(at), run.bytes, prot, flags, file, run.offset()) }
                .map_err(failed)?;
            at = at.saturating_add(run.bytes.get());
        }
        Ok(mapping)
    }
}

impl Drop for FrameMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; whoever holds a pointer into it borrows this value.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}
