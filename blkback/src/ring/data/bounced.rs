//! Pages that stay mapped, while the device works on bounce buffers.

use super::Unreachable;
use super::persistent::Persistent;
use crate::ring::bounce::BouncePool;
use crate::ring::budget::Budget;
use crate::ring::persistent::PersistentGrants;
use crate::storage::{IoVec, IoVecs};
use ring_proto::abi::Segment;
use std::ops::Range;
use std::sync::Arc;
use xen_platform::MappedGrants;

pub(super) struct Bounced {
    mapped: Persistent,
    pool: BouncePool,
    /// By tag.
    held: Box<[Held]>,
}

#[derive(Clone, Default)]
struct Held {
    pages: IoVecs,
    buffer: Option<Range<usize>>,
}

impl Bounced {
    pub(super) fn new(mapped: Persistent, pool: BouncePool, slots: usize) -> Self {
        Self { mapped, pool, held: vec![Held::default(); slots].into() }
    }

    pub(super) fn pool(&self) -> &BouncePool {
        &self.pool
    }

    pub(super) fn grants(&mut self) -> &mut PersistentGrants {
        self.mapped.grants()
    }

    pub(super) fn purge(&mut self) {
        self.pool.purge();
    }

    pub(super) fn into_mappings(self) -> Vec<Arc<dyn MappedGrants>> {
        self.mapped.into_mappings()
    }

    pub(super) fn prepare(
        &mut self,
        tag: u16,
        write: bool,
        segments: &[Segment],
        buffers: &mut IoVecs,
        budget: &mut Budget,
    ) -> Result<(), Unreachable> {
        let Held { pages, buffer } = &mut self.held[usize::from(tag)];
        let bytes = segments.iter().map(Segment::bytes).sum();
        let range = self.pool.take(bytes).ok_or(Unreachable::Busy)?;
        pages.clear();
        if let Err(unreachable) = self.mapped.prepare(tag, segments, pages, budget) {
            self.pool.give(&range);
            return Err(unreachable);
        }
        if write {
            each(pages, &range, |page, at| page.copy_into(&**self.pool.region(), at));
        }
        // SAFETY: as in grant copy: the range is within the region, which outlives the operation, and is
        // this request's alone until `release`.
        buffers.push(unsafe { IoVec::new(self.pool.address(&range), bytes) });
        *buffer = Some(range);
        Ok(())
    }

    pub(super) fn filled(&mut self, tag: u16, budget: &mut Budget) {
        let Held { pages, buffer: Some(range) } = &self.held[usize::from(tag)] else { return };
        each(pages, range, |page, at| page.fill_from(&**self.pool.region(), at));
        budget.moves(range.len() as u64);
    }

    pub(super) fn release(&mut self, tag: u16, budget: &mut Budget) {
        self.mapped.release(tag, budget);
        if let Some(range) = self.held[usize::from(tag)].buffer.take() {
            self.pool.give(&range);
        }
    }
}

/// Calls `copy` with each of `pages` and its place in the buffer at `range`.
fn each(pages: &IoVecs, range: &Range<usize>, mut copy: impl FnMut(&IoVec, usize)) {
    let mut at = range.start;
    for page in pages {
        copy(page, at);
        at += page.len();
    }
}
