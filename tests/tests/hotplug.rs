//! Hotplug scripts: the backend waits for what they say, if somebody may run them.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;

use anyhow::{Context, Result, ensure};
use guest::{Device, Guest, Link, Store, Transport, WellBehaved, state};
use ring_proto::{Abi, RingLayout};
use std::fs::File;
use std::process::Command;
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{Process, run, wait_until};
use xenstore_glue::wire::{Access, Perm};

const PLAIN: Transport =
    Transport { layout: RingLayout::Union(Abi::X86_64), order: 0, persistent: false };

/// A disk with a script, set up as far as its frontend can get without the backend.
fn offered(host: &Host, guest: &Guest, vdev: &str) -> Result<(Device, Link)> {
    let line = format!("vdev={vdev},script=block-test,target=memory:16M");
    let device = guest.attach(host, &line)?;
    device.begin(guest)?;
    let link = Link::new(guest, PLAIN)?;
    device.offer(guest, &link.keys())?;
    Ok((device, link))
}

#[test]
fn the_disk_is_connected_when_its_script_has_run_or_nobody_runs_it() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    // Enough for all that has to happen before the timeout.
    let mut daemon = host.backend(&["--script-timeout-s", "15"])?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let state_of = |device: &Device| admin.read(&format!("{}/state", device.back));

    let (refused, _refused_link) = offered(&host, &guest, "xvda")?;
    admin.write(&format!("{}/hotplug-status", refused.back), "error")?;
    let (scripted, link) = offered(&host, &guest, "xvdb")?;
    let unscripted = guest.attach(&host, "vdev=xvdc,target=memory:16M")?;
    let mut used = WellBehaved::connect(&guest, &unscripted, PLAIN)?;
    used.round_trip(0)?;
    // The backend handles events in order, so it has seen the other frontends.
    let waiting = state_of(&scripted)?;
    ensure!(waiting.as_deref() == Some(state::INIT_WAIT), "{waiting:?}: {}", daemon.log());
    ensure!(admin.read(&format!("{}/hotplug-status", scripted.back))?.is_none());
    admin.write(&format!("{}/hotplug-status", scripted.back), "connected")?;
    scripted.wait_backend(&guest, &[state::CONNECTED])?;
    scripted.set_state(&guest, state::CONNECTED)?;
    WellBehaved::on(&guest, link)?.round_trip(0)?;
    ensure!(!daemon.log().contains("nobody runs"), "{}", daemon.log());

    let (abandoned, link) = offered(&host, &guest, "xvdd")?;
    abandoned.wait_backend(&guest, &[state::CONNECTED])?;
    abandoned.set_state(&guest, state::CONNECTED)?;
    WellBehaved::on(&guest, link)?.round_trip(0)?;
    // The other one's time would be over by now, had its script not said no.
    let still_refused = |daemon: &Process| -> Result<()> {
        let waiting = state_of(&refused)?;
        ensure!(waiting.as_deref() == Some(state::INIT_WAIT), "{waiting:?}: {}", daemon.log());
        let said = admin.read(&format!("{}/hotplug-status", refused.back))?;
        ensure!(said.as_deref() == Some("error"), "{said:?}: {}", daemon.log());
        Ok(())
    };
    still_refused(&daemon)?;
    // The daemon's successor takes no for an answer, too.
    daemon.kill()?;
    let daemon = host.backend(&[])?;
    used.round_trip(0)?;
    // Longer than the daemon waits for a script that nobody may run.
    std::thread::sleep(Duration::from_secs(4));
    still_refused(&daemon)
}

/// As those of OVMF and Mini-OS do, which then wait for the backend to be connected.
#[test]
fn a_frontend_may_say_connected_at_once() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let device = guest.attach(&host, "vdev=xvda,target=memory:16M")?;
    device.begin(&guest)?;
    let link = Link::new(&guest, PLAIN)?;
    let connected = ("state".to_owned(), state::CONNECTED.into());
    guest.store.write_all(&device.front, &[link.keys(), vec![connected]].concat())?;
    device.wait_backend(&guest, &[state::CONNECTED])?;
    let mut disk = WellBehaved::on(&guest, link)?;
    disk.round_trip(0)?;
    disk.disconnect(&guest, &device)?;
    WellBehaved::connect(&guest, &device, PLAIN)?.round_trip(0)
}

/// Storage may hang, as on a lost network: here a lease keeps others from opening the file, for 45 s
/// (`/proc/sys/fs/lease-break-time`).
#[test]
fn a_disk_that_cannot_be_opened_for_ever_makes_room() -> Result<()> {
    /// F_SETLEASE and F_WRLCK of linux/fcntl.h.
    const LEASE: &str = r#"open(my $file, "+<", shift) or die "open: $!";
        fcntl($file, 1024, 1) or die "lease: $!";
        $SIG{IO} = "IGNORE"; $| = 1; print "held\n"; sleep 1 while 1;"#;
    let host = Host::start(Programs::beside_us()?)?;
    let daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let image = host.dir().join("hangs.img");
    File::create(&image)?.set_len(1 << 20)?;
    let mut perl = Command::new("perl");
    perl.args(["-e", LEASE]).arg(&image);
    let mut holder = Process::start("holder", host.dir(), &perl)?;
    holder.wait_for("held")?;
    let hangs =
        format!("backend={DRIVER_DOMAIN},backendtype=tap,vdev=xvda,target={}", image.display());
    run(host.toolstack().args(["attach", "guest", &hangs, "--no-wait"]))?;
    // It is being opened.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(!daemon.log().contains("disk opened"), "the lease holds nobody: {}", daemon.log());
    host.detach("guest", "xvda")?;
    let device = guest.attach(&host, "vdev=xvda,target=memory:16M")?;
    let mut disk = WellBehaved::connect(&guest, &device, PLAIN)?;
    disk.round_trip(0)?;
    ensure!(!daemon.log().contains("hangs.img"), "opened after all: {}", daemon.log());
    Ok(())
}

/// Undoing a script's work needs the directory; whoever does that also removes it.
#[test]
fn the_directory_stays_for_who_runs_the_script() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let options = ["--script-timeout-s", "3600"];
    let mut daemon = host.backend(&options)?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let (disk, link) = offered(&host, &guest, "xvda")?;
    // Longer than the daemon waits without that option.
    std::thread::sleep(Duration::from_secs(4));
    ensure!(disk.property(&guest, "state")?.as_deref() == Some(state::INIT_WAIT), "not waited for");
    admin.write(&format!("{}/hotplug-status", disk.back), "connected")?;
    disk.wait_backend(&guest, &[state::CONNECTED])?;
    disk.set_state(&guest, state::CONNECTED)?;
    let mut used = WellBehaved::on(&guest, link)?;
    used.round_trip(0)?;
    std::thread::scope(|scope| {
        let toolstack = scope.spawn(|| host.detach("guest", "xvda"));
        disk.wait_backend(&guest, &[state::CLOSING])?;
        // It may be mounted, for example: it is still served, also by the daemon's successor.
        used.round_trip(0)?;
        daemon.kill()?;
        daemon = host.backend(&options)?;
        used.round_trip(0)?;
        used.disconnect(&guest, &disk)?;
        wait_until("the device to be removed", || Ok(daemon.log().contains("device removed")))?;
        // Longer than the directory is left if there is no script.
        std::thread::sleep(Duration::from_secs(3));
        ensure!(admin.read(&format!("{}/params", disk.back))?.is_some(), "{}", daemon.log());
        admin.rm(&disk.back)?;
        toolstack.join().map_err(|_| anyhow::anyhow!("the toolstack panicked"))??;
        Ok(())
    })
}

/// As with the scripts of DRBD and iSCSI, which make a device of a name.
#[test]
fn what_another_script_has_found_is_the_disk() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let options = ["--script-timeout-s", "3600", "--resize-interval-s", "1"];
    let mut daemon = host.backend(&options)?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let image = host.dir().join("found.raw");
    File::create(&image)?.set_len(3 << 20)?;
    // No target of ours, and no path.
    let device = guest.attach(&host, "vdev=xvda,script=block-test,target=drbd:resource")?;
    device.begin(&guest)?;
    let link = Link::new(&guest, PLAIN)?;
    device.offer(&guest, &link.keys())?;
    let path = image.to_str().context("a path")?;
    admin.write(&format!("{}/physical-device-path", device.back), path)?;
    ensure!(!daemon.log().contains("disk opened"), "{}", daemon.log());
    admin.write(&format!("{}/hotplug-status", device.back), "connected")?;
    device.wait_backend(&guest, &[state::CONNECTED])?;
    ensure!(device.property(&guest, "sectors")?.as_deref() == Some("6144"), "{}", daemon.log());
    device.set_state(&guest, state::CONNECTED)?;
    let mut used = WellBehaved::on(&guest, link)?;
    used.round_trip(0)?;
    daemon.kill()?;
    let _daemon = host.backend(&options)?;
    used.round_trip(0)?;
    File::options().write(true).open(&image)?.set_len(4 << 20)?;
    wait_until("the disk is resized", || {
        Ok(device.property(&guest, "sectors")?.as_deref() == Some("8192"))
    })
}

/// libxl attaches the guest's disks to it as well.
#[test]
fn a_stub_domain_shares_its_guest_s_disk() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _daemon = host.backend(&[])?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let image = host.dir().join("disk.raw");
    File::create(&image)?.set_len(1 << 20)?;
    let (guest, stub) = (Guest::create(&host, "guest")?, Guest::create(&host, "guest-dm")?);
    let target = format!("/local/domain/{}/target", stub.domid.0);
    admin.write(&target, guest.domid.0.to_string())?;
    // As dom0 could anyway.
    let perms = [Perm::new(0, Access::None), Perm::new(guest.backend.0, Access::Read)];
    admin.set_perms(&target, &perms)?;
    let line = format!("vdev=xvda,target={}", image.display());
    let device = guest.attach(&host, &line)?;
    WellBehaved::connect(&guest, &device, PLAIN)?.round_trip(0)?;
    let device = stub.attach(&host, &line)?;
    WellBehaved::connect(&stub, &device, PLAIN)?.round_trip(0)
}

/// Debian's xenstore tools and the script that we ship, on a disk of a driver domain.
#[test]
fn our_script_says_what_blkback_has_found() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _daemon = host.backend(&["--script-timeout-s", "3600"])?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let script = |device: &Device, action: &str| -> Result<bool> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../blkback/dist/block-blkback");
        let socket = host.platform_dir().join("xenstored.sock");
        let mut command = Command::new("sh");
        command.arg(path).arg(action);
        command.env("XENSTORED_PATH", socket).env("XENBUS_PATH", &device.back);
        Ok(command.status()?.success())
    };
    let image = host.dir().join("disk.raw");
    File::create(&image)?.set_len(1 << 20)?;
    let attach = |vdev: &str, target: &str| -> Result<Device> {
        let line = format!("vdev={vdev},script=block-blkback,target={target}");
        let device = guest.attach(&host, &line)?;
        device.set_state(&guest, state::INITIALISING)?;
        device.wait_backend(&guest, &[state::INIT_WAIT, state::CLOSED])?;
        Ok(device)
    };
    let node = |device: &Device, key: &str| admin.read(&format!("{}/{key}", device.back));

    for (vdev, target) in [("xvda", "null:64G"), ("xvdb", &image.display().to_string())] {
        let device = attach(vdev, target)?;
        ensure!(node(&device, "hotplug-status")?.is_none(), "{target}");
        ensure!(script(&device, "add")?, "{target}");
        ensure!(node(&device, "hotplug-status")?.as_deref() == Some("connected"), "{target}");
        ensure!(node(&device, "physical-device")?.is_none(), "{target} is no device");
        ensure!(script(&device, "add")? && script(&device, "remove")?, "{target}, again");
        ensure!(!script(&device, "change")?, "an action that there is not");
    }
    // As blkback says of a disk that it cannot open.
    let refused = attach("xvdc", "null:1G")?;
    admin.write(&format!("{}/hotplug-error", refused.back), "no such disk")?;
    admin.write(&format!("{}/hotplug-status", refused.back), "error")?;
    ensure!(!script(&refused, "add")?);
    ensure!(node(&refused, "hotplug-status")?.as_deref() == Some("error"));
    ensure!(node(&refused, "hotplug-error")?.as_deref() == Some("no such disk"));
    Ok(())
}
