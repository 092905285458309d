//! Backends that do as they like in xenstore: the test plays them, and serves no ring.

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod guest;

use anyhow::{Context, Result, anyhow, ensure};
use blkfront::{Config, Disk};
use guest::{Store, state};
use std::time::{Duration, Instant};
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::{run, wait_until};
use xen_platform::{Choice, End};

/// A disk of a guest's that nobody serves any more.
struct Played {
    host: Host,
    store: Store,
    front: String,
    back: String,
}

impl Played {
    fn new() -> Result<Self> {
        let host = Host::start(Programs::beside_us()?)?;
        let domain = host.create_domain("guest", &["--on-crash", "preserve"])?;
        // The toolstack waits for one.
        let mut backend = host.backend(&[])?;
        let told = host.attach("guest", "backend=stor,vdev=xvda,target=memory:1M")?;
        let back = told.trim().rsplit(' ').next().context("directory")?.to_owned();
        backend.kill()?;
        let store = Store::connect(&host.platform_dir().join("xenstored.sock"))?;
        let front = format!("/local/domain/{domain}/device/vbd/51712");
        Ok(Self { host, store, front, back })
    }

    fn write(&self, key: &str, value: &str) -> Result<()> {
        self.store.write(&format!("{}/{key}", self.back), value)
    }

    fn wait_for(&self, states: &[&str]) -> Result<()> {
        self.store.wait_for(&format!("{}/state", self.front), states)
    }

    /// Starts over, and takes what is offered.
    fn connect(&self, sector_size: &str) -> Result<()> {
        self.write("state", state::INIT_WAIT)?;
        self.wait_for(&[state::INITIALISED])?;
        self.write("sectors", "2048")?;
        self.write("sector-size", sector_size)?;
        self.write("state", state::CONNECTED)
    }

    /// The disk, opened in this process.
    fn open(&self) -> Result<Disk> {
        let choice = Choice::new(Some(&self.host.platform()), Some("guest"))?;
        let (platform, endpoint) = choice.open(End::Frontend)?;
        // Short, as nobody closes the backend at the end.
        let config = Config { connect_timeout: Duration::from_secs(3), ..Config::default() };
        std::thread::scope(|scope| {
            let disk = scope.spawn(|| Disk::open(platform, endpoint, "xvda", config));
            self.connect("512")?;
            // From here on, a state of the frontend is an answer to what we write.
            self.wait_for(&[state::CONNECTED])?;
            Ok(disk.join().map_err(|_| anyhow!("panicked"))??)
        })
    }
}

#[test]
fn io_waits_while_sectors_are_larger_than_those_in_use() -> Result<()> {
    let backend = Played::new()?;
    let disk = backend.open()?;
    backend.connect("4096")?;
    backend.wait_for(&[state::CLOSING, state::CLOSED])?;
    ensure!(disk.info().reconnects == 0 && disk.geometry().sector_size == 512, "{:?}", disk.info());
    backend.write("state", state::CLOSED)?;
    backend.wait_for(&[state::INITIALISING])?;
    backend.connect("512")?;
    backend.wait_for(&[state::CONNECTED])?;
    ensure!(disk.info().reconnects == 1, "{:?}", disk.info());
    Ok(())
}

#[test]
fn a_backend_that_changes_its_mind_is_followed_once_a_second() -> Result<()> {
    const TIMES: u32 = 3;
    // The first time may be at once.
    let least = Duration::from_secs(1) * (TIMES - 1);
    let backend = Played::new()?;
    let disk = backend.open()?;
    let begin = Instant::now();
    for _ in 0..TIMES {
        backend.connect("512")?;
        backend.wait_for(&[state::CONNECTED])?;
    }
    ensure!(begin.elapsed() >= least, "connected {TIMES} times in {:?}", begin.elapsed());
    let begin = Instant::now();
    for n in 0..TIMES {
        let sectors = 4096 + u64::from(n);
        backend.write("sectors", &sectors.to_string())?;
        backend.write("state", state::CONNECTED)?;
        wait_until("the disk to be resized", || Ok(disk.geometry().size == sectors * 512))?;
    }
    ensure!(begin.elapsed() >= least, "resized {TIMES} times in {:?}", begin.elapsed());
    Ok(())
}

#[test]
fn what_a_backend_says_is_told_when_it_does_not_connect() -> Result<()> {
    let backend = Played::new()?;
    backend.write("state", state::CLOSED)?;
    backend.write("hotplug-error", "no such volume")?;
    let told = run(backend.host.frontend("guest", "info").args(["xvda", "--connect-timeout=1"]));
    let told = format!("{:#}", told.err().context("there is no backend")?);
    ensure!(told.contains("not Connected after 1 s, but Closed (6): no such volume"), "{told}");
    Ok(())
}
