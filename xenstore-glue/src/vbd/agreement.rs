//! What both ends work with once offer and request have met.

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
    /// The rings: as many as agreed, each with the pages its layout and order take, no grant and no
    /// port twice, no port 0.
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

    /// Brings offer and request together; both ends come to the same.
    ///
    /// # Errors
    /// A request beyond the offer, or one that names a page or a port twice: two rings in one page
    /// would corrupt each other, and a port can be bound only once.
    pub fn new(offer: &BackendOffer, request: FrontendRequest) -> Result<Self, Refusal> {
        let count = request.queues.len();
        let refuse =
            |key: &str, value: String, rule| Err(Refusal::new(key, Some(value.as_bytes()), rule));
        if count == 0 {
            return refuse("multi-queue-num-queues", count.to_string(), Rule::Below(1));
        }
        if count > usize::from(offer.max_queues) {
            let rule = Rule::Above(offer.max_queues.into());
            return refuse("multi-queue-num-queues", count.to_string(), rule);
        }
        if request.order > offer.max_ring_page_order {
            let rule = Rule::Above(offer.max_ring_page_order.into());
            return refuse("ring-page-order", request.order.to_string(), rule);
        }
        if request.layout == RingLayout::Split && !offer.split_ring {
            return refuse("split-ring", "1".to_owned(), Rule::NotOffered);
        }
        let (requests, responses) = request.layout.pages(request.order);
        for (queue, keys) in request.queues.iter().enumerate() {
            let (key, has) = (request.port_key(queue), keys.request_refs.len());
            if has != requests {
                return Err(Refusal::new(key, None, Rule::PageCount(has, requests)));
            }
            let has = keys.response_refs.len();
            if has != responses {
                return Err(Refusal::new(key, None, Rule::PageCount(has, responses)));
            }
            if keys.port.0 == 0 {
                return refuse(&key, "0".to_owned(), Rule::Below(1));
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
