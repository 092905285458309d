//! The granting side: a domain's own memory and grant table.

use super::connection::Connection;
use super::frames::FrameAllocator;
use super::locked;
use super::memory::{discard_frames, map_frames};
use super::table::{ENTRIES, GrantTable, RESERVED_ENTRIES};
use crate::mapping::Kept;
use crate::{Access, Error, GrantedPages, Result};
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, SharedMemory};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

/// A domain as it sees itself.
#[derive(Debug)]
pub(super) struct OwnDomain {
    memory: OwnedFd,
    grants: GrantTable,
    free: Mutex<Free>,
    /// When this closes, the broker takes the grants back.
    _connection: Arc<Connection>,
}

#[derive(Debug)]
struct Free {
    frames: FrameAllocator,
    entries: Vec<GrantRef>,
    /// Pages dropped while the peer still used them.
    limbo: Vec<Limbo>,
}

#[derive(Debug)]
struct Limbo {
    pages: Arc<Kept<OwnFrames>>,
    refs: Vec<GrantRef>,
}

impl OwnDomain {
    pub(super) fn new(
        connection: Arc<Connection>,
        memory: OwnedFd,
        grant_table: &OwnedFd,
    ) -> Result<Self> {
        let bytes = nix::sys::stat::fstat(&memory)
            .map_err(|e| Error::io("look at the domain's memory", e))?
            .st_size;
        let frames = u32::try_from(bytes / PAGE_SIZE as i64).unwrap_or(u32::MAX);
        let entries = (RESERVED_ENTRIES..ENTRIES).rev().map(GrantRef).collect();
        let free = Free { frames: FrameAllocator::new(frames), entries, limbo: Vec::new() };
        let grants = GrantTable::map(grant_table.as_fd())?;
        Ok(Self { memory, grants, free: Mutex::new(free), _connection: connection })
    }

    /// Its memory file, opened again: a separate open file, to hold locks.
    pub(super) fn open_memory(&self) -> Result<File> {
        let path = format!("/proc/self/fd/{}", self.memory.as_raw_fd());
        let opened = File::options().read(true).write(true).open(path);
        opened.map_err(|e| Error::io("open the domain's memory again", e))
    }

    pub(super) fn grant_table(&self) -> &GrantTable {
        &self.grants
    }

    pub(super) fn grant(
        self: &Arc<Self>,
        peer: DomId,
        pages: usize,
        access: Access,
    ) -> Result<Granted> {
        self.free_limbo();
        let (frames, refs) = {
            let mut free = locked(&self.free);
            let left = free.entries.len();
            let Some(keep) = left.checked_sub(pages) else {
                let limit = (ENTRIES - RESERVED_ENTRIES) as usize;
                return Err(Error::Exhausted { what: "grant entries", limit });
            };
            let limit = free.frames.total();
            let frames =
                free.frames.allocate(pages).ok_or(Error::Exhausted { what: "pages", limit })?;
            (frames, free.entries.split_off(keep))
        };
        let mapping = match map_frames(self.memory.as_fd(), &frames, Access::ReadWrite) {
            Ok(mapping) => mapping,
            Err(e) => {
                let mut free = locked(&self.free);
                free.frames.release(&frames);
                free.entries.extend(refs);
                return Err(e);
            }
        };
        for (&gref, &frame) in refs.iter().zip(&frames) {
            self.grants.permit(gref, peer, frame, access);
        }
        let frames = OwnFrames { domain: Arc::downgrade(self), frames };
        let pages = Arc::new(Kept::new(mapping, frames));
        Ok(Granted { domain: Arc::clone(self), pages, refs, peer, access })
    }

    /// Frees dropped pages that peers have let go of since.
    fn free_limbo(&self) {
        // Dropped after the lock is released, as freeing pages takes it.
        let mut _freed = Vec::new();
        let mut free = locked(&self.free);
        for mut limbo in std::mem::take(&mut free.limbo) {
            self.revoke_each(&mut free, &mut limbo.refs);
            if limbo.refs.is_empty() {
                _freed.push(limbo.pages);
            } else {
                free.limbo.push(limbo);
            }
        }
    }

    /// Revokes what it can; the rest stays in `refs`.
    fn revoke_each(&self, free: &mut Free, refs: &mut Vec<GrantRef>) {
        refs.retain(|&gref| {
            let revoked = self.grants.revoke(gref);
            if revoked {
                free.entries.push(gref);
            }
            !revoked
        });
    }
}

/// Frames of our own. They become free when nobody in this process maps them any more either.
#[derive(Debug)]
struct OwnFrames {
    /// Weak, because the domain keeps frames in limbo.
    domain: Weak<OwnDomain>,
    frames: Vec<u32>,
}

impl Drop for OwnFrames {
    fn drop(&mut self) {
        let Some(domain) = self.domain.upgrade() else { return };
        // Zeroed now, so that their next user sees nothing of the contents. Frames that cannot be zeroed are
        // never used again.
        if discard_frames(&domain.memory, &self.frames).is_ok() {
            locked(&domain.free).frames.release(&self.frames);
        }
    }
}

/// Pages granted to a peer.
#[derive(Debug)]
pub(super) struct Granted {
    domain: Arc<OwnDomain>,
    pages: Arc<Kept<OwnFrames>>,
    refs: Vec<GrantRef>,
    peer: DomId,
    access: Access,
}

impl GrantedPages for Granted {
    fn memory(&self) -> Arc<dyn SharedMemory> {
        Arc::clone(&self.pages) as Arc<dyn SharedMemory>
    }

    fn refs(&self) -> &[GrantRef] {
        &self.refs
    }

    fn revoke(self: Box<Self>) -> std::result::Result<(), (Box<dyn GrantedPages>, Error)> {
        self.domain.free_limbo();
        let grants = &self.domain.grants;
        for (i, &gref) in self.refs.iter().enumerate() {
            if grants.revoke(gref) {
                continue;
            }
            // All or nothing: grant again what was taken back.
            for (&gref, &frame) in self.refs.iter().zip(&self.pages.by.frames).take(i) {
                grants.permit(gref, self.peer, frame, self.access);
            }
            return Err((self, Error::StillMapped { gref }));
        }
        Ok(()) // dropping frees the entries
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        let mut refs = std::mem::take(&mut self.refs);
        let mut free = locked(&self.domain.free);
        self.domain.revoke_each(&mut free, &mut refs);
        if !refs.is_empty() {
            free.limbo.push(Limbo { pages: Arc::clone(&self.pages), refs });
        }
    }
}
