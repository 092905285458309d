//! A disk: one frontend, its rings and its vCPUs.

use crate::stats::Stats;
use crate::{Cause, Config, Error, Queue, Result};
use serde::Serialize;
use std::sync::Arc;
use xen_platform::Platform;
use xenstore_glue::client::Endpoint;

/// Size and shape of a disk, as its backend states it now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Geometry {
    /// Bytes.
    pub size: u64,
    /// Every offset and length is a multiple of this many bytes: 512, or 4096.
    pub sector_size: u32,
    /// Bytes the device likes to write at once.
    pub physical_sector_size: u32,
    /// Writes and discards are refused.
    pub read_only: bool,
    /// The backend calls it removable.
    pub removable: bool,
    /// The backend calls it a CD-ROM.
    pub cdrom: bool,
}

/// What was agreed with the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Features {
    /// Flushes reach the backend. Without, the disk has no volatile cache and they succeed at once.
    pub flush: bool,
    /// Durable writes are one request, a barrier; otherwise they are a write and then a flush.
    pub barrier: bool,
    /// Discards are taken.
    pub discard: bool,
    /// Secure discards are taken.
    pub secure_discard: bool,
    /// Bytes a discard should be a multiple of.
    pub discard_granularity: u32,
    /// Bytes; where the multiples start.
    pub discard_alignment: u32,
    /// The backend keeps our pages mapped.
    pub persistent: bool,
    /// Segments of an indirect request; 0 without.
    pub max_indirect_segments: u16,
    /// Segments of a direct request.
    pub max_direct_segments: u16,
    /// Ring pages, as a power of two.
    pub ring_order: u8,
    /// Requests and responses have pages of their own.
    pub split_ring: bool,
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
    /// What it has done.
    pub stats: Stats,
}

/// All there is to say about a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Info {
    /// The frontend's domain.
    pub domain: u16,
    /// The backend's domain.
    pub backend_domain: u16,
    /// As the toolstack named it (`dev` in the backend's directory), or the number.
    pub device: String,
    /// Its number.
    pub devid: u32,
    /// The frontend's directory.
    pub frontend: String,
    /// The backend's directory.
    pub backend: String,
    /// Whether the backend is there now.
    pub connected: bool,
    /// Times a backend came back.
    pub reconnects: u64,
    /// Size and shape.
    pub geometry: Geometry,
    /// What was agreed.
    pub features: Features,
    /// The rings.
    pub rings: Vec<RingInfo>,
}

/// A connected disk. Dropping it closes it.
#[derive(Debug)]
pub struct Disk {}

impl Disk {
    /// Connects to the backend of `device`, a name like `xvda` or a number like `51712`, of the
    /// platform's domain. Blocks until the disk can be used.
    ///
    /// # Errors
    /// When there is no such device, or it could not be connected within
    /// [`Config::connect_timeout`].
    pub fn open(
        platform: Arc<dyn Platform>,
        xenstore: Endpoint,
        device: &str,
        config: Config,
    ) -> Result<Self> {
        let _ = (platform, xenstore, device, config);
        Ok(Self {})
    }

    /// The queue of a vCPU. Each can be taken once, and is owned by one thread at a time.
    ///
    /// # Errors
    /// When it was taken before, or there is no such vCPU.
    pub fn queue(&self, vcpu: u32) -> Result<Queue> {
        Err(self.no_queue(vcpu))
    }

    fn no_queue(&self, vcpu: u32) -> Error {
        let cause = Cause::NoQueue { vcpu, vcpus: self.vcpus() };
        Error { domain: ring_proto::DomId(0), device: String::new(), cause }
    }

    /// How many queues there are.
    pub fn vcpus(&self) -> u32 {
        0
    }

    /// Size and shape now; the size changes when the backend resizes the disk.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            size: 0,
            sector_size: 0,
            physical_sector_size: 0,
            read_only: false,
            removable: false,
            cdrom: false,
        }
    }

    /// What was agreed with the backend; it may change when another one comes back.
    pub fn features(&self) -> Features {
        Features {
            flush: false,
            barrier: false,
            discard: false,
            secure_discard: false,
            discard_granularity: 512,
            discard_alignment: 0,
            persistent: false,
            max_indirect_segments: 0,
            max_direct_segments: 0,
            ring_order: 0,
            split_ring: false,
        }
    }

    /// Closes the disk: what is in flight fails with [`crate::IoError::Gone`], and the backend is
    /// walked to Closed. Dropping the disk does the same and tells nobody how it went.
    ///
    /// # Errors
    /// When the backend did not let go within [`Config::connect_timeout`].
    pub fn close(self) -> Result<()> {
        Ok(())
    }
}
