//! The life of a device, from the disk line to nothing: what is refused and how that is reported, and what
//! stays when it is gone.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;
#[path = "hostile/usage.rs"]
mod usage;

use anyhow::{Context, Result, ensure};
use guest::{Device, Guest, Status, Store, Transport, WellBehaved, state};
use nix::sys::signal::Signal;
use ring_proto::{Abi, Body, RingLayout, Transfer};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use usage::Usage;
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::{run, wait_until};
use xenstore_glue::store::quota;
use xenstore_glue::wire::{Access, Perm};

const PLAIN: Transport =
    Transport { layout: RingLayout::Union(Abi::X86_64), order: 0, persistent: false };
const SECTOR: u64 = 512;
const DISK: u64 = 16 << 20;

fn host() -> Result<Host> {
    Host::start(Programs::beside_us()?)
}

/// A sparse file.
fn image(host: &Host, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = host.dir().join(name);
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

fn line(vdev: &str, target: impl AsRef<Path>) -> String {
    format!("vdev={vdev},target={}", target.as_ref().display())
}

/// All of xenstore.
fn nodes(host: &Host) -> Result<String> {
    run(host.xenstore("ls").args(["-f", "/"]))
}

/// Detaches a disk that is in use, as the toolstack and an obedient frontend do together.
fn detach_connected(
    host: &Host,
    guest: &Guest,
    device: &Device,
    disk: WellBehaved,
    vdev: &str,
) -> Result<()> {
    std::thread::scope(|scope| {
        let toolstack = scope.spawn(|| host.detach(&guest.name, vdev));
        device.wait_backend(guest, &[state::CLOSING])?;
        let online = device.property(guest, "online")?;
        ensure!(online.as_deref() == Some("0"), "online is {online:?}");
        disk.disconnect(guest, device)?;
        toolstack.join().map_err(|_| anyhow::anyhow!("the toolstack panicked"))??;
        Ok(())
    })
}

#[test]
fn disks_that_cannot_be_served_are_refused_with_a_reason() -> Result<()> {
    let host = host()?;
    let mut daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let device = guest.attach(&host, "vdev=xvda,target=memory:16M")?;
    let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
    let mut before = None;

    let directory = host.dir().to_owned();
    let missing = host.dir().join("missing.img");
    let odd = image(&host, "odd.img", 1000)?;
    let empty = image(&host, "empty.img", 0)?;
    let pipe = host.dir().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU)?;
    // The kernel lets nobody write it, not even root.
    let forbidden = Path::new("/sys/kernel/uevent_seqnum");
    let wrong: Vec<(String, &str)> = vec![
        (line("xvdb", &missing), "missing.img"),
        (line("xvdb", &directory), "directory"),
        (line("xvdb", &odd), "512"),
        (line("xvdb", &empty), "empty"),
        (line("xvdb", &pipe), "not a disk"),
        (line("xvdb", forbidden), "uevent_seqnum"),
        (line("xvdb", "null:0"), "0"),
        (line("xvdb", "null:1000"), "1000"),
        (line("xvdb", "null:words"), "words"),
        (line("xvdb", "dealy:1ms,memory:1M"), "dealy"),
        (line("xvdb", "qcow2:/disk.qcow2"), "qcow2"),
    ];
    for (disk_line, reason) in &wrong {
        let Err(told) = guest.attach(&host, disk_line) else {
            anyhow::bail!("{disk_line} was attached");
        };
        let told = format!("{told:#}").to_lowercase();
        ensure!(told.contains("refuses") && told.contains(reason), "{disk_line}: {told}");
        let back = device.back.replace("51712", "51728");
        let error = admin.read(&format!("{back}/hotplug-error"))?.context("hotplug-error")?;
        ensure!(error.to_lowercase().contains(reason), "{disk_line}: {error}");
        let status = admin.read(&format!("{back}/hotplug-status"))?;
        ensure!(status.as_deref() == Some("error"), "{status:?}");
        let error = back.replacen("/backend/", "/error/backend/", 1);
        let error = admin.read(&format!("{error}/error"))?.context("error node")?;
        ensure!(daemon.log().contains(&error), "{error} is not in the log:\n{}", daemon.log());
        disk.round_trip(0).with_context(|| disk_line.clone())?;
        host.detach("guest", "xvdb")?;
        // The first leaves directories in the driver domain that all devices share.
        if before.is_none() {
            before = Some((nodes(&host)?, Usage::of(daemon.pid())?));
        }
    }
    let (before, held) = before.context("no disk was tried")?;
    // Also what the toolstack itself can see to be wrong.
    for bad in ["vdev=xvdb", "vdev=nonsense,target=memory:1M", "vdev=xvdb,format=zip,target=/x"] {
        ensure!(host.attach("guest", &format!("backend=stor,{bad}")).is_err(), "{bad}");
    }
    wait_until("xenstore to be as before", || Ok(nodes(&host)? == before)).with_context(|| {
        format!("before:\n{before}\nnow:\n{}", nodes(&host).unwrap_or_default())
    })?;
    held.wait_for_baseline(daemon.pid())?;
    disk.round_trip(8)?;
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(())
}

/// A directory that is removed and made anew, unseen in between, is another disk's: unseen first because
/// the disk takes its time to be opened, then because the daemon does.
#[test]
fn a_directory_made_anew_is_another_disks() -> Result<()> {
    let host = host()?;
    let daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let path = image(&host, "disk.img", DISK)?;
    let held = File::options().write(true).open(&path)?;
    held.lock()?;
    let attach = |target: &str| {
        let line = format!("backend=stor,backendtype=tap,format=raw,vdev=xvda,target={target}");
        host.attach("guest", &line)
    };
    let device = guest.device(51712);
    let replace = |target: &str, go_on: &dyn Fn() -> Result<()>| -> Result<()> {
        // Without it the toolstack knows of no disk, and makes the directories as always: in one
        // transaction, after removing what is there.
        admin.rm(&format!("/libxl/{}/device/vbd/51712", guest.domid.0))?;
        std::thread::scope(|scope| -> Result<()> {
            let attached = scope.spawn(|| attach(target));
            let params = format!("aio:{target}");
            admin.wait_for(&format!("{}/params", device.back), &[&params])?;
            go_on()?;
            attached.join().map_err(|_| anyhow::anyhow!("the toolstack panicked"))?.map(drop)
        })
    };
    let sectors = |mib: u64| -> Result<()> {
        let link = device.connect(&guest, PLAIN)?;
        let told = device.property(&guest, "sectors")?;
        ensure!(told == Some((mib << 11).to_string()), "{told:?}: {}", daemon.log());
        device.disconnect(&guest, link)
    };
    std::thread::scope(|scope| -> Result<()> {
        // Its outcome is that of the other disk.
        scope.spawn(|| attach(&path.display().to_string()).is_ok());
        wait_until("the daemon to know of the disk", || {
            Ok(host.snapshot()?["devices"].as_array().is_some_and(|devices| !devices.is_empty()))
        })?;
        replace("memory:32M", &|| Ok(held.unlock()?))
    })?;
    sectors(32)?;
    daemon.signal(Signal::SIGSTOP)?;
    replace("memory:64M", &|| daemon.signal(Signal::SIGCONT))?;
    sectors(64)
}

#[test]
fn twenty_attachments_leave_nothing() -> Result<()> {
    let host = host()?;
    let mut daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let path = image(&host, "disk.img", DISK)?;
    let mut before = None;
    // The first round makes what stays: the guest's directories, idle threads.
    for round in 0..21 {
        let device = guest.attach(&host, &line("xvda", &path))?;
        let transport = Transport { persistent: round % 2 == 0, order: round % 5, ..PLAIN };
        let mut disk = WellBehaved::connect(&guest, &device, transport)?;
        disk.round_trip(u64::from(round) * 8)?;
        detach_connected(&host, &guest, &device, disk, "xvda")?;
        let now = (nodes(&host)?, Usage::of(daemon.pid())?);
        let (nodes, usage) = before.get_or_insert_with(|| now.clone());
        ensure!(now.0 == *nodes, "before:\n{nodes}\nnow:\n{}", now.0);
        usage.wait_for_baseline(daemon.pid())?;
    }
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    ensure!(!open.into_iter().any(|target| target == path), "the file is still open");
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    let said = daemon.log().matches("state=Closed").count();
    ensure!(said == 21, "the log says {said} times that a disk is closed: {}", daemon.log());
    Ok(())
}

/// xenstored limits the number of a driver domain's nodes. A disk beyond that is connected when there is
/// room, and can be detached before.
#[test]
fn a_disk_beyond_the_quota_waits_for_room() -> Result<()> {
    let host = host()?;
    let daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let first = guest.attach(&host, "vdev=xvda,target=memory:16M")?;
    let mut disk = WellBehaved::connect(&guest, &first, PLAIN)?;

    let filler = format!("/local/domain/{}/data/filler", guest.backend.0);
    admin.write(&filler, "")?;
    admin.set_perms(&filler, &[Perm::new(guest.backend.0, Access::None)])?;
    let nodes: Vec<_> = (0..quota::NODES).map(|n| (n.to_string(), Vec::new())).collect();
    admin.write_all(&filler, &nodes)?;
    let refusals = || daemon.log().matches("a quota that xenstored sets").count();
    std::thread::scope(|scope| -> Result<()> {
        let attach = || {
            host.attach(
                "guest",
                "backend=stor,backendtype=tap,format=raw,vdev=xvdb,target=memory:16M",
            )
        };
        let attached = scope.spawn(attach);
        wait_until("the log to say why", || Ok(refusals() > 0))?;
        host.detach("guest", "xvdb")?;
        let attached = attached.join().map_err(|_| anyhow::anyhow!("the toolstack panicked"))?;
        ensure!(attached.is_err(), "{attached:?}");
        let back = first.back.replace("51712", "51728");
        ensure!(admin.read(&format!("{back}/state"))?.is_none(), "{back} is left");

        let before = refusals();
        let attached = scope.spawn(attach);
        wait_until("the log to say why again", || Ok(refusals() > before))?;
        admin.rm(&filler)?;
        attached.join().map_err(|_| anyhow::anyhow!("the toolstack panicked"))??;
        Ok(())
    })
    .with_context(|| daemon.log())?;
    let second = Device {
        front: first.front.replace("51712", "51728"),
        back: first.back.replace("51712", "51728"),
    };
    WellBehaved::connect(&guest, &second, PLAIN)?.round_trip(0)?;
    disk.round_trip(8)
}

#[test]
fn a_daemon_drains_and_its_successor_goes_on() -> Result<()> {
    let host = host()?;
    let guest = Guest::create(&host, "guest")?;
    let path = image(&host, "disk.img", DISK)?;
    // Attached before there is a daemon.
    let attach = format!("backend=stor,format=raw,backendtype=tap,{}", line("xvda", &path));
    let told = run(host.toolstack().args(["attach", "--no-wait", "guest", &attach]))?;
    let back = told.trim().rsplit(' ').next().context("directory")?.to_owned();
    let front = format!("/local/domain/{}/device/vbd/51712", guest.domid.0);
    let device = Device { front, back };
    let mut daemon = host.backend(&[])?;
    let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
    for round in 0..5 {
        disk.round_trip(round * 8)?;
        let status = daemon.terminate()?;
        ensure!(status.success(), "{status}: {}", daemon.log());
        // It leaves the state for its successor, and holds nothing: the kernel would have told the
        // broker otherwise. Requests wait on the ring meanwhile.
        let found = device.property(&guest, "state")?;
        ensure!(found.as_deref() == Some(state::CONNECTED), "{found:?}");
        std::thread::scope(|scope| -> Result<()> {
            let waiting = scope.spawn(|| disk.round_trip(round * 8 + 1000));
            daemon = host.backend(&[])?;
            waiting.join().map_err(|_| anyhow::anyhow!("the frontend panicked"))?
        })?;
    }
    detach_connected(&host, &guest, &device, disk, "xvda")?;
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(())
}

/// Waits until the frontend sees the file's `sectors`: I/O works up to there, and fails beyond.
fn resized(guest: &Guest, device: &Device, disk: &mut WellBehaved, bytes: u64) -> Result<()> {
    let sectors = bytes / SECTOR;
    guest.store.wait_for(&format!("{}/sectors", device.back), &[&sectors.to_string()])?;
    disk.round_trip(sectors - 8)?;
    ensure!(disk.read(sectors)?.0 == Status::Error, "read past the end of {sectors} sectors");
    Ok(())
}

#[test]
fn a_file_that_changes_its_size_is_a_disk_that_does() -> Result<()> {
    for (options, hangup) in
        [(["--resize-interval-s", "0"], true), (["--resize-interval-s", "1"], false)]
    {
        let host = host()?;
        let daemon = host.backend(&options)?;
        let guest = Guest::create(&host, "guest")?;
        let path = image(&host, "disk.img", DISK)?;
        let device = guest.attach(&host, &line("xvda", &path))?;
        let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
        resized(&guest, &device, &mut disk, DISK)?;
        for bytes in [2 * DISK, 3 * DISK, DISK] {
            File::options().write(true).open(&path)?.set_len(bytes)?;
            if hangup {
                daemon.signal(Signal::SIGHUP)?;
            }
            resized(&guest, &device, &mut disk, bytes)?;
            let connected = device.property(&guest, "state")?;
            ensure!(connected.as_deref() == Some(state::CONNECTED), "{connected:?}");
        }
    }
    Ok(())
}

/// One look at the sizes of all disks is all that an idle daemon wakes up for.
#[test]
fn idle_disks_do_not_keep_the_daemon_awake() -> Result<()> {
    const DISKS: u64 = 8;
    const LOOKS: u64 = 4;
    let host = host()?;
    let daemon = host.backend(&["--resize-interval-s", "1"])?;
    let guest = Guest::create(&host, "guest")?;
    let mut connected = Vec::new();
    for letter in ('a'..).take(DISKS as usize) {
        let vdev = format!("xvd{letter}");
        let device = guest.attach(&host, &line(&vdev, image(&host, &vdev, DISK)?))?;
        connected.push(WellBehaved::connect(&guest, &device, PLAIN)?);
    }
    std::thread::sleep(Duration::from_secs(1));
    let before = daemon.sleeps()?;
    std::thread::sleep(Duration::from_secs(LOOKS));
    let woken = daemon.sleeps()?.saturating_sub(before);
    // Threads that opened the disks may end meanwhile, too: once each.
    ensure!(woken <= LOOKS + 1 + DISKS, "{woken} wake-ups, and {LOOKS} looks at {DISKS} disks");
    drop(connected);
    Ok(())
}

#[test]
fn a_read_only_disk_refuses_writes_and_discards() -> Result<()> {
    let host = host()?;
    let _daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let path = image(&host, "disk.img", DISK)?;
    let content = [0x5a; 4096];
    File::options().write(true).open(&path)?.write_all_at(&content, 0)?;
    let device = guest.attach(&host, &format!("access=ro,{}", line("xvda", &path)))?;
    let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
    // VDISK_READONLY of blkif.h.
    let info: u32 = device.property(&guest, "info")?.context("info")?.parse()?;
    ensure!(info & 4 != 0, "info is {info}");
    ensure!(disk.read(0)? == (Status::Okay, content), "it can be read");
    ensure!(disk.write(0, &[1; 4096])? != Status::Okay, "a write was accepted");
    let discard = Body::Discard { sector: 0, sectors: 8, secure: false };
    ensure!(disk.request(discard)? != Status::Okay, "a discard was accepted");
    ensure!(disk.read(0)? == (Status::Okay, content), "it has changed");
    ensure!(std::fs::read(&path)?[..4096] == content, "the file has changed");
    Ok(())
}

#[test]
fn flushes_and_discards_reach_a_file() -> Result<()> {
    let host = host()?;
    let _daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let path = image(&host, "disk.img", DISK)?;
    let device = guest.attach(&host, &line("xvda", &path))?;
    let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
    let flush = device.property(&guest, "feature-flush-cache")?;
    ensure!(flush.as_deref() == Some("1"), "feature-flush-cache is {flush:?}");
    ensure!(disk.write(0, &[7; 4096])? == Status::Okay, "write");
    for barrier in [false, true] {
        ensure!(disk.request(Body::Flush { barrier })? == Status::Okay, "flush, {barrier}");
    }
    ensure!(std::fs::read(&path)?[..4096] == [7; 4096], "the file does not have it");
    let discard = device.property(&guest, "feature-discard")?;
    ensure!(discard.as_deref() == Some("1"), "feature-discard is {discard:?}");
    let body = Body::Discard { sector: 0, sectors: 8, secure: false };
    ensure!(disk.request(body)? == Status::Okay, "discard");
    ensure!(std::fs::read(&path)?[..4096] == [0; 4096], "it was not discarded");
    Ok(())
}

/// Of the disk's flushes the second and the fifth fail.
#[test]
fn a_barrier_is_flushed_before_its_data_and_behind() -> Result<()> {
    let host = host()?;
    let _daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let path = image(&host, "disk.img", DISK)?;
    let target = format!("error:flush@40%,{}", path.display());
    let device = guest.attach(&host, &line("xvda", target))?;
    let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
    let mut outcome = |transfer, sector, byte| -> Result<_> {
        let status = disk.write_by(transfer, sector, &[byte; 4096])?;
        Ok((status, std::fs::read(&path)?[(sector * SECTOR) as usize] == byte))
    };
    ensure!(outcome(Transfer::Barrier, 0, 1)? == (Status::Error, true), "nothing behind it");
    for sector in [8, 16] {
        ensure!(outcome(Transfer::FlushWrite, sector, 2)? == (Status::Okay, true), "{sector}");
    }
    ensure!(outcome(Transfer::FlushWrite, 24, 3)? == (Status::Error, false), "nothing before it");
    Ok(())
}

/// Each on its own file, all at the same time.
#[test]
fn guests_and_disks_do_not_meet() -> Result<()> {
    const DISKS: [&str; 3] = ["xvda", "xvdb", "xvdc"];
    let host = host()?;
    let mut daemon = host.backend(&[])?;
    let mut all = Vec::new();
    for name in ["one", "two"] {
        let guest = Guest::create(&host, name)?;
        for vdev in DISKS {
            let path = image(&host, &format!("{name}-{vdev}.img"), DISK)?;
            let device = guest.attach(&host, &line(vdev, &path))?;
            let transport = Transport { persistent: vdev == "xvdb", ..PLAIN };
            all.push((path, WellBehaved::connect(&guest, &device, transport)?));
        }
    }
    std::thread::scope(|scope| {
        let writers: Vec<_> = all
            .iter_mut()
            .zip(1u8..)
            .map(|((_, disk), byte)| {
                scope.spawn(move || -> Result<()> {
                    for n in 0..256 {
                        ensure!(disk.write(n * 8, &[byte; 4096])? == Status::Okay, "write");
                    }
                    Ok(())
                })
            })
            .collect();
        for writer in writers {
            writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??;
        }
        anyhow::Ok(())
    })?;
    for ((path, _), byte) in all.iter().zip(1u8..) {
        let content = std::fs::read(path)?;
        let (written, rest) = content.split_at(256 * 4096);
        ensure!(written.iter().all(|&b| b == byte), "{} has other data", path.display());
        ensure!(rest.iter().all(|&b| b == 0), "{} has data behind", path.display());
    }
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    Ok(())
}
