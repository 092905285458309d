//! Hotplug scripts: what they say is waited for, where somebody may run them.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;

use anyhow::{Result, ensure};
use guest::{Device, Guest, Link, Store, Transport, WellBehaved, state};
use ring_proto::{Abi, RingLayout};
use xen_blk_tests::host::{Host, Programs};

const PLAIN: Transport =
    Transport { layout: RingLayout::Union(Abi::X86_64), order: 0, persistent: false };

/// A disk with a script, as far as its frontend can go without the backend.
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
    let daemon = host.backend(&[])?;
    let guest = Guest::create(&host, "guest")?;
    let admin = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
    let state_of = |device: &Device| admin.read(&format!("{}/state", device.back));

    let (refused, _refused_link) = offered(&host, &guest, "xvda")?;
    admin.write(&format!("{}/hotplug-status", refused.back), "error")?;
    let (scripted, link) = offered(&host, &guest, "xvdb")?;
    let unscripted = guest.attach(&host, "vdev=xvdc,target=memory:16M")?;
    WellBehaved::connect(&guest, &unscripted, PLAIN)?.round_trip(0)?;
    // The backend takes events in their order, so it has seen the others' frontends.
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
    // Later than the other's time was up, had its script not said no.
    let waiting = state_of(&refused)?;
    ensure!(waiting.as_deref() == Some(state::INIT_WAIT), "{waiting:?}: {}", daemon.log());
    Ok(())
}
