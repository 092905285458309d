//! The grantee's side: mapping and copying what a peer granted.

use super::connection::Connection;
use super::memory::map_frames;
use super::table::{ActiveTable, GrantTable};
use crate::mapping::Kept;
use crate::{
    Access, CopyDirection, CopySegment, Error, GrantCopier, GrantStatus, LocalRegion, Mapping,
    Result,
};
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, SharedMemory, copy_volatile};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// A domain whose grants we use.
#[derive(Debug)]
pub(super) struct Peer {
    domid: DomId,
    /// All of its memory. Only frames that a pin has checked are accessed.
    memory: Mapping,
    file: OwnedFd,
    frames: u32,
    grants: GrantTable,
    active: ActiveTable,
    /// When it closes, the broker ends all our uses.
    connection: Arc<Connection>,
}

impl Peer {
    /// Asks the broker for `domid`; returns `None` if nobody is there.
    pub(super) fn connect(connection: Arc<Connection>, domid: DomId) -> Result<Option<Self>> {
        let Some([file, grants, active]) = connection.peer(domid)? else { return Ok(None) };
        let memory = Mapping::whole(file.as_fd());
        let memory = memory.map_err(|e| Error::io(format!("map the memory of {domid}"), e))?;
        let frames = u32::try_from(memory.len() / PAGE_SIZE).unwrap_or(u32::MAX);
        let grants = GrantTable::map(grants.as_fd())?;
        let active = ActiveTable::map(active.as_fd())?;
        Ok(Some(Self { domid, memory, file, frames, grants, active, connection }))
    }

    /// Whether its process is gone, and its grants with it.
    pub(super) fn is_gone(&self) -> bool {
        self.active.is_closed()
    }

    fn pin(&self, gref: GrantRef, access: Access) -> Result<u32, GrantStatus> {
        self.active.pin(&self.grants, gref, self.connection.domid(), access, self.frames)
    }

    fn unpin(&self, gref: GrantRef, access: Access) {
        self.active.unpin(&self.grants, gref, access);
    }
}

/// Uses of a peer's grants, which end when this is dropped.
#[derive(Debug)]
pub(super) struct Pins {
    peer: Arc<Peer>,
    refs: Vec<GrantRef>,
    access: Access,
}

impl Drop for Pins {
    fn drop(&mut self) {
        for &gref in &self.refs {
            self.peer.unpin(gref, self.access);
        }
    }
}

/// Maps a peer's pages, each of which is pinned first.
pub(super) fn map(peer: Arc<Peer>, refs: &[GrantRef], access: Access) -> Result<Kept<Pins>> {
    let mut pins = Pins { peer, refs: Vec::with_capacity(refs.len()), access };
    let mut frames = Vec::with_capacity(refs.len());
    for &gref in refs {
        let peer = pins.peer.domid;
        let frame = pins.peer.pin(gref, access);
        frames.push(frame.map_err(|status| Error::Grant { peer, gref, status })?);
        pins.refs.push(gref);
    }
    let mapping = map_frames(pins.peer.file.as_fd(), &frames, access)?;
    Ok(Kept::new(mapping, pins))
}

/// Copies from and to one peer, without a system call or an allocation per segment.
#[derive(Debug)]
pub(super) struct Copier(pub(super) Arc<Peer>);

impl GrantCopier for Copier {
    fn copy(&mut self, local: &LocalRegion, segments: &mut [CopySegment]) -> Result<()> {
        let gone = self.0.is_gone();
        for segment in segments {
            segment.status =
                if gone { Err(GrantStatus::BadDomain) } else { self.copy_one(local, segment) };
        }
        Ok(())
    }
}

impl Copier {
    fn copy_one(&self, local: &LocalRegion, segment: &CopySegment) -> Result<(), GrantStatus> {
        let (offset, len) = (usize::from(segment.offset), usize::from(segment.len));
        let local_end = segment.local.checked_add(len).ok_or(GrantStatus::BadRange)?;
        if offset + len > PAGE_SIZE || local_end > local.len() {
            return Err(GrantStatus::BadRange);
        }
        let access = match segment.direction {
            CopyDirection::FromPeer => Access::ReadOnly,
            CopyDirection::ToPeer => Access::ReadWrite,
        };
        let frame = self.0.pin(segment.gref, access)?;
        let theirs = self.0.memory.base().as_ptr();
        let theirs = theirs.wrapping_add(frame as usize * PAGE_SIZE + offset);
        let ours = local.base().as_ptr().wrapping_add(segment.local);
        let (from, to) = match segment.direction {
            CopyDirection::FromPeer => (theirs, ours),
            CopyDirection::ToPeer => (ours, theirs),
        };
        // SAFETY: `pin` made sure that the frame lies in the peer's memory, which is mapped as long
        // as `self.0` lives; offset, length and local range were checked above; a local region is
        // no part of any domain's memory.
        unsafe { copy_volatile(from, to, len) };
        self.0.unpin(segment.gref, access);
        Ok(())
    }
}
