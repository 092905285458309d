//! Frames of the memory files that domains share.

use crate::{Access, Error, Mapping, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use ring_proto::abi::PAGE_SIZE;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Gives the memory behind `frames` back to the kernel: they read as zeroes from then on.
pub(super) fn discard_frames(file: impl AsFd, frames: &[u32]) -> Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for run in runs(frames) {
        // Frame numbers have 32 bits, so both always fit.
        let (offset, bytes) = (run.offset() as i64, (run.pages * PAGE_SIZE) as i64);
        fallocate(file.as_fd(), mode, offset, bytes)
            .map_err(|e| Error::io(format!("zero {bytes} bytes"), e))?;
    }
    Ok(())
}

/// Consecutive frames of a memory file.
struct Run {
    first: u32,
    pages: usize,
}

impl Run {
    /// In bytes.
    fn offset(&self) -> u64 {
        u64::from(self.first) * PAGE_SIZE as u64
    }
}

fn runs(frames: &[u32]) -> impl Iterator<Item = Run> + '_ {
    frames
        .chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .filter_map(|run| Some(Run { first: *run.first()?, pages: run.len() }))
}

/// Maps `frames`, each of which must lie within `file`, one after the other.
pub(super) fn map_frames(file: BorrowedFd<'_>, frames: &[u32], access: Access) -> Result<Mapping> {
    let map = || {
        let mut mapping = Mapping::anonymous(frames.len())?;
        let mut page = 0;
        for run in runs(frames) {
            let pages = page..page + run.pages;
            page = pages.end;
            mapping.replace(pages, file, run.offset(), access)?;
        }
        Ok(mapping)
    };
    map().map_err(|e: io::Error| Error::io(format!("map {} granted pages", frames.len()), e))
}
