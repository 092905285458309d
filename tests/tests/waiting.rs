//! What a ring's thread does while its disk is busy.

use anyhow::{Context, Result, ensure};
use blkfront::{Config, Disk, Io};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use xen_blk_tests::cpu;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{HUNG, Process, run, skip, wait_until};
use xen_platform::{Choice, End};

/// Each test wants the CPUs for itself.
static ALONE: Mutex<()> = Mutex::new(());

/// A small ext4 file system that can be frozen: kernel threads that write to it wait.
struct FileSystem(PathBuf);

impl FileSystem {
    /// `None` if nothing can be mounted, and the test may be skipped.
    fn new(dir: &Path) -> Result<Option<Self>> {
        let (image, mountpoint) = (dir.join("ext4.img"), dir.join("ext4"));
        File::create(&image)?.set_len(64 << 20)?;
        std::fs::create_dir(&mountpoint)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        let mut mount = Command::new("mount");
        match run(mount.args(["-o", "loop"]).args([&image, &mountpoint])) {
            Ok(_) => Ok(Some(Self(mountpoint))),
            Err(error) => skip(&format!("{error:#}")).map(|()| None),
        }
    }

    fn freeze(&self) -> Result<Frozen<'_>> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.0))?;
        Ok(Frozen(self))
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Frozen until this is dropped: before the processes that use it, which cannot even be killed.
struct Frozen<'a>(&'a FileSystem);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0.0).status();
    }
}

/// A write to the page cache is done by a kernel thread, which may want the CPU that ours spins on.
#[test]
fn nobody_spins_while_a_thread_of_the_kernel_writes() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::start(Programs::beside_us()?)?;
    let Some(files) = FileSystem::new(host.dir())? else { return Ok(()) };
    let image = files.0.join("disk.img");
    File::create(&image)?.set_len(16 << 20)?;
    // If it spins, then for longer than the test looks.
    let spin = ["--wait", "adaptive", "--spin-us", "20000000", "--direct", "off"];
    let mut backend = host.backend(&spin)?;
    host.create_domain("guest", &[])?;
    let image = image.display();
    host.attach(
        "guest",
        &format!("vdev=xvda,format=raw,backendtype=tap,backend={DRIVER_DOMAIN},target={image}"),
    )?;
    let mut writes = host.frontend("guest", "bench");
    writes.args(["xvda", "--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=4"]);
    // Dropped after the unfreezing, whatever happens.
    let mut load;
    let frozen = files.freeze()?;
    load = Process::start("load", host.dir(), &writes)?;
    wait_until("writes are in flight", || {
        let stats = host.stats()?;
        Ok(stats["devices"][0]["total"]["wr_req"].as_u64().unwrap_or(0) == 4)
    })?;
    let before = cpu::used(backend.pid())?;
    std::thread::sleep(Duration::from_secs(1));
    let used = cpu::used(backend.pid())? - before;
    ensure!(used < Duration::from_millis(500), "{used:?} of a CPU in one second of waiting");
    drop(frozen);
    let status = load.wait(HUNG)?;
    ensure!(status.success(), "{}", load.describe());
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    Ok(())
}

/// Kernel threads that do what a disk is asked for may have no CPU but the one that our thread polls on.
#[test]
fn a_thread_that_polls_gives_way_while_its_disk_is_busy() -> Result<()> {
    const CPU: &str = "0";
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::start(Programs::beside_us()?)?;
    let mut backend = host.backend_on(CPU, &["--wait", "poll"])?;
    host.create_domain("guest", &[])?;
    // For longer than the test looks.
    let disk = format!("vdev=xvda,backend={DRIVER_DOMAIN},target=delay:20s,null:1G");
    host.attach("guest", &disk)?;
    let mut reads = host.frontend("guest", "bench");
    reads.args(["xvda", "--size=4k"]);
    let mut load = Process::start("load", host.dir(), &reads)?;
    wait_until("a read is in flight", || {
        Ok(host.stats()?["devices"][0]["total"]["rd_req"].as_u64() == Some(1))
    })?;
    let mut other = Command::new("taskset");
    other.args(["-c", CPU, "sh", "-c", "while :; do :; done"]);
    let mut other = Process::start("other", host.dir(), &other)?;
    let now = || Ok::<_, anyhow::Error>((cpu::used(backend.pid())?, cpu::used(other.pid())?));
    let before = now()?;
    std::thread::sleep(Duration::from_secs(1));
    let after = now()?;
    let (ours, others) = (after.0 - before.0, after.1 - before.1);
    // The scheduler alone would give both the same.
    ensure!(ours < others / 2, "we had the CPU for {ours:?}, the other for {others:?}");
    other.kill()?;
    ensure!(load.wait(HUNG)?.success(), "{}", load.describe());
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    Ok(())
}

/// How long a disk takes says nothing about how soon a frontend comes back after an answer.
#[test]
fn a_slow_disk_does_not_keep_a_thread_from_waiting_for_a_quick_frontend() -> Result<()> {
    const READS: u64 = 100;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::start(Programs::beside_us()?)?;
    // A frontend that was asleep is back sooner than that, even on a busy machine...
    let mut backend = host.backend(&["--wait", "adaptive", "--spin-us", "5000"])?;
    host.create_domain("guest", &[])?;
    // ...and the disk is not.
    let disk = format!("vdev=xvda,backend={DRIVER_DOMAIN},target=delay:20ms,null:1G");
    host.attach("guest", &disk)?;
    let mut reads = host.frontend("guest", "bench");
    reads.args(["xvda", "--rw=read", "--bs=4k", "--wait=event"]);
    // Its statistics go with the frontend, so they are read before the end.
    reads.arg(format!("--size={}k", 4 * 2 * READS));
    let mut load = Process::start("load", host.dir(), &reads)?;
    let mut counts = (0, 0);
    wait_until("some reads are done", || {
        let stats = host.stats()?;
        let of = |name| stats["devices"][0]["total"][name].as_u64().unwrap_or(0);
        counts = (of("rd_req"), of("sleeps"));
        Ok(counts.0 >= READS)
    })?;
    // One per read for the disk; with a common history there is another for the frontend.
    let (done, sleeps) = counts;
    ensure!(sleeps < done * 3 / 2, "{sleeps} sleeps for {done} reads");
    ensure!(load.wait(HUNG)?.success(), "{}", load.describe());
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    Ok(())
}

/// What a round may copy is bounded. A read that has to wait for the next is answered before those that the disk
/// has completed since: otherwise it might wait for ever.
#[test]
fn reads_are_answered_in_the_order_in_which_the_disk_completes_them() -> Result<()> {
    const READS: u64 = 32;
    const BYTES: usize = 128 << 10;
    let host = Host::start(Programs::beside_us()?)?;
    let _backend = host.backend(&[])?;
    host.create_domain("guest", &["--on-crash", "preserve"])?;
    let target = "target=delay:50ms,memory:16M";
    host.attach("guest", &format!("vdev=xvda,backendtype=tap,backend={DRIVER_DOMAIN},{target}"))?;
    let choice = Choice::new(Some(&host.platform()), Some("guest"))?;
    let (platform, endpoint) = choice.open(End::Frontend)?;
    let config = Config { persistent: false, merge: false, ..Config::default() };
    let disk = Disk::open(platform, endpoint, "xvda", config)?;
    let mut queue = disk.queue(0)?;
    for round in 0..3 {
        for cookie in 0..READS {
            let buffer = queue.alloc(BYTES).context("a buffer")?;
            let read = Io::read(cookie, cookie * BYTES as u64, buffer);
            ensure!(queue.submit(read).is_ok(), "round {round}: read {cookie} was refused");
        }
        let mut done = Vec::new();
        while done.len() < READS as usize {
            ensure!(queue.wait(&mut done, Some(HUNG)) > 0, "only {} are answered", done.len());
        }
        let order: Vec<_> = done.iter().map(|read| read.cookie).collect();
        ensure!(order.iter().copied().eq(0..READS), "round {round}: {order:?}");
    }
    Ok(())
}
