//! The three blkif ABIs as C lays them out, and the limits that blkif.h sets.
//!
//! Nothing reads a request through these types: a peer may write the shared page at any time, so
//! [`crate::RequestConsumer`] copies words and decodes the copy. The types are here so that every
//! offset the codec uses is the compiler's, and can be compared with Xen's own headers (see
//! `tests/c_peer.rs`).

use crate::GrantRef;

/// Bytes in a page of the shared ring and in a granted page, whatever the guest's own page size.
pub const PAGE_SIZE: usize = 4096;
/// Bytes in a blkif sector. Every `sector` on the ring counts these, whatever `sector-size` says (blkif.h note 2024-09).
pub const SECTOR_SIZE: usize = 512;
/// 512-byte sectors in a granted page; `last_sect` must stay below it.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Segments that fit in the request itself (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const MAX_DIRECT_SEGMENTS: usize = 11;
/// Pages of segments an indirect request can name (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments in one page of an indirect request: 4096 / 8.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = PAGE_SIZE / core::mem::size_of::<Segment>();
/// The most segments we allow in an indirect request: 1 MiB, as Linux's backend does
/// (`MAX_INDIRECT_SEGMENTS` in drivers/block/xen-blkback/common.h). The wire format would allow 4096,
/// but then one guest could tie up 16 MiB per slot (XSA-300).
pub const MAX_INDIRECT_SEGMENTS: usize = 256;
/// The largest ring we agree to: 16 pages of requests, 512 slots, or 1024 if it is split (`XENBUS_MAX_RING_GRANT_ORDER` in Linux).
pub const MAX_RING_PAGE_ORDER: u8 = 4;

/// `operation` values of blkif.h.
pub mod op {
    /// Read sectors into the segments.
    pub const READ: u8 = 0;
    /// Write sectors from the segments.
    pub const WRITE: u8 = 1;
    /// Write that is ordered against every other request and durable when answered.
    pub const WRITE_BARRIER: u8 = 2;
    /// Make completed writes durable, then write the segments, if there are any.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Reserved; used privately for SCSI packets.
    pub const RESERVED_1: u8 = 4;
    /// Give sectors back to the device.
    pub const DISCARD: u8 = 5;
    /// Read or write whose segments are listed in pages of their own.
    pub const INDIRECT: u8 = 6;
}

/// Discard `flag`: make the data unreadable, not just unused (`BLKIF_DISCARD_SECURE`).
pub const DISCARD_SECURE: u8 = 1;

/// Part of a granted page. Both sector numbers are inclusive and count 512-byte units.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Segment {
    /// The page.
    pub gref: GrantRef,
    /// First sector of the page to transfer, 0 to 7.
    pub first_sect: u8,
    /// Last sector of the page to transfer, `first_sect` to 7.
    pub last_sect: u8,
    pad: u16,
}

impl Segment {
    /// Names sectors `first_sect..=last_sect` of the page behind `gref`.
    pub const fn new(gref: GrantRef, first_sect: u8, last_sect: u8) -> Self {
        Self { gref, first_sect, last_sect, pad: 0 }
    }

    /// Where the data starts in its page, in bytes.
    pub const fn offset(&self) -> usize {
        self.first_sect as usize * SECTOR_SIZE
    }

    /// 512-byte sectors in the segment; 0 if `last_sect` is below `first_sect`.
    pub const fn sectors(&self) -> u32 {
        (self.last_sect as u32 + 1).saturating_sub(self.first_sect as u32)
    }

    /// Bytes in the segment.
    pub const fn bytes(&self) -> usize {
        self.sectors() as usize * SECTOR_SIZE
    }

    /// Whether the data of this segment and of `next` is contiguous when their pages are adjacent.
    pub const fn touches(&self, next: &Self) -> bool {
        self.last_sect == SECTORS_PER_PAGE - 1 && next.first_sect == 0
    }
}

/// Defines one ABI's wire structures; `$align` is how the C compiler aligns a `uint64_t` in them.
macro_rules! abi {
    ($(#[$doc:meta])* $name:ident, $($packing:tt)*) => {
        $(#[$doc])*
        pub mod $name {
            use super::{MAX_DIRECT_SEGMENTS, MAX_INDIRECT_PAGES, Segment};

            /// `struct blkif_request`: read, write, barrier, flush.
            #[repr($($packing)*)]
            pub struct Request {
                /// One of [`super::op`].
                pub operation: u8,
                /// Segments used.
                pub nr_segments: u8,
                /// Virtual device; nobody reads it.
                pub handle: u16,
                /// The frontend's tag, echoed in the response.
                pub id: u64,
                /// First sector on the device, in 512-byte units.
                pub sector_number: u64,
                /// The data.
                pub seg: [Segment; MAX_DIRECT_SEGMENTS],
            }

            /// `struct blkif_request_discard`.
            #[repr($($packing)*)]
            pub struct Discard {
                /// [`super::op::DISCARD`].
                pub operation: u8,
                /// 0 or [`super::DISCARD_SECURE`].
                pub flag: u8,
                /// Virtual device; nobody reads it.
                pub handle: u16,
                /// The frontend's tag.
                pub id: u64,
                /// First sector, in 512-byte units.
                pub sector_number: u64,
                /// Number of sectors, in 512-byte units.
                pub nr_sectors: u64,
            }

            /// `struct blkif_request_indirect`.
            #[repr($($packing)*)]
            pub struct Indirect {
                /// [`super::op::INDIRECT`].
                pub operation: u8,
                /// [`super::op::READ`] or [`super::op::WRITE`].
                pub indirect_op: u8,
                /// Segments in the indirect pages.
                pub nr_segments: u16,
                /// The frontend's tag.
                pub id: u64,
                /// First sector on the device, in 512-byte units.
                pub sector_number: u64,
                /// Virtual device; nobody reads it.
                pub handle: u16,
                /// Padding.
                pub pad: u16,
                /// Pages of [`super::SEGMENTS_PER_INDIRECT_PAGE`] segments each.
                pub indirect_grefs: [crate::GrantRef; MAX_INDIRECT_PAGES],
            }

            /// `struct blkif_response`.
            #[repr($($packing)*)]
            pub struct Response {
                /// Copied from the request.
                pub id: u64,
                /// Copied from the request; for an indirect one, the inner operation.
                pub operation: u8,
                /// 0, -1 or -2.
                pub status: i16,
            }
        }
    };
}

abi!(
    /// A 64-bit frontend on x86, and every native frontend elsewhere: `uint64_t` is 8-byte aligned.
    x86_64, C
);

abi!(
    /// A 32-bit frontend on x86: `uint64_t` is 4-byte aligned, so there is no hole before `id`.
    x86_32, C, packed(4)
);

/// The ABI of a frontend built for this machine.
#[cfg(target_arch = "x86")]
pub use x86_32 as native;
/// The ABI of a frontend built for this machine.
#[cfg(not(target_arch = "x86"))]
pub use x86_64 as native;
