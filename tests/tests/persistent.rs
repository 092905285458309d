//! Persistent grants: what a request names and is not mapped yet is mapped by one operation, and stays as long
//! as there is room.
//!
//! A ring's thread in this process, between two domains of a real broker. What it has mapped is read from
//! the guest's grant table.

mod served;

use anyhow::{Context, Result, bail, ensure};
use blkback::ring::{Inflight, RingSetup, Strategy};
use blkback::stats::RingStats;
use blkback::storage::{self, Options};
use ring_proto::abi::{MAX_INDIRECT_PAGES, PAGE_SIZE, Segment};
use ring_proto::{
    Abi, Body, DomId, GrantRef, Limits, Port, Request, RequestProducer, ResponseConsumer,
    RingLayout, RingPages, Segments, Status, Transfer, Window, Words, back, encode_segment, front,
};
use served::Served;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_platform::embedded::EmbeddedPlatform;
use xen_platform::{
    Access, EventChannel, GrantCopier, GrantedPages, MappedGrants, Platform, Waiting,
};

/// `xen_blkif_max_pgrants` of Linux's backend, which ours promises to keep to.
const MAX_PERSISTENT_GRANTS: usize = 1056;
/// More pages than a backend keeps.
const PAGES: usize = 3000;
/// Segments of a direct request, and of an indirect one, at the most (blkif.h, Linux's backend).
const DIRECT: usize = 11;
const INDIRECT: usize = 256;
/// Size of the disk in 512-byte sectors.
const SECTORS: u64 = 8192;
/// `GTF_reading` and `GTF_writing` of grant_table.h.
const IN_USE: u32 = 0x18;
/// A reference beyond the guest's grant table.
const NO_GRANT: GrantRef = GrantRef(u32::MAX);
/// How often the guest looks for responses.
const LOOK: Duration = Duration::from_micros(20);

/// A domain that counts the maps that it makes.
#[derive(Debug)]
struct Counting {
    domain: Arc<EmbeddedPlatform>,
    maps: AtomicUsize,
}

impl Platform for Counting {
    fn domid(&self) -> DomId {
        self.domain.domid()
    }
    fn claim(&self, device: u32) -> xen_platform::Result<Option<OwnedFd>> {
        self.domain.claim(device)
    }
    fn map(
        &self,
        peer: DomId,
        refs: &[GrantRef],
        access: Access,
    ) -> xen_platform::Result<Arc<dyn MappedGrants>> {
        self.maps.fetch_add(1, Ordering::Relaxed);
        self.domain.map(peer, refs, access)
    }
    fn copier(&self, peer: DomId) -> xen_platform::Result<Box<dyn GrantCopier>> {
        self.domain.copier(peer)
    }
    fn grant(
        &self,
        peer: DomId,
        pages: usize,
        access: Access,
    ) -> xen_platform::Result<Box<dyn GrantedPages>> {
        self.domain.grant(peer, pages, access)
    }
    fn alloc_unbound(&self, peer: DomId) -> xen_platform::Result<Box<dyn EventChannel>> {
        self.domain.alloc_unbound(peer)
    }
    fn bind_interdomain(
        &self,
        peer: DomId,
        port: Port,
    ) -> xen_platform::Result<Box<dyn EventChannel>> {
        self.domain.bind_interdomain(peer, port)
    }
}

/// What a guest asks for.
struct Io {
    transfer: Transfer,
    sector: u64,
    segments: Vec<Segment>,
}

/// A guest with a ring, its pages, and the thread that serves it.
struct Ring {
    table: Words,
    stor: Arc<Counting>,
    /// Of the ring.
    ring: Box<dyn GrantedPages>,
    data: Box<dyn GrantedPages>,
    /// Pages that segments of indirect requests stand in, one a request.
    lists: Box<dyn GrantedPages>,
    read_only: Box<dyn GrantedPages>,
    requests: RequestProducer,
    responses: ResponseConsumer,
    near: Box<dyn EventChannel>,
    served: Served,
}

impl Ring {
    fn start(host: &Host) -> Result<Self> {
        let domid = host.create_domain("guest", &[])?;
        let guest = EmbeddedPlatform::attach(&host.platform_dir(), &domid.to_string())?;
        let domain = EmbeddedPlatform::attach(&host.platform_dir(), DRIVER_DOMAIN)?;
        let stor = Arc::new(Counting { domain, maps: AtomicUsize::new(0) });
        let layout = RingLayout::Union(Abi::NATIVE);
        let grant = |pages, access| guest.grant(stor.domid(), pages, access);
        let ring = grant(1, Access::ReadWrite)?;
        let (requests, responses) = front::create(RingPages::Union(ring.memory()), layout, 0)?;
        let near = guest.alloc_unbound(stor.domid())?;
        let channel = stor.bind_interdomain(guest.domid(), near.port())?;
        let mapped = stor.domain.map(guest.domid(), ring.refs(), Access::ReadWrite)?;
        let (taker, answerer) = back::attach(RingPages::Union(mapped), layout, 0)?;
        let setup = RingSetup {
            platform: stor.clone(),
            peer: guest.domid(),
            inflight: Inflight::private(&taker)?,
            requests: taker,
            responses: answerer,
            channel,
            storage: storage::open(
                &format!("memory:{}", SECTORS * 512).parse()?,
                Options::default(),
            )?,
            limits: Limits {
                sectors: SECTORS,
                granule: 1,
                max_indirect_segments: INDIRECT as u16,
                read_only: false,
                discard: false,
            },
            strategy: Strategy::Persistent,
            stats: Arc::new(RingStats::default()),
        };
        Ok(Self {
            table: Words::new(guest.grant_table()),
            ring,
            data: grant(PAGES, Access::ReadWrite)?,
            lists: grant(requests.slots() as usize, Access::ReadWrite)?,
            read_only: grant(1, Access::ReadOnly)?,
            stor,
            requests,
            responses,
            near,
            served: Served::start(setup, Waiting::Event)?,
        })
    }

    fn is_mapped(&self, gref: GrantRef) -> bool {
        // The flags are the low half of an entry's first word (grant_entry_v1).
        self.table[2 * gref.0 as usize].load(Ordering::Relaxed) & IN_USE != 0
    }

    /// Pages of data and of segments that the backend has mapped.
    fn mapped(&self) -> usize {
        let grants = [&self.data, &self.lists, &self.read_only];
        grants.iter().flat_map(|pages| pages.refs()).filter(|gref| self.is_mapped(**gref)).count()
    }

    /// Maps made so far.
    fn maps(&self) -> usize {
        self.stor.maps.load(Ordering::Relaxed)
    }

    fn page(&self, n: usize) -> Result<Window> {
        Window::new(self.data.memory(), n * PAGE_SIZE, PAGE_SIZE).context("a page")
    }

    /// A segment of a whole page.
    fn whole(&self, n: usize) -> Segment {
        Segment::new(self.data.refs()[n], 0, 7)
    }

    /// Has requests carried out together. Nothing is mapped meanwhile but what may be kept and what they name.
    fn ask(&mut self, ios: &[Io]) -> Result<Vec<Status>> {
        let mut pages = 0;
        for (id, &Io { transfer, sector, ref segments }) in ios.iter().enumerate() {
            pages += segments.len();
            let body = if segments.len() <= DIRECT {
                Body::Direct { transfer, sector, segments: Segments::of(segments) }
            } else {
                pages += 1;
                let bytes: Vec<u8> = segments.iter().flat_map(encode_segment).collect();
                let list = Window::new(self.lists.memory(), id * PAGE_SIZE, bytes.len());
                list.context("a page of segments")?.write(&bytes);
                let mut pages = [GrantRef(0); MAX_INDIRECT_PAGES];
                pages[0] = self.lists.refs()[id];
                Body::Indirect { transfer, sector, nr_segments: segments.len() as u16, pages }
            };
            self.requests.push(&Request { id: id as u64, body })?;
        }
        if self.requests.publish() {
            self.near.notify()?;
        }
        let mut statuses = vec![Status::Error; ios.len()];
        for _ in ios {
            while self.responses.poll()? == 0 {
                self.served.check()?;
                ensure!(self.mapped() <= MAX_PERSISTENT_GRANTS + pages, "{}", self.mapped());
                std::thread::sleep(LOOK);
            }
            let response = self.responses.pop().context("a response")?;
            statuses[response.id as usize] = response.status;
        }
        ensure!(self.mapped() <= MAX_PERSISTENT_GRANTS, "{} pages stay mapped", self.mapped());
        Ok(statuses)
    }

    fn ask_one(
        &mut self,
        transfer: Transfer,
        sector: u64,
        segments: Vec<Segment>,
    ) -> Result<Status> {
        Ok(self.ask(&[Io { transfer, sector, segments }])?[0])
    }

    /// Nothing stays mapped when the ring has ended: the guest can take every page back.
    fn end(self) -> Result<()> {
        self.served.stop()?;
        for pages in [self.ring, self.data, self.lists, self.read_only] {
            pages.revoke().map_err(|(_, error)| error)?;
        }
        Ok(())
    }
}

/// What a segment of a page with this number in every byte is worth on the disk.
fn bytes(segment: &Segment, fill: u8) -> Vec<u8> {
    vec![fill; segment.bytes()]
}

#[test]
fn a_request_is_mapped_by_one_operation() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut ring = Ring::start(&host)?;
    for n in 0..INDIRECT {
        ring.page(n)?.write(&[n as u8; PAGE_SIZE]);
    }
    // Out of order, one of them twice, and one by two of its parts that follow one another.
    let part = |ring: &Ring, n: usize, first, last| Segment::new(ring.data.refs()[n], first, last);
    let (front, back) = (part(&ring, 7, 0, 2), part(&ring, 7, 3, 5));
    let mut few: Vec<_> = [3, 4, 9, 2, 3].map(|n| (n, ring.whole(n))).into();
    few.extend([(7, front), (7, back), (5, part(&ring, 5, 6, 6))]);
    let disk: Vec<u8> = few.iter().flat_map(|(n, segment)| bytes(segment, *n as u8)).collect();
    let write: Vec<_> = few.iter().map(|(_, segment)| *segment).collect();
    ensure!(ring.ask_one(Transfer::Write, 8, write.clone())? == Status::Okay);
    ensure!((ring.maps(), ring.mapped()) == (1, 6), "{}, {}", ring.maps(), ring.mapped());
    ensure!(ring.ask_one(Transfer::Write, 8, write)? == Status::Okay);
    ensure!((ring.maps(), ring.mapped()) == (1, 6), "{}, {}", ring.maps(), ring.mapped());

    // Where some are known, the others are mapped together; and the page that names them by itself.
    let all = |ring: &Ring, from: usize| (from..from + INDIRECT).map(|n| ring.whole(n)).collect();
    let segments = all(&ring, 0);
    ensure!(ring.ask_one(Transfer::Write, 1024, segments)? == Status::Okay);
    ensure!((ring.maps(), ring.mapped()) == (3, 257), "{}, {}", ring.maps(), ring.mapped());
    let segments = all(&ring, 500);
    ensure!(ring.ask_one(Transfer::Read, 1024, segments)? == Status::Okay);
    ensure!((ring.maps(), ring.mapped()) == (4, 513), "{}, {}", ring.maps(), ring.mapped());
    let mut page = [0; PAGE_SIZE];
    for n in 0..INDIRECT {
        ring.page(500 + n)?.read(&mut page);
        ensure!(page == [n as u8; PAGE_SIZE], "page {n}");
    }
    // And the first write is where it belongs.
    let pages = disk.len().div_ceil(PAGE_SIZE);
    let segments = (500..500 + pages).map(|n| ring.whole(n)).collect();
    ensure!(ring.ask_one(Transfer::Read, 8, segments)? == Status::Okay);
    let mut read = vec![0; pages * PAGE_SIZE];
    for (n, page) in read.chunks_exact_mut(PAGE_SIZE).enumerate() {
        ring.page(500 + n)?.read(page);
    }
    ensure!(read[..disk.len()] == disk);
    ensure!(ring.maps() == 4, "{}", ring.maps());
    ring.end()
}

#[test]
fn a_bad_grant_fails_only_its_request() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut ring = Ring::start(&host)?;
    let mut next = 0;
    for bad in [NO_GRANT, ring.read_only.refs()[0]] {
        for count in [DIRECT, 32] {
            let pages = |from: usize| from..from + count;
            let (before, spoilt, after) =
                (pages(next), pages(next + count), pages(next + 2 * count));
            next += 3 * count;
            let [first, mut second, third] = [&before, &spoilt, &after].map(|pages| Io {
                transfer: Transfer::Write,
                sector: 0,
                segments: pages.clone().map(|n| ring.whole(n)).collect(),
            });
            let middle = &mut second.segments[count / 2].gref;
            let good = std::mem::replace(middle, bad);
            let statuses = ring.ask(&[first, second, third])?;
            ensure!(statuses == [Status::Okay, Status::Error, Status::Okay], "{statuses:?}");
            ensure!(before.chain(after).all(|n| ring.is_mapped(ring.data.refs()[n])));
            ensure!(!spoilt.clone().any(|n| ring.is_mapped(ring.data.refs()[n])));
            // What was good is so still.
            let again: Vec<_> = spoilt.clone().map(|n| ring.whole(n)).collect();
            ensure!(again[count / 2].gref == good);
            ensure!(ring.ask_one(Transfer::Write, 0, again)? == Status::Okay);
            ensure!(spoilt.clone().all(|n| ring.is_mapped(ring.data.refs()[n])));
        }
    }
    ring.end()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }
}

#[test]
fn a_frontend_with_more_pages_than_are_kept() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut ring = Ring::start(&host)?;
    let mut random = Random(1);
    let mut fullest = 0;
    for round in 0..400 {
        // Now all its pages, now few of them, so that pages come and go and come to be hot.
        let pages = if round % 5 == 0 { PAGES } else { 600 };
        let mut good = Vec::new();
        let ios: Vec<_> = (0..1 + random.below(ring.requests.slots() as usize))
            .map(|_| {
                let most = if random.below(8) == 0 { INDIRECT } else { DIRECT };
                let mut segments: Vec<_> =
                    (0..1 + random.below(most)).map(|_| ring.whole(random.below(pages))).collect();
                good.push(random.below(20) > 0);
                if good.last() == Some(&false) {
                    let n = random.below(segments.len());
                    segments[n].gref =
                        if n.is_multiple_of(2) { NO_GRANT } else { ring.read_only.refs()[0] };
                }
                let transfer = if random.below(2) == 0 { Transfer::Read } else { Transfer::Write };
                Io { transfer, sector: 0, segments }
            })
            .collect();
        let before = ring.maps();
        let statuses = ring.ask(&ios)?;
        for (status, good) in statuses.iter().zip(&good) {
            ensure!((*status == Status::Okay) == *good, "round {round}: {statuses:?}, {good:?}");
        }
        // One of its pages each, and one of the page that names those.
        let most = ios.iter().map(|io| if io.segments.len() > DIRECT { 2 } else { 1 }).sum();
        ensure!(ring.maps() - before <= most, "round {round}: {} maps", ring.maps() - before);
        fullest = fullest.max(ring.mapped());
    }
    ensure!(fullest > MAX_PERSISTENT_GRANTS * 9 / 10, "never full: {fullest} pages");
    // What fits comes to stay: it is mapped no more.
    let some: Vec<_> = (0..32)
        .map(|k| Io {
            transfer: Transfer::Read,
            sector: 0,
            segments: (0..DIRECT).map(|n| ring.whole(PAGES - 1 - k * DIRECT - n)).collect(),
        })
        .collect();
    for _ in 0..5000 {
        let before = ring.maps();
        ring.ask(&some)?;
        if ring.maps() == before {
            return ring.end();
        }
    }
    bail!("pages that are always used are not kept")
}
