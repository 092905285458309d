//! Requests and responses as values of our own: copied, then validated, then used.

use crate::GrantRef;
use crate::abi::{
    DISCARD_SECURE, MAX_DIRECT_SEGMENTS, MAX_INDIRECT_PAGES, SECTORS_PER_PAGE,
    SEGMENTS_PER_INDIRECT_PAGE, Segment, op,
};
#[cfg(not(loom))]
use crate::{RingLayout, sync::AtomicU32};
use core::ops::Deref;

/// The segments of a direct request.
#[derive(Clone, Copy)]
pub struct Segments {
    list: [Segment; MAX_DIRECT_SEGMENTS],
    /// As wide as its neighbours in memory: it is read soon after it is written, and a store narrower than
    /// a word would stall that load.
    len: u32,
}

impl Segments {
    /// None yet.
    pub const EMPTY: Self =
        Self { list: [Segment::new(GrantRef(0), 0, 0); MAX_DIRECT_SEGMENTS], len: 0 };

    /// As many of `segments` as there is room for.
    pub fn of(segments: &[Segment]) -> Self {
        let mut list = Self::EMPTY;
        for &segment in segments {
            list.push(segment);
        }
        list
    }

    /// Removes all segments.
    #[inline]
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends a segment; `false` when there is no room.
    #[inline]
    pub fn push(&mut self, segment: Segment) -> bool {
        let Some(place) = self.list.get_mut(self.len as usize) else { return false };
        *place = segment;
        self.len += 1;
        true
    }
}

impl Deref for Segments {
    type Target = [Segment];
    #[inline]
    fn deref(&self) -> &[Segment] {
        // `push` and the decoder keep `len` within the array.
        self.list.get(..self.len as usize).unwrap_or(&self.list)
    }
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Segments {}

impl core::fmt::Debug for Segments {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// What a transfer does with its data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// From the device.
    Read,
    /// To the device.
    Write,
    /// `WRITE_BARRIER`: all earlier writes are durable before the data is written, and the data is
    /// durable when the request is answered (Linux's frontend maps FUA onto it).
    Barrier,
    /// `FLUSH_DISKCACHE` with data: flush, then write.
    FlushWrite,
}

impl Transfer {
    /// The operation code.
    pub const fn operation(self) -> u8 {
        match self {
            Self::Read => op::READ,
            Self::Write => op::WRITE,
            Self::Barrier => op::WRITE_BARRIER,
            Self::FlushWrite => op::FLUSH_DISKCACHE,
        }
    }
}

/// A request whose every field was checked against [`Limits`]. It owns its segments, or, to avoid
/// copying them, borrows them from its [`RawRequest`] as `&[Segment]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request<S = Segments> {
    /// The frontend's tag, meaningful only to the frontend; the split layout carries 32 bits of it.
    pub id: u64,
    /// What is asked for.
    pub body: Body<S>,
}

/// What a request asks for. Sectors are 512 bytes each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body<S = Segments> {
    /// Data in the pages that the request names.
    Direct {
        /// Which way.
        transfer: Transfer,
        /// First sector.
        sector: u64,
        /// The pages.
        segments: S,
    },
    /// Data in pages named by segments that are listed in pages of their own. The segments must still
    /// be fetched, and then checked by [`Limits::check_segments`].
    Indirect {
        /// [`Transfer::Read`] or [`Transfer::Write`].
        transfer: Transfer,
        /// First sector.
        sector: u64,
        /// Total number of segments.
        nr_segments: u16,
        /// The pages that list the segments; only the first [`indirect_pages`] are used.
        pages: [GrantRef; MAX_INDIRECT_PAGES],
    },
    /// Make completed writes durable. No data.
    Flush {
        /// It came as a barrier: later requests must wait for it.
        barrier: bool,
    },
    /// Give sectors back.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
        /// Make them unreadable.
        secure: bool,
    },
}

impl Request<&[Segment]> {
    /// With segments of its own.
    pub fn to_owned(&self) -> Request {
        Request { id: self.id, body: self.body.to_owned() }
    }
}

impl Body {
    /// With the segments where they are.
    #[inline]
    pub fn borrowed(&self) -> Body<&[Segment]> {
        match *self {
            Self::Direct { transfer, sector, ref segments } => {
                Body::Direct { transfer, sector, segments }
            }
            Self::Indirect { transfer, sector, nr_segments, pages } => {
                Body::Indirect { transfer, sector, nr_segments, pages }
            }
            Self::Flush { barrier } => Body::Flush { barrier },
            Self::Discard { sector, sectors, secure } => Body::Discard { sector, sectors, secure },
        }
    }
}

impl Body<&[Segment]> {
    /// With segments of its own.
    pub fn to_owned(&self) -> Body {
        match *self {
            Self::Direct { transfer, sector, segments } => {
                Body::Direct { transfer, sector, segments: Segments::of(segments) }
            }
            Self::Indirect { transfer, sector, nr_segments, pages } => {
                Body::Indirect { transfer, sector, nr_segments, pages }
            }
            Self::Flush { barrier } => Body::Flush { barrier },
            Self::Discard { sector, sectors, secure } => Body::Discard { sector, sectors, secure },
        }
    }
}

impl<S> Request<S> {
    /// The operation code for the response. For an indirect request it must be the inner one, or
    /// Linux's frontend disables the device.
    #[inline]
    pub const fn response_operation(&self) -> u8 {
        match &self.body {
            Body::Direct { transfer, .. } | Body::Indirect { transfer, .. } => transfer.operation(),
            Body::Flush { barrier: false } => op::FLUSH_DISKCACHE,
            Body::Flush { barrier: true } => op::WRITE_BARRIER,
            Body::Discard { .. } => op::DISCARD,
        }
    }
}

/// Pages that hold `nr_segments` segments.
pub const fn indirect_pages(nr_segments: u16) -> usize {
    (nr_segments as usize).div_ceil(SEGMENTS_PER_INDIRECT_PAGE)
}

/// Decodes the segments in a copy of an indirect page. Their contents are not checked.
pub fn decode_segments(page: &[u8]) -> impl Iterator<Item = Segment> + '_ {
    page.chunks_exact(size_of::<Segment>()).map(|s| {
        let gref = u32::from_le_bytes([s[0], s[1], s[2], s[3]]);
        Segment::new(GrantRef(gref), s[4], s[5])
    })
}

/// Encodes a segment for an indirect page.
pub const fn encode_segment(segment: &Segment) -> [u8; size_of::<Segment>()] {
    let gref = segment.gref.0.to_le_bytes();
    [gref[0], gref[1], gref[2], gref[3], segment.first_sect, segment.last_sect, 0, 0]
}

/// What this device currently accepts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Size of the device, in 512-byte sectors.
    pub sectors: u64,
    /// Every start and length must be a multiple of this many 512-byte sectors (1, or 8 with 4 KiB logical sectors).
    pub granule: u32,
    /// 0 if indirect requests were not offered.
    pub max_indirect_segments: u16,
    /// Writes and discards are refused.
    pub read_only: bool,
    /// Discards were offered.
    pub discard: bool,
}

/// Why a request was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Reason {
    /// `operation`: unknown, or reserved.
    #[error("operation {0} is unknown")]
    Operation(u8),
    /// `operation`: known, but not offered.
    #[error("operation {0} was not offered")]
    NotOffered(u8),
    /// `indirect_op`: only reads and writes may be indirect.
    #[error("indirect_op {0} is neither read nor write")]
    IndirectOperation(u8),
    /// `nr_segments`: 0, or more than the layout or what was negotiated allows.
    #[error("nr_segments {count} is not within 1 to {max}")]
    SegmentCount {
        /// As asked.
        count: u16,
        /// As allowed.
        max: u16,
    },
    /// `first_sect`, `last_sect`: in the wrong order, or outside the page.
    #[error("segment covers sectors {first} to {last} of a page of {SECTORS_PER_PAGE}")]
    Segment {
        /// `first_sect`
        first: u8,
        /// `last_sect`
        last: u8,
    },
    /// `sector_number`: the range extends past the end of the device.
    #[error("{sectors} sectors from {sector} leave the device")]
    PastEnd {
        /// `sector_number`
        sector: u64,
        /// Length in 512-byte sectors.
        sectors: u64,
    },
    /// A start or length that is no multiple of the logical sector size.
    #[error("a range is not aligned to the logical sector size")]
    Misaligned,
    /// A write or discard on a read-only device.
    #[error("the device is read-only")]
    ReadOnly,
}

impl Reason {
    /// Number of kinds.
    pub const KINDS: usize = 8;

    /// Names of the kinds, by [`Reason::kind`], for statistics.
    pub const NAMES: [&'static str; Self::KINDS] = [
        "operation",
        "not_offered",
        "indirect_operation",
        "segment_count",
        "segment",
        "past_end",
        "misaligned",
        "read_only",
    ];

    /// Which kind this is, below [`Reason::KINDS`].
    pub const fn kind(self) -> usize {
        match self {
            Self::Operation(_) => 0,
            Self::NotOffered(_) => 1,
            Self::IndirectOperation(_) => 2,
            Self::SegmentCount { .. } => 3,
            Self::Segment { .. } => 4,
            Self::PastEnd { .. } => 5,
            Self::Misaligned => 6,
            Self::ReadOnly => 7,
        }
    }

    /// The status for the response.
    pub const fn status(self) -> Status {
        match self {
            Self::Operation(_) | Self::NotOffered(_) => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// A request that was refused, with what its response needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("request {id:#x}: {reason}")]
pub struct Refused {
    /// The frontend's tag.
    pub id: u64,
    /// For the response.
    pub operation: u8,
    /// Why.
    pub reason: Reason,
}

/// A request as it was copied from the ring. Nothing in it can be trusted: see [`RawRequest::validate`].
///
/// One value is filled again and again; fields that a request does not use hold leftovers of earlier ones.
#[derive(Clone, Debug)]
pub struct RawRequest {
    pub(crate) operation: u8,
    /// `nr_segments`, `flag` or `indirect_op`.
    pub(crate) detail: u8,
    /// `handle`, or `nr_segments` of an indirect request.
    pub(crate) half: u16,
    pub(crate) id: u64,
    pub(crate) sector: u64,
    /// `nr_sectors` of a discard.
    pub(crate) sectors: u64,
    /// Segments of a direct request; `len` is the number copied.
    pub(crate) segments: Segments,
    /// Pages of an indirect request.
    pub(crate) pages: [GrantRef; MAX_INDIRECT_PAGES],
    /// Segments the layout has room for.
    pub(crate) room: u8,
}

impl Default for RawRequest {
    fn default() -> Self {
        Self::BLANK
    }
}

impl RawRequest {
    const BLANK: Self = Self {
        operation: 0,
        detail: 0,
        half: 0,
        id: 0,
        sector: 0,
        sectors: 0,
        segments: Segments::EMPTY,
        pages: [GrantRef(0); MAX_INDIRECT_PAGES],
        room: 0,
    };

    #[inline]
    pub(crate) fn set_segments(&mut self, count: usize, mut at: impl FnMut(usize) -> Segment) {
        for (k, place) in self.segments.list.iter_mut().take(count).enumerate() {
            *place = at(k);
        }
        self.segments.len = count.min(MAX_DIRECT_SEGMENTS) as u32;
    }

    /// Decodes a copy made by [`crate::RequestConsumer::pop_to`].
    #[cfg(not(loom))]
    pub fn from_copy(copy: &[AtomicU32], layout: RingLayout) -> Self {
        let mut raw = Self::BLANK;
        crate::codec::decode_copy(copy, layout, &mut raw);
        raw
    }

    /// Checks every field against the rules of blkif.h and what this device accepts.
    ///
    /// # Errors
    /// The first rule broken. The request must be answered with that, and nothing else done for it.
    #[inline]
    pub fn validate(&self, limits: &Limits) -> Result<Request<&[Segment]>, Refused> {
        let refuse = |operation, reason| Refused { id: self.id, operation, reason };
        let body = match self.operation {
            op::READ | op::WRITE | op::WRITE_BARRIER | op::FLUSH_DISKCACHE => {
                self.direct(limits).map_err(|reason| refuse(self.operation, reason))?
            }
            op::INDIRECT => self.indirect(limits).map_err(|reason| refuse(self.detail, reason))?,
            op::DISCARD => self.discard(limits).map_err(|reason| refuse(op::DISCARD, reason))?,
            unknown => return Err(refuse(unknown, Reason::Operation(unknown))),
        };
        Ok(Request { id: self.id, body })
    }

    #[inline]
    fn direct(&self, limits: &Limits) -> Result<Body<&[Segment]>, Reason> {
        let transfer = match self.operation {
            op::READ => Transfer::Read,
            op::WRITE => Transfer::Write,
            op::WRITE_BARRIER => Transfer::Barrier,
            _ => Transfer::FlushWrite,
        };
        if self.detail == 0 {
            match transfer {
                Transfer::Barrier => return Ok(Body::Flush { barrier: true }),
                Transfer::FlushWrite => return Ok(Body::Flush { barrier: false }),
                Transfer::Read | Transfer::Write => {}
            }
        }
        if self.detail == 0 || self.detail > self.room {
            let (count, max) = (u16::from(self.detail), u16::from(self.room));
            return Err(Reason::SegmentCount { count, max });
        }
        limits.check_writable(transfer)?;
        limits.check_segments(self.sector, &self.segments)?;
        Ok(Body::Direct { transfer, sector: self.sector, segments: &self.segments })
    }

    #[inline]
    fn indirect(&self, limits: &Limits) -> Result<Body<&[Segment]>, Reason> {
        let transfer = match self.detail {
            op::READ => Transfer::Read,
            op::WRITE => Transfer::Write,
            other => return Err(Reason::IndirectOperation(other)),
        };
        let max = limits.max_indirect_segments;
        if max == 0 {
            return Err(Reason::NotOffered(op::INDIRECT));
        }
        if self.half == 0 || self.half > max {
            return Err(Reason::SegmentCount { count: self.half, max });
        }
        limits.check_writable(transfer)?;
        // The length is unknown until the segments are fetched, but each has at least one sector.
        limits.check_range(self.sector, u64::from(self.half))?;
        let mut pages = [GrantRef(0); MAX_INDIRECT_PAGES];
        let used = indirect_pages(self.half).min(MAX_INDIRECT_PAGES);
        pages[..used].copy_from_slice(&self.pages[..used]);
        Ok(Body::Indirect { transfer, sector: self.sector, nr_segments: self.half, pages })
    }

    #[inline]
    fn discard(&self, limits: &Limits) -> Result<Body<&[Segment]>, Reason> {
        if !limits.discard {
            return Err(Reason::NotOffered(op::DISCARD));
        }
        limits.check_writable(Transfer::Write)?;
        limits.check_range(self.sector, self.sectors)?;
        limits.check_aligned(self.sector | self.sectors)?;
        let secure = self.detail & DISCARD_SECURE != 0;
        Ok(Body::Discard { sector: self.sector, sectors: self.sectors, secure })
    }
}

impl Limits {
    /// Checks each segment, and that together, from `sector` on, they fit within the device. Returns
    /// their length in 512-byte sectors.
    ///
    /// # Errors
    /// The first rule broken.
    #[inline]
    pub fn check_segments(&self, sector: u64, segments: &[Segment]) -> Result<u64, Reason> {
        let wrong = |segment: &&Segment| {
            (segment.first_sect > segment.last_sect) | (segment.last_sect >= SECTORS_PER_PAGE)
        };
        let (mut sectors, mut edges, mut all_right) = (0u64, sector, true);
        // No branch per segment: only an attacker's are wrong.
        for segment in segments {
            all_right &= !wrong(&segment);
            sectors += u64::from(segment.sectors());
            edges |= u64::from(segment.sectors());
        }
        if !all_right && let Some(segment) = segments.iter().find(wrong) {
            return Err(Reason::Segment { first: segment.first_sect, last: segment.last_sect });
        }
        self.check_range(sector, sectors)?;
        self.check_aligned(edges)?;
        Ok(sectors)
    }

    #[inline]
    fn check_range(&self, sector: u64, sectors: u64) -> Result<(), Reason> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.sectors => Ok(()),
            _ => Err(Reason::PastEnd { sector, sectors }),
        }
    }

    /// `edges` is the bitwise or of every start and length.
    #[inline]
    fn check_aligned(&self, edges: u64) -> Result<(), Reason> {
        let mask = u64::from(self.granule.max(1)) - 1;
        if edges & mask == 0 { Ok(()) } else { Err(Reason::Misaligned) }
    }

    #[inline]
    fn check_writable(&self, transfer: Transfer) -> Result<(), Reason> {
        if self.read_only && transfer != Transfer::Read { Err(Reason::ReadOnly) } else { Ok(()) }
    }
}

/// How a request ended (`BLKIF_RSP_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i16)]
pub enum Status {
    /// Done.
    Okay = 0,
    /// Failed.
    Error = -1,
    /// The backend does not support the operation.
    NotSupported = -2,
}

impl Status {
    /// Decodes a peer's status; anything unknown is an error.
    pub const fn from_wire(status: i16) -> Self {
        match status {
            0 => Self::Okay,
            -2 => Self::NotSupported,
            _ => Self::Error,
        }
    }
}

/// A response.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    /// The request's tag. A frontend must check it against the requests in flight.
    pub id: u64,
    /// The request's operation; the inner one of an indirect request.
    pub operation: u8,
    /// How it ended.
    pub status: Status,
}
