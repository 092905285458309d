//! Granting: memory that the kernel allocates, grants and, when both ends have let go, frees.

use super::abi::{self, ALLOC_WRITABLE, AllocGref, DeallocGref};
use crate::{Access, Error, GrantedPages, Mapping, Result};
use nix::Error as Errno;
use ring_proto::{DomId, GrantRef, SharedMemory};
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// The module's limit for all processes together.
const LIMIT: &str = "/sys/module/xen_gntalloc/parameters/limit";
/// The default limit, for when it cannot be read.
const DEFAULT_LIMIT: usize = 1024;

/// Pages of ours that a peer may use.
#[derive(Debug)]
pub(super) struct Granted {
    file: Arc<File>,
    index: u64,
    refs: Vec<GrantRef>,
    memory: Arc<Mapping>,
}

impl Granted {
    pub(super) fn new(file: Arc<File>, peer: DomId, pages: usize, access: Access) -> Result<Self> {
        let doing = || format!("grant {pages} pages to {peer}");
        let count = u32::try_from(pages).map_err(|_| Error::io(doing(), Errno::EINVAL))?;
        // `AllocGref` and the references after its first, in words that are aligned for it.
        const WORD: usize = size_of::<u64>();
        let bytes = offset_of!(AllocGref, gref_ids).saturating_add(pages.saturating_mul(4));
        let mut request = vec![0_u64; bytes.max(size_of::<AllocGref>()).div_ceil(WORD)];
        let header: *mut AllocGref = request.as_mut_ptr().cast();
        let flags = if access == Access::ReadWrite { ALLOC_WRITABLE } else { 0 };
        // SAFETY: `request` is aligned for `AllocGref` and at least as long.
        unsafe { header.write(AllocGref { domid: peer.0, flags, count, index: 0, gref_ids: [0] }) };
        // SAFETY: the kernel writes `count` references from `gref_ids` on: `request` has room.
        match unsafe { abi::gntalloc_alloc(file.as_raw_fd(), header) } {
            Ok(_) => {}
            Err(Errno::ENOSPC) => {
                let what = "grants of xen-gntalloc, a limit for all processes together: \
                            raise /sys/module/xen_gntalloc/parameters/limit";
                return Err(Error::Exhausted { what, limit: limit() });
            }
            Err(error) => return Err(Error::io(doing(), error)),
        }
        // SAFETY: initialised above, and the kernel has filled in the rest.
        let index = unsafe { (*header).index };
        let first: *const u32 =
            header.cast_const().wrapping_byte_add(offset_of!(AllocGref, gref_ids)).cast();
        // SAFETY: `request` holds `pages` references from there, and is not touched meanwhile.
        let refs = unsafe { std::slice::from_raw_parts(first, pages) };
        let refs = refs.iter().copied().map(GrantRef).collect();
        match Mapping::of(&file, index, pages, Access::ReadWrite) {
            Ok(memory) => Ok(Self { file, index, refs, memory: Arc::new(memory) }),
            Err(error) => {
                give_back(&file, index, count);
                Err(Error::io(doing(), error))
            }
        }
    }
}

/// Pages that all processes together may grant.
fn limit() -> usize {
    let limit = std::fs::read_to_string(LIMIT).ok();
    limit.and_then(|text| text.trim().parse().ok()).unwrap_or(DEFAULT_LIMIT)
}

fn give_back(file: &File, index: u64, count: u32) {
    let mut dealloc = DeallocGref { index, count };
    // SAFETY: the argument is the struct that this request takes, and lives through the call. It
    // fails only for pages that were not allocated through this file.
    let _ = unsafe { abi::gntalloc_dealloc(file.as_raw_fd(), &raw mut dealloc) };
}

impl GrantedPages for Granted {
    fn memory(&self) -> Arc<dyn SharedMemory> {
        Arc::clone(&self.memory) as Arc<dyn SharedMemory>
    }

    fn refs(&self) -> &[GrantRef] {
        &self.refs
    }

    /// The kernel does not tell whether the peer still maps a page, so this never fails: a page is
    /// freed, and its grant with it, when nobody maps it at either end.
    fn revoke(self: Box<Self>) -> std::result::Result<(), (Box<dyn GrantedPages>, Error)> {
        Ok(())
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        // As many as were allocated, which was a u32.
        give_back(&self.file, self.index, self.refs.len() as u32);
    }
}
