//! Grants that stay mapped from request to request.

use ring_proto::{DomId, GrantRef};
use std::collections::HashMap;
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

/// A mapped page, and how many segments in flight use it.
struct Entry {
    page: Arc<dyn MappedGrants>,
    /// The address of the page.
    base: NonNull<u8>,
    gref: GrantRef,
    pins: u32,
    /// When last used, in ticks.
    used: u32,
}

/// A pinned page, until [`PersistentGrants::unpin`].
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
    /// Where the page of a grant is among the entries.
    places: HashMap<GrantRef, u32, BuildHasherDefault<GrefHasher>>,
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    tick: u32,
    /// Pages given up so far.
    pub(super) evictions: u64,
}

/// What became of a look-up.
pub(super) enum Page {
    /// It is pinned, and was mapped just now or before.
    Pinned { pin: Pin, base: NonNull<u8>, new: bool },
    /// It is mapped for this request alone: the pool is full of pages in use.
    Transient(Arc<dyn MappedGrants>),
}

impl PersistentGrants {
    pub(super) fn new() -> Self {
        let mut places = HashMap::default();
        places.reserve(MAX_PERSISTENT_GRANTS);
        Self { places, entries: Vec::new(), free: Vec::new(), tick: 0, evictions: 0 }
    }

    /// Pages mapped now.
    pub(super) fn held(&self) -> usize {
        self.places.len()
    }

    /// Starts a new moment for "least recently used".
    pub(super) fn tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
    }

    /// The page behind `gref`, mapped now if it was not. Unless it is transient it stays until [`Self::unpin`].
    pub(super) fn page(
        &mut self,
        platform: &dyn Platform,
        peer: DomId,
        gref: GrantRef,
    ) -> xen_platform::Result<Page> {
        if let Some(&place) = self.places.get(&gref)
            && let Some(Some(entry)) = self.entries.get_mut(place as usize)
        {
            entry.pins += 1;
            entry.used = self.tick;
            return Ok(Page::Pinned { pin: Pin(place), base: entry.base, new: false });
        }
        if self.held() >= MAX_PERSISTENT_GRANTS {
            self.evict();
        }
        // Read-write whatever the request: the same page serves a read next time. A frontend that
        // offers persistent grants grants them all that way (blkif.h, feature-persistent).
        let page = platform.map(peer, &[gref], Access::ReadWrite)?;
        if self.held() >= MAX_PERSISTENT_GRANTS {
            return Ok(Page::Transient(page));
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        self.places.insert(gref, place);
        let base = page.base();
        let entry = Entry { page, base, gref, pins: 1, used: self.tick };
        self.entries[place as usize] = Some(entry);
        Ok(Page::Pinned { pin: Pin(place), base, new: true })
    }

    /// A page that is pinned.
    pub(super) fn memory(&self, Pin(place): Pin) -> Option<&Arc<dyn MappedGrants>> {
        self.entries.get(place as usize)?.as_ref().map(|entry| &entry.page)
    }

    /// Gives back one use of a page.
    pub(super) fn unpin(&mut self, Pin(place): Pin) {
        if let Some(Some(entry)) = self.entries.get_mut(place as usize) {
            entry.pins -= 1;
        }
    }

    /// Unmaps a share of the pages that were unused for longest.
    fn evict(&mut self) {
        let tick = self.tick;
        let mut idle: Vec<(u32, u32)> = (0u32..)
            .zip(&self.entries)
            .filter_map(|(place, entry)| Some((place, entry.as_ref()?)))
            .filter(|(_, entry)| entry.pins == 0)
            .map(|(place, entry)| (tick.wrapping_sub(entry.used), place))
            .collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        for (_, place) in idle.into_iter().take(MAX_PERSISTENT_GRANTS / EVICT_SHARE) {
            drop(self.give_up(place));
        }
    }

    /// Hands out every page that no request uses, for a ring that has gone quiet.
    pub(super) fn purge(&mut self) -> Vec<Arc<dyn MappedGrants>> {
        let places = 0..self.entries.len() as u32;
        places.filter_map(|place| self.give_up(place)).collect()
    }

    /// All of its pages.
    pub(super) fn into_pages(self) -> impl Iterator<Item = Arc<dyn MappedGrants>> {
        self.entries.into_iter().flatten().map(|entry| entry.page)
    }

    /// Takes a page out, unless a request uses it.
    fn give_up(&mut self, place: u32) -> Option<Arc<dyn MappedGrants>> {
        let entry = self.entries[place as usize].take_if(|entry| entry.pins == 0)?;
        self.places.remove(&entry.gref);
        self.free.push(place);
        self.evictions += 1;
        Some(entry.page)
    }
}
