//! What the frontend writes before `Initialised`.

use super::{BackendOffer, Keys, Nodes, Refusal, Rule, bit, flag, node, number32, required32};
use ring_proto::abi::MAX_RING_PAGE_ORDER;
use ring_proto::{Abi, GrantRef, Port, RingLayout};

/// The ABI of a frontend that has no `protocol` key.
///
/// blkif.h says "the native one". On x86, Linux, QEMU and tapdisk all take 32 bit, because only
/// frontends that predate the key omit it, and those are 32-bit. We do the same.
pub const PROTOCOL_DEFAULT: Abi =
    if cfg!(any(target_arch = "x86", target_arch = "x86_64")) { Abi::X86_32 } else { Abi::NATIVE };

/// `XEN_IO_PROTO_ABI_*` of public/io/protocols.h, and their ABIs here.
const PROTOCOLS: &[(&str, Abi)] = &[
    ("x86_64-abi", Abi::X86_64),
    ("x86_32-abi", Abi::X86_32),
    // One name for 32 and 64 bit: both align `uint64_t` to 8 bytes.
    #[cfg(any(target_arch = "arm", target_arch = "aarch64"))]
    ("arm-abi", Abi::X86_64),
];

fn protocol_name(abi: Abi) -> &'static str {
    match abi {
        _ if cfg!(any(target_arch = "arm", target_arch = "aarch64")) => "arm-abi",
        Abi::X86_64 => "x86_64-abi",
        Abi::X86_32 => "x86_32-abi",
    }
}

/// One ring: its pages and its event channel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QueueKeys {
    /// The pages of the ring; with the split layout, those of its requests.
    pub request_refs: Vec<GrantRef>,
    /// With the split layout, the pages of its indices and responses; else none.
    pub response_refs: Vec<GrantRef>,
    /// The frontend's unbound event channel.
    pub port: Port,
}

/// What the frontend asks for.
///
/// | key | where | |
/// |---|---|---|
/// | `protocol` | top | |
/// | `feature-persistent` | top | |
/// | `feature-large-sector-size` | top | written only if set |
/// | `multi-queue-num-queues` | top | written only above 1 |
/// | `ring-page-order` | top | written only above 0, or with the split layout; `num-ring-pages` is read too |
/// | `split-ring` | top | the extension; written only with the split layout |
/// | `ring-ref` | queue | the only page, if there is no `ring-page-order` |
/// | `ring-ref0`, `ring-ref1`, … | queue | the pages, if there is a `ring-page-order`, even 0 |
/// | `response-ring-ref0`, … | queue | the split layout's other pages |
/// | `event-channel` | queue | |
///
/// A queue's keys are at the top if there is one queue, else under `queue-0/`, `queue-1/`, ….
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendRequest {
    /// How the ring is laid out. With the split layout, `protocol` is the native ABI.
    pub layout: RingLayout,
    /// log2 of ring (split: request) pages.
    pub order: u8,
    /// The frontend can leave its grants mapped.
    pub persistent: bool,
    /// The frontend knows that ring and `sectors` count 512 bytes even if `sector-size` is larger.
    pub large_sector_size: bool,
    /// The rings.
    pub queues: Vec<QueueKeys>,
}

/// What the keys at the top say about where the others are.
struct Shape {
    layout: RingLayout,
    order: u8,
    /// Whether pages are numbered; otherwise there is just `ring-ref`.
    numbered: bool,
    queues: u16,
}

impl FrontendRequest {
    /// The keys at the top of the directory that [`Self::ring_keys`] and [`Self::from_keys`] look up.
    pub const KEYS: &'static [&'static str] = &[
        "protocol",
        "feature-persistent",
        "feature-large-sector-size",
        "multi-queue-num-queues",
        "ring-page-order",
        "num-ring-pages",
        "split-ring",
    ];

    /// Written as 1 by a frontend that makes new rings and reissues the requests in flight when a
    /// connected backend goes back to `InitWait`. Linux's frontend does not; an extension, see
    /// docs/protocol.md.
    pub const REISSUE_KEY: &'static str = "feature-reissue";

    /// What the frontend writes, in one transaction, before `Initialised`.
    pub fn to_keys(&self) -> Nodes {
        let (abi, split) = match self.layout {
            RingLayout::Union(abi) => (abi, false),
            RingLayout::Split => (Abi::NATIVE, true),
        };
        let numbered = self.order > 0 || split;
        let mut nodes = vec![
            node("protocol", protocol_name(abi)),
            node("feature-persistent", bit(self.persistent)),
        ];
        if self.large_sector_size {
            nodes.push(node("feature-large-sector-size", 1));
        }
        if self.queues.len() > 1 {
            nodes.push(node("multi-queue-num-queues", self.queues.len()));
        }
        if numbered {
            nodes.push(node("ring-page-order", self.order));
        }
        if split {
            nodes.push(node("split-ring", 1));
        }
        for (queue, keys) in self.queues.iter().enumerate() {
            let prefix = prefix(self.queues.len(), queue);
            for (page, gref) in keys.request_refs.iter().enumerate() {
                nodes.push(node(&ring_ref(&prefix, numbered, page), gref.0));
            }
            for (page, gref) in keys.response_refs.iter().enumerate() {
                nodes.push(node(&response_ref(&prefix, page), gref.0));
            }
            nodes.push(node(&event_channel(&prefix), keys.port.0));
        }
        nodes
    }

    /// The keys of the rings that [`Self::from_keys`] will look up, given those of [`Self::KEYS`].
    ///
    /// Their number is bounded by the offer, whatever the frontend wrote.
    ///
    /// # Errors
    /// As [`Self::from_keys`], for the keys at the top.
    pub fn ring_keys(offer: &BackendOffer, keys: &Keys<'_>) -> Result<Vec<String>, Refusal> {
        let shape = Shape::from_keys(offer, keys)?;
        let (requests, responses) = shape.layout.pages(shape.order);
        let mut names = Vec::new();
        for queue in 0..usize::from(shape.queues) {
            let prefix = prefix(shape.queues.into(), queue);
            names.extend((0..requests).map(|page| ring_ref(&prefix, shape.numbered, page)));
            names.extend((0..responses).map(|page| response_ref(&prefix, page)));
            names.push(event_channel(&prefix));
        }
        Ok(names)
    }

    /// Reads what a frontend asks for, within the offer.
    ///
    /// # Errors
    /// Missing keys, malformed numbers, counts above the offer. [`super::Agreement::new`] checks that
    /// grants and ports differ.
    pub fn from_keys(offer: &BackendOffer, keys: &Keys<'_>) -> Result<Self, Refusal> {
        let shape = Shape::from_keys(offer, keys)?;
        let (requests, responses) = shape.layout.pages(shape.order);
        let gref = |key: String| required32(keys, &key).map(GrantRef);
        let queue = |queue| {
            let prefix = prefix(shape.queues.into(), queue);
            Ok(QueueKeys {
                request_refs: (0..requests)
                    .map(|page| gref(ring_ref(&prefix, shape.numbered, page)))
                    .collect::<Result<_, _>>()?,
                response_refs: (0..responses)
                    .map(|page| gref(response_ref(&prefix, page)))
                    .collect::<Result<_, _>>()?,
                port: Port(required32(keys, &event_channel(&prefix))?),
            })
        };
        Ok(Self {
            layout: shape.layout,
            order: shape.order,
            persistent: flag(keys, "feature-persistent")?,
            large_sector_size: flag(keys, "feature-large-sector-size")?,
            queues: (0..usize::from(shape.queues)).map(queue).collect::<Result<_, _>>()?,
        })
    }

    /// Every grant of every queue, with its key.
    pub(super) fn grants(&self) -> impl Iterator<Item = (String, GrantRef)> + '_ {
        let numbered = self.order > 0 || self.layout == RingLayout::Split;
        self.queues.iter().enumerate().flat_map(move |(queue, keys)| {
            let prefix = prefix(self.queues.len(), queue);
            let requests = keys.request_refs.iter().enumerate();
            let responses = keys.response_refs.iter().enumerate();
            let requests: Vec<_> =
                requests.map(|(page, gref)| (ring_ref(&prefix, numbered, page), *gref)).collect();
            let responses: Vec<_> =
                responses.map(|(page, gref)| (response_ref(&prefix, page), *gref)).collect();
            requests.into_iter().chain(responses)
        })
    }

    /// The key of a queue's event channel.
    pub(super) fn port_key(&self, queue: usize) -> String {
        event_channel(&prefix(self.queues.len(), queue))
    }
}

impl Shape {
    fn from_keys(offer: &BackendOffer, keys: &Keys<'_>) -> Result<Self, Refusal> {
        let abi = protocol(keys)?;
        let split = flag(keys, "split-ring")?;
        if split && !offer.split_ring {
            let value = keys("split-ring");
            return Err(Refusal::new("split-ring", value.as_deref(), Rule::NotOffered));
        }
        let (order, numbered) = order(offer, keys)?;
        Ok(Self {
            layout: if split { RingLayout::Split } else { RingLayout::Union(abi) },
            order,
            numbered: numbered || split,
            queues: queues(offer, keys)?,
        })
    }
}

fn protocol(keys: &Keys<'_>) -> Result<Abi, Refusal> {
    let Some(value) = keys("protocol") else { return Ok(PROTOCOL_DEFAULT) };
    let known = PROTOCOLS.iter().find(|(name, _)| name.as_bytes() == value);
    known
        .map(|(_, abi)| *abi)
        .ok_or_else(|| Refusal::new("protocol", Some(&value), Rule::UnknownProtocol))
}

fn queues(offer: &BackendOffer, keys: &Keys<'_>) -> Result<u16, Refusal> {
    let key = "multi-queue-num-queues";
    let Some(count) = number32(keys, key)? else { return Ok(1) };
    let rule = match u16::try_from(count) {
        Ok(0) => Rule::Below(1),
        Ok(count) if count <= offer.max_queues => return Ok(count),
        _ => Rule::Above(offer.max_queues.into()),
    };
    Err(Refusal::new(key, Some(count.to_string().as_bytes()), rule))
}

/// log2 of the ring's pages, and whether they are numbered.
fn order(offer: &BackendOffer, keys: &Keys<'_>) -> Result<(u8, bool), Refusal> {
    let cap = u32::from(offer.max_ring_page_order.min(MAX_RING_PAGE_ORDER));
    if let Some(order) = number32(keys, "ring-page-order")? {
        return match u8::try_from(order) {
            Ok(small) if order <= cap => Ok((small, true)),
            _ => {
                let value = order.to_string();
                Err(Refusal::new(
                    "ring-page-order",
                    Some(value.as_bytes()),
                    Rule::Above(cap.into()),
                ))
            }
        };
    }
    let key = "num-ring-pages";
    let Some(pages) = number32(keys, key)? else { return Ok((0, false)) };
    let rule = match pages {
        0 => Rule::Below(1),
        _ if pages > 1 << cap => Rule::Above(1 << cap),
        _ if !pages.is_power_of_two() => Rule::NotPowerOfTwo,
        // At most 1 << MAX_RING_PAGE_ORDER.
        _ => return Ok((pages.ilog2() as u8, pages > 1)),
    };
    Err(Refusal::new(key, Some(pages.to_string().as_bytes()), rule))
}

fn prefix(queues: usize, queue: usize) -> String {
    if queues > 1 { format!("queue-{queue}/") } else { String::new() }
}

fn ring_ref(prefix: &str, numbered: bool, page: usize) -> String {
    if numbered { format!("{prefix}ring-ref{page}") } else { format!("{prefix}ring-ref") }
}

fn response_ref(prefix: &str, page: usize) -> String {
    format!("{prefix}response-ring-ref{page}")
}

fn event_channel(prefix: &str) -> String {
    format!("{prefix}event-channel")
}
