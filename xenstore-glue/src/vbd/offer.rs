//! What the backend writes before `InitWait`.

use super::{Keys, Nodes, Refusal, bit, flag, node, number32};
use ring_proto::abi::{MAX_INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER};

/// The most queues a device may have: as many as a large guest has vCPUs. With the largest ring, one takes up to
/// 22 of the 1000 nodes of a frontend's xenstore quota.
pub const MAX_QUEUES: u16 = 64;

/// A backend's limits, written before `InitWait`.
///
/// `feature-persistent` is among them although Linux writes it only at connect: no frontend reads it
/// earlier, and this way the offer is complete when the frontend makes its rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendOffer {
    /// Queues the frontend may use, 1 to [`MAX_QUEUES`].
    pub max_queues: u16,
    /// Largest log2 of ring pages, 0 to [`MAX_RING_PAGE_ORDER`].
    pub max_ring_page_order: u8,
    /// The most segments of an indirect request; 0 for no indirect requests.
    pub max_indirect_segments: u16,
    /// Grants stay mapped between requests.
    pub persistent: bool,
    /// Requests and responses may be in separate pages; an extension, see docs/protocol.md.
    pub split_ring: bool,
}

impl BackendOffer {
    /// Whether the backend keeps grants mapped. Linux's backend writes this key, alone of these, only
    /// before `Connected`, so a frontend knows it only once connected.
    pub const PERSISTENT_KEY: &'static str = "feature-persistent";

    /// The keys that [`Self::from_keys`] looks up.
    pub const KEYS: &'static [&'static str] = &[
        "multi-queue-max-queues",
        "max-ring-page-order",
        "max-ring-pages",
        "feature-max-indirect-segments",
        Self::PERSISTENT_KEY,
        "feature-split-ring",
    ];

    /// What the backend writes before `InitWait`. `feature-split-ring`, which is not in blkif.h, is
    /// written only if offered.
    pub fn to_keys(&self) -> Nodes {
        let mut nodes = vec![
            node("multi-queue-max-queues", self.max_queues),
            node("max-ring-page-order", self.max_ring_page_order),
            node("feature-max-indirect-segments", self.max_indirect_segments),
            node(Self::PERSISTENT_KEY, bit(self.persistent)),
        ];
        if self.split_ring {
            nodes.push(node("feature-split-ring", 1));
        }
        nodes
    }

    /// Reads a backend's offer. Missing keys mean one queue, one page, no features. Offers above what
    /// this crate can use are cut to that. `max-ring-pages`, the older key, is read if
    /// `max-ring-page-order` is missing, and rounded down to a power of two.
    ///
    /// # Errors
    /// The first key that is no number.
    pub fn from_keys(keys: &Keys<'_>) -> Result<Self, Refusal> {
        let queues = number32(keys, "multi-queue-max-queues")?.unwrap_or(1);
        let order = match number32(keys, "max-ring-page-order")? {
            Some(order) => order,
            None => number32(keys, "max-ring-pages")?.and_then(u32::checked_ilog2).unwrap_or(0),
        };
        let segments = number32(keys, "feature-max-indirect-segments")?.unwrap_or(0);
        Ok(Self {
            max_queues: u16::try_from(queues).unwrap_or(u16::MAX).clamp(1, MAX_QUEUES),
            max_ring_page_order: u8::try_from(order).unwrap_or(u8::MAX).min(MAX_RING_PAGE_ORDER),
            max_indirect_segments: u16::try_from(segments)
                .unwrap_or(u16::MAX)
                .min(MAX_INDIRECT_SEGMENTS as u16),
            persistent: flag(keys, Self::PERSISTENT_KEY)?,
            split_ring: flag(keys, "feature-split-ring")?,
        })
    }
}
