//! A backend that is killed while a frontend that cannot reissue requests waits for answers, and the
//! backend's successor.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;

use anyhow::{Context, Result, ensure};
use guest::{Device, Guest, Link, Status, Transport, WellBehaved, window};
use ring_proto::abi::{PAGE_SIZE, Segment};
use ring_proto::{
    Abi, Body, Request, RequestProducer, Response, ResponseConsumer, RingLayout, Segments,
    Transfer, front,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::{HUNG, Patience};
use xen_platform::{Access, GrantedPages};

const PLAIN: Transport =
    Transport { layout: RingLayout::Union(Abi::X86_64), order: 0, persistent: false };
/// Bytes of the disk.
const DISK: u64 = 1 << 20;
/// Requests that the disk is slow to do; each follows one that is refused at once.
const SLOW: u64 = 12;
/// The barrier's id, and those of the requests after it.
const BARRIER: u64 = 2 * SLOW;
const LATER: std::ops::Range<u64> = BARRIER + 1..BARRIER + 7;

/// A connected disk with a page for every request.
struct Disk {
    link: Link,
    requests: RequestProducer,
    responses: ResponseConsumer,
    data: Box<dyn GrantedPages>,
}

impl Disk {
    fn connect(guest: &Guest, device: &Device) -> Result<Self> {
        let link = device.connect(guest, PLAIN)?;
        let (requests, responses) = front::create(link.pages(), PLAIN.layout, PLAIN.order)?;
        let data = guest.grant(LATER.end as usize, Access::ReadWrite)?;
        Ok(Self { link, requests, responses, data })
    }

    /// Asks for page `id` of the disk to be written with `id + 1`s, or for one behind its end.
    fn write(&mut self, id: u64, transfer: Transfer, beyond: bool) -> Result<()> {
        let page = id as usize * PAGE_SIZE;
        window(&self.data.memory(), page, PAGE_SIZE)?.write(&[id as u8 + 1; PAGE_SIZE]);
        let mut segments = Segments::EMPTY;
        segments.push(Segment::new(self.data.refs()[id as usize], 0, 7));
        let sector = if beyond { DISK / 512 } else { id * 8 };
        let body = Body::Direct { transfer, sector, segments };
        Ok(self.requests.push(&Request { id, body })?)
    }

    fn publish(&mut self) -> Result<()> {
        if self.requests.publish() {
            self.link.channel.notify()?;
        }
        Ok(())
    }

    /// The next `count` responses, in their order.
    fn responses(&mut self, count: usize) -> Result<Vec<Response>> {
        let mut found = Vec::new();
        let mut patience = Patience::new(HUNG);
        while found.len() < count {
            ensure!(!patience.is_over(), "{} of {count} are answered: {found:?}", found.len());
            match self.responses.pop() {
                Some(response) => found.push(response),
                None if self.responses.final_check()? => {}
                None => self.link.sleep()?,
            }
        }
        Ok(found)
    }
}

/// Asks for refused and slow writes by turns, then for a barrier; when the refused ones are answered, over
/// the slots of slow ones, the backend is killed.
fn killed_half_way(host: &Host, guest: &Guest, device: &Device) -> Result<Disk> {
    let mut daemon = host.backend(&[])?;
    let mut disk = Disk::connect(guest, device)?;
    for id in 0..BARRIER {
        disk.write(id, Transfer::Write, id % 2 == 0)?;
    }
    disk.write(BARRIER, Transfer::Barrier, false)?;
    disk.publish()?;
    for (answer, id) in disk.responses(SLOW as usize)?.iter().zip((0..).step_by(2)) {
        ensure!(answer.id == id && answer.status == Status::Error, "{answer:?} to {id}");
    }
    daemon.kill()?;
    Ok(disk)
}

/// The one record that there is.
fn record(host: &Host) -> Result<Option<PathBuf>> {
    let dir = host.platform_dir().join("blkback");
    let mode = dir.metadata()?.permissions().mode();
    ensure!(mode & 0o777 == 0o700, "{dir:?} has mode {mode:o}");
    let mut files = std::fs::read_dir(&dir)?;
    let first = files.next().transpose()?.map(|entry| entry.path());
    ensure!(files.next().is_none(), "more than one record");
    if let Some(path) = &first {
        let mode = path.metadata()?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "{path:?} has mode {mode:o}");
    }
    Ok(first)
}

/// The descriptor number of the daemon's only io_uring. A limit bounds these numbers, not how many there
/// are: inherited ones may have any.
fn number_of_the_queue(pid: u32) -> Result<usize> {
    for file in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let file = file?.path();
        if std::fs::read_link(&file)?.as_os_str() == "anon_inode:[io_uring]" {
            return Ok(file.file_name().unwrap_or_default().to_string_lossy().parse()?);
        }
    }
    anyhow::bail!("the daemon has no io_uring")
}

fn setup() -> Result<(Host, Guest, PathBuf)> {
    let host = Host::start(Programs::beside_us()?)?;
    let guest = Guest::create(&host, "guest")?;
    let image = host.dir().join("disk.raw");
    File::create(&image)?.set_len(DISK)?;
    Ok((host, guest, image))
}

fn slow(image: &Path) -> String {
    format!("vdev=xvda,target=delay:300ms,{}", image.display())
}

/// Attaches, and stops the daemon for which the toolstack waits.
fn attach(host: &Host, guest: &Guest, image: &Path) -> Result<Device> {
    let mut daemon = host.backend(&[])?;
    let device = guest.attach(host, &slow(image))?;
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(device)
}

#[test]
fn what_was_in_flight_is_answered_once_and_in_its_order() -> Result<()> {
    let (host, guest, image) = setup()?;
    let device = attach(&host, &guest, &image)?;
    let mut disk = killed_half_way(&host, &guest, &device)?;
    for id in LATER {
        disk.write(id, Transfer::Write, false)?;
    }
    disk.publish()?;
    ensure!(record(&host)?.is_some(), "there is no record");

    let mut daemon = host.backend(&[])?;
    let count = SLOW as usize + 1 + LATER.count();
    let answers = disk.responses(count)?;
    let position: BTreeMap<u64, usize> =
        answers.iter().enumerate().map(|(at, answer)| (answer.id, at)).collect();
    ensure!(position.len() == count, "some are answered twice: {answers:?}");
    ensure!(answers.iter().all(|answer| answer.status == Status::Okay), "{answers:?}");
    ensure!(position.get(&BARRIER) == Some(&(SLOW as usize)), "the barrier: {answers:?}");
    let mut content = Vec::new();
    File::open(&image)?.read_to_end(&mut content)?;
    for (id, page) in (0..LATER.end).zip(content.chunks(PAGE_SIZE)) {
        let byte = if id < BARRIER && id % 2 == 0 { 0 } else { id as u8 + 1 };
        ensure!(page.iter().all(|&b| b == byte), "page {id} does not hold what was written");
    }

    let Disk { link, requests, responses, data } = disk;
    drop((requests, responses, data));
    ensure!(record(&host)?.is_some(), "there is no record");
    device.disconnect(&guest, link)?;
    ensure!(record(&host)?.is_none(), "the record is still there");
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(())
}

/// The next backend waits for a disk that it cannot open: once it can, the guest has lost nothing.
#[test]
fn a_disk_in_use_that_cannot_be_opened_is_waited_for() -> Result<()> {
    let (host, guest, image) = setup()?;
    let device = attach(&host, &guest, &image)?;
    let mut disk = killed_half_way(&host, &guest, &device)?;
    let away = image.with_extension("away");
    std::fs::rename(&image, &away)?;
    let mut daemon = host.backend(&[])?;
    daemon.wait_for("cannot be served yet")?;
    let state = device.property(&guest, "state")?;
    ensure!(state.as_deref() == Some(guest::state::CONNECTED), "{state:?}: {}", daemon.log());
    std::fs::rename(&away, &image)?;
    let answers = disk.responses(SLOW as usize + 1)?;
    ensure!(answers.iter().all(|answer| answer.status == Status::Okay), "{answers:?}");
    let Disk { link, requests, responses, data } = disk;
    drop((requests, responses, data));
    device.disconnect(&guest, link)?;
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(())
}

/// A connected frontend has made its rings by the last backend's offer, and does not look again.
#[test]
fn an_offer_stands_until_the_frontend_starts_over() -> Result<()> {
    let (host, guest, image) = setup()?;
    let mut daemon = host.backend(&["--persistent-grants", "false"])?;
    let device = guest.attach(&host, &format!("vdev=xvda,target={}", image.display()))?;
    // Like Linux's, it says that its grants are persistent whatever it is offered.
    let persistent = Transport { persistent: true, ..PLAIN };
    let mut disk = WellBehaved::connect(&guest, &device, Transport { order: 1, ..persistent })?;
    disk.round_trip(0)?;
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    let less = ["--max-ring-page-order", "0", "--max-indirect-segments", "0"];
    let mut daemon = host.backend(&less)?;
    disk.round_trip(8)?;
    ensure!(!daemon.log().contains("persistent grants"), "{}", daemon.log());
    let order = || device.property(&guest, "max-ring-page-order");
    ensure!(order()?.as_deref() != Some("0"), "the offer has changed behind its back");
    disk.disconnect(&guest, &device)?;
    WellBehaved::connect(&guest, &device, persistent)?.round_trip(16)?;
    ensure!(order()?.as_deref() == Some("0") && daemon.log().contains("persistent grants"));
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(())
}

/// A record that makes no sense is refused. What was in flight is lost then, and nothing else is.
#[test]
fn a_damaged_record_is_refused() -> Result<()> {
    let (host, guest, image) = setup()?;
    let device = attach(&host, &guest, &image)?;
    for damage in [0, 64, 4096] {
        let disk = killed_half_way(&host, &guest, &device)?;
        let path = record(&host)?.context("a record")?;
        let mut file = File::options().write(true).open(&path)?;
        file.seek(SeekFrom::Start(damage))?;
        file.write_all(&[0xa5; 4096])?;
        let mut daemon = host.backend(&[])?;
        daemon.wait_for("does not fit")?;
        // Such a disk has to be connected again.
        device.disconnect(&guest, disk.link)?;
        WellBehaved::connect(&guest, &device, PLAIN)?.round_trip(0)?;
        ensure!(daemon.terminate()?.success(), "{}", daemon.log());
        std::fs::remove_file(host.dir().join("blkback.log"))?;
    }
    Ok(())
}

/// Records of disks that were detached meanwhile are removed.
#[test]
fn no_record_is_left_of_a_disk_that_is_gone() -> Result<()> {
    let (host, guest, image) = setup()?;
    let device = attach(&host, &guest, &image)?;
    killed_half_way(&host, &guest, &device)?;
    let path = record(&host)?.context("a record")?;
    let mut rm = host.xenstore("rm");
    xen_blk_tests::process::run(rm.arg(&device.back))?;
    let _daemon = host.backend(&[])?;
    xen_blk_tests::process::wait_until("the record is removed", || Ok(!path.exists()))
}

/// The handshake is done when the ring's thread finds that there is no room for its io_uring.
#[test]
fn a_disk_in_use_waits_for_what_the_host_lacks() -> Result<()> {
    let (host, guest, image) = setup()?;
    let device = attach(&host, &guest, &image)?;
    let mut daemon = host.backend(&[])?;
    let mut disk = Disk::connect(&guest, &device)?;
    disk.write(0, Transfer::Write, false)?;
    disk.publish()?;
    disk.responses(1)?;
    let queue = number_of_the_queue(daemon.pid())?;
    disk.write(1, Transfer::Write, false)?;
    disk.publish()?;
    daemon.kill()?;

    let mut short = host.backend_with_files(queue, &[])?;
    short.wait_for("a disk in use cannot be served yet: ring 0: the storage queue failed")?;
    short.terminate()?;
    let _daemon = host.backend(&[])?;
    let answer = disk.responses(1)?;
    ensure!(matches!(answer[..], [Response { id: 1, status: Status::Okay, .. }]), "{answer:?}");
    Ok(())
}
