//! Grants that stay mapped from request to request.
//!
//! Pages that a request is the first to use are mapped contiguously, as one *run*, by one call to the
//! hypervisor. From then on, as much of a run as a request names in the same order takes one look-up
//! and is one piece of memory. A frontend that allocates its pages last in, first out mostly does so.

use super::budget::Budget;
use crate::stats::RingStats;
use ring_proto::abi::{MAX_INDIRECT_SEGMENTS, PAGE_SIZE, Segment};
use ring_proto::{DomId, GrantRef};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr::NonNull;
use std::sync::Arc;
use xen_platform::{Access, MappedGrants, Platform};

/// The most persistent grants that a ring keeps: `xen_blkif_max_pgrants` of Linux's backend, 3 for
/// every segment of 32 direct requests. It bounds the maptrack handles that one guest can take up.
pub(super) const MAX_PERSISTENT_GRANTS: usize = 1056;
/// When the pool is full, one page in this many is evicted at a time (`LRU_PERCENT_CLEAN` 5 %), so
/// that a frontend with more pages than we keep does not cost one search per page.
const EVICT_SHARE: usize = 20;

/// Pages that were first used together, mapped contiguously.
struct Run {
    pages: Arc<dyn MappedGrants>,
    /// Address of the first page.
    base: NonNull<u8>,
    refs: Box<[GrantRef]>,
    /// Uses of any of its pages by requests in flight.
    pins: u32,
    /// When last used, in ticks.
    used: u32,
}

/// Where a page is.
#[derive(Clone, Copy)]
struct Place {
    run: u32,
    page: u32,
}

/// A pinned run, until [`PersistentGrants::unpin`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pin(u32);

/// Hashes grant references, which count up from small numbers, with one multiplication. A frontend
/// that makes them collide slows down its own ring, by at most as many steps as the pool has pages.
#[derive(Default)]
struct GrefHasher(u64);

impl Hasher for GrefHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u32(u32::from(b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        // 2^64 / golden ratio (Knuth); the table uses the low bits, and the high ones as tags.
        self.0 = (self.0 ^ u64::from(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// The pool of one ring.
pub(super) struct PersistentGrants {
    platform: Arc<dyn Platform>,
    peer: DomId,
    places: HashMap<GrantRef, Place, BuildHasherDefault<GrefHasher>>,
    runs: Vec<Option<Run>>,
    free: Vec<u32>,
    tick: u32,
    /// The frontend uses more pages than are kept. New ones are then mapped one by one: evicting a whole
    /// run because of one page, or keeping it because of one, wastes the others.
    crowded: bool,
    stats: Arc<RingStats>,
}

/// Memory for the first of some segments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    /// How many segments it covers, at least one.
    pub(super) count: usize,
    /// Where the page of the first segment is mapped; the pages of the others follow.
    pub(super) base: *mut u8,
}

/// What keeps pages mapped.
#[derive(Debug)]
pub(super) enum Hold {
    /// They stay at least until this is [given back](PersistentGrants::unpin).
    Pin(Pin),
    /// They are mapped for this request alone, because the pool is full of pages in use.
    Map(Arc<dyn MappedGrants>),
}

impl PersistentGrants {
    pub(super) fn new(platform: Arc<dyn Platform>, peer: DomId, stats: Arc<RingStats>) -> Self {
        let mut places = HashMap::default();
        places.reserve(MAX_PERSISTENT_GRANTS + MAX_INDIRECT_SEGMENTS);
        Self {
            platform,
            peer,
            places,
            runs: Vec::new(),
            free: Vec::new(),
            tick: 0,
            crowded: false,
            stats,
        }
    }

    /// Advances the clock for "least recently used".
    pub(super) fn tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
    }

    /// The pages of `segments`, or of the first of them as far as they are contiguous, if they are mapped.
    #[inline(always)]
    pub(super) fn known(&mut self, segments: &[Segment]) -> Option<(Found, Pin)> {
        let &Place { run: place, page } = self.places.get(&segments.first()?.gref)?;
        let run = self.runs.get_mut(place as usize)?.as_mut()?;
        run.pins += 1;
        run.used = self.tick;
        let base = run.base.as_ptr().wrapping_add(page as usize * PAGE_SIZE);
        let mut count = 1;
        if segments.len() > 1 {
            let behind = run.refs.get(page as usize + 1..).unwrap_or_default();
            let pairs = segments.iter().skip(1).zip(behind);
            count += pairs.take_while(|(segment, gref)| segment.gref == **gref).count();
        }
        self.stats.persistent_hits.add(count as u64);
        Some((Found { count, base }, Pin(place)))
    }

    /// As [`Self::known`], but maps the pages if they are not mapped yet.
    ///
    /// # Errors
    /// If the frontend has not granted one of them, or one cannot be mapped.
    pub(super) fn find(
        &mut self,
        segments: &[Segment],
        budget: &mut Budget,
    ) -> xen_platform::Result<(Found, Hold)> {
        match self.known(segments) {
            Some((found, pin)) => Ok((found, Hold::Pin(pin))),
            None => self.add(segments, budget),
        }
    }

    /// Maps and keeps the first of `segments`, which is not [known](Self::known), and those after it up to
    /// one that is. If there is no room for them, maps all for this request alone.
    ///
    /// # Errors
    /// As [`Self::find`].
    #[cold]
    pub(super) fn add(
        &mut self,
        segments: &[Segment],
        budget: &mut Budget,
    ) -> xen_platform::Result<(Found, Hold)> {
        let added = self.map_new(segments, budget);
        self.stats.persistent_held.set(self.places.len() as u64);
        added
    }

    fn map_new(
        &mut self,
        segments: &[Segment],
        budget: &mut Budget,
    ) -> xen_platform::Result<(Found, Hold)> {
        let place = self.free.pop().unwrap_or_else(|| {
            self.runs.push(None);
            self.runs.len() as u32 - 1
        });
        let most = if self.crowded { 1 } else { segments.len() };
        let mut refs = Vec::with_capacity(most);
        for segment in segments.iter().take(most) {
            // A page that the request names twice ends the run as well.
            let Entry::Vacant(vacant) = self.places.entry(segment.gref) else { break };
            vacant.insert(Place { run: place, page: refs.len() as u32 });
            refs.push(segment.gref);
        }
        let crowds = self.is_overfull();
        if crowds {
            self.evict();
        }
        let kept = if self.is_overfull() { Ok(None) } else { self.map(&refs, budget).map(Some) };
        self.crowded |= crowds && kept.is_ok();
        match kept {
            Ok(Some(pages)) => {
                let (count, base) = (refs.len(), pages.base());
                let run = Run { pages, base, refs: refs.into(), pins: 1, used: self.tick };
                self.runs[place as usize] = Some(run);
                Ok((Found { count, base: base.as_ptr() }, Hold::Pin(Pin(place))))
            }
            not_kept => {
                for gref in &refs {
                    self.places.remove(gref);
                }
                self.free.push(place);
                not_kept?;
                let all: Vec<_> = segments.iter().map(|segment| segment.gref).collect();
                let pages = self.map(&all, budget)?;
                let base = pages.base().as_ptr();
                Ok((Found { count: all.len(), base }, Hold::Map(pages)))
            }
        }
    }

    fn is_overfull(&self) -> bool {
        self.places.len() > MAX_PERSISTENT_GRANTS
    }

    fn map(
        &mut self,
        refs: &[GrantRef],
        budget: &mut Budget,
    ) -> xen_platform::Result<Arc<dyn MappedGrants>> {
        budget.maps(refs.len());
        // Read-write even for a write request: the same page may serve a read next time. A frontend
        // with persistent grants grants them all that way (blkif.h, feature-persistent).
        let pages = self.platform.map(self.peer, refs, Access::ReadWrite)?;
        self.stats.grant_maps.add(refs.len() as u64);
        Ok(pages)
    }

    /// Gives back one use of a run.
    pub(super) fn unpin(&mut self, Pin(place): Pin) {
        if let Some(Some(run)) = self.runs.get_mut(place as usize) {
            run.pins -= 1;
        }
    }

    /// Unmaps a share of the pages, and those above the limit: long runs first, then the least recently
    /// used.
    fn evict(&mut self) {
        let tick = self.tick;
        let idle = |(place, run): (u32, &Option<Run>)| {
            let run = run.as_ref().filter(|run| run.pins == 0)?;
            Some((run.refs.len(), tick.wrapping_sub(run.used), place))
        };
        let mut idle: Vec<_> = (0u32..).zip(&self.runs).filter_map(idle).collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        let keep = MAX_PERSISTENT_GRANTS - MAX_PERSISTENT_GRANTS / EVICT_SHARE;
        for (_, _, place) in idle {
            if self.places.len() <= keep {
                break;
            }
            drop(self.give_up(place));
        }
    }

    /// Removes and returns every page that no request uses, for a ring that has gone quiet.
    pub(super) fn purge(&mut self) -> Vec<Arc<dyn MappedGrants>> {
        self.crowded = false;
        let places = 0..self.runs.len() as u32;
        let pages = places.filter_map(|place| self.give_up(place)).collect();
        self.stats.persistent_held.set(self.places.len() as u64);
        pages
    }

    /// All pages of the pool.
    pub(super) fn into_pages(self) -> impl Iterator<Item = Arc<dyn MappedGrants>> {
        self.runs.into_iter().flatten().map(|run| run.pages)
    }

    /// Removes a run from the pool, unless a request uses it.
    fn give_up(&mut self, place: u32) -> Option<Arc<dyn MappedGrants>> {
        let run = self.runs[place as usize].take_if(|run| run.pins == 0)?;
        for gref in &run.refs {
            self.places.remove(gref);
        }
        self.free.push(place);
        self.stats.persistent_evictions.add(run.refs.len() as u64);
        Some(run.pages)
    }
}

#[cfg(test)]
mod tests;
