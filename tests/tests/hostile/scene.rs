//! The stage: a host, the daemon, a frontend to attack with, and a peaceful one to watch.

use crate::guest::{Device, Guest, Transport, WellBehaved};
use crate::usage::Usage;
use anyhow::{Context, Result, ensure};
use ring_proto::{Abi, RingLayout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::{Process, wait_until};

/// Bytes of each disk to attack.
pub(crate) const DISK: u64 = 16 << 20;
/// Bytes of the neighbour's disk, which are memory of the daemon's once they are written.
const SMALL_DISK: u64 = 1 << 20;

/// A host with a daemon, a hostile guest, and a peaceful one that works all the time.
pub(crate) struct Scene {
    pub(crate) evil: Guest,
    pub(crate) good: Guest,
    pub(crate) good_device: Device,
    pub(crate) neighbour: Neighbour,
    pub(crate) daemon: Process,
    pub(crate) host: Host,
}

impl Scene {
    pub(crate) fn new(options: &[&str]) -> Result<Self> {
        let host = Host::start(Programs::beside_us()?)?;
        // One thread serves both guests, so that whatever the hostile one does gets in the way of the
        // other.
        let daemon = host.backend(&[&["--threads", "1"], options].concat())?;
        let good = Guest::create(&host, "good")?;
        let good_device = good.attach(&host, &format!("vdev=xvda,target=memory:{SMALL_DISK}"))?;
        let transport =
            Transport { layout: RingLayout::Union(Abi::X86_64), order: 0, persistent: true };
        let neighbour = Neighbour::start(WellBehaved::connect(&good, &good_device, transport)?);
        let evil = Guest::create(&host, "evil")?;
        Ok(Self { evil, good, good_device, neighbour, daemon, host })
    }

    /// Adds the state of the daemon to an error.
    pub(crate) fn watch<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.with_context(|| {
            let stats = self.host.stats().map_or_else(|e| e.to_string(), |s| s.to_string());
            format!("{}\nstatistics: {stats}", self.daemon.describe())
        })
    }

    /// Checks that the daemon served the neighbour without an error, still runs, and holds nothing of ours.
    pub(crate) fn end(mut self, baseline: Usage) -> Result<()> {
        let good = self.neighbour.stop()?;
        good.disconnect(&self.good, &self.good_device)?;
        ensure!(self.daemon.is_running()?, "the daemon ended:\n{}", self.daemon.log());
        let log = self.daemon.log();
        ensure!(!log.contains("panicked"), "{log}");
        let now = baseline.wait_for_baseline(self.daemon.pid())?;
        println!("daemon before: {baseline:?}\ndaemon after:  {now:?}");
        ensure!(self.daemon.terminate()?.success(), "{}", self.daemon.log());
        Ok(())
    }
}

/// A peaceful frontend on a thread.
pub(crate) struct Neighbour {
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<WellBehaved>>,
}

impl Neighbour {
    pub(crate) fn start(mut disk: WellBehaved) -> Self {
        let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ends) = (done.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let n = count.fetch_add(1, Ordering::Relaxed);
                disk.round_trip(n * 8 % (SMALL_DISK / 512))?;
            }
            Ok(disk)
        });
        Self { done, stop, thread }
    }

    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until it has done `more` than now: it is served, whatever else goes on.
    pub(crate) fn wait_for(&self, more: u64) -> Result<()> {
        let goal = self.done() + more;
        wait_until("the neighbour's disk", || {
            ensure!(!self.thread.is_finished(), "the neighbour's disk failed");
            Ok(self.done() >= goal)
        })
    }

    pub(crate) fn stop(self) -> Result<WellBehaved> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the neighbour panicked"))?
    }

    /// Round trips a second from `since`, when it had done `before`.
    pub(crate) fn rate(&self, before: u64, since: Instant) -> f64 {
        (self.done() - before) as f64 / since.elapsed().as_secs_f64()
    }
}
