//! Mapping and copying what a peer granted.

use super::abi::{
    self, COPY_FROM_GRANT, COPY_TO_GRANT, CopySide, Foreign, GrantCopySegment, MapGrantRef, MapRef,
    UnmapGrantRef,
};
use super::device::Device;
use crate::mapping::Kept;
use crate::{
    Access, CopyDirection, CopySegment, Error, GrantCopier, GrantStatus, LocalRegion, Mapping,
    Result,
};
use nix::Error as Errno;
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, SharedMemory};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

/// How often to try a map while the peer's page is not in memory (`EAGAIN`) or signals come (`EINTR`), and
/// the pause in between. libxengnttab tries forever, which a hostile peer could exploit.
const MAP_TRIES: u32 = 100;
const MAP_PAUSE: Duration = Duration::from_millis(1);

/// Entries of the request before the references: `count`, `pad` and `index`.
const HEADER: usize = offset_of!(MapGrantRef, refs) / size_of::<MapRef>();

/// An open file, and the memory for requests to it.
struct Gntdev {
    file: Arc<File>,
    request: Vec<MapRef>,
}

thread_local! {
    /// One file per thread: the kernel keeps a file's maps in one list, under one lock, and walks it for
    /// each map and unmap. Closed when the thread has ended and what it mapped is unmapped.
    static GNTDEV: RefCell<Option<Gntdev>> = const { RefCell::new(None) };
}

/// The kernel's record of a map, which it drops when nothing of it is mapped.
#[derive(Debug)]
pub(super) struct Entry {
    file: Arc<File>,
    index: u64,
    count: u32,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut unmap = UnmapGrantRef { index: self.index, count: self.count, pad: 0 };
        // SAFETY: the argument is the struct that this request takes, and lives through the call. It
        // fails only for a map that is not this file's.
        let _ = unsafe { abi::gntdev_unmap(self.file.as_raw_fd(), &raw mut unmap) };
    }
}

/// Maps a peer's pages.
pub(super) fn map(peer: DomId, refs: &[GrantRef], access: Access) -> Result<Kept<Entry>> {
    let mut passing = Errno::EAGAIN.into();
    for _ in 0..MAP_TRIES {
        let entry = enter(peer, refs)?;
        match Mapping::of(&entry.file, entry.index, refs.len(), access) {
            Ok(mapping) => return Ok(Kept::new(mapping, entry)),
            // Not with the same entry again: since 6.1, Linux maps each at most once.
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                passing = error;
            }
            Err(error) => {
                return Err(why_refused(peer, refs).unwrap_or_else(|| map_error(peer, refs, error)));
            }
        }
        std::thread::sleep(MAP_PAUSE);
    }
    Err(map_error(peer, refs, passing))
}

/// Tells the kernel what to map, by this thread's file.
fn enter(peer: DomId, refs: &[GrantRef]) -> Result<Entry> {
    GNTDEV.with_borrow_mut(|gntdev| {
        let gntdev = match gntdev {
            Some(gntdev) => gntdev,
            None => {
                let file = Arc::new(Device::Gntdev.open()?);
                gntdev.insert(Gntdev { file, request: Vec::new() })
            }
        };
        gntdev.enter(peer, refs).map_err(|error| map_error(peer, refs, error))
    })
}

fn map_error(peer: DomId, refs: &[GrantRef], error: impl Into<io::Error>) -> Error {
    let (pages, first) = (refs.len(), refs.first().copied().unwrap_or_default());
    Error::io(format!("map {pages} pages of {peer}, the first being {first}"), error)
}

impl Gntdev {
    /// Tells the kernel what to map; it looks at the grants only when they are mapped.
    fn enter(&mut self, peer: DomId, refs: &[GrantRef]) -> Result<Entry, Errno> {
        let count = u32::try_from(refs.len()).map_err(|_| Errno::EINVAL)?;
        if count == 0 {
            return Err(Errno::EINVAL);
        }
        self.request.clear();
        self.request.extend([
            MapRef { domid: count, gref: 0 }, // count, pad
            MapRef { domid: 0, gref: 0 },     // index
        ]);
        let domid = peer.0.into();
        self.request.extend(refs.iter().map(|gref| MapRef { domid, gref: gref.0 }));
        let request: *mut MapGrantRef = self.request.as_mut_ptr().cast();
        // SAFETY: the buffer is a `MapGrantRef` followed by the references after its first. The
        // kernel copies to and from it, whatever its alignment.
        unsafe { abi::gntdev_map(self.file.as_raw_fd(), request) }?;
        let index = self.request.get(1).ok_or(Errno::EINVAL)?;
        let index = u64::from(index.gref) << 32 | u64::from(index.domid);
        Ok(Entry { file: Arc::clone(&self.file), index, count })
    }
}
const _: () = assert!(HEADER == 2 && cfg!(target_endian = "little"));

/// Finds the grant that made a map fail: gntdev does not tell, but copying a byte of each page does. `None`
/// if all can be read: then one may not be written, or Xen has run out of maptrack entries.
fn why_refused(peer: DomId, refs: &[GrantRef]) -> Option<Error> {
    let local = LocalRegion::new(1).ok()?;
    let mut probes: Vec<CopySegment> = refs
        .iter()
        .map(|&gref| CopySegment {
            gref,
            offset: 0,
            len: 1,
            local: 0,
            direction: CopyDirection::FromPeer,
            status: Err(GrantStatus::NotAttempted),
        })
        .collect();
    Copier::new(peer).ok()?.copy(&local, &mut probes).ok()?;
    probes.iter().find_map(|probe| {
        let status = probe.status.err()?;
        Some(Error::Grant { peer, gref: probe.gref, status })
    })
}

/// Copies from and to one peer, any number of segments per system call.
#[derive(Debug)]
pub(super) struct Copier {
    file: File,
    peer: DomId,
    segments: Segments,
}

/// The segments of a call; their memory is kept for the next.
#[derive(Default)]
struct Segments(Vec<GrantCopySegment>);

impl std::fmt::Debug for Segments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} segments", self.0.len())
    }
}

impl Copier {
    pub(super) fn new(peer: DomId) -> Result<Self> {
        Ok(Self { file: Device::Gntdev.open()?, peer, segments: Segments::default() })
    }
}

impl GrantCopier for Copier {
    fn copy(&mut self, local: &LocalRegion, segments: &mut [CopySegment]) -> Result<()> {
        let requests = &mut self.segments.0;
        requests.clear();
        for segment in segments.iter_mut() {
            // One bad range would fail the whole call.
            segment.status = match request(self.peer, local, segment) {
                Some(request) => {
                    requests.push(request);
                    Err(GrantStatus::NotAttempted)
                }
                None => Err(GrantStatus::BadRange),
            };
        }
        if requests.is_empty() {
            return Ok(());
        }
        let failed = |error| Error::io(format!("copy {} segments", segments.len()), error);
        let count = u32::try_from(requests.len()).map_err(|_| failed(Errno::EINVAL))?;
        let mut copy = abi::GrantCopy { count, segments: requests.as_mut_ptr() };
        // SAFETY: `count` segments, all of them ours until the call returns, whose local sides
        // `request` has checked to lie in `local`, which nobody holds a reference into.
        unsafe { abi::gntdev_copy(self.file.as_raw_fd(), &raw mut copy) }.map_err(failed)?;
        let tried = segments.iter_mut().filter(|s| s.status == Err(GrantStatus::NotAttempted));
        for (segment, done) in tried.zip(requests.iter()) {
            segment.status = status(done.status);
        }
        Ok(())
    }
}

/// One segment for the kernel, or `None` if it leaves the peer's page or the local region.
fn request(peer: DomId, local: &LocalRegion, segment: &CopySegment) -> Option<GrantCopySegment> {
    let len = usize::from(segment.len);
    let local_end = segment.local.checked_add(len)?;
    if usize::from(segment.offset) + len > PAGE_SIZE || local_end > local.len() {
        return None;
    }
    let ours = local.base().as_ptr().wrapping_add(segment.local);
    let ours = CopySide { virt: ours.expose_provenance() };
    let foreign = Foreign { gref: segment.gref.0, offset: segment.offset, domid: peer.0 };
    let theirs = CopySide { foreign };
    let (source, dest, flags) = match segment.direction {
        CopyDirection::FromPeer => (theirs, ours, COPY_FROM_GRANT),
        CopyDirection::ToPeer => (ours, theirs, COPY_TO_GRANT),
    };
    Some(GrantCopySegment { source, dest, len: segment.len, flags, status: GENERAL_ERROR })
}

// grant_table.h, GNTST_*
const OKAY: i16 = 0;
const GENERAL_ERROR: i16 = -1;
const BAD_DOMAIN: i16 = -2;
const BAD_GNTREF: i16 = -3;
const PERMISSION_DENIED: i16 = -8;
const BAD_COPY_ARG: i16 = -10;

fn status(raw: i16) -> Result<(), GrantStatus> {
    match raw {
        OKAY => Ok(()),
        BAD_DOMAIN => Err(GrantStatus::BadDomain),
        BAD_GNTREF => Err(GrantStatus::BadRef),
        PERMISSION_DENIED => Err(GrantStatus::PermissionDenied),
        BAD_COPY_ARG => Err(GrantStatus::BadRange),
        other => Err(GrantStatus::Other(other)),
    }
}
