//! Grants that stay mapped from request to request.
//!
//! What a request names that is not mapped is mapped by one operation, as a group, and the group is
//! unmapped as one: a map costs the kernel by the mapping, and an unmap a flush of other CPUs' TLBs.

use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, Window};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr::NonNull;
use std::sync::Arc;
use xen_platform::{Access, MappedGrants, Platform};

/// Persistent grants a ring keeps at the most: `xen_blkif_max_pgrants` of Linux's backend, 3 for
/// every segment of 32 direct requests. It bounds the maptrack handles that one guest can hold. A page
/// counts for as long as its group is mapped, whether it is used itself or not.
pub(super) const MAX_PERSISTENT_GRANTS: usize = 1056;
/// What is given up at a time when the pool is full: one in this many (`LRU_PERCENT_CLEAN` 5 %)...
const EVICT_SHARE: usize = 20;
/// ...and no more until so many rounds later (Linux's backend waits 100 ms). Of more pages than we keep, used
/// in turn, those unused for longest are the next to come: giving them up each time would keep none that is
/// of use. Linux's frontend takes pages first that it finds still mapped.
const EVICT_PAUSE: u32 = 256;

/// Pages that were mapped together.
struct Group {
    map: Arc<dyn MappedGrants>,
    /// The address of the first.
    base: NonNull<u8>,
    refs: Vec<GrantRef>,
    /// Segments in flight that use one of them.
    pins: u32,
    /// When last used, in ticks.
    used: u32,
    /// Otherwise unmapped with its last pin: the pool was full of pages in use.
    kept: bool,
}

/// Where the page of a grant is. Who pins it has it until [`PersistentGrants::unpin`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pin {
    pub(super) group: u32,
    page: u32,
}

impl Pin {
    /// In bytes from the start of its group.
    const fn offset(self) -> usize {
        self.page as usize * PAGE_SIZE
    }
}

impl Group {
    fn address(&self, pin: Pin) -> *mut u8 {
        self.base.as_ptr().wrapping_add(pin.offset())
    }
}

/// Spreads grant references, which count up from small numbers, with one multiplication. A frontend
/// that makes them collide slows down its own ring, by at most as many steps as pages are mapped.
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
    places: HashMap<GrantRef, Pin, BuildHasherDefault<GrefHasher>>,
    groups: Vec<Option<Group>>,
    free: Vec<u32>,
    tick: u32,
    /// When last something was given up because the pool was full, in ticks.
    evicted: u32,
    held: usize,
    transient: usize,
    /// Pages given up so far.
    pub(super) evictions: u64,
}

/// What became of a look-up.
pub(super) struct Page {
    pub(super) pin: Pin,
    pub(super) address: *mut u8,
    /// Pages that were mapped for it.
    pub(super) mapped: usize,
}

impl PersistentGrants {
    pub(super) fn new() -> Self {
        let mut places = HashMap::default();
        places.reserve(MAX_PERSISTENT_GRANTS);
        Self {
            places,
            groups: Vec::new(),
            free: Vec::new(),
            tick: 0,
            evicted: 0,
            held: 0,
            transient: 0,
            evictions: 0,
        }
    }

    /// Pages that stay mapped, [`MAX_PERSISTENT_GRANTS`] at the most.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Pages that are mapped beside them, until the requests that use them are over.
    pub(super) fn transient(&self) -> usize {
        self.transient
    }

    /// Starts a new moment for "least recently used".
    pub(super) fn tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
    }

    /// The page behind `gref`, until [`Self::unpin`]. If it is not mapped it is now, together with what
    /// is not of `rest`.
    ///
    /// # Errors
    /// When one of the grants to be mapped is refused; then none is mapped.
    pub(super) fn page(
        &mut self,
        platform: &dyn Platform,
        peer: DomId,
        gref: GrantRef,
        rest: impl Iterator<Item = GrantRef>,
    ) -> xen_platform::Result<Page> {
        if let Some(&pin) = self.places.get(&gref)
            && let Some(Some(group)) = self.groups.get_mut(pin.group as usize)
        {
            group.pins += 1;
            group.used = self.tick;
            return Ok(Page { pin, address: group.address(pin), mapped: 0 });
        }
        self.map(platform, peer, std::iter::once(gref).chain(rest))
    }

    /// Maps those of `grefs` that are not mapped as a group, and pins the first, which is one of them.
    fn map(
        &mut self,
        platform: &dyn Platform,
        peer: DomId,
        grefs: impl Iterator<Item = GrantRef>,
    ) -> xen_platform::Result<Page> {
        let place = self.free.pop().unwrap_or_else(|| {
            self.groups.push(None);
            self.groups.len() as u32 - 1
        });
        let mut refs = Vec::new();
        for gref in grefs {
            match self.places.entry(gref) {
                Entry::Vacant(entry) => {
                    entry.insert(Pin { group: place, page: refs.len() as u32 });
                    refs.push(gref);
                }
                // The request needs it too: it is not to make room.
                Entry::Occupied(entry) => {
                    if let Some(Some(group)) = self.groups.get_mut(entry.get().group as usize) {
                        group.used = self.tick;
                    }
                }
            }
        }
        let kept = self.make_room(refs.len());
        // Read-write whatever the request: the same page serves a read next time. A frontend that
        // offers persistent grants grants them all that way (blkif.h, feature-persistent).
        let map = match platform.map(peer, &refs, Access::ReadWrite) {
            Ok(map) => map,
            Err(error) => {
                for gref in &refs {
                    self.places.remove(gref);
                }
                self.free.push(place);
                return Err(error);
            }
        };
        let mapped = refs.len();
        *if kept { &mut self.held } else { &mut self.transient } += mapped;
        let group = Group { base: map.base(), map, refs, pins: 1, used: self.tick, kept };
        let pin = Pin { group: place, page: 0 };
        let address = group.address(pin);
        self.groups[place as usize] = Some(group);
        Ok(Page { pin, address, mapped })
    }

    /// The first `bytes` of a page that is pinned.
    pub(super) fn window(&self, pin: Pin, bytes: usize) -> Option<Window> {
        let group = self.groups.get(pin.group as usize)?.as_ref()?;
        Window::new(group.map.clone(), pin.offset(), bytes)
    }

    /// Gives back one use of a page.
    pub(super) fn unpin(&mut self, pin: Pin) {
        if let Some(Some(group)) = self.groups.get_mut(pin.group as usize) {
            group.pins -= 1;
            if group.pins == 0 && !group.kept {
                self.give_up(pin.group);
            }
        }
    }

    /// Whether there is room for `pages` more among those that stay; now and then it is made, by unmapping
    /// what was unused for longest.
    fn make_room(&mut self, pages: usize) -> bool {
        if self.held + pages <= MAX_PERSISTENT_GRANTS {
            return true;
        }
        let tick = self.tick;
        if tick.wrapping_sub(self.evicted) < EVICT_PAUSE {
            return false;
        }
        self.evicted = tick;
        let mut idle: Vec<(u32, u32)> = (0u32..)
            .zip(&self.groups)
            .filter_map(|(place, group)| Some((place, group.as_ref()?)))
            .filter(|(_, group)| group.pins == 0 && group.used != tick)
            .map(|(place, group)| (tick.wrapping_sub(group.used), place))
            .collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        let room = pages.max(MAX_PERSISTENT_GRANTS / EVICT_SHARE);
        for (_, place) in idle {
            if self.held + room <= MAX_PERSISTENT_GRANTS {
                break;
            }
            self.give_up(place);
        }
        self.held + pages <= MAX_PERSISTENT_GRANTS
    }

    /// Unmaps every group that no request uses, for a ring that has gone quiet.
    pub(super) fn purge(&mut self) {
        for place in 0..self.groups.len() as u32 {
            if self.groups[place as usize].as_ref().is_some_and(|group| group.pins == 0) {
                self.give_up(place);
            }
        }
    }

    fn give_up(&mut self, place: u32) {
        let Some(group) = self.groups[place as usize].take() else { return };
        let pages = group.refs.len();
        for gref in &group.refs {
            self.places.remove(gref);
        }
        self.free.push(place);
        if group.kept {
            self.held -= pages;
            self.evictions += pages as u64;
        } else {
            self.transient -= pages;
        }
    }
}
