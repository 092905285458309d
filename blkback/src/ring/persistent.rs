//! Grants that stay mapped from request to request.
//!
//! Pages that a request is the first to use are mapped side by side, as one *run*: one call to the
//! hypervisor, and from then on one look-up and one piece of memory for as much of a run as a request
//! names in the same order. A frontend that hands its pages out last in, first out does so mostly.

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
/// that a frontend with more pages than we keep does not cost a search a request.
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
/// that makes them collide slows down its own ring, by at most [`MAX_PERSISTENT_GRANTS`] steps.
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
    places: HashMap<GrantRef, Place, BuildHasherDefault<GrefHasher>>,
    runs: Vec<Option<Run>>,
    free: Vec<u32>,
    tick: u32,
    /// The frontend uses more pages than are kept. They are mapped one by one then, because giving up a
    /// run for the sake of one page, or keeping it for one, wastes the others.
    crowded: bool,
    /// Pages given up so far.
    pub(super) evictions: u64,
}

/// Memory of the first of some segments.
pub(super) struct Found {
    /// How many segments it serves, at least one.
    pub(super) count: usize,
    /// Where the page of the first is mapped; those of the others follow.
    pub(super) base: *mut u8,
    /// It was mapped just now.
    pub(super) is_new: bool,
    /// What keeps it mapped.
    pub(super) hold: Hold,
}

/// What keeps pages mapped.
pub(super) enum Hold {
    /// They stay at least until this is [given back](PersistentGrants::unpin).
    Pin(Pin),
    /// They are mapped for this request alone: the pool is full of pages in use.
    Map(Arc<dyn MappedGrants>),
}

impl PersistentGrants {
    pub(super) fn new() -> Self {
        let mut places = HashMap::default();
        places.reserve(MAX_PERSISTENT_GRANTS + MAX_INDIRECT_SEGMENTS);
        Self { places, runs: Vec::new(), free: Vec::new(), tick: 0, crowded: false, evictions: 0 }
    }

    /// Pages mapped now.
    pub(super) fn held(&self) -> usize {
        self.places.len()
    }

    /// Starts a new moment for "least recently used".
    pub(super) fn tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
    }

    /// The pages of `segments`, or of as many of the first of them as lie side by side, mapped now if
    /// they were not.
    ///
    /// # Errors
    /// When the frontend has not granted one of them, or it cannot be mapped.
    pub(super) fn find(
        &mut self,
        platform: &dyn Platform,
        peer: DomId,
        segments: &[Segment],
    ) -> xen_platform::Result<Found> {
        if let Some(first) = segments.first()
            && let Some(&Place { run: place, page }) = self.places.get(&first.gref)
            && let Some(Some(run)) = self.runs.get_mut(place as usize)
        {
            run.pins += 1;
            run.used = self.tick;
            // The first is known: a run of one page need not be looked into.
            let behind = run.refs.get(page as usize + 1..).unwrap_or_default();
            let pairs = segments.iter().skip(1).zip(behind);
            let count = 1 + pairs.take_while(|(segment, gref)| segment.gref == **gref).count();
            let base = run.base.as_ptr().wrapping_add(page as usize * PAGE_SIZE);
            let hold = Hold::Pin(Pin(place));
            return Ok(Found { count, base, is_new: false, hold });
        }
        self.map(platform, peer, segments)
    }

    /// Maps the first of `segments`, up to one whose page there is already.
    #[cold]
    fn map(
        &mut self,
        platform: &dyn Platform,
        peer: DomId,
        segments: &[Segment],
    ) -> xen_platform::Result<Found> {
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
        if self.held() > MAX_PERSISTENT_GRANTS {
            self.evict();
        }
        // Read-write whatever the request: the same page serves a read next time. A frontend that
        // offers persistent grants grants them all that way (blkif.h, feature-persistent).
        let (count, fits) = (refs.len(), self.held() <= MAX_PERSISTENT_GRANTS);
        match platform.map(peer, &refs, Access::ReadWrite) {
            Ok(pages) if fits => {
                let base = pages.base();
                let run = Run { pages, base, refs: refs.into(), pins: 1, used: self.tick };
                self.runs[place as usize] = Some(run);
                Ok(Found { count, base: base.as_ptr(), is_new: true, hold: Hold::Pin(Pin(place)) })
            }
            not_kept => {
                for gref in &refs {
                    self.places.remove(gref);
                }
                self.free.push(place);
                let pages = not_kept?;
                let base = pages.base().as_ptr();
                Ok(Found { count, base, is_new: true, hold: Hold::Map(pages) })
            }
        }
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
        self.crowded = true;
        let tick = self.tick;
        let mut idle: Vec<_> = (0u32..)
            .zip(&self.runs)
            .filter_map(|(place, run)| Some((place, run.as_ref()?)))
            .filter(|(_, run)| run.pins == 0)
            .map(|(place, run)| (run.refs.len(), tick.wrapping_sub(run.used), place))
            .collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        let keep = MAX_PERSISTENT_GRANTS - MAX_PERSISTENT_GRANTS / EVICT_SHARE;
        for (_, _, place) in idle {
            if self.held() <= keep {
                break;
            }
            drop(self.give_up(place));
        }
    }

    /// Hands out every page that no request uses, for a ring that has gone quiet.
    pub(super) fn purge(&mut self) -> Vec<Arc<dyn MappedGrants>> {
        self.crowded = false;
        let places = 0..self.runs.len() as u32;
        places.filter_map(|place| self.give_up(place)).collect()
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
        self.evictions += run.refs.len() as u64;
        Some(run.pages)
    }
}
