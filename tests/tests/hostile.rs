//! Frontends that obey no rule, against the running daemon: what they put on the ring.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;
#[path = "hostile/random.rs"]
mod random;
#[path = "hostile/requests.rs"]
mod requests;
#[path = "hostile/ring.rs"]
mod ring;
#[path = "hostile/scene.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod scene;
#[path = "hostile/usage.rs"]
mod usage;

use anyhow::{Context, Result, ensure};
use guest::{Device, Guest, Link, Transport, WellBehaved, revoke, state, window};
use random::Random;
use requests::{Attack, Expect, Grants, KINDS};
use ring::{Fields, Index, RawRing};
use ring_proto::{Abi, DomId, RingLayout};
use scene::{DISK, Scene};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use usage::Usage;
use xen_blk_tests::process::{HUNG, Patience};
use xen_blk_tests::scratch::Scratch;
use xen_platform::{Access, GrantedPages, Platform};

/// Malformed requests in all: what the project promises to survive.
const MALFORMED: u64 = 10_000_000;
/// What blkback offers (`feature-max-indirect-segments`).
const MAX_INDIRECT: u16 = 256;
const LAYOUTS: [RingLayout; 3] =
    [RingLayout::Union(Abi::X86_64), RingLayout::Union(Abi::X86_32), RingLayout::Split];
/// The largest ring: most requests per batch.
const ORDER: u8 = 4;

/// Pages of all kinds, and grant references that are none.
struct Pages {
    kept: Vec<Box<dyn GrantedPages>>,
    foreign: Box<dyn GrantedPages>,
    grants: Grants,
}

impl Pages {
    fn new(guest: &Guest, random: &mut Random) -> Result<Self> {
        let good = guest.grant(16, Access::ReadWrite)?;
        let readonly = guest.grant(4, Access::ReadOnly)?;
        let foreign = guest.platform.grant(DomId(0), 4, Access::ReadWrite)?;
        let crossed = guest.grant(4, Access::ReadWrite)?;
        let dangling = guest.grant(4, Access::ReadWrite)?;
        let spare = guest.grant(4, Access::ReadWrite)?;
        let revoked = spare.refs().to_vec();
        // From here on nothing may be granted, or it would get these.
        revoke(spare)?;
        let mut bad: Vec<_> = [foreign.refs(), &revoked].concat();
        bad.extend([0, 7, 32767, 32768, 1 << 31, u32::MAX].map(ring_proto::GrantRef));
        for page in 0..4 {
            let mut bytes = [0; 4096];
            random.fill(&mut bytes);
            bytes[4..6].copy_from_slice(&[5, 4]);
            window(&crossed.memory(), page * 4096, 4096)?.write(&bytes);
            for segment in bytes.chunks_exact_mut(8) {
                segment[..4].copy_from_slice(&random.pick(&bad).0.to_le_bytes());
                segment[4..6].copy_from_slice(&[0, 7]);
            }
            window(&dangling.memory(), page * 4096, 4096)?.write(&bytes);
        }
        let grants = Grants {
            good: good.refs().to_vec(),
            readonly: readonly.refs().to_vec(),
            bad,
            crossed: crossed.refs().to_vec(),
            dangling: dangling.refs().to_vec(),
        };
        Ok(Self { kept: vec![good, readonly, crossed, dangling], foreign, grants })
    }

    /// Revokes all of them: the backend must hold none.
    fn revoke(self) -> Result<()> {
        for pages in self.kept {
            revoke(pages)?;
        }
        revoke(self.foreign)
    }
}

/// A device's counters, all rings together.
fn counters(scene: &Scene, device: &Device) -> Result<serde_json::Value> {
    let stats = scene.host.stats()?;
    let devices = stats["devices"].as_array().context("devices")?;
    let found = devices.iter().find(|entry| entry["backend"] == device.back.as_str());
    Ok(found.context("the device's statistics")?["total"].clone())
}

fn counter(counters: &serde_json::Value, name: &str) -> Result<u64> {
    counters[name].as_u64().with_context(|| format!("{name} of {counters}"))
}

/// Sends `count` malformed requests in full batches and checks every answer.
fn assault(ring: &mut RawRing, attack: &mut Attack, count: u64) -> Result<u64> {
    let (slots, mask) = (ring.slots(), ring.id_mask());
    let mut index = ring.get(Index::ReqProd);
    let mut sent = 0;
    let mut malformed = 0;
    let mut expected: Vec<Option<(Fields, Expect)>> = vec![None; slots as usize];
    while sent < count {
        for slot in 0..slots {
            let kind = (sent + u64::from(slot)) % KINDS as u64;
            let (mut fields, expect) = attack.request(kind as usize);
            // Where to look the answer up; the rest of the id is random.
            fields.id = (fields.id & !0xffff_ffff | sent & 0xffff_fc00 | u64::from(slot)) & mask;
            ring.write(index.wrapping_add(slot), &fields);
            malformed += u64::from(expect != Expect::Any);
            expected[slot as usize] = Some((fields, expect));
        }
        let end = index.wrapping_add(slots);
        ring.publish(end)?;
        ring.wait(end)?;
        for n in 0..slots {
            let answer = ring.answer(index.wrapping_add(n));
            let entry = expected.get_mut((answer.id & 0x3ff) as usize).and_then(Option::take);
            let (fields, expect) = entry.with_context(|| format!("{answer:?} to nothing"))?;
            ensure!(
                answer.id == fields.id && expect.allows(answer.status),
                "{answer:?}, expected {expect:?}, to {fields:?}"
            );
            // For an indirect request it is the inner operation, where there is one.
            let operation = fields.operation == answer.operation || fields.operation == 6;
            ensure!(operation, "{answer:?} to {fields:?}");
        }
        index = end;
        sent += u64::from(slots);
    }
    Ok(malformed)
}

#[test]
fn malformed_requests_are_answered_and_harm_nobody() -> Result<()> {
    malformed_requests(&[], MALFORMED)
}

/// Data is mapped for each request, where it is not copied.
#[test]
fn malformed_requests_harm_nobody_where_data_is_mapped() -> Result<()> {
    malformed_requests(&["--data", "map"], MALFORMED / 20)
}

/// The disk does not work on the pages themselves.
#[test]
fn malformed_requests_harm_nobody_where_data_is_bounced() -> Result<()> {
    malformed_requests(&["--pin-grants", "off"], MALFORMED / 20)
}

fn malformed_requests(options: &[&str], count: u64) -> Result<()> {
    let scene = Scene::new(options)?;
    let image = scene.host.dir().join("disk.img");
    File::create(&image)?.set_len(DISK)?;
    let disks =
        ["vdev=xvda,target=memory:16M".to_owned(), format!("vdev=xvdb,target={}", image.display())];
    let devices = disks
        .iter()
        .map(|disk| scene.evil.attach(&scene.host, disk))
        .collect::<Result<Vec<_>>>()?;
    let mut random = Random::new(1);
    // Use everything once, so that the baseline includes what is kept forever.
    let largest = Transport { layout: LAYOUTS[0], order: ORDER, persistent: true };
    for device in &devices {
        WellBehaved::connect(&scene.evil, device, largest)?.disconnect(&scene.evil, device)?;
    }
    let baseline = Usage::of(scene.daemon.pid())?;
    let (before, quiet) = (scene.neighbour.done(), Instant::now());
    scene.neighbour.wait_for(10_000)?;
    let alone = scene.neighbour.rate(before, quiet);

    let combinations = (LAYOUTS.len() * 2 * devices.len()) as u64;
    let (before, since) = (scene.neighbour.done(), Instant::now());
    let mut malformed = 0;
    for device in &devices {
        for layout in LAYOUTS {
            for persistent in [false, true] {
                let transport = Transport { layout, order: ORDER, persistent };
                let mut ring = RawRing::new(device.connect(&scene.evil, transport)?)?;
                let pages = Pages::new(&scene.evil, &mut random)?;
                let mut attack = Attack {
                    random: random.clone(),
                    grants: pages.grants.clone(),
                    sectors: DISK / 512,
                    room: ring.room(),
                    max_indirect: MAX_INDIRECT,
                };
                let begin = Instant::now();
                // One kind in 13 is random, and some of those are right.
                let share = count / combinations * 101 / 100;
                let n = assault(&mut ring, &mut attack, share)
                    .with_context(|| format!("{} {transport:?}", device.back));
                let n = scene.watch(n)?;
                malformed += n;
                let rate = n as f64 / begin.elapsed().as_secs_f64();
                println!("{transport:?}: {n} malformed requests, {rate:.0}/s");
                let told = counters(&scene, device)?;
                let refused = counter(&told["derived"], "refused")?;
                let counted = refused + counter(&told, "grant_errors")?;
                ensure!(counted >= n, "{counted} of {n} malformed requests are counted");
                scene.neighbour.wait_for(1)?;
                scene.watch(device.disconnect(&scene.evil, ring.into_link()))?;
                pages.revoke()?;
                random = attack.random;
                // The same device must serve an obedient frontend.
                let mut disk = WellBehaved::connect(&scene.evil, device, transport)?;
                scene.watch(disk.round_trip(8))?;
                scene.watch(disk.disconnect(&scene.evil, device))?;
            }
        }
    }
    let under = scene.neighbour.rate(before, since);
    println!(
        "neighbour: {alone:.0} round trips/s alone, {under:.0}/s beside {malformed} malformed"
    );
    ensure!(malformed >= count, "only {malformed}");
    scene.end(baseline)
}

/// Waits until the device was given up, with a reason, and closes it.
fn given_up(scene: &Scene, device: &Device, link: Link) -> Result<()> {
    device.wait_backend(&scene.evil, &[state::CLOSING, state::CLOSED])?;
    let reason = device.back.replacen("/backend/", "/error/backend/", 1);
    let admin = guest::Store::connect(&scene.host.platform_dir().join("xenstored.sock"))?;
    let reason = admin.read(&format!("{reason}/error"))?.context("no reason is told")?;
    ensure!(reason.contains("req_prod"), "{reason}");
    scene.neighbour.wait_for(1)?;
    device.set_state(&scene.evil, state::CLOSED)?;
    device.wait_backend(&scene.evil, &[state::CLOSED])?;
    link.revoke()
}

#[test]
fn an_index_that_cannot_be_stops_the_ring_and_nothing_else() -> Result<()> {
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, "vdev=xvda,target=memory:16M")?;
    let transport = |layout| Transport { layout, order: 0, persistent: false };
    for layout in LAYOUTS {
        WellBehaved::connect(&scene.evil, &device, transport(layout))?
            .disconnect(&scene.evil, &device)?;
    }
    let baseline = Usage::of(scene.daemon.pid())?;
    for layout in LAYOUTS {
        for start in [0u32, 20] {
            for step in [1, 1 << 16, 1 << 31, u32::MAX - 64, u32::MAX] {
                let mut ring = RawRing::new(device.connect(&scene.evil, transport(layout))?)?;
                let flush =
                    Fields { operation: 3, detail: 0, half: 0, id: 1, sector: 0, body: [0; 88] };
                for n in 0..start {
                    ring.write(n, &flush);
                }
                ring.publish(start)?;
                ring.wait(start)?;
                // One more than there are slots, or backwards.
                let broken = match step {
                    u32::MAX if start == 0 => u32::MAX,
                    u32::MAX => start - 1,
                    _ => start.wrapping_add(ring.slots()).wrapping_add(step),
                };
                ring.set(Index::ReqProd, broken);
                ring.link().channel.notify()?;
                let outcome = given_up(&scene, &device, ring.into_link());
                scene.watch(outcome).with_context(|| format!("{layout:?} {start} to {broken}"))?;
            }
        }
        // Broken before it is attached.
        device.begin(&scene.evil)?;
        let ring = RawRing::new(Link::new(&scene.evil, transport(layout))?)?;
        ring.set(Index::ReqProd, 1000);
        ring.set(Index::RspProd, 3);
        device.offer(&scene.evil, &ring.link().keys())?;
        given_up(&scene, &device, ring.into_link())?;
        let mut disk = WellBehaved::connect(&scene.evil, &device, transport(layout))?;
        disk.round_trip(0)?;
        disk.disconnect(&scene.evil, &device)?;
    }
    scene.end(baseline)
}

/// Requests change after they were pushed, responses and the other end's indices are scribbled on,
/// events come without end: each request is answered, whatever it was by then.
#[test]
fn scribbling_and_event_storms_are_survived() -> Result<()> {
    const BATCHES: u32 = 1000;
    const STORM: u64 = 2000;
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, "vdev=xvda,target=memory:16M")?;
    let mut random = Random::new(2);
    let largest = Transport { layout: LAYOUTS[0], order: ORDER, persistent: true };
    WellBehaved::connect(&scene.evil, &device, largest)?.disconnect(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    for layout in LAYOUTS {
        for persistent in [false, true] {
            let transport = Transport { layout, order: 1, persistent };
            let mut ring = RawRing::new(device.connect(&scene.evil, transport)?)?;
            let pages = Pages::new(&scene.evil, &mut random)?;
            let grants: Vec<_> = [&pages.grants.good[..], &pages.grants.bad].concat();
            let ends = Arc::new(AtomicBool::new(false));
            let ((slots, length), stop) = (ring.request_slots(), ends.clone());
            let mut dice = random.clone();
            // Plausible words, so that checks are passed before they change.
            let words: Vec<u32> = grants.iter().map(|g| g.0).chain(0..9).chain([0x700]).collect();
            let scribbler = std::thread::spawn(move || {
                let mut bytes = [0; ring::MAX_SLOT];
                while !stop.load(Ordering::Relaxed) {
                    for chunk in bytes.chunks_exact_mut(4) {
                        chunk.copy_from_slice(&dice.pick(&words).to_le_bytes());
                    }
                    let slot = &slots[dice.below(slots.len() as u64) as usize];
                    slot.write(&bytes[..length]);
                }
            });
            let mut index = 0u32;
            for batch in 0..BATCHES {
                index = index.wrapping_add(ring.slots());
                ring.publish(index)?;
                if batch % 4 == 0 {
                    // This index belongs to the backend.
                    ring.set(Index::ReqEvent, random.next() as u32);
                }
                ring.link().channel.notify()?;
                ring.wait(index).with_context(|| format!("{transport:?} batch {batch}"))?;
            }
            ends.store(true, Ordering::Relaxed);
            ensure!(scribbler.join().is_ok(), "the scribbler failed");
            // A storm of events, without a request.
            let served = scene.neighbour.done();
            let mut events = 0u64;
            let (begin, mut patience) = (Instant::now(), Patience::new(HUNG));
            let before = counter(&counters(&scene, &device)?, "spurious_events")?;
            while scene.neighbour.done() < served + STORM && !patience.is_over() {
                for _ in 0..100 {
                    ring.link().channel.notify()?;
                }
                events += 100;
            }
            ensure!(scene.neighbour.done() >= served + STORM, "the neighbour starves");
            let rate = scene.neighbour.rate(served, begin);
            let taken = counter(&counters(&scene, &device)?, "spurious_events")? - before;
            // One a millisecond once it is a storm.
            let most = begin.elapsed().as_millis() as u64 + 100;
            ensure!(taken <= most, "{taken} of {events} events were taken in {most} ms");
            println!(
                "{transport:?}: {taken} of {events} events taken, neighbour at {rate:.0} round trips/s"
            );
            device.disconnect(&scene.evil, ring.into_link())?;
            pages.revoke()?;
        }
    }
    scene.end(baseline)
}

/// Events while a barrier is carried out: they get the request behind it no further.
#[test]
fn a_storm_behind_a_barrier_is_no_faster() -> Result<()> {
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, "vdev=xvda,target=delay:2s,memory:16M")?;
    let transport = Transport { layout: LAYOUTS[0], order: 0, persistent: false };
    WellBehaved::connect(&scene.evil, &device, transport)?.disconnect(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    let mut ring = RawRing::new(device.connect(&scene.evil, transport)?)?;
    let empty = Fields { operation: 2, detail: 0, half: 0, id: 0, sector: 0, body: [0; 88] };
    ring.write(0, &empty);
    ring.write(1, &empty);
    ring.publish(2)?;
    let before = counter(&counters(&scene, &device)?, "events")?;
    let begin = Instant::now();
    while ring.get(Index::RspProd) == 0 && begin.elapsed() < HUNG {
        for _ in 0..100 {
            ring.link().channel.notify()?;
        }
    }
    let taken = counter(&counters(&scene, &device)?, "events")? - before;
    let most = begin.elapsed().as_millis() as u64 + 100;
    println!("{taken} events taken in {most} ms");
    ensure!(most > 1000, "the barrier was no slow one");
    ensure!(taken <= most, "{taken} events were taken in {most} ms");
    ring.wait(2)?;
    device.disconnect(&scene.evil, ring.into_link())?;
    scene.end(baseline)
}

/// Indirect requests to a slow disk, of more pages than may be mapped: without a bound a guest could
/// use up the mappings that the daemon's process may have.
#[test]
fn mapped_pages_are_bounded() -> Result<()> {
    mapped_pages(&[], true)?;
    mapped_pages(&["--data", "map"], false)
}

fn mapped_pages(options: &[&str], persistent: bool) -> Result<()> {
    /// Pages of the guest: more than a ring keeps mapped (1056).
    const PAGES: usize = 2048;
    /// Persistent grants of a ring, what it maps for requests in flight, and everything else.
    const MOST_MAPPINGS: usize = 1056 + 2048 + 1000;
    let scene = Scene::new(options)?;
    let device = scene.evil.attach(&scene.host, "vdev=xvda,target=delay:10ms,memory:16M")?;
    let fresh = scene.evil.attach(&scene.host, "vdev=xvdb,target=memory:16M")?;
    let transport = Transport { layout: LAYOUTS[0], order: ORDER, persistent };
    WellBehaved::connect(&scene.evil, &device, transport)?.disconnect(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    let mut ring = RawRing::new(device.connect(&scene.evil, transport)?)?;
    let data = scene.evil.grant(PAGES, Access::ReadWrite)?;
    let lists = scene.evil.grant(PAGES / usize::from(MAX_INDIRECT), Access::ReadWrite)?;
    for (n, refs) in data.refs().chunks(usize::from(MAX_INDIRECT)).enumerate() {
        for k in 0..refs.len() {
            // Out of order, because the kernel joins mappings of consecutive pages.
            let gref = refs[k * 97 % refs.len()];
            let segment = window(&lists.memory(), n * 4096 + k * 8, 8)?;
            segment.write(&ring_proto::encode_segment(&ring_proto::Segment::new(gref, 0, 7)));
        }
    }
    let slots = ring.slots();
    for n in 0..slots {
        let mut fields =
            Fields { operation: 6, detail: 0, half: MAX_INDIRECT, id: 0, sector: 0, body: [0; 88] };
        fields.set_indirect_page(0, lists.refs()[n as usize % lists.refs().len()].0);
        ring.write(n, &fields);
    }
    ring.publish(slots)?;
    let mut most = 0;
    let mut patience = Patience::new(HUNG);
    while ring.get(Index::RspProd) != slots {
        most = most.max(Usage::of(scene.daemon.pid())?.mappings);
        ensure!(!patience.is_over(), "requests are not answered");
    }
    let answers: Vec<_> = (0..slots).map(|n| ring.answer(n).status).collect();
    ensure!(answers.iter().all(|&status| status == 0), "{answers:?}");
    println!("{most} mappings at the most");
    ensure!(most > 1056, "only {most} mappings were seen: the test shows nothing");
    ensure!(most < MOST_MAPPINGS, "{most} mappings");
    ring.wait(slots)?;
    let mut disk = WellBehaved::connect(&scene.evil, &fresh, transport)?;
    disk.round_trip(0)?;
    disk.disconnect(&scene.evil, &fresh)?;
    device.disconnect(&scene.evil, ring.into_link())?;
    revoke(data)?;
    revoke(lists)?;
    scene.end(baseline)
}

/// A frontend that uses its persistent grants in another order each time, adjacent and apart, in parts, one
/// twice in a request; first fewer than are kept, then more. Each page must have its own data.
#[test]
fn pages_in_any_company_keep_their_data() -> Result<()> {
    pages_in_any_company(&[], "persistent grants\"")
}

/// The same with a copy on the way.
#[test]
fn bounced_pages_in_any_company_keep_their_data() -> Result<()> {
    pages_in_any_company(&["--pin-grants", "off"], "persistent grants, bounced\"")
}

fn pages_in_any_company(options: &[&str], strategy: &str) -> Result<()> {
    /// Not quite twice what a ring keeps mapped (1056).
    const PAGES: usize = 2000;
    /// Few enough for it to keep them all.
    const FEW: usize = 900;
    const ROUNDS: usize = 1500;
    let scene = Scene::new(options)?;
    // O_DIRECT works where programs are built; temporary files may be on a tmpfs.
    let dir = Scratch::new(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let image = dir.path().join("disk.img");
    File::create(&image)?.set_len(DISK)?;
    let device =
        scene.evil.attach(&scene.host, &format!("vdev=xvda,target={}", image.display()))?;
    let transport = Transport { layout: LAYOUTS[0], order: 0, persistent: true };
    WellBehaved::connect(&scene.evil, &device, transport)?.disconnect(&scene.evil, &device)?;
    ensure!(scene.daemon.log().contains(strategy), "{}", scene.daemon.log());
    let baseline = Usage::of(scene.daemon.pid())?;
    let mut disk = WellBehaved::connect(&scene.evil, &device, transport)?;
    let data = scene.evil.grant(PAGES, Access::ReadWrite)?;
    let list = scene.evil.grant(1, Access::ReadWrite)?;
    let mut random = Random::new(7);
    // What must be in the pages, and on the disk.
    let mut pages = vec![[0; 4096]; PAGES];
    let mut image = vec![0; 4096 * usize::from(MAX_INDIRECT)];
    for round in 0..ROUNDS {
        let within = if round < ROUNDS / 2 { FEW } else { PAGES } as u64;
        let count = 1 + random.below(if round % 2 == 0 { 11 } else { MAX_INDIRECT.into() });
        let mut page = 0;
        let used: Vec<Part> = (0..count)
            .map(|_| {
                let next = if random.below(4) == 0 { random.below(within) } else { page + 1 };
                page = next % within;
                let whole = random.below(8) > 0;
                let (first, last) =
                    if whole { (0, 7) } else { (random.below(4), 4 + random.below(4)) };
                (page as usize, first as usize * 512..(last as usize + 1) * 512)
            })
            .collect();
        let write = random.below(2) == 0;
        if write {
            for (page, part) in &used {
                random.fill(&mut pages[*page][part.clone()]);
                window(&data.memory(), page * 4096, 4096)?.write(&pages[*page]);
            }
        }
        let mut at = 0;
        for (page, part) in &used {
            let (disk, page) = (&mut image[at..at + part.len()], &mut pages[*page][part.clone()]);
            if write {
                disk.copy_from_slice(page)
            } else {
                page.copy_from_slice(disk)
            }
            at += part.len();
        }
        let status = disk.request(transfer(write, &used, &*data, &*list)?)?;
        ensure!(status == guest::Status::Okay, "{status:?} to {used:?} in round {round}");
        let mut found = [0; 4096];
        for (page, _) in &used {
            window(&data.memory(), page * 4096, 4096)?.read(&mut found);
            ensure!(found == pages[*page], "page {page} after {used:?} in round {round}");
        }
    }
    let told = counters(&scene, &device)?;
    let (hits, maps) = (counter(&told, "persistent_hits")?, counter(&told, "grant_maps")?);
    let evictions = counter(&told, "persistent_evictions")?;
    println!("{hits} pages were mapped before, {maps} were not, {evictions} were given up");
    ensure!(hits > 0 && evictions > 0, "all pages were kept, or none");
    disk.disconnect(&scene.evil, &device)?;
    revoke(data)?;
    revoke(list)?;
    scene.end(baseline)
}

/// A page, and which of its bytes.
type Part = (usize, std::ops::Range<usize>);

/// A request for as many bytes from the start of the disk as there are in `parts`.
fn transfer(
    write: bool,
    parts: &[Part],
    data: &dyn GrantedPages,
    list: &dyn GrantedPages,
) -> Result<ring_proto::Body> {
    let transfer = if write { ring_proto::Transfer::Write } else { ring_proto::Transfer::Read };
    let segments = parts.iter().map(|(page, part)| {
        let (first, last) = (part.start / 512, part.end / 512 - 1);
        ring_proto::Segment::new(data.refs()[*page], first as u8, last as u8)
    });
    if parts.len() <= ring_proto::abi::MAX_DIRECT_SEGMENTS {
        let segments = ring_proto::Segments::of(&segments.collect::<Vec<_>>());
        return Ok(ring_proto::Body::Direct { transfer, sector: 0, segments });
    }
    for (k, segment) in segments.enumerate() {
        window(&list.memory(), k * 8, 8)?.write(&ring_proto::encode_segment(&segment));
    }
    let mut pages = [ring_proto::GrantRef(0); ring_proto::abi::MAX_INDIRECT_PAGES];
    pages[0] = list.refs()[0];
    let nr_segments = parts.len() as u16;
    Ok(ring_proto::Body::Indirect { transfer, sector: 0, nr_segments, pages })
}
