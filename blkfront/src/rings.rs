//! Making rings.

use crate::Cause;
use crate::hw::Ring;
use ring_proto::{DomId, RingLayout, RingPages};
use xen_platform::{Access, Platform};
use xenstore_glue::vbd::QueueKeys;

/// Grants the pages of ring `index` to `peer`, lays an empty ring over them and makes its event channel.
/// Returns it with what the peer needs to know.
pub(crate) fn make(
    platform: &dyn Platform,
    peer: DomId,
    index: u32,
    layout: RingLayout,
    order: u8,
) -> Result<(Ring, QueueKeys), Cause> {
    let failed = |source| Cause::Platform { ring: index, source };
    let (first, second) = layout.pages(order);
    let requests = platform.grant(peer, first, Access::ReadWrite).map_err(failed)?;
    let request_refs = requests.refs().to_vec();
    let (pages, grants) = if second == 0 {
        (RingPages::Union(requests.memory()), vec![requests])
    } else {
        let responses = platform.grant(peer, second, Access::ReadWrite).map_err(failed)?;
        (RingPages::Split(requests.memory(), responses.memory()), vec![requests, responses])
    };
    let response_refs = grants.get(1).map_or(Vec::new(), |grant| grant.refs().to_vec());
    let (producer, consumer) = ring_proto::front::create(pages, layout, order)
        .map_err(|source| Cause::Ring { ring: index, source })?;
    let channel = platform.alloc_unbound(peer).map_err(failed)?;
    let keys = QueueKeys { request_refs, response_refs, port: channel.port() };
    Ok((Ring { producer, consumer, channel, _pages: grants }, keys))
}
