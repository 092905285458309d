//! What both ends work with once the offer and the request are known.

use super::{BackendOffer, FrontendRequest, QueueKeys, Refusal, Rule};
use ring_proto::RingLayout;
use std::collections::HashMap;

/// What a backend and a frontend have agreed on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// How every ring is laid out, with the frontend's ABI.
    pub layout: RingLayout,
    /// log2 of ring (split: request) pages.
    pub order: u8,
    /// The rings: as many as agreed, each with the pages its layout and order take. No grant or port
    /// occurs twice, and no port is 0.
    pub queues: Vec<QueueKeys>,
    /// Grants stay mapped: both ends want it.
    pub persistent: bool,
    /// Segments an indirect request may have; 0 if there are none.
    pub max_indirect_segments: u16,
    /// The frontend understands logical sectors above 512 bytes.
    pub large_sector_size: bool,
}

impl Agreement {
    /// Request slots of each ring.
    pub fn slots(&self) -> u32 {
        self.layout.slots(self.order)
    }

    /// Combines offer and request, with the same result on both ends. The request must be within the
    /// offer; one read by [`FrontendRequest::from_keys`] always is.
    ///
    /// # Errors
    /// A request without a ring or a port, or that names a page or a port twice: two rings in one
    /// page would corrupt each other, and a port can be bound only once.
    pub fn new(offer: &BackendOffer, request: FrontendRequest) -> Result<Self, Refusal> {
        let refuse =
            |key: &str, value: &str| Err(Refusal::new(key, Some(value.as_bytes()), Rule::Below(1)));
        if request.queues.is_empty() {
            return refuse("multi-queue-num-queues", "0");
        }
        for (queue, keys) in request.queues.iter().enumerate() {
            if keys.port.0 == 0 {
                return refuse(&request.port_key(queue), "0");
            }
        }
        distinct(request.grants().map(|(key, gref)| (key, gref.0)))?;
        let ports = request.queues.iter().enumerate();
        distinct(ports.map(|(queue, keys)| (request.port_key(queue), keys.port.0)))?;
        Ok(Self {
            layout: request.layout,
            order: request.order,
            persistent: offer.persistent && request.persistent,
            max_indirect_segments: offer.max_indirect_segments,
            large_sector_size: request.large_sector_size,
            queues: request.queues,
        })
    }
}

fn distinct(numbers: impl Iterator<Item = (String, u32)>) -> Result<(), Refusal> {
    let mut seen = HashMap::new();
    for (key, number) in numbers {
        if let Some(other) = seen.insert(number, key.clone()) {
            let value = number.to_string();
            return Err(Refusal::new(key, Some(value.as_bytes()), Rule::Repeats(other)));
        }
    }
    Ok(())
}
