//! A ring's thread in this process, between two domains of a real broker.

use super::allocations;
use super::served::Served;
use anyhow::{Context, Result, ensure};
use blkback::ring::{Inflight, RingSetup, Strategy};
use blkback::stats::RingStats;
use blkback::storage::{self, Geometry, Options, Queue, QueueSetup, Storage};
use ring_proto::abi::Segment;
use ring_proto::{
    Abi, Body, Limits, Request, RingLayout, RingPages, Segments, Status, Transfer, back, front,
};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host};
use xen_platform::embedded::EmbeddedPlatform;
use xen_platform::{Access, Platform, Waiting};

/// Size of the disk in 512-byte sectors.
pub(crate) const SECTORS: u64 = 8192;
/// Rounds before counting starts: by then every buffer list has its size and every page is mapped.
pub(crate) const WARM_UP: u64 = 32;
/// How often a guest that lets its backend sleep looks.
const LOOK: Duration = Duration::from_micros(20);

/// What a ring's thread is given to do: rounds of as many requests of 4 KiB as the ring holds.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) target: String,
    pub(crate) strategy: Strategy,
    /// [`Waiting::Poll`], or [`Waiting::Event`], where the thread is asleep when a round begins, so that it
    /// does the same each time.
    pub(crate) waiting: Waiting,
    /// One request in three writes.
    pub(crate) writes: bool,
}

/// What the thread counted from the end of the warm-up on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) allocations: u64,
    pub(crate) system_calls: u64,
    pub(crate) events: u64,
    pub(crate) kicks: u64,
    pub(crate) sleeps: u64,
}

impl Counts {
    fn now(stats: &RingStats) -> Self {
        Self {
            requests: stats.rd_req.get() + stats.wr_req.get(),
            allocations: allocations::counted(),
            system_calls: stats.system_calls.get(),
            events: stats.events.get(),
            kicks: stats.kicks.get(),
            sleeps: stats.sleeps.get(),
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            allocations: self.allocations - before.allocations,
            system_calls: self.system_calls - before.system_calls,
            events: self.events - before.events,
            kicks: self.kicks - before.kicks,
            sleeps: self.sleeps - before.sleeps,
        }
    }
}

/// A disk that identifies the ring's thread, which opens its queue here.
struct Counted(Arc<dyn Storage>);

impl Storage for Counted {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.0.refresh()
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        allocations::count_here();
        self.0.open_queue(setup)
    }
}

/// Runs a ring's thread for the warm-up and `rounds`, in the new domain `name`.
pub(crate) fn serve(host: &Host, name: &str, work: &Work, rounds: u64) -> Result<Counts> {
    let domid = host.create_domain(name, &[])?;
    let guest = EmbeddedPlatform::attach(&host.platform_dir(), &domid.to_string())?;
    let stor = EmbeddedPlatform::attach(&host.platform_dir(), DRIVER_DOMAIN)?;
    let layout = RingLayout::Union(Abi::NATIVE);
    let ring = guest.grant(stor.domid(), 1, Access::ReadWrite)?;
    let (mut requests, mut responses) = front::create(RingPages::Union(ring.memory()), layout, 0)?;
    let depth = u64::from(requests.slots());
    let data = guest.grant(stor.domid(), depth as usize, Access::ReadWrite)?;
    let mut near = guest.alloc_unbound(stor.domid())?;
    let far = stor.bind_interdomain(guest.domid(), near.port())?;
    let mapped = stor.map(guest.domid(), ring.refs(), Access::ReadWrite)?;
    let (taker, answerer) = back::attach(RingPages::Union(mapped), layout, 0)?;
    let stats = Arc::new(RingStats::default());
    let setup = RingSetup {
        platform: stor,
        peer: guest.domid(),
        inflight: Inflight::private(&taker)?,
        requests: taker,
        responses: answerer,
        channel: far,
        storage: Arc::new(Counted(storage::open(&work.target.parse()?, Options::default())?)),
        limits: Limits {
            sectors: SECTORS,
            granule: 1,
            max_indirect_segments: 0,
            read_only: false,
            discard: true,
        },
        strategy: work.strategy,
        stats: stats.clone(),
    };
    let served = Served::start(setup, work.waiting)?;
    let sleepy = work.waiting == Waiting::Event;
    let asleep_since = |sleeps: u64| -> Result<()> {
        while sleepy && stats.sleeps.get() <= sleeps {
            served.check()?;
            std::thread::sleep(LOOK);
        }
        Ok(())
    };
    asleep_since(0)?;
    let mut before = Counts::default();
    for n in 0..WARM_UP + rounds {
        if n == WARM_UP {
            before = Counts::now(&stats);
        }
        for id in 0..depth {
            let mut segments = Segments::EMPTY;
            segments.push(Segment::new(data.refs()[id as usize], 0, 7));
            let write = work.writes && (n + id) % 3 == 0;
            let transfer = if write { Transfer::Write } else { Transfer::Read };
            let sector = (n * 31 + id) * 8 % SECTORS;
            requests.push(&Request { id, body: Body::Direct { transfer, sector, segments } })?;
        }
        let sleeps = stats.sleeps.get();
        if sleepy {
            ensure!(!responses.final_check()?, "a response to nothing");
        }
        if requests.publish() {
            near.notify()?;
        }
        for _ in 0..depth {
            while responses.poll()? == 0 {
                served.check()?;
                if sleepy { std::thread::sleep(LOOK) } else { std::hint::spin_loop() }
            }
            let response = responses.pop().context("a response")?;
            ensure!(response.status == Status::Okay, "{response:?}");
        }
        asleep_since(sleeps)?;
        if near.take()? {
            near.unmask()?;
        }
    }
    let counts = Counts::now(&stats).since(&before);
    served.stop()?;
    Ok(counts)
}
