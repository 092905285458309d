//! Where things are in the shared pages, for each ring layout.

use crate::abi::{self, MAX_DIRECT_SEGMENTS, MAX_RING_PAGE_ORDER, PAGE_SIZE, Segment};
use core::mem::{offset_of, size_of};

/// How a frontend's compiler laid out its requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Abi {
    /// `x86_64-abi`, and the native ABI of every other 64-bit machine.
    X86_64,
    /// `x86_32-abi`.
    X86_32,
}

impl Abi {
    /// What a program built for this machine uses.
    pub const NATIVE: Self = if cfg!(target_arch = "x86") { Self::X86_32 } else { Self::X86_64 };
}

/// How requests and responses share the pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum RingLayout {
    /// blkif.h's ring: a 64-byte header, then slots that hold a request first and a response later.
    Union(Abi),
    /// The two halves in pages of their own: 64-byte request slots, and a control area with one
    /// cache line for each index followed by 8-byte responses. An extension that both ends must
    /// offer; see docs/protocol.md.
    Split,
}

impl core::fmt::Display for RingLayout {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Union(Abi::X86_64) => "x86_64-abi",
            Self::Union(Abi::X86_32) => "x86_32-abi",
            Self::Split => "split",
        })
    }
}

/// 64-byte request slots of the split layout: a header of 16 bytes and six segments.
pub(crate) const SPLIT_REQUEST_WORDS: usize = 16;
/// 8-byte responses of the split layout.
pub(crate) const SPLIT_RESPONSE_WORDS: usize = 2;
/// Segments in a request of the split layout.
pub(crate) const SPLIT_DIRECT_SEGMENTS: usize = 6;
/// Bytes before the first response of the split layout: four indices, each on a cache line of its own.
pub(crate) const SPLIT_CONTROL_BYTES: usize = 4 * 64;
/// Bytes before the first slot of a union ring (`req_prod`, `req_event`, `rsp_prod`, `rsp_event`, 48 reserved).
pub(crate) const UNION_HEADER_BYTES: usize = 64;

/// Where a request's fields are, as indices of 32-bit words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields {
    /// First word of the `id`.
    pub(crate) id: usize,
    /// First word of `sector_number`.
    pub(crate) sector: usize,
    /// First word after `sector_number`: segments, `nr_sectors`, or `handle` of an indirect request.
    pub(crate) body: usize,
    /// First word of `indirect_grefs`.
    pub(crate) indirect_grefs: usize,
    /// Segments the body holds.
    pub(crate) segments: usize,
    /// Whether `id` takes two words, not one.
    pub(crate) wide_id: bool,
}

const WORD: usize = size_of::<u32>();

macro_rules! fields {
    ($abi:ident) => {
        Fields {
            id: offset_of!(abi::$abi::Request, id) / WORD,
            sector: offset_of!(abi::$abi::Request, sector_number) / WORD,
            body: offset_of!(abi::$abi::Request, seg) / WORD,
            indirect_grefs: offset_of!(abi::$abi::Indirect, indirect_grefs) / WORD,
            segments: MAX_DIRECT_SEGMENTS,
            wide_id: true,
        }
    };
}

pub(crate) const X86_64: Fields = fields!(x86_64);
pub(crate) const X86_32: Fields = fields!(x86_32);
pub(crate) const SPLIT: Fields = Fields {
    id: 1,
    sector: 2,
    body: 4,
    indirect_grefs: 5,
    segments: SPLIT_DIRECT_SEGMENTS,
    wide_id: false,
};

impl RingLayout {
    pub(crate) const fn fields(self) -> &'static Fields {
        match self {
            Self::Union(Abi::X86_64) => &X86_64,
            Self::Union(Abi::X86_32) => &X86_32,
            Self::Split => &SPLIT,
        }
    }

    /// Words (32 bits) between one request slot and the next.
    pub const fn request_words(self) -> usize {
        match self {
            Self::Union(Abi::X86_64) => size_of::<abi::x86_64::Request>() / WORD,
            Self::Union(Abi::X86_32) => size_of::<abi::x86_32::Request>() / WORD,
            Self::Split => SPLIT_REQUEST_WORDS,
        }
    }

    /// Segments that fit in a request without indirection.
    pub const fn max_direct_segments(self) -> usize {
        self.fields().segments
    }

    /// Request slots in a ring of `1 << order` request pages: what fits, rounded down to a power of two
    /// (`__RING_SIZE` in ring.h). `order` is capped at [`MAX_RING_PAGE_ORDER`].
    pub const fn slots(self, order: u8) -> u32 {
        let order = if order > MAX_RING_PAGE_ORDER { MAX_RING_PAGE_ORDER } else { order };
        let bytes = PAGE_SIZE << order;
        let room = match self {
            Self::Union(_) => (bytes - UNION_HEADER_BYTES) / (self.request_words() * WORD),
            Self::Split => bytes / (SPLIT_REQUEST_WORDS * WORD),
        };
        1 << room.ilog2()
    }

    /// Pages that a ring of this order takes: those of the union ring or of the split requests, then those
    /// of the split control area and responses (0 for a union ring).
    pub const fn pages(self, order: u8) -> (usize, usize) {
        let order = if order > MAX_RING_PAGE_ORDER { MAX_RING_PAGE_ORDER } else { order };
        match self {
            Self::Union(_) => (1 << order, 0),
            Self::Split => {
                let bytes =
                    SPLIT_CONTROL_BYTES + self.slots(order) as usize * SPLIT_RESPONSE_WORDS * WORD;
                (1 << order, bytes.div_ceil(PAGE_SIZE))
            }
        }
    }
}

// The offsets of blkif.h and ring.h. `tests/c_peer.rs` checks them against the headers themselves.
const _: () = {
    assert!(size_of::<Segment>() == 8);
    assert!(size_of::<abi::x86_64::Request>() == 112);
    assert!(size_of::<abi::x86_32::Request>() == 108);
    assert!(size_of::<abi::x86_64::Response>() == 16);
    assert!(size_of::<abi::x86_32::Response>() == 12);
    assert!(offset_of!(abi::x86_64::Request, id) == 8);
    assert!(offset_of!(abi::x86_32::Request, id) == 4);
    assert!(offset_of!(abi::x86_64::Discard, nr_sectors) == offset_of!(abi::x86_64::Request, seg));
    assert!(offset_of!(abi::x86_32::Discard, nr_sectors) == offset_of!(abi::x86_32::Request, seg));
    assert!(offset_of!(abi::x86_64::Indirect, id) == 8);
    assert!(offset_of!(abi::x86_32::Indirect, id) == 4);
    assert!(offset_of!(abi::x86_64::Indirect, indirect_grefs) == 28);
    assert!(offset_of!(abi::x86_32::Indirect, indirect_grefs) == 24);
    assert!(offset_of!(abi::x86_64::Response, status) == 10);
    assert!(offset_of!(abi::x86_32::Response, status) == 10);
    assert!(RingLayout::Union(Abi::X86_64).slots(0) == 32);
    assert!(RingLayout::Union(Abi::X86_32).slots(4) == 512);
    assert!(RingLayout::Split.slots(0) == 64);
};
