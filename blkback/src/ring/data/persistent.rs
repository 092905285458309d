//! Pages that stay mapped, for the device to work on.

use super::mapped::Maps;
use super::{Unreachable, list};
use crate::ring::budget::Budget;
use crate::ring::persistent::{Found, Hold, PersistentGrants, Pin};
use crate::storage::{IoVec, IoVecs};
use ring_proto::abi::Segment;
use std::sync::Arc;
use xen_platform::MappedGrants;

pub(super) struct Persistent {
    grants: PersistentGrants,
    /// The runs that each request uses, by tag.
    pins: Box<[Vec<Pin>]>,
    /// Pages for which the pool has no room.
    maps: Maps,
}

impl Persistent {
    pub(super) fn new(grants: PersistentGrants, slots: usize) -> Self {
        Self { grants, pins: vec![Vec::new(); slots].into(), maps: Maps::new(slots) }
    }

    pub(super) fn grants(&mut self) -> &mut PersistentGrants {
        &mut self.grants
    }

    pub(super) fn into_mappings(self) -> Vec<Arc<dyn MappedGrants>> {
        self.maps.into_mappings().chain(self.grants.into_pages()).collect()
    }

    #[inline(always)]
    pub(super) fn prepare(
        &mut self,
        tag: u16,
        segments: &[Segment],
        pages: &mut IoVecs,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        self.maps.check(segments.len())?;
        // Most requests: a page that is known.
        if let [segment] = segments
            && let Some((Found { base, .. }, pin)) = self.grants.known(segments)
        {
            self.pins[usize::from(tag)].push(pin);
            let data = base.wrapping_add(segment.offset());
            // SAFETY: as in `prepare_runs`.
            pages.push(unsafe { IoVec::new(data, segment.bytes()) });
            return Ok(());
        }
        self.prepare_runs(tag, segments, pages, budget)
    }

    #[inline(never)]
    fn prepare_runs(
        &mut self,
        tag: u16,
        segments: &[Segment],
        pages: &mut IoVecs,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        let mut rest = segments;
        while !rest.is_empty() {
            let Found { count, base } = if let Some((found, pin)) = self.grants.known(rest) {
                self.pins[usize::from(tag)].push(pin);
                found
            } else if let Ok((found, hold)) = self.grants.add(rest, budget) {
                match hold {
                    Hold::Pin(pin) => self.pins[usize::from(tag)].push(pin),
                    Hold::Map(map) => self.maps.hold(tag, map, found.count),
                }
                found
            } else {
                self.release(tag, budget);
                return Err(Unreachable::Refused);
            };
            let (these, others) = rest.split_at(count);
            // SAFETY: the pages stay mapped until `release` gives the pin or map back, and
            // validation keeps each segment within its page.
            unsafe { list(base, these, pages) };
            rest = others;
        }
        Ok(())
    }

    pub(super) fn release(&mut self, tag: u16, budget: &mut Budget) {
        while let Some(pin) = self.pins[usize::from(tag)].pop() {
            self.grants.unpin(pin);
        }
        self.maps.release(tag, budget);
    }
}
