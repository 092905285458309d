//! Information about a disk.

use crate::Stats;
use crate::limits::{FlushMode, Limits};
use ring_proto::RingLayout;
use serde::Serialize;
use xenstore_glue::vbd::{Agreement, DeviceProperties};

/// Size and shape of a disk, as its backend states it now.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize)]
pub struct Geometry {
    /// Bytes.
    pub size: u64,
    /// Every offset and length is a multiple of this many bytes: 512, or 4096.
    pub sector_size: u32,
    /// Bytes that the device prefers to write at once.
    pub physical_sector_size: u32,
    /// Writes and discards are refused.
    pub read_only: bool,
    /// The backend calls it removable.
    pub removable: bool,
    /// The backend calls it a CD-ROM.
    pub cdrom: bool,
}

impl Geometry {
    pub(crate) fn new(device: &DeviceProperties) -> Self {
        Self {
            size: device.bytes(),
            sector_size: device.sector_size,
            physical_sector_size: device.physical_sector_size,
            read_only: device.read_only,
            removable: device.removable,
            cdrom: device.cdrom,
        }
    }
}

/// The features agreed with the backend.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize)]
pub struct Features {
    /// Flushes reach the backend. Without, the disk has no volatile cache and they succeed at once.
    pub flush: bool,
    /// Durable writes are one request, a barrier; otherwise they are a write and then a flush.
    pub barrier: bool,
    /// Discards are supported.
    pub discard: bool,
    /// Secure discards are supported.
    pub secure_discard: bool,
    /// Bytes a discard should be a multiple of.
    pub discard_granularity: u32,
    /// Where the multiples start, in bytes.
    pub discard_alignment: u32,
    /// The backend keeps our pages mapped.
    pub persistent: bool,
    /// Segments of an indirect request; 0 for none.
    pub max_indirect_segments: u16,
    /// Segments of a direct request.
    pub max_direct_segments: u16,
    /// Ring pages, as a power of two.
    pub ring_order: u8,
    /// Requests and responses have pages of their own.
    pub split_ring: bool,
}

impl Features {
    pub(crate) fn new(limits: &Limits, agreed: &Agreement, device: &DeviceProperties) -> Self {
        Self {
            flush: limits.flush != FlushMode::None,
            barrier: limits.flush == FlushMode::Barrier,
            discard: limits.discard,
            secure_discard: limits.secure_discard,
            discard_granularity: device.discard.map_or(device.sector_size, |d| d.granularity),
            discard_alignment: device.discard.map_or(0, |d| d.alignment),
            persistent: agreed.persistent,
            max_indirect_segments: limits.indirect,
            max_direct_segments: limits.direct,
            ring_order: agreed.order,
            split_ring: agreed.layout == RingLayout::Split,
        }
    }
}

/// A ring, and who uses it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RingInfo {
    /// Its number.
    pub ring: u32,
    /// Requests it holds.
    pub slots: u32,
    /// The vCPUs that submit to it.
    pub vcpus: Vec<u32>,
    /// What it and its vCPUs have done.
    pub stats: Stats,
}

/// Everything known about a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Info {
    /// The frontend's domain.
    pub domain: u16,
    /// The backend's domain.
    pub backend_domain: u16,
    /// The name its number stands for, such as `xvda`, or the number.
    pub device: String,
    /// Its number.
    pub devid: u32,
    /// The frontend's directory.
    pub frontend: String,
    /// The backend's directory.
    pub backend: String,
    /// Whether the toolstack trusts the backend (`untrusted` in the disk's configuration). It makes no
    /// difference: no backend is trusted (see the crate's description).
    pub trusted: bool,
    /// Whether the backend is there now.
    pub connected: bool,
    /// Times a backend came back.
    pub reconnects: u64,
    /// Size and shape.
    pub geometry: Geometry,
    /// The features agreed on.
    pub features: Features,
    /// The rings.
    pub rings: Vec<RingInfo>,
}
