//! Grants that stay mapped from request to request.
//!
//! Pages that a request is the first to use are mapped side by side, as one *run*: one call to the
//! hypervisor, and from then on one look-up and one piece of memory for as much of a run as a request
//! names in the same order. A frontend that hands its pages out last in, first out does so mostly.

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

/// Persistent grants a ring keeps at the most: `xen_blkif_max_pgrants` of Linux's backend, 3 for
/// every segment of 32 direct requests. It bounds the maptrack handles that one guest can hold.
pub(super) const MAX_PERSISTENT_GRANTS: usize = 1056;
/// What is given up at a time when the pool is full: one in this many (`LRU_PERCENT_CLEAN` 5 %), so
/// that a frontend with more pages than we keep does not cost a search a page.
const EVICT_SHARE: usize = 20;

/// Pages that were first used together, mapped side by side.
struct Run {
    pages: Arc<dyn MappedGrants>,
    /// Of the first page.
    base: NonNull<u8>,
    refs: Box<[GrantRef]>,
    /// Uses by requests in flight, of any of its pages.
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

/// A run that is pinned, until [`PersistentGrants::unpin`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pin(u32);

/// Spreads grant references, which count up from small numbers, with one multiplication. A frontend
/// that makes them collide slows down its own ring, by as many steps as the pool has pages.
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
    /// The frontend uses more pages than are kept. They are mapped one by one then, because giving up a
    /// run for the sake of one page, or keeping it for one, wastes the others.
    crowded: bool,
    stats: Arc<RingStats>,
}

/// Memory of the first of some segments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    /// How many segments it serves, at least one.
    pub(super) count: usize,
    /// Where the page of the first is mapped; those of the others follow.
    pub(super) base: *mut u8,
}

/// What keeps pages mapped.
#[derive(Debug)]
pub(super) enum Hold {
    /// They stay at least until this is [given back](PersistentGrants::unpin).
    Pin(Pin),
    /// They are mapped for this request alone: the pool is full of pages in use.
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

    /// Starts a new moment for "least recently used".
    pub(super) fn tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
    }

    /// The pages of `segments`, or of as many of the first of them as lie side by side, if they are mapped.
    #[inline]
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

    /// As [`Self::known`]; the pages are mapped now if they were not.
    ///
    /// # Errors
    /// When the frontend has not granted one of them, or it cannot be mapped.
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

    /// Maps and keeps the first of `segments`, which is not [known](Self::known), and those behind it up to
    /// one that is. If there is no room for them, maps them all for this request.
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
        // Read-write whatever the request: the same page serves a read next time. A frontend that
        // offers persistent grants grants them all that way (blkif.h, feature-persistent).
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

    /// Unmaps a share of the pages, and those above the limit: long runs first, then what was unused
    /// for longest.
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

    /// Hands out every page that no request uses, for a ring that has gone quiet.
    pub(super) fn purge(&mut self) -> Vec<Arc<dyn MappedGrants>> {
        self.crowded = false;
        let places = 0..self.runs.len() as u32;
        let pages = places.filter_map(|place| self.give_up(place)).collect();
        self.stats.persistent_held.set(self.places.len() as u64);
        pages
    }

    /// All of its pages.
    pub(super) fn into_pages(self) -> impl Iterator<Item = Arc<dyn MappedGrants>> {
        self.runs.into_iter().flatten().map(|run| run.pages)
    }

    /// Takes a run out, unless a request uses it.
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
