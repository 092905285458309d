//! Frontends that obey no rule, against the running daemon: what they write to xenstore, and how
//! they go away.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;
#[path = "hostile/random.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod random;
#[path = "hostile/scene.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod scene;
#[path = "hostile/usage.rs"]
mod usage;

use anyhow::{Context, Result, ensure};
use guest::{Device, Guest, Link, Store, Transport, WellBehaved, state};
use random::Random;
use ring_proto::{Abi, DomId, RingLayout};
use scene::Scene;
use usage::Usage;
use xen_blk_tests::process::{run, wait_until};
use xen_platform::{Access, Platform};
use xenstore_glue::wire::{Access as NodeAccess, Perm};

const PLAIN: Transport =
    Transport { layout: RingLayout::Union(Abi::X86_64), order: 0, persistent: false };
const DISK_LINE: &str = "vdev=xvda,target=memory:16M";

/// A frontend that obeys the rules must be served on the same device.
fn serves(guest: &Guest, device: &Device) -> Result<()> {
    let mut disk = WellBehaved::connect(guest, device, PLAIN)?;
    disk.round_trip(0)?;
    disk.disconnect(guest, device)
}

fn admin(scene: &Scene) -> Result<Store> {
    Store::connect(&scene.host.platform_dir().join("xenstored.sock"))
}

/// Where the backend says what is wrong.
fn error_node(device: &Device) -> String {
    format!("{}/error", device.back.replacen("/backend/", "/error/backend/", 1))
}

#[test]
fn absurd_keys_are_refused_with_a_reason() -> Result<()> {
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, DISK_LINE)?;
    let admin = admin(&scene)?;
    serves(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    let foreign = scene.evil.platform.grant(DomId(0), 1, Access::ReadWrite)?;
    let readonly = scene.evil.grant(1, Access::ReadOnly)?;
    let bound = scene.evil.platform.alloc_unbound(scene.evil.domid)?;
    let number = |n: u32| n.to_string().into_bytes();
    let long = vec![b'7'; 1900];
    let numbers: [&[u8]; 9] = [
        b"",
        b"-1",
        b"+1",
        b"1 ",
        b"0x10",
        b"4294967296",
        b"99999999999999999999999",
        b"\xff\xfe\x00\x80",
        &long,
    ];
    let mut wrong: Vec<(&str, Option<Vec<u8>>)> = Vec::new();
    for key in ["ring-ref", "event-channel", "feature-persistent"] {
        wrong.extend(numbers.map(|value| (key, Some(value.to_vec()))));
    }
    wrong.extend([
        ("ring-ref", None),
        ("ring-ref", Some(number(31_000))),
        ("ring-ref", Some(number(u32::MAX))),
        ("ring-ref", Some(number(foreign.refs()[0].0))),
        ("ring-ref", Some(number(readonly.refs()[0].0))),
        ("event-channel", None),
        ("event-channel", Some(number(0))),
        ("event-channel", Some(number(4000))),
        ("event-channel", Some(number(u32::MAX))),
        ("event-channel", Some(number(bound.port().0))),
        ("protocol", Some(b"powerpc64-abi\xff".to_vec())),
        ("protocol", Some(long.clone())),
        ("multi-queue-num-queues", Some(number(0))),
        ("multi-queue-num-queues", Some(number(1_000_000_000))),
        ("multi-queue-num-queues", Some(number(2))),
        ("ring-page-order", Some(number(5))),
        ("ring-page-order", Some(number(99))),
        ("ring-page-order", Some(number(1))),
        ("num-ring-pages", Some(number(3))),
        ("num-ring-pages", Some(number(u32::MAX))),
        ("split-ring", Some(number(1))),
    ]);
    for (key, value) in &wrong {
        device.begin(&scene.evil)?;
        let link = Link::new(&scene.evil, PLAIN)?;
        let mut keys = link.keys();
        keys.retain(|(name, _)| name != key);
        scene.evil.store.rm(&format!("{}/{key}", device.front))?;
        keys.extend(value.iter().map(|value| ((*key).to_owned(), value.clone())));
        refused(&scene, &admin, &device, &keys, link)
            .with_context(|| format!("{key} {value:?}"))?;
    }
    // One page under two keys.
    device.begin(&scene.evil)?;
    let link = Link::new(&scene.evil, Transport { order: 1, ..PLAIN })?;
    let mut keys = link.keys();
    let first = keys.iter().find(|(key, _)| key == "ring-ref0").context("ring-ref0")?.1.clone();
    keys.retain(|(key, _)| key != "ring-ref1");
    keys.push(("ring-ref1".to_owned(), first));
    refused(&scene, &admin, &device, &keys, link)?;
    println!("{} sets of keys refused", wrong.len() + 1);
    serves(&scene.evil, &device)?;
    scene.end(baseline)
}

/// Offers keys, checks that they are refused with a reason, and that nothing stays mapped.
fn refused(
    scene: &Scene,
    admin: &Store,
    device: &Device,
    keys: &[(String, Vec<u8>)],
    link: Link,
) -> Result<()> {
    admin.rm(&error_node(device))?;
    device.offer(&scene.evil, keys)?;
    device.wait_backend(&scene.evil, &[state::CLOSING, state::CLOSED])?;
    let reason = admin.read(&error_node(device))?.context("no reason is told")?;
    ensure!(!reason.is_empty() && reason.len() < 400, "{reason:?}");
    ensure!(!reason.chars().any(char::is_control), "{reason:?}");
    link.revoke()?;
    device.set_state(&scene.evil, state::CLOSED)?;
    device.wait_backend(&scene.evil, &[state::CLOSED])
}

#[test]
fn nodes_that_the_backend_may_not_read_count_as_missing() -> Result<()> {
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, DISK_LINE)?;
    serves(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    let closed = [Perm::new(scene.evil.domid.0, NodeAccess::None)];
    let open = [closed[0], Perm::new(scene.evil.backend.0, NodeAccess::Read)];
    for key in ["state", "ring-ref", "event-channel", "feature-reissue", "protocol"] {
        let node = format!("{}/{key}", device.front);
        device.begin(&scene.evil)?;
        let link = Link::new(&scene.evil, PLAIN)?;
        scene.evil.store.write(&node, "1")?;
        scene.evil.store.set_perms(&node, &closed)?;
        scene.evil.store.write_all(&device.front, &link.keys())?;
        device.set_state(&scene.evil, state::INITIALISED)?;
        // The daemon looks at the device whenever its own directory changes.
        let poke = format!("{}/poke", device.back);
        admin(&scene)?.write(&poke, "1")?;
        scene.neighbour.wait_for(100)?;
        admin(&scene)?.rm(&poke)?;
        scene.evil.store.set_perms(&node, &open)?;
        device.set_state(&scene.evil, state::CLOSED)?;
        device.wait_backend(&scene.evil, &[state::CLOSED])?;
        link.revoke()?;
        scene.evil.store.rm(&format!("{}/feature-reissue", device.front))?;
        serves(&scene.evil, &device).context(key)?;
    }
    let given_up = scene.daemon.log().matches("device given up").count();
    ensure!(given_up == 0, "a frontend's permissions are no reason to give a device up");
    scene.end(baseline)
}

#[test]
fn states_in_any_order_are_survived() -> Result<()> {
    const JUMPS: usize = 500;
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, DISK_LINE)?;
    serves(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    let mut random = Random::new(3);
    let links = [Link::new(&scene.evil, PLAIN)?, Link::new(&scene.evil, PLAIN)?];
    let values = ["0", "1", "2", "3", "3", "4", "4", "5", "6", "7", "8", "9", "", "-1", "words"];
    for jump in 0..JUMPS {
        if random.below(4) == 0 {
            let link = &links[random.below(2) as usize];
            scene.evil.store.write_all(&device.front, &link.keys())?;
        }
        device.set_state(&scene.evil, random.pick(&values))?;
        // Some states are seen, some are jumped over.
        if jump % 8 == 0 {
            scene.neighbour.wait_for(20)?;
        }
    }
    device.set_state(&scene.evil, state::CLOSED)?;
    device.wait_backend(&scene.evil, &[state::CLOSED])?;
    for link in links {
        link.revoke()?;
    }
    serves(&scene.evil, &device)?;
    scene.end(baseline)
}

#[test]
fn two_hundred_connections_leave_nothing() -> Result<()> {
    const CONNECTIONS: usize = 200;
    let scene = Scene::new(&[])?;
    let device = scene.evil.attach(&scene.host, DISK_LINE)?;
    serves(&scene.evil, &device)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    for n in 0..CONNECTIONS {
        let transport = match n % 3 {
            0 => PLAIN,
            1 => Transport { persistent: true, ..PLAIN },
            _ => Transport { layout: RingLayout::Split, order: 1, persistent: false },
        };
        let link = device.connect(&scene.evil, transport).with_context(|| format!("round {n}"))?;
        if n % 2 == 0 {
            device.disconnect(&scene.evil, link)?;
        } else {
            // Closed in one step.
            device.set_state(&scene.evil, state::CLOSED)?;
            device.wait_backend(&scene.evil, &[state::CLOSED])?;
            link.revoke()?;
        }
    }
    serves(&scene.evil, &device)?;
    scene.end(baseline)
}

/// How far a frontend gets before something happens to it.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Attached,
    Waiting,
    /// Its keys are refused.
    Refused,
    Connected,
    Closing,
    Closed,
}

const STAGES: [Stage; 6] = [
    Stage::Attached,
    Stage::Waiting,
    Stage::Refused,
    Stage::Connected,
    Stage::Closing,
    Stage::Closed,
];

impl Stage {
    fn reach(self, guest: &Guest, device: &Device) -> Result<Option<Link>> {
        match self {
            Self::Attached => Ok(None),
            Self::Waiting => device.begin(guest).map(|()| None),
            Self::Refused => {
                device.begin(guest)?;
                let link = Link::new(guest, PLAIN)?;
                let mut keys = link.keys();
                keys.retain(|(key, _)| key != "event-channel");
                device.offer(guest, &keys)?;
                device.wait_backend(guest, &[state::CLOSING, state::CLOSED])?;
                Ok(Some(link))
            }
            Self::Connected => Ok(Some(device.connect(guest, PLAIN)?)),
            Self::Closing => {
                let link = device.connect(guest, PLAIN)?;
                device.set_state(guest, state::CLOSING)?;
                device.wait_backend(guest, &[state::CLOSING])?;
                Ok(Some(link))
            }
            Self::Closed => {
                device.disconnect(guest, device.connect(guest, PLAIN)?)?;
                Ok(None)
            }
        }
    }
}

/// Waits until the backend holds none of the ring's pages.
fn let_go(link: Option<Link>) -> Result<()> {
    let Some(link) = link else { return Ok(()) };
    for pages in std::iter::once(link.requests).chain(link.responses) {
        let mut kept = Some(pages);
        wait_until("the backend to unmap a ring", || {
            kept = kept.take().and_then(|pages| pages.revoke().err()).map(|(pages, _)| pages);
            Ok(kept.is_none())
        })?;
    }
    Ok(())
}

#[test]
fn directories_that_vanish_take_nothing_with_them() -> Result<()> {
    let scene = Scene::new(&[])?;
    let admin = admin(&scene)?;
    serves(&scene.evil, &scene.evil.attach(&scene.host, DISK_LINE)?)?;
    scene.host.detach("evil", "xvda")?;
    let baseline = Usage::of(scene.daemon.pid())?;
    for stage in STAGES {
        for frontend in [true, false] {
            let device = scene.evil.attach(&scene.host, DISK_LINE)?;
            let link = stage.reach(&scene.evil, &device)?;
            let gone = if frontend { &device.front } else { &device.back };
            admin.rm(gone)?;
            let_go(link).with_context(|| format!("{stage:?}, {gone} removed"))?;
            scene.neighbour.wait_for(10)?;
            run(scene.host.toolstack().args(["detach", "--force", "evil", "xvda"]))?;
            let device = scene.evil.attach(&scene.host, DISK_LINE)?;
            serves(&scene.evil, &device).with_context(|| format!("{stage:?}, after {gone}"))?;
            scene.host.detach("evil", "xvda")?;
        }
    }
    scene.end(baseline)
}

#[test]
fn guests_that_vanish_in_any_state_are_forgotten() -> Result<()> {
    let scene = Scene::new(&[])?;
    let admin = admin(&scene)?;
    serves(&scene.evil, &scene.evil.attach(&scene.host, DISK_LINE)?)?;
    let baseline = Usage::of(scene.daemon.pid())?;
    for stage in STAGES {
        let guest = Guest::create(&scene.host, "brief")?;
        let device = guest.attach(&scene.host, DISK_LINE)?;
        let link = stage.reach(&guest, &device)?;
        // To the broker, this is the end of the guest's process, and so of the guest.
        drop((link, guest));
        wait_until("the backend's directory to go", || Ok(admin.read(&device.back)?.is_none()))
            .with_context(|| format!("{stage:?}"))?;
        scene.neighbour.wait_for(10)?;
    }
    // And one that never had a process.
    scene.host.create_domain("brief", &[])?;
    let line = format!("backend=stor,format=raw,backendtype=tap,{DISK_LINE}");
    let told = scene.host.attach("brief", &line)?;
    let back = told.trim().rsplit(' ').next().context("directory")?.to_owned();
    run(scene.host.toolstack().args(["domain", "destroy", "brief"]))?;
    wait_until("the backend's directory to go", || Ok(admin.read(&back)?.is_none()))?;
    // Nothing is left that counts against the driver domain's quota, errors included.
    let driver = format!("/local/domain/{}", scene.evil.backend.0);
    let others = (scene.evil.domid.0 + 1)..(scene.evil.domid.0 + 8);
    wait_until("nodes of the driver domain's to go", || {
        let left = run(scene.host.xenstore("ls").arg("-f").arg(&driver))?;
        Ok(others.clone().all(|number| !left.contains(&format!("/vbd3/{number}"))))
    })?;
    scene.end(baseline)
}
