//! The rings of a connected device.

use crate::records::{Records, RingName};
use crate::ring::{Exit, Inflight, RingControl, RingSetup, Strategy, Tenant, Threads};
use crate::stats::RingStats;
use crate::storage::{Geometry, Storage};
use crate::tuning::{DataPath, PinGrants, Tuning};
use ring_proto::abi::{PAGE_SIZE, SECTOR_SIZE};
use ring_proto::{
    DomId, GrantRef, Limits, Port, RequestConsumer, RingLayout, RingPages, SetupError,
    SharedMemory, back,
};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tracing::warn;
use xen_platform::{Access, EventChannel, Platform};
use xenstore_glue::vbd::{Agreement, QueueKeys};

/// How long a killed predecessor may hold its end of an event channel.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(5);
/// How often to retry meanwhile.
const PREDECESSOR_LOOK: Duration = Duration::from_millis(10);

/// Why the rings of a frontend could not be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error(
        "the disk has {0}-byte sectors and the frontend did not set feature-large-sector-size: set direct = \"auto\", which makes them 512 bytes"
    )]
    SectorSize(u32),
    #[error("ring {ring}: {source}")]
    Platform { ring: usize, source: xen_platform::Error },
    #[error("ring {ring}: {source}")]
    Layout { ring: usize, source: SetupError },
    #[error("ring {ring}: cannot start its thread: {source}")]
    Thread { ring: usize, source: io::Error },
}

/// A ring ended without being told to.
#[derive(Debug)]
pub(super) struct RingEnded {
    pub(super) ring: usize,
    pub(super) why: Exit,
}

struct Ring {
    control: RingControl,
    stats: Arc<RingStats>,
}

/// Rings being served. Dropping this tells them to stop; [`Link::stop`] also waits for them.
pub(super) struct Link {
    rings: Vec<Ring>,
    /// The device's size as last told to them, in 512-byte sectors.
    sectors: u64,
    strategy: Strategy,
    /// Each ring has a sender until it has let go of everything of the frontend's.
    alive: mpsc::Receiver<Infallible>,
    ended: UnboundedReceiver<RingEnded>,
}

/// What a link is made from.
pub(super) struct LinkSetup<'a> {
    pub(super) platform: &'a Arc<dyn Platform>,
    pub(super) threads: &'a Arc<Threads>,
    pub(super) peer: DomId,
    /// For the names of threads.
    pub(super) name: &'a str,
    pub(super) agreement: &'a Agreement,
    pub(super) storage: &'a Arc<dyn Storage>,
    pub(super) geometry: &'a Geometry,
    pub(super) tuning: &'a Tuning,
    /// The backend directory.
    pub(super) backend: &'a str,
    /// Where to record requests in flight, for a frontend that cannot reissue them.
    pub(super) records: Option<&'a Records>,
    /// The frontend is connected: a predecessor served these rings.
    pub(super) live: bool,
}

impl Link {
    /// Maps, binds and starts every ring, and leaves the link in `place`. After an error it holds the
    /// rings before the one that failed, which must be [stopped](Self::stop).
    pub(super) async fn start<'a>(
        place: &'a mut Option<Self>,
        setup: &LinkSetup<'_>,
    ) -> Result<&'a Self, LinkError> {
        let geometry = setup.geometry;
        let large = geometry.sector_size > SECTOR_SIZE as u32;
        // Segments cannot address sectors larger than a page.
        if geometry.sector_size > PAGE_SIZE as u32 || large && !setup.agreement.large_sector_size {
            return Err(LinkError::SectorSize(geometry.sector_size));
        }
        let strategy = strategy(setup);
        let (ours, alive) = mpsc::channel(1);
        let (reports, ended) = mpsc::unbounded_channel();
        let (rings, sectors) = (Vec::new(), geometry.sectors);
        let link = place.insert(Self { rings, sectors, strategy, alive, ended });
        for (ring, keys) in setup.agreement.queues.iter().enumerate() {
            let (ours, reports) = (ours.clone(), reports.clone());
            link.rings.push(start_ring(setup, strategy, ring, keys, ours, reports).await?);
        }
        Ok(link)
    }

    /// Waits for a ring that ends by itself. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> RingEnded {
        match self.ended.recv().await {
            Some(ended) => ended,
            // All rings have ended and been reported.
            None => std::future::pending().await,
        }
    }

    pub(super) fn stats(&self) -> Vec<Arc<RingStats>> {
        self.rings.iter().map(|ring| ring.stats.clone()).collect()
    }

    pub(super) fn strategy(&self) -> &'static str {
        match self.strategy {
            Strategy::Copy => "grant copy",
            Strategy::Persistent => "persistent grants",
            Strategy::Bounce => "persistent grants, bounced",
            Strategy::Map => "map and unmap",
            Strategy::Nothing => "no data moved",
        }
    }

    /// Tells every ring the device's new size, in 512-byte sectors. Returns the size they knew before.
    pub(super) fn resize(&mut self, sectors: u64) -> u64 {
        for ring in &self.rings {
            ring.control.resize(sectors);
        }
        std::mem::replace(&mut self.sectors, sectors)
    }

    /// Answers the requests in flight, then unmaps and unbinds. May be dropped and called again.
    pub(super) async fn stop(&mut self) {
        self.tell();
        // Nothing is ever sent: this returns when the last ring has ended.
        let _ = self.alive.recv().await;
    }

    fn tell(&self) {
        for ring in &self.rings {
            ring.control.stop();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tell();
    }
}

fn strategy(setup: &LinkSetup<'_>) -> Strategy {
    let LinkSetup { geometry, tuning, .. } = setup;
    // A disk that others may open does not make us wait for a killed predecessor, whose reads in flight
    // could then land in pages that the guest uses for something else by now.
    let may_pin = geometry.exclusive
        && match tuning.pin_grants {
            PinGrants::Auto => setup.platform.may_pin(),
            PinGrants::On => true,
            PinGrants::Off => false,
        };
    // If the device requires aligned buffers, the guest's pages will not do, but ours will.
    let aligned = geometry.buffer_alignment <= SECTOR_SIZE as u32;
    let mapped = aligned && (may_pin || !geometry.pins_buffers());
    if setup.agreement.persistent && mapped {
        Strategy::Persistent
    } else if !geometry.moves_data {
        Strategy::Nothing
    } else if setup.agreement.persistent {
        Strategy::Bounce
    } else if tuning.data == DataPath::Map && mapped {
        Strategy::Map
    } else {
        Strategy::Copy
    }
}

async fn start_ring(
    setup: &LinkSetup<'_>,
    strategy: Strategy,
    ring: usize,
    keys: &QueueKeys,
    alive: mpsc::Sender<Infallible>,
    ended: UnboundedSender<RingEnded>,
) -> Result<Ring, LinkError> {
    let refused = |source| LinkError::Platform { ring, source };
    let (platform, peer) = (setup.platform, setup.peer);
    let map = |refs: &[GrantRef]| -> Result<Arc<dyn SharedMemory>, LinkError> {
        Ok(platform.map(peer, refs, Access::ReadWrite).map_err(refused)?)
    };
    let requests = map(&keys.request_refs)?;
    let pages = match setup.agreement.layout {
        RingLayout::Union(_) => RingPages::Union(requests),
        RingLayout::Split => RingPages::Split(requests, map(&keys.response_refs)?),
    };
    // Before anything else: this is refused while a predecessor lives, and from here on only we touch
    // the ring and its record.
    let channel = bind(setup, keys.port).await.map_err(refused)?;
    let (mut requests, responses) =
        back::attach(pages, setup.agreement.layout, setup.agreement.order)
            .map_err(|source| LinkError::Layout { ring, source })?;
    let inflight = inflight(setup, ring, keys, &mut requests).map_err(refused)?;
    if setup.live {
        // The predecessor may have died between a response and its event.
        channel.notify().map_err(refused)?;
    }
    let geometry = setup.geometry;
    let stats = Arc::new(RingStats::default());
    let served = RingSetup {
        platform: platform.clone(),
        peer,
        requests,
        responses,
        inflight,
        channel,
        storage: setup.storage.clone(),
        limits: Limits {
            sectors: geometry.sectors,
            granule: geometry.sector_size / SECTOR_SIZE as u32,
            max_indirect_segments: setup.agreement.max_indirect_segments,
            read_only: geometry.read_only,
            discard: geometry.discard.is_some(),
        },
        strategy,
        stats: stats.clone(),
    };
    let tenant = Tenant {
        name: format!("{}.{} r{ring}", setup.peer, setup.name),
        // Nobody listens when the whole device is going away.
        ended: Box::new(move |why| drop(ended.send(RingEnded { ring, why }))),
        alive: Arc::new(alive),
    };
    let control = setup.threads.serve(served, tenant);
    let control = control.map_err(|source| LinkError::Thread { ring, source })?;
    Ok(Ring { control, stats })
}

/// Our end of a ring's event channel.
async fn bind(setup: &LinkSetup<'_>, port: Port) -> xen_platform::Result<Box<dyn EventChannel>> {
    let since = Instant::now();
    loop {
        match setup.platform.bind_interdomain(setup.peer, port) {
            // A predecessor holds it until the kernel has torn down its io_uring.
            Err(xen_platform::Error::Port { .. })
                if setup.live && since.elapsed() < PREDECESSOR_PATIENCE =>
            {
                tokio::time::sleep(PREDECESSOR_LOOK).await;
            }
            outcome => return outcome,
        }
    }
}

/// The table of requests in flight on a ring, in memory that outlives us if the frontend needs it.
fn inflight(
    setup: &LinkSetup<'_>,
    ring: usize,
    keys: &QueueKeys,
    requests: &mut RequestConsumer,
) -> xen_platform::Result<Inflight> {
    let Agreement { layout, order, .. } = setup.agreement;
    let QueueKeys { request_refs, response_refs, port } = keys;
    let refs = |refs: &[GrantRef]| refs.iter().map(|gref| gref.0).collect::<Vec<_>>();
    let identity = format!(
        "{} ring {ring} {layout:?} order {order} pages {:?} {:?} port {}",
        setup.backend,
        refs(request_refs),
        refs(response_refs),
        port.0
    );
    let name = RingName { backend: setup.backend, ring, identity: &identity };
    if setup.live {
        if let Some(inflight) = setup.records.and_then(|records| records.take_up(name, requests)) {
            return Ok(inflight);
        }
        // If there is nothing to take, all that was taken has been answered.
        if !matches!(requests.poll(), Ok(0)) {
            warn!(ring, "no record of what is in flight: requests may be lost or done twice");
        }
    }
    match setup.records.and_then(|records| records.begin(name, requests)) {
        Some(inflight) => Ok(inflight),
        None => Inflight::private(requests),
    }
}
