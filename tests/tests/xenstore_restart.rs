//! Xenstore restarts, or goes away for good, and disks go on.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{run, wait_until};

/// How often xenstore is restarted under one fio.
const RESTARTS: usize = 10;
/// A backend that does not wait for xenstore ends within this time.
const PROMPTLY: Duration = Duration::from_secs(5);
/// A frontend gives the backend ten seconds to close, and xenstore five more.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10 + 5);

fn disk_line(target: &str) -> String {
    format!("vdev=xvda,format=raw,backendtype=tap,backend={DRIVER_DOMAIN},target={target}")
}

/// A guest that stays when its frontend ends.
fn create_guest(host: &Host, guest: &str) -> Result<()> {
    host.create_domain(guest, &["--vcpus", "2", "--on-crash", "preserve"]).map(drop)
}

fn restart_xenstore(host: &Host) -> Result<()> {
    run(host.toolstack().arg("xenstore-restart")).map(drop)
}

/// Attaches, uses and detaches a disk of its own.
fn come_and_go(host: &Host) -> Result<()> {
    host.attach("other", &disk_line("memory:16M"))?;
    let (mut nbd, uri) = host.export("other", &["--vcpus", "2"])?;
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 9 0 1M", &uri]))?;
    ensure!(nbd.terminate()?.success(), "{}", nbd.log());
    host.detach("other", "xvda").map(drop)
}

/// Xenstore restarts ten times under fio with verification, while another disk comes and goes. No
/// I/O fails, nobody is left with a stale view, and everything can be taken away in the end.
#[test]
fn disks_outlive_restarts_of_xenstore() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    create_guest(&host, "guest")?;
    create_guest(&host, "other")?;
    let mut backend = host.backend(&[])?;
    host.attach("guest", &disk_line("memory:64M"))?;
    let (mut nbd, uri) = host.export("guest", &["--vcpus", "2"])?;

    let done = AtomicBool::new(false);
    let rounds = |body: &dyn Fn() -> Result<()>| -> Result<usize> {
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) {
            body()?;
            rounds += 1;
        }
        Ok(rounds)
    };
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| {
            rounds(&|| {
                run(Command::new("fio")
                    .args(["--name=restart", "--ioengine=nbd", "--uri", &uri, "--thread"])
                    .args(["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=16m"])
                    .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]))
                .map(drop)
            })
        });
        let other = scope.spawn(|| rounds(&|| come_and_go(&host)));
        let restarted = (0..RESTARTS).try_for_each(|restart| -> Result<()> {
            // While the other disk is set up, used, closed, and taken away.
            let events = ["disk opened", "rings attached", "rings detached", "device removed"];
            let event = events[restart % events.len()];
            let before = backend.log().matches(event).count();
            wait_until(event, || {
                ensure!(!fio.is_finished() && !other.is_finished(), "ended at {restart}");
                Ok(backend.log().matches(event).count() > before)
            })?;
            restart_xenstore(&host)
        });
        done.store(true, Ordering::Relaxed);
        let joined = |result: std::thread::Result<Result<usize>>| match result {
            Ok(rounds) => rounds,
            Err(_) => anyhow::bail!("a thread panicked"),
        };
        let (fio, other) = (joined(fio.join()), joined(other.join()));
        let context = || format!("blkfront: {}\nblkback: {}", nbd.log(), backend.log());
        ensure!(fio.with_context(context)? > 0);
        ensure!(other.with_context(context)? > 0);
        restarted.with_context(context)
    })?;
    ensure!(backend.log().contains("connected to xenstore again"), "{}", backend.log());

    // Both ends still hear of each other: a disk comes and goes, and the old one goes.
    come_and_go(&host)?;
    ensure!(nbd.terminate()?.success(), "{}", nbd.log());
    host.detach("guest", "xvda")?;
    let left = run(host.xenstore("ls").args(["-f", "/"]))?;
    // The number of xvda, which is in the paths of both ends' directories.
    ensure!(!left.contains("/51712"), "{left}");
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    ensure!(!backend.log().contains("given up"), "{}", backend.log());
    Ok(())
}

/// Xenstore goes away for good while both ends have something to write there. Stopping them does not wait
/// for it, and what was in flight is answered.
#[test]
fn both_ends_stop_without_xenstore() -> Result<()> {
    let mut host = Host::start(Programs::beside_us()?)?;
    create_guest(&host, "guest")?;
    let mut backend = host.backend(&[])?;
    let file = host.dir().join("disk.raw");
    File::create(&file)?.set_len(16 << 20)?;
    host.attach("guest", &disk_line(&file.display().to_string()))?;
    let (mut nbd, uri) = host.export("guest", &["--vcpus", "2"])?;

    host.broker().kill()?;
    File::options().write(true).open(&file)?.set_len(32 << 20)?;
    // The backend is to write the new size there, unless it already waits for another answer.
    backend.signal(Signal::SIGHUP)?;
    // The rings need no xenstore.
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 9 0 1M", &uri]))?;
    backend.signal(Signal::SIGTERM)?;
    ensure!(backend.wait(PROMPTLY)?.success(), "{}", backend.log());
    ensure!(backend.log().contains("rings detached"), "{}", backend.log());
    // It could not walk the backend to Closed, and says so.
    nbd.signal(Signal::SIGTERM)?;
    ensure!(
        !nbd.wait(CONNECT_TIMEOUT)?.success() && nbd.log().contains("xenstore"),
        "{}",
        nbd.log()
    );
    Ok(())
}
