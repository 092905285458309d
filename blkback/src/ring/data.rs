//! How data gets from the guest's pages to the device and back: one of a few strategies, chosen
//! when the frontend connects.

use super::bounce::BouncePool;
use super::persistent::{Found, Hold, PersistentGrants, Pin};
use crate::stats::RingStats;
use crate::storage::{IoVec, IoVecs};
use ring_proto::abi::{MAX_INDIRECT_PAGES, PAGE_SIZE, SECTORS_PER_PAGE, Segment};
use ring_proto::{DomId, GrantRef, SharedMemory, decode_segments};
use std::ops::Range;
use std::sync::Arc;
use xen_platform::{
    Access, CopyDirection, CopySegment, GrantCopier, GrantStatus, LocalRegion, MappedGrants,
    Platform,
};

/// Pages that a ring keeps mapped for requests in flight, beside its persistent grants. As much as
/// grant copy's large buffers hold, and 8 MiB keep any disk busy. Without a bound, indirect requests
/// could use up the mappings that a process may have (`vm.max_map_count`), those of other guests'
/// devices included.
const MAX_MAPPED_PAGES: usize = 2048;

/// How a frontend's data is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategy {
    /// Copied by the hypervisor through buffers of ours. The frontend's pages are never mapped, so
    /// it can take a grant back at any time without harm to anybody but itself.
    Copy,
    /// Mapped once and kept, because the frontend promised to use the same pages again.
    Persistent,
    /// Mapped as well, but the device works on buffers of ours, and we copy: it wants other alignment, or
    /// the pages may not be pinned ([`Platform::may_pin`]).
    Bounce,
    /// Mapped for a request and unmapped before its response.
    Map,
    /// Not reached at all: the device neither reads nor writes data.
    Nothing,
}

/// Why a request's data could not be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unreachable {
    /// No buffer is free. Try again after a completion.
    Busy,
    /// A grant was refused. The request fails.
    Refused,
}

/// What a request holds on to until its response.
#[derive(Default)]
pub(super) struct Held {
    segments: Vec<Segment>,
    bounce: Option<Range<usize>>,
    pins: Vec<Pin>,
    maps: Vec<Arc<dyn MappedGrants>>,
    /// Pages in `maps`.
    mapped: usize,
    /// A grant copy for it was refused.
    pub(super) refused: bool,
}

enum Via {
    Copy(BouncePool),
    Persistent(PersistentGrants, Option<Bounced>),
    Map,
    Nothing,
}

/// What the device works on in the place of mapped pages.
struct Bounced {
    pool: BouncePool,
    /// The pages of each request, by tag.
    pages: Vec<IoVecs>,
}

impl Via {
    /// The buffers that the device works on, if they are ours.
    #[inline]
    fn bounce(&mut self) -> Option<&mut BouncePool> {
        match self {
            Self::Copy(bounce) | Self::Persistent(_, Some(Bounced { pool: bounce, .. })) => {
                Some(bounce)
            }
            Self::Persistent(_, None) | Self::Map | Self::Nothing => None,
        }
    }
}

/// One ring's way to the data of its requests.
pub(super) struct Data {
    platform: Arc<dyn Platform>,
    copier: Box<dyn GrantCopier>,
    peer: DomId,
    via: Via,
    /// Pages that are mapped for single requests.
    mapped: usize,
    /// Pages that were to be mapped for single requests so far, whether that succeeded or not.
    tried: usize,
    /// Grant copies to be made together, and the tag that each is for.
    copies: Vec<CopySegment>,
    owners: Vec<u16>,
    /// Where a page of indirect segments is copied to.
    page: Box<[u8; PAGE_SIZE]>,
    scratch: Arc<LocalRegion>,
    refs: Vec<GrantRef>,
    stats: Arc<RingStats>,
}

impl Data {
    pub(super) fn new(
        platform: Arc<dyn Platform>,
        peer: DomId,
        strategy: Strategy,
        slots: usize,
        direct_segments: usize,
        indirect_segments: usize,
        stats: Arc<RingStats>,
    ) -> xen_platform::Result<Self> {
        let bounce = || BouncePool::new(slots, direct_segments.max(indirect_segments));
        let persistent = || PersistentGrants::new(platform.clone(), peer, stats.clone());
        let via = match strategy {
            Strategy::Copy => Via::Copy(bounce()?),
            Strategy::Persistent => Via::Persistent(persistent(), None),
            Strategy::Bounce => {
                let pages = vec![IoVecs::new(); slots];
                Via::Persistent(persistent(), Some(Bounced { pool: bounce()?, pages }))
            }
            Strategy::Map => Via::Map,
            Strategy::Nothing => Via::Nothing,
        };
        let copier = platform.copier(peer)?;
        Ok(Self {
            platform,
            copier,
            peer,
            via,
            mapped: 0,
            tried: 0,
            copies: Vec::with_capacity(slots * direct_segments),
            owners: Vec::with_capacity(slots * direct_segments),
            page: Box::new([0; PAGE_SIZE]),
            scratch: Arc::new(LocalRegion::new(1)?),
            refs: Vec::with_capacity(indirect_segments.max(direct_segments)),
            stats,
        })
    }

    /// Memory that the device will read and write, where it is known beforehand: the first so many bytes.
    pub(super) fn region(&mut self) -> Option<(Arc<LocalRegion>, usize)> {
        self.via.bounce().map(|bounce| (bounce.region().clone(), bounce.registered()))
    }

    /// Starts a new moment for the pool of persistent grants.
    pub(super) fn tick(&mut self) {
        if let Via::Persistent(pool, _) = &mut self.via {
            pool.tick();
        }
    }

    /// Gives back what a quiet ring does not need: memory now, mappings by handing them out.
    pub(super) fn purge(&mut self) -> Vec<Arc<dyn MappedGrants>> {
        if let Some(bounce) = self.via.bounce() {
            bounce.purge();
        }
        match &mut self.via {
            Via::Persistent(pool, _) => pool.purge(),
            _ => Vec::new(),
        }
    }

    /// All mappings, those of requests among them, when none uses them any more.
    pub(super) fn into_mappings(
        self,
        held: impl Iterator<Item = Held>,
    ) -> Vec<Arc<dyn MappedGrants>> {
        let held = held.flat_map(|held| held.maps);
        match self.via {
            Via::Persistent(pool, _) => held.chain(pool.into_pages()).collect(),
            Via::Copy(_) | Via::Map | Via::Nothing => held.collect(),
        }
    }

    /// Fetches the segments of an indirect request, each exactly once (XSA-155), into `segments`.
    pub(super) fn indirect(
        &mut self,
        pages: &[GrantRef; MAX_INDIRECT_PAGES],
        nr_segments: u16,
        segments: &mut Vec<Segment>,
    ) -> Result<(), Unreachable> {
        segments.clear();
        let mut left = usize::from(nr_segments);
        for &gref in pages {
            if left == 0 {
                break;
            }
            let count = left.min(PAGE_SIZE / size_of::<Segment>());
            let bytes = count * size_of::<Segment>();
            self.fetch_page(gref, bytes)?;
            segments.extend(decode_segments(&self.page[..bytes]));
            left -= count;
        }
        Ok(())
    }

    /// Copies the start of a granted page to `self.page`.
    fn fetch_page(&mut self, gref: GrantRef, bytes: usize) -> Result<(), Unreachable> {
        if let Via::Persistent(pool, _) = &mut self.via {
            let page = Segment::new(gref, 0, SECTORS_PER_PAGE - 1);
            let (found, hold) = pool.find(&[page]).map_err(|_| Unreachable::Refused)?;
            // SAFETY: `hold` keeps the page mapped, and `bytes` is a page at the most.
            unsafe { IoVec::new(found.base, bytes) }.copy_to(&mut self.page[..bytes]);
            if let Hold::Pin(pin) = hold {
                pool.unpin(pin);
            }
            return Ok(());
        }
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

    /// Finds memory for the data of request `tag`, which will hold on to it, and lists it in
    /// `buffers`, which are empty.
    ///
    /// For a write it holds the data only after [`Data::copy`].
    pub(super) fn prepare(
        &mut self,
        tag: u16,
        write: bool,
        segments: &[Segment],
        held: &mut Held,
        buffers: &mut IoVecs,
    ) -> Result<(), Unreachable> {
        // A request of its own always fits.
        if self.mapped > 0 && self.mapped + segments.len() > MAX_MAPPED_PAGES {
            return Err(Unreachable::Busy);
        }
        match &mut self.via {
            Via::Copy(bounce) => {
                let bytes = segments.iter().map(Segment::bytes).sum();
                let range = bounce.take(bytes).ok_or(Unreachable::Busy)?;
                // SAFETY: the range is within the region, which lives as long as `self`; the worker
                // waits for its operations before it drops `self`. The range is this request's alone
                // until `release`.
                buffers.push(unsafe { IoVec::new(bounce.address(&range), bytes) });
                if write {
                    stage(
                        &mut self.copies,
                        &mut self.owners,
                        tag,
                        segments,
                        range.start,
                        CopyDirection::FromPeer,
                    );
                } else {
                    held.segments.clear();
                    held.segments.extend_from_slice(segments);
                }
                held.bounce = Some(range);
            }
            Via::Persistent(pool, bounce) => {
                let pages = match bounce {
                    None => &mut *buffers,
                    Some(Bounced { pool, pages }) => {
                        let bytes = segments.iter().map(Segment::bytes).sum();
                        held.bounce = Some(pool.take(bytes).ok_or(Unreachable::Busy)?);
                        pages[usize::from(tag)].clear();
                        &mut pages[usize::from(tag)]
                    }
                };
                let mut rest = segments;
                while !rest.is_empty() {
                    let Found { count, base } = if let Some((found, pin)) = pool.known(rest) {
                        held.pins.push(pin);
                        found
                    } else if let Ok((found, hold)) = pool.add(rest) {
                        match hold {
                            Hold::Pin(pin) => held.pins.push(pin),
                            Hold::Map(pages) => {
                                held.maps.push(pages);
                                held.mapped += found.count;
                                self.mapped += found.count;
                            }
                        }
                        found
                    } else {
                        self.release(held);
                        return Err(Unreachable::Refused);
                    };
                    let (these, others) = rest.split_at(count);
                    // SAFETY: the pages stay mapped until `release` gives the pin or map back, and
                    // validation keeps each segment within its page.
                    unsafe { list(base, these, pages) };
                    rest = others;
                }
                if let (Some(Bounced { pool, pages }), Some(range)) = (bounce, &held.bounce) {
                    if write {
                        let pages = &pages[usize::from(tag)];
                        each(pages, range, |page, at| page.copy_into(&**pool.region(), at));
                    }
                    // SAFETY: as in grant copy.
                    buffers.push(unsafe { IoVec::new(pool.address(range), range.len()) });
                }
            }
            Via::Map => {
                self.refs.clear();
                self.refs.extend(segments.iter().map(|s| s.gref));
                self.tried += segments.len();
                let access = if write { Access::ReadOnly } else { Access::ReadWrite };
                let map = self
                    .platform
                    .map(self.peer, &self.refs, access)
                    .map_err(|_| Unreachable::Refused)?;
                // SAFETY: as above.
                unsafe { list(map.base().as_ptr(), segments, buffers) };
                held.maps.push(map);
                held.mapped = segments.len();
                self.mapped += held.mapped;
                self.stats.grant_maps.add(segments.len() as u64);
            }
            Via::Nothing => {}
        }
        Ok(())
    }

    /// Notes that the device has filled the buffers of read `tag`. Returns how many bytes are to be copied.
    #[inline]
    pub(super) fn filled(&mut self, tag: u16, held: &Held) -> u64 {
        let Some(range) = &held.bounce else { return 0 };
        match &self.via {
            Via::Persistent(_, Some(Bounced { pool, pages })) => {
                let pages = &pages[usize::from(tag)];
                each(pages, range, |page, at| page.fill_from(&**pool.region(), at));
            }
            _ => {
                let to = CopyDirection::ToPeer;
                stage(&mut self.copies, &mut self.owners, tag, &held.segments, range.start, to);
            }
        }
        range.len() as u64
    }

    /// Moves the data of every write that was prepared, and of every read that was filled, since the last call,
    /// in one operation. Names those for which that was refused.
    #[inline]
    pub(super) fn copy(&mut self, refused: impl FnMut(u16)) {
        if !self.copies.is_empty() {
            self.copy_all(refused);
        }
    }

    fn copy_all(&mut self, mut refused: impl FnMut(u16)) {
        let Via::Copy(bounce) = &self.via else { return };
        self.stats.grant_copies.add(self.copies.len() as u64);
        let whole = self.copier.copy(bounce.region(), &mut self.copies);
        for (copy, &tag) in self.copies.iter().zip(&self.owners) {
            if whole.is_err() || copy.status.is_err() {
                refused(tag);
            }
        }
        self.copies.clear();
        self.owners.clear();
    }

    /// Pages that were to be mapped so far, whether that succeeded or not.
    pub(super) fn tried(&self) -> usize {
        match &self.via {
            Via::Persistent(pool, _) => pool.tried(),
            Via::Copy(_) | Via::Map | Via::Nothing => self.tried,
        }
    }

    /// Pages that are mapped for single requests.
    pub(super) fn mapped(&self) -> usize {
        self.mapped
    }

    /// Lets go of everything that a request holds. What was mapped for it alone is unmapped when this returns.
    pub(super) fn release(&mut self, held: &mut Held) {
        held.refused = false;
        if let Via::Persistent(pool, _) = &mut self.via {
            while let Some(pin) = held.pins.pop() {
                pool.unpin(pin);
            }
        }
        if let Some(bounce) = self.via.bounce()
            && let Some(range) = held.bounce.take()
        {
            bounce.give(&range);
        }
        if held.mapped > 0 {
            held.maps.clear();
            self.mapped -= std::mem::take(&mut held.mapped);
        }
    }
}

/// Appends the memory of `segments`, whose pages lie side by side from `base`. Data without a gap is one
/// piece: the fewer pieces, the less for the kernel to look up.
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

/// Names the place of each of `pages` in the buffer that `range` is of.
fn each(pages: &IoVecs, range: &Range<usize>, mut copy: impl FnMut(&IoVec, usize)) {
    let mut at = range.start;
    for page in pages {
        copy(page, at);
        at += page.len();
    }
}

/// Lists the grant copies of one request.
fn stage(
    copies: &mut Vec<CopySegment>,
    owners: &mut Vec<u16>,
    tag: u16,
    segments: &[Segment],
    mut local: usize,
    direction: CopyDirection,
) {
    for segment in segments {
        copies.push(CopySegment {
            gref: segment.gref,
            offset: segment.offset() as u16,
            len: segment.bytes() as u16,
            local,
            direction,
            status: Err(GrantStatus::NotAttempted),
        });
        owners.push(tag);
        local += segment.bytes();
    }
}
