//! Data that the hypervisor copies to and from bounce buffers.

use super::Unreachable;
use crate::ring::bounce::BouncePool;
use crate::ring::budget::Budget;
use crate::stats::RingStats;
use crate::storage::{IoVec, IoVecs};
use ring_proto::abi::Segment;
use std::ops::Range;
use xen_platform::{CopyDirection, CopySegment, GrantCopier, GrantStatus};

pub(super) struct Copied {
    pool: BouncePool,
    /// By tag.
    held: Box<[Held]>,
    /// Copies to be made in one operation, and the tag of each.
    copies: Vec<CopySegment>,
    owners: Vec<u16>,
}

#[derive(Clone, Default)]
struct Held {
    /// The segments of a read.
    segments: Vec<Segment>,
    buffer: Option<Range<usize>>,
    /// A copy was refused.
    refused: bool,
}

impl Copied {
    pub(super) fn new(pool: BouncePool, slots: usize, direct_segments: usize) -> Self {
        Self {
            pool,
            held: vec![Held::default(); slots].into(),
            copies: Vec::with_capacity(slots * direct_segments),
            owners: Vec::with_capacity(slots * direct_segments),
        }
    }

    pub(super) fn pool(&self) -> &BouncePool {
        &self.pool
    }

    pub(super) fn purge(&mut self) {
        self.pool.purge();
    }

    pub(super) fn prepare(
        &mut self,
        tag: u16,
        write: bool,
        segments: &[Segment],
        buffers: &mut IoVecs,
    ) -> Result<(), Unreachable> {
        let bytes = segments.iter().map(Segment::bytes).sum();
        let range = self.pool.take(bytes).ok_or(Unreachable::Busy)?;
        // SAFETY: the range is within the region, which lives as long as `self`; the worker
        // waits for its operations before it drops `self`. The range is this request's alone
        // until `release`.
        buffers.push(unsafe { IoVec::new(self.pool.address(&range), bytes) });
        let held = &mut self.held[usize::from(tag)];
        if write {
            let from = CopyDirection::FromPeer;
            stage(&mut self.copies, &mut self.owners, tag, segments, range.start, from);
        } else {
            held.segments.clear();
            held.segments.extend_from_slice(segments);
        }
        held.buffer = Some(range);
        Ok(())
    }

    pub(super) fn filled(&mut self, tag: u16, budget: &mut Budget) {
        let Held { segments, buffer: Some(range), .. } = &self.held[usize::from(tag)] else {
            return;
        };
        let to = CopyDirection::ToPeer;
        stage(&mut self.copies, &mut self.owners, tag, segments, range.start, to);
        budget.moves(range.len() as u64);
    }

    pub(super) fn copy(&mut self, copier: &mut dyn GrantCopier, stats: &RingStats) {
        if self.copies.is_empty() {
            return;
        }
        stats.grant_copies.add(self.copies.len() as u64);
        let whole = copier.copy(self.pool.region(), &mut self.copies);
        for (copy, &tag) in self.copies.iter().zip(&self.owners) {
            self.held[usize::from(tag)].refused |= whole.is_err() || copy.status.is_err();
        }
        self.copies.clear();
        self.owners.clear();
    }

    pub(super) fn refused(&self, tag: u16) -> bool {
        self.held[usize::from(tag)].refused
    }

    pub(super) fn release(&mut self, tag: u16) {
        let held = &mut self.held[usize::from(tag)];
        held.refused = false;
        if let Some(range) = held.buffer.take() {
            self.pool.give(&range);
        }
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
