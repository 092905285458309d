//! How data gets from the guest's pages to the device and back: one of a few ways, chosen when the
//! frontend connects. Each keeps, by tag, the resources that a request holds until its response.

mod bounced;
mod copied;
mod mapped;
mod persistent;

use super::bounce::BouncePool;
use super::budget::Budget;
use super::persistent::{Hold, PersistentGrants};
use super::setup::RingSetup;
use crate::stats::RingStats;
use crate::storage::{IoVec, IoVecs};
use bounced::Bounced;
use copied::Copied;
use mapped::Mapped;
use persistent::Persistent;
use ring_proto::abi::{MAX_INDIRECT_PAGES, PAGE_SIZE, SECTORS_PER_PAGE, Segment};
use ring_proto::{GrantRef, SharedMemory, decode_segments};
use std::sync::Arc;
use xen_platform::{
    CopyDirection, CopySegment, GrantCopier, GrantStatus, LocalRegion, MappedGrants,
};

/// How a frontend's data is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategy {
    /// Copied by the hypervisor through bounce buffers. The frontend's pages are never mapped, so it
    /// can revoke a grant at any time and harm nobody but itself.
    Copy,
    /// Mapped once and kept, because the frontend promised to use the same pages again.
    Persistent,
    /// Mapped as well, but the device works on bounce buffers, and we copy: it needs another alignment, or
    /// the pages must not be pinned ([`Platform::may_pin`](xen_platform::Platform::may_pin)).
    Bounce,
    /// Mapped for a request and unmapped before its response.
    Map,
    /// Not accessed at all: the device neither reads nor writes data.
    Nothing,
}

/// Why a request's data could not be accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unreachable {
    /// No buffer is free. Try again after a completion.
    Busy,
    /// A grant was refused. The request fails.
    Refused,
}

/// Matched several times per request, hence an explicit tag instead of a niche in some field.
#[repr(u8)]
enum Way {
    Copied(Copied),
    Persistent(Persistent),
    Bounced(Bounced),
    Mapped(Mapped),
    Nothing,
}

impl Way {
    /// The pool of persistent grants, if there is one.
    #[inline]
    fn grants(&mut self) -> Option<&mut PersistentGrants> {
        match self {
            Self::Persistent(way) => Some(way.grants()),
            Self::Bounced(way) => Some(way.grants()),
            Self::Copied(_) | Self::Mapped(_) | Self::Nothing => None,
        }
    }
}

/// One ring's way to the data of its requests.
pub(super) struct Data {
    way: Way,
    copier: Box<dyn GrantCopier>,
    /// Buffer for one page of indirect segments.
    page: Box<[u8; PAGE_SIZE]>,
    scratch: Arc<LocalRegion>,
    stats: Arc<RingStats>,
}

impl Data {
    pub(super) fn new(setup: &RingSetup) -> xen_platform::Result<Self> {
        let slots = setup.requests.slots() as usize;
        let direct = setup.requests.layout().max_direct_segments();
        let most = direct.max(usize::from(setup.limits.max_indirect_segments));
        let bounce = || BouncePool::new(slots, most);
        let persistent = || {
            let (platform, stats) = (setup.platform.clone(), setup.stats.clone());
            Persistent::new(PersistentGrants::new(platform, setup.peer, stats), slots)
        };
        Ok(Self {
            way: match setup.strategy {
                Strategy::Copy => Way::Copied(Copied::new(bounce()?, slots, direct)),
                Strategy::Persistent => Way::Persistent(persistent()),
                Strategy::Bounce => Way::Bounced(Bounced::new(persistent(), bounce()?, slots)),
                Strategy::Map => Way::Mapped(Mapped::new(setup, slots)),
                Strategy::Nothing => Way::Nothing,
            },
            copier: setup.platform.copier(setup.peer)?,
            page: Box::new([0; PAGE_SIZE]),
            scratch: Arc::new(LocalRegion::new(1)?),
            stats: setup.stats.clone(),
        })
    }

    /// The memory that the device will use, if known beforehand, and how much of its start to register.
    pub(super) fn region(&self) -> Option<(Arc<LocalRegion>, usize)> {
        let pool = match &self.way {
            Way::Copied(way) => way.pool(),
            Way::Bounced(way) => way.pool(),
            Way::Persistent(_) | Way::Mapped(_) | Way::Nothing => return None,
        };
        Some((pool.region().clone(), pool.registered()))
    }

    /// Advances the clock of the pool of persistent grants.
    pub(super) fn tick(&mut self) {
        if let Some(grants) = self.way.grants() {
            grants.tick();
        }
    }

    /// Releases what a quiet ring does not need: memory at once, mappings by returning them.
    pub(super) fn purge(&mut self) -> Vec<Arc<dyn MappedGrants>> {
        match &mut self.way {
            Way::Copied(way) => way.purge(),
            Way::Bounced(way) => way.purge(),
            Way::Persistent(_) | Way::Mapped(_) | Way::Nothing => {}
        }
        self.way.grants().map_or_else(Vec::new, PersistentGrants::purge)
    }

    /// All mappings, including those of requests, once no request uses them any more.
    pub(super) fn into_mappings(self) -> Vec<Arc<dyn MappedGrants>> {
        match self.way {
            Way::Persistent(way) => way.into_mappings(),
            Way::Bounced(way) => way.into_mappings(),
            Way::Mapped(way) => way.into_mappings(),
            Way::Copied(_) | Way::Nothing => Vec::new(),
        }
    }

    /// Fetches the segments of an indirect request, each exactly once (XSA-155), into `segments`.
    pub(super) fn indirect(
        &mut self,
        pages: &[GrantRef; MAX_INDIRECT_PAGES],
        nr_segments: u16,
        segments: &mut Vec<Segment>,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        segments.clear();
        let mut left = usize::from(nr_segments);
        for &gref in pages {
            if left == 0 {
                break;
            }
            let count = left.min(PAGE_SIZE / size_of::<Segment>());
            let bytes = count * size_of::<Segment>();
            self.fetch_page(gref, bytes, budget)?;
            segments.extend(decode_segments(&self.page[..bytes]));
            left -= count;
        }
        Ok(())
    }

    /// Copies the start of a granted page to `self.page`.
    fn fetch_page(
        &mut self,
        gref: GrantRef,
        bytes: usize,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        let Some(grants) = self.way.grants() else { return self.copy_page(gref, bytes) };
        let page = Segment::new(gref, 0, SECTORS_PER_PAGE - 1);
        let (found, hold) = grants.find(&[page], budget).map_err(|_| Unreachable::Refused)?;
        // SAFETY: `hold` keeps the page mapped, and `bytes` is a page at the most.
        unsafe { IoVec::new(found.base, bytes) }.copy_to(&mut self.page[..bytes]);
        if let Hold::Pin(pin) = hold {
            grants.unpin(pin);
        }
        Ok(())
    }

    fn copy_page(&mut self, gref: GrantRef, bytes: usize) -> Result<(), Unreachable> {
        self.stats.grant_copies.add(1);
        let mut copy = [CopySegment {
            gref,
            offset: 0,
            len: bytes as u16,
            local: 0,
            direction: CopyDirection::FromPeer,
            status: Err(GrantStatus::NotAttempted),
        }];
        let whole = self.copier.copy(&self.scratch, &mut copy);
        if whole.is_err() || copy[0].status.is_err() {
            return Err(Unreachable::Refused);
        }
        // SAFETY: the page is ours, and `bytes` is a page at the most.
        unsafe { IoVec::new(self.scratch.base().as_ptr(), bytes) }.copy_to(&mut self.page[..bytes]);
        Ok(())
    }

    /// Finds memory for the data of request `tag`, which keeps it until [`Data::release`], and lists it in
    /// `buffers`, which must be empty.
    ///
    /// For a write, the memory holds the data only after [`Data::copy`].
    #[inline(always)]
    pub(super) fn prepare(
        &mut self,
        tag: u16,
        write: bool,
        segments: &[Segment],
        buffers: &mut IoVecs,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        match &mut self.way {
            Way::Persistent(way) => way.prepare(tag, segments, buffers, budget),
            Way::Copied(way) => way.prepare(tag, write, segments, buffers),
            Way::Bounced(way) => way.prepare(tag, write, segments, buffers, budget),
            Way::Mapped(way) => way.prepare(tag, write, segments, buffers, budget),
            Way::Nothing => Ok(()),
        }
    }

    /// Notes that the device has filled the buffers of read `tag`.
    #[inline]
    pub(super) fn filled(&mut self, tag: u16, budget: &mut Budget) {
        match &mut self.way {
            Way::Copied(way) => way.filled(tag, budget),
            Way::Bounced(way) => way.filled(tag, budget),
            Way::Persistent(_) | Way::Mapped(_) | Way::Nothing => {}
        }
    }

    /// Moves, in one operation, the data of every write prepared and every read filled since the last
    /// call.
    #[inline]
    pub(super) fn copy(&mut self) {
        if let Way::Copied(way) = &mut self.way {
            way.copy(&mut *self.copier, &self.stats);
        }
    }

    /// Whether [`Data::copy`] was refused for request `tag`.
    #[inline]
    pub(super) fn refused(&self, tag: u16) -> bool {
        matches!(&self.way, Way::Copied(way) if way.refused(tag))
    }

    /// Releases everything that request `tag` holds, if anything. What was mapped for it alone is unmapped
    /// when this returns.
    #[inline]
    pub(super) fn release(&mut self, tag: u16, budget: &mut Budget) {
        match &mut self.way {
            Way::Persistent(way) => way.release(tag, budget),
            Way::Copied(way) => way.release(tag),
            Way::Bounced(way) => way.release(tag, budget),
            Way::Mapped(way) => way.release(tag, budget),
            Way::Nothing => {}
        }
    }
}

/// Appends the memory of `segments`, whose pages are contiguous from `base`. Contiguous data becomes one
/// piece: the fewer pieces, the less the kernel has to look up.
///
/// # Safety
/// As for [`IoVec::new`], for each segment's part of its page.
unsafe fn list(base: *mut u8, segments: &[Segment], buffers: &mut IoVecs) {
    let (mut from, mut bytes) = (base, 0);
    for (page, segment) in segments.iter().enumerate() {
        if bytes == 0 {
            from = base.wrapping_add(page * PAGE_SIZE + segment.offset());
        }
        bytes += segment.bytes();
        if !segments.get(page + 1).is_some_and(|next| segment.touches(next)) {
            // SAFETY: the caller's obligations.
            buffers.push(unsafe { IoVec::new(from, std::mem::take(&mut bytes)) });
        }
    }
}
