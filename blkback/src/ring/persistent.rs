//! Grants that stay mapped from request to request.

use ring_proto::{DomId, GrantRef};
use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::hash::{BuildHasherDefault, Hasher};
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
    pins: u32,
    /// When last used, in ticks.
    used: u32,
}

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
    pages: HashMap<GrantRef, Entry, BuildHasherDefault<GrefHasher>>,
    tick: u32,
    /// Pages given up so far.
    pub(super) evictions: u64,
}

/// What became of a look-up.
pub(super) enum Page<'a> {
    /// It was mapped already, and is now pinned.
    Hit(&'a Arc<dyn MappedGrants>),
    /// It was mapped just now, and is pinned.
    New(&'a Arc<dyn MappedGrants>),
    /// It is mapped for this request alone: the pool is full of pages in use.
    Transient(Arc<dyn MappedGrants>),
}

impl PersistentGrants {
    pub(super) fn new() -> Self {
        let mut pages = HashMap::default();
        pages.reserve(MAX_PERSISTENT_GRANTS);
        Self { pages, tick: 0, evictions: 0 }
    }

    /// Pages mapped now.
    pub(super) fn held(&self) -> usize {
        self.pages.len()
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
    ) -> xen_platform::Result<Page<'_>> {
        if self.pages.len() >= MAX_PERSISTENT_GRANTS && !self.pages.contains_key(&gref) {
            self.evict();
            if self.pages.len() >= MAX_PERSISTENT_GRANTS {
                return platform.map(peer, &[gref], Access::ReadWrite).map(Page::Transient);
            }
        }
        match self.pages.entry(gref) {
            Occupied(occupied) => {
                let entry = occupied.into_mut();
                entry.pins += 1;
                entry.used = self.tick;
                Ok(Page::Hit(&entry.page))
            }
            Vacant(vacant) => {
                // Read-write whatever the request: the same page serves a read next time. A frontend
                // that offers persistent grants grants them all that way (blkif.h, feature-persistent).
                let page = platform.map(peer, &[gref], Access::ReadWrite)?;
                let entry = vacant.insert(Entry { page, pins: 1, used: self.tick });
                Ok(Page::New(&entry.page))
            }
        }
    }

    /// Gives back one use of a page.
    pub(super) fn unpin(&mut self, gref: GrantRef) {
        if let Some(entry) = self.pages.get_mut(&gref) {
            entry.pins -= 1;
        }
    }

    /// Unmaps a share of the pages that were unused for longest.
    fn evict(&mut self) {
        let tick = self.tick;
        let mut idle: Vec<(u32, GrantRef)> = self
            .pages
            .iter()
            .filter(|(_, entry)| entry.pins == 0)
            .map(|(&gref, entry)| (tick.wrapping_sub(entry.used), gref))
            .collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        for (_, gref) in idle.into_iter().take(MAX_PERSISTENT_GRANTS / EVICT_SHARE) {
            self.pages.remove(&gref);
            self.evictions += 1;
        }
    }

    /// Unmaps every page that no request uses, for a ring that has gone quiet.
    pub(super) fn purge(&mut self) {
        let before = self.pages.len();
        self.pages.retain(|_, entry| entry.pins > 0);
        self.evictions += (before - self.pages.len()) as u64;
    }
}
