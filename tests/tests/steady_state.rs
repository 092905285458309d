//! What a request costs a ring's thread besides the work: no allocation, and no system call where
//! nobody sleeps.
//!
//! The thread is run in this process, whose allocator counts by thread; both ends are domains of a
//! real broker.

use anyhow::{Context, Result, ensure};
use blkback::ring::{self, Inflight, RingControl, RingSetup, Strategy, Wait};
use blkback::stats::RingStats;
use blkback::storage::{self, Options};
use ring_proto::abi::{PAGE_SIZE, Segment};
use ring_proto::{
    Abi, Body, Limits, Request, RingLayout, RingPages, Segments, Status, Transfer, back, front,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_platform::embedded::EmbeddedPlatform;
use xen_platform::{Access, Platform};

/// Requests before counting starts: by then every buffer list has its size and every page is mapped.
const WARM_UP: u64 = 1_000;
/// Requests that are counted.
const COUNTED: u64 = 5_000;
/// Size of the disk in 512-byte sectors.
const SECTORS: u64 = 8192;

/// Counts the allocations of threads that have asked for it.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED_HERE: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // A thread that is ending has no such value any more.
    if COUNTED_HERE.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as our caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as our caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as our caller promised.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of the ring's thread for [`COUNTED`] requests, and its counters.
fn serve(
    host: &Host,
    target: &str,
    strategy: Strategy,
    wait: Wait,
) -> Result<(u64, Arc<RingStats>)> {
    let domid =
        host.create_domain(&format!("{strategy:?}-{wait:?}").replace(['(', ')'], ""), &[])?;
    let guest = EmbeddedPlatform::attach(&host.platform_dir(), &domid.to_string())?;
    let stor = EmbeddedPlatform::attach(&host.platform_dir(), DRIVER_DOMAIN)?;
    let layout = RingLayout::Union(Abi::NATIVE);
    let ring = guest.grant(stor.domid(), 1, Access::ReadWrite)?;
    let (mut requests, mut responses) = front::create(RingPages::Union(ring.memory()), layout, 0)?;
    let depth = u64::from(requests.slots());
    let data = guest.grant(stor.domid(), depth as usize, Access::ReadWrite)?;
    let near = guest.alloc_unbound(stor.domid())?;
    let far = stor.bind_interdomain(guest.domid(), near.port())?;
    let mapped = stor.map(guest.domid(), ring.refs(), Access::ReadWrite)?;
    let (taker, answerer) = back::attach(RingPages::Union(mapped), layout, 0)?;
    let stats = Arc::new(RingStats::default());
    let control = RingControl::new(SECTORS)?;
    let setup = RingSetup {
        platform: stor,
        peer: guest.domid(),
        inflight: Inflight::private(&taker)?,
        requests: taker,
        responses: answerer,
        channel: far,
        storage: storage::open(&target.parse()?, Options::default())?,
        limits: Limits {
            sectors: SECTORS,
            granule: 1,
            max_indirect_segments: 0,
            read_only: false,
            discard: true,
        },
        strategy,
        wait,
        stats: stats.clone(),
        control: control.clone(),
    };
    let thread = std::thread::spawn(move || {
        COUNTED_HERE.set(true);
        ring::run(setup)
    });
    let mut before = 0;
    for n in 0..(WARM_UP + COUNTED) / depth {
        if n == WARM_UP / depth {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        for id in 0..depth {
            let mut segments = Segments::EMPTY;
            segments.push(Segment::new(data.refs()[id as usize], 0, 7));
            let transfer = if (n + id) % 3 == 0 { Transfer::Write } else { Transfer::Read };
            let sector = (n * 31 + id * 8) % (SECTORS - 8);
            requests.push(&Request { id, body: Body::Direct { transfer, sector, segments } })?;
        }
        if requests.publish() {
            near.notify()?;
        }
        for _ in 0..depth {
            while responses.poll()? == 0 {
                std::hint::spin_loop();
            }
            let response = responses.pop().context("a response")?;
            ensure!(response.status == Status::Okay, "{response:?}");
        }
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    control.stop();
    thread.join().map_err(|_| anyhow::anyhow!("the ring's thread panicked"))??;
    Ok((allocations, stats))
}

#[test]
fn a_request_allocates_nothing_and_polling_calls_nobody() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let memory = format!("memory:{}", SECTORS * 512);
    let file = host.dir().join("disk.raw");
    std::fs::write(&file, vec![0; PAGE_SIZE * SECTORS as usize / 8])?;
    let file = file.display().to_string();
    let null = "null:1G".to_owned();
    for (target, strategy) in [
        (&null, Strategy::Nothing),
        (&memory, Strategy::Copy),
        (&memory, Strategy::Persistent),
        (&file, Strategy::Copy),
        (&file, Strategy::Persistent),
    ] {
        let (allocations, stats) = serve(&host, target, strategy, Wait::Poll)?;
        let case = format!("{target}, {strategy:?}: {stats:#?}");
        ensure!(allocations == 0, "{allocations} allocations: {case}");
        ensure!(stats.sleeps.get() == 0 && stats.events.get() == 0, "{case}");
        let done = stats.rd_req.get() + stats.wr_req.get();
        ensure!(done >= COUNTED, "{case}");
        if target != &file {
            ensure!(stats.system_calls.get() == 0, "{case}");
        }
    }
    // Mapping for each request does allocate, so the counter counts.
    let (allocations, _) = serve(&host, &memory, Strategy::Map, Wait::Poll)?;
    ensure!(allocations > COUNTED / 2, "{allocations} allocations");
    Ok(())
}
