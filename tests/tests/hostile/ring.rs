//! A ring as seen by a frontend that obeys no rule. Offsets are blkif.h's and ring.h's, written down here
//! once more, so that nothing relies on the code under test.

use crate::guest::{Link, wait_for_event, window};
use anyhow::{Result, bail};
use ring_proto::{Abi, RingLayout, RingPages, Window};
use std::sync::atomic::{Ordering, fence};
use xen_blk_tests::process::{HUNG, Patience};

/// An index on the shared page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Index {
    ReqProd = 0,
    ReqEvent = 1,
    RspProd = 2,
    RspEvent = 3,
}

/// Longest slot, in bytes.
pub(crate) const MAX_SLOT: usize = 112;

/// Where the fields of a request stand.
#[derive(Clone, Copy)]
struct Offsets {
    slot: usize,
    id: usize,
    sector: usize,
    body: usize,
    wide_id: bool,
}

fn offsets(layout: RingLayout) -> Offsets {
    match layout {
        RingLayout::Union(Abi::X86_64) => {
            Offsets { slot: 112, id: 8, sector: 16, body: 24, wide_id: true }
        }
        RingLayout::Union(Abi::X86_32) => {
            Offsets { slot: 108, id: 4, sector: 12, body: 20, wide_id: true }
        }
        RingLayout::Split => Offsets { slot: 64, id: 4, sector: 8, body: 16, wide_id: false },
    }
}

/// A request, field by field. `body` is what follows `sector_number`: 8 bytes a segment, `nr_sectors` of a
/// discard, or `handle`, padding and the grants of an indirect request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields {
    pub(crate) operation: u8,
    /// `nr_segments`, `flag`, `indirect_op`.
    pub(crate) detail: u8,
    /// `handle`, `nr_segments` of an indirect request.
    pub(crate) half: u16,
    pub(crate) id: u64,
    pub(crate) sector: u64,
    pub(crate) body: [u8; 88],
}

impl Fields {
    pub(crate) fn set_segment(&mut self, n: usize, gref: u32, first: u8, last: u8) {
        self.body[8 * n..8 * n + 4].copy_from_slice(&gref.to_le_bytes());
        self.body[8 * n + 4..8 * n + 6].copy_from_slice(&[first, last]);
    }

    pub(crate) fn set_indirect_page(&mut self, n: usize, gref: u32) {
        self.body[4 + 4 * n..8 + 4 * n].copy_from_slice(&gref.to_le_bytes());
    }

    pub(crate) fn set_nr_sectors(&mut self, sectors: u64) {
        self.body[..8].copy_from_slice(&sectors.to_le_bytes());
    }
}

/// A response.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    pub(crate) id: u64,
    pub(crate) operation: u8,
    pub(crate) status: i16,
}

/// The ring.
pub(crate) struct RawRing {
    link: Link,
    indices: [Window; 4],
    requests: Vec<Window>,
    responses: Vec<Window>,
    offsets: Offsets,
}

impl RawRing {
    pub(crate) fn new(link: Link) -> Result<Self> {
        let layout = link.transport.layout;
        let offsets = offsets(layout);
        let pages = 1usize << link.transport.order;
        let (slots, first, control) = match link.pages() {
            RingPages::Union(memory) => {
                let slots = (pages * 4096 - 64) / offsets.slot;
                (slots, memory.clone(), memory)
            }
            RingPages::Split(requests, control) => (pages * 4096 / 64, requests, control),
        };
        let slots = 1 << slots.ilog2();
        let split = layout == RingLayout::Split;
        let index = |n: usize| window(&control, if split { 64 * n } else { 4 * n }, 4);
        let base = if split { 0 } else { 64 };
        let requests: Vec<_> = (0..slots)
            .map(|n| window(&first, base + n * offsets.slot, offsets.slot))
            .collect::<Result<_>>()?;
        let responses = match split {
            true => (0..slots).map(|n| window(&control, 256 + 8 * n, 8)).collect::<Result<_>>()?,
            false => (0..slots)
                .map(|n| window(&first, base + n * offsets.slot, 12))
                .collect::<Result<_>>()?,
        };
        let indices = [index(0)?, index(1)?, index(2)?, index(3)?];
        Ok(Self { link, indices, requests, responses, offsets })
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    pub(crate) fn into_link(self) -> Link {
        self.link
    }

    pub(crate) fn slots(&self) -> u32 {
        self.requests.len() as u32
    }

    /// Segments that a request has room for.
    pub(crate) fn room(&self) -> usize {
        (self.offsets.slot - self.offsets.body) / 8
    }

    /// Bits of an id that come back.
    pub(crate) fn id_mask(&self) -> u64 {
        if self.offsets.wide_id { u64::MAX } else { u64::from(u32::MAX) }
    }

    pub(crate) fn get(&self, index: Index) -> u32 {
        let mut bytes = [0; 4];
        self.indices[index as usize].read(&mut bytes);
        fence(Ordering::SeqCst);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn set(&self, index: Index, value: u32) {
        fence(Ordering::SeqCst);
        self.indices[index as usize].write(&value.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// The slots that requests are written to, for whoever wants to scribble on them, and their length.
    pub(crate) fn request_slots(&self) -> (Vec<Window>, usize) {
        (self.requests.clone(), self.offsets.slot)
    }

    pub(crate) fn write(&self, index: u32, request: &Fields) {
        let at = &self.offsets;
        let mut bytes = [0; MAX_SLOT];
        bytes[0] = request.operation;
        bytes[1] = request.detail;
        bytes[2..4].copy_from_slice(&request.half.to_le_bytes());
        let id = request.id.to_le_bytes();
        let id = if at.wide_id { &id[..] } else { &id[..4] };
        bytes[at.id..at.id + id.len()].copy_from_slice(id);
        bytes[at.sector..at.sector + 8].copy_from_slice(&request.sector.to_le_bytes());
        let room = at.slot - at.body;
        bytes[at.body..at.slot].copy_from_slice(&request.body[..room]);
        self.requests[(index % self.slots()) as usize].write(&bytes[..at.slot]);
    }

    pub(crate) fn answer(&self, index: u32) -> Answer {
        let slot = &self.responses[(index % self.slots()) as usize];
        let mut bytes = [0; 12];
        let (id, rest) = if self.offsets.wide_id {
            slot.read(&mut bytes);
            let (id, rest) = bytes.split_at(8);
            (id.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)), rest)
        } else {
            slot.read(&mut bytes[..8]);
            let (id, rest) = bytes.split_at(4);
            (id.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)), rest)
        };
        Answer { id, operation: rest[0], status: i16::from_le_bytes([rest[2], rest[3]]) }
    }

    /// Publishes requests up to `index`, by the rules.
    pub(crate) fn publish(&self, index: u32) -> Result<()> {
        let old = self.get(Index::ReqProd);
        self.set(Index::ReqProd, index);
        let event = self.get(Index::ReqEvent);
        if index.wrapping_sub(event) < index.wrapping_sub(old) {
            self.link.channel.notify()?;
        }
        Ok(())
    }

    /// Waits until the response before `index` is there.
    pub(crate) fn wait(&mut self, index: u32) -> Result<()> {
        let mut patience = Patience::new(HUNG);
        loop {
            self.set(Index::RspEvent, index);
            let done = self.get(Index::RspProd);
            if done == index {
                return Ok(());
            }
            if patience.is_over() {
                bail!("responses stop at {done}, {index} is expected");
            }
            wait_for_event(&mut *self.link.channel)?;
        }
    }
}
