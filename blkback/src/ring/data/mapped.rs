//! Pages mapped for a single request.

use super::{Unreachable, list};
use crate::ring::budget::Budget;
use crate::ring::setup::RingSetup;
use crate::stats::RingStats;
use crate::storage::IoVecs;
use ring_proto::abi::Segment;
use ring_proto::{DomId, GrantRef};
use std::sync::Arc;
use xen_platform::{Access, MappedGrants, Platform};

/// The most pages that a ring keeps mapped for requests in flight, besides its persistent grants. As
/// much as grant copy's large buffers hold; 8 MiB keep any disk busy. Without a bound, indirect
/// requests could use up the mappings that a process may have (`vm.max_map_count`), to the detriment
/// of other guests' devices.
const MAX_MAPPED_PAGES: usize = 2048;

/// Mappings for single requests.
pub(super) struct Maps {
    /// By tag.
    held: Box<[Held]>,
    /// Total pages.
    pages: usize,
}

#[derive(Clone, Default)]
struct Held {
    maps: Vec<Arc<dyn MappedGrants>>,
    pages: usize,
}

impl Maps {
    pub(super) fn new(slots: usize) -> Self {
        Self { held: vec![Held::default(); slots].into(), pages: 0 }
    }

    /// Whether a request may have so many pages mapped now; a single request always may.
    #[inline]
    pub(super) fn check(&self, pages: usize) -> Result<(), Unreachable> {
        let full = self.pages > 0 && self.pages + pages > MAX_MAPPED_PAGES;
        if full { Err(Unreachable::Busy) } else { Ok(()) }
    }

    pub(super) fn hold(&mut self, tag: u16, map: Arc<dyn MappedGrants>, pages: usize) {
        let held = &mut self.held[usize::from(tag)];
        held.maps.push(map);
        held.pages += pages;
        self.pages += pages;
    }

    #[inline]
    pub(super) fn release(&mut self, tag: u16, budget: &mut Budget) {
        if self.pages > 0 {
            let held = &mut self.held[usize::from(tag)];
            held.maps.clear();
            let pages = std::mem::take(&mut held.pages);
            self.pages -= pages;
            budget.maps(pages);
        }
    }

    pub(super) fn into_mappings(self) -> impl Iterator<Item = Arc<dyn MappedGrants>> {
        self.held.into_iter().flat_map(|held| held.maps)
    }
}

pub(super) struct Mapped {
    platform: Arc<dyn Platform>,
    peer: DomId,
    maps: Maps,
    refs: Vec<GrantRef>,
    stats: Arc<RingStats>,
}

impl Mapped {
    pub(super) fn new(setup: &RingSetup, slots: usize) -> Self {
        let (platform, stats) = (setup.platform.clone(), setup.stats.clone());
        let (maps, refs) = (Maps::new(slots), Vec::new());
        Self { platform, peer: setup.peer, maps, refs, stats }
    }

    pub(super) fn into_mappings(self) -> Vec<Arc<dyn MappedGrants>> {
        self.maps.into_mappings().collect()
    }

    pub(super) fn prepare(
        &mut self,
        tag: u16,
        write: bool,
        segments: &[Segment],
        buffers: &mut IoVecs,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        self.maps.check(segments.len())?;
        self.refs.clear();
        self.refs.extend(segments.iter().map(|segment| segment.gref));
        budget.maps(segments.len());
        let access = if write { Access::ReadOnly } else { Access::ReadWrite };
        let map = self.platform.map(self.peer, &self.refs, access);
        let map = map.map_err(|_| Unreachable::Refused)?;
        // SAFETY: the pages stay mapped until `release`, and validation keeps each segment within its page.
        unsafe { list(map.base().as_ptr(), segments, buffers) };
        self.maps.hold(tag, map, segments.len());
        self.stats.grant_maps.add(segments.len() as u64);
        Ok(())
    }

    pub(super) fn release(&mut self, tag: u16, budget: &mut Budget) {
        self.maps.release(tag, budget);
    }
}
