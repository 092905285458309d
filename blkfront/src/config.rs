//! How a disk is to be opened.

use ring_proto::Abi;
use std::time::Duration;
use xen_platform::Waiting;
use xenstore_glue::vbd::PROTOCOL_DEFAULT;

/// Bytes of granted data pages a vCPU gets unless [`Config::pool_bytes`] says otherwise: 128 I/Os of
/// 64 KiB, twice what the IOmeter mix has in flight on one vCPU.
pub const DEFAULT_POOL_BYTES: usize = 8 << 20;
/// The largest pool of a vCPU: 16384 pages, half of the 32768 grants that a Xen guest has by default.
pub const MAX_POOL_BYTES: usize = 64 << 20;
/// I/Os a vCPU may have submitted and not yet taken back, unless [`Config::depth`] says otherwise.
pub const DEFAULT_DEPTH: usize = 256;
/// The largest [`Config::depth`]; each costs some 100 bytes whether it is used or not.
pub const MAX_DEPTH: usize = 4096;
/// The most vCPUs, and rings, of a disk: what one process can sensibly spread a disk over.
pub const MAX_VCPUS: u32 = 64;
/// Segments of an indirect request unless [`Config::max_indirect_segments`] says otherwise: 128 KiB,
/// as in Linux's frontend (`xen_blkif_max_segments`).
pub const DEFAULT_INDIRECT_SEGMENTS: u16 = 32;
/// The longest [`Config::connect_timeout`] and [`Config::reconnect_timeout`]: a century, and short enough to be
/// added to any time.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(u32::MAX as u64);

/// How [`crate::Disk::open`] sets up a disk. Whatever the backend does not offer is left out.
#[derive(Clone, Debug)]
pub struct Config {
    /// Queue handles: [`crate::Disk::queue`] takes 0 to `vcpus - 1`.
    pub vcpus: u32,
    /// Rings; one a vCPU if `None`. The backend's `multi-queue-max-queues` bounds it.
    pub queues: Option<u32>,
    /// Ring pages as a power of two, 0 to [`ring_proto::abi::MAX_RING_PAGE_ORDER`]. The backend's
    /// `max-ring-page-order` bounds it.
    pub ring_order: u8,
    /// Offer persistent grants. The data pages are granted for good either way.
    pub persistent: bool,
    /// Ask for the split layout (docs/protocol.md); without it, or with a backend that does not know
    /// it, the ring is blkif.h's.
    pub split_ring: bool,
    /// The ABI of a blkif.h ring.
    pub protocol: Protocol,
    /// The most segments of an indirect request; 0 does without indirect requests. The backend's
    /// `feature-max-indirect-segments` bounds it.
    pub max_indirect_segments: u16,
    /// Merge adjacent I/Os that wait at the same time.
    pub merge: bool,
    /// I/Os a vCPU may have in the queue, 1 to [`MAX_DEPTH`].
    pub depth: usize,
    /// Bytes of granted data pages a vCPU has for its buffers, up to [`MAX_POOL_BYTES`].
    pub pool_bytes: usize,
    /// Tell the backend that the frontend will reissue what is in flight if the backend dies
    /// (`feature-reissue`, docs/protocol.md). Otherwise a new backend takes over the existing rings, as it
    /// does for Linux's frontend.
    pub reissue: bool,
    /// How a thread waits for responses.
    pub waiting: Waiting,
    /// How long to wait for a backend, when opening and when closing.
    pub connect_timeout: Duration,
    /// How long I/O waits for a backend before it fails; forever if `None`. Counted from when the backend
    /// announces that it goes away, or from when its successor starts: a killed backend announces nothing.
    pub reconnect_timeout: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: 1,
            queues: None,
            ring_order: 0,
            persistent: true,
            split_ring: false,
            protocol: Protocol::default(),
            max_indirect_segments: DEFAULT_INDIRECT_SEGMENTS,
            merge: true,
            depth: DEFAULT_DEPTH,
            pool_bytes: DEFAULT_POOL_BYTES,
            reissue: true,
            waiting: Waiting::default(),
            connect_timeout: Duration::from_secs(10),
            reconnect_timeout: None,
        }
    }
}

/// How blkif.h's structures are laid out, and whether the key `protocol` says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// The key names the ABI.
    Named(Abi),
    /// The key is absent: backends then assume [`PROTOCOL_DEFAULT`], as for old frontends.
    Unnamed,
}

impl Default for Protocol {
    fn default() -> Self {
        Self::Named(Abi::NATIVE)
    }
}

impl Protocol {
    pub(crate) fn abi(self) -> Abi {
        match self {
            Self::Named(abi) => abi,
            Self::Unnamed => PROTOCOL_DEFAULT,
        }
    }
}
