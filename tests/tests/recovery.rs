//! Either end is killed, and the other goes on.

use anyhow::{Context, Result, ensure};
use blkfront::{Cause, Config, Disk};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{HUNG, Process, run, wait_until};
use xen_platform::{Choice, End};

/// How often the backend is killed under one fio.
const KILLS: usize = 20;

/// Mappings that a process has of a domain's memory and tables.
fn mapped(process: &Process, domain: &str) -> Result<usize> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid()))?;
    let name = format!("/memfd:{domain} ");
    Ok(maps.lines().filter(|line| line.contains(&name)).count())
}

fn descriptors(process: &Process) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count())
}

fn disk_line(vdev: &str, target: &str) -> String {
    format!("vdev={vdev},format=raw,backendtype=tap,backend={DRIVER_DOMAIN},target={target}")
}

/// Attaches a disk to a new guest, which stays, and opens it in this process.
fn open(host: &Host, target: &str, config: Config) -> Result<Disk> {
    host.create_domain("guest", &["--on-crash", "preserve"])?;
    host.attach("guest", &disk_line("xvda", target))?;
    let choice = Choice::new(Some(&host.platform()), Some("guest"))?;
    let (platform, endpoint) = choice.open(End::Frontend)?;
    Ok(Disk::open(platform, endpoint, "xvda", config)?)
}

/// Requests that the backend has taken from a guest's disk, as far as it tells.
fn requests(host: &Host, domain: u16) -> Result<u64> {
    let Ok(stats) = host.stats() else { return Ok(0) };
    let devices = stats["devices"].as_array().context("devices")?;
    let of_guest = devices.iter().filter(|device| device["domain"] == domain);
    let rings = of_guest.flat_map(|device| device["rings"].as_array().into_iter().flatten());
    Ok(rings.filter_map(|ring| Some(ring["rd_req"].as_u64()? + ring["wr_req"].as_u64()?)).sum())
}

/// A frontend that is killed under load takes nothing with it: the backend frees all it held, and
/// the disk of another guest does not notice.
#[test]
fn frontend_killed_under_load() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut backend = host.backend(&[])?;
    let neighbour = host.create_domain("neighbour", &[])?;
    host.attach("neighbour", &disk_line("xvda", "memory:64M"))?;
    let (_nbd, uri) = host.export("neighbour", &[])?;
    // After this, the ring's thread has opened all it needs.
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "read 0 4k", &uri]))?;
    let before = descriptors(&backend)?;
    for round in 0..5 {
        let name = format!("guest{round}");
        let domain = host.create_domain(&name, &["--vcpus", "2"])?;
        host.attach(&name, &disk_line("xvda", "memory:64M"))?;
        let mut command = host.frontend(&name, "bench");
        command.args(["xvda", "--rw=randrw", "--bs=4k", "--iodepth=32", "--numjobs=2"]);
        command.args(["--runtime=600", "--time_based"]);
        let mut load = Process::start(&name, host.dir(), &command)?;
        wait_until("the load runs", || {
            ensure!(load.is_running()?, "bench ended: {}", load.log());
            Ok(requests(&host, domain)? > 1000)
        })?;
        ensure!(mapped(&backend, &name)? > 0 && descriptors(&backend)? > before);
        load.kill()?;
        wait_until("the backend frees what the guest gave it", || {
            Ok(mapped(&backend, &name)? == 0 && descriptors(&backend)? <= before)
        })?;
        run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 9 0 1M", &uri]))?;
        run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 9 0 1M", &uri]))?;
    }
    ensure!(requests(&host, neighbour)? > 0);
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    Ok(())
}

/// A disk in use cannot be opened a second time, and its user notices nothing; the successor of a user that
/// was killed takes the disk over.
#[test]
fn a_disk_has_one_frontend_at_a_time() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _backend = host.backend(&[])?;
    host.create_domain("guest", &["--on-crash", "preserve"])?;
    host.attach("guest", &disk_line("xvda", "memory:64M"))?;
    host.attach("guest", &disk_line("xvdb", "memory:64M"))?;
    let (mut killed, uri) = host.export("guest", &[])?;
    let second = run(host.frontend("guest", "info").arg("xvda"));
    let told = format!("{:#}", second.err().context("two processes have one disk")?);
    ensure!(told.contains("is attached to the domain: stop it first"), "{told}");
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 9 0 1M", &uri]))?;
    killed.kill()?;

    let choice = Choice::new(Some(&host.platform()), Some("guest"))?;
    let (platform, endpoint) = choice.open(End::Frontend)?;
    let open = |disk| Disk::open(platform.clone(), endpoint.clone(), disk, Config::default());
    let first = open("xvda")?;
    let mut queue = first.queue(0)?;
    // Its number stands for the same disk.
    let refused = open("51712").err().context("one process has a disk twice")?;
    ensure!(matches!(refused.cause, Cause::InUse { .. }), "{refused}");
    let other = open("xvdb")?;
    let mut data = [0; 512];
    queue.read_at(0, &mut data)?;
    ensure!(data == [9; 512] && first.info().reconnects == 0, "the first user was disturbed");
    drop(queue);
    first.close()?;
    open("xvda")?.close()?;
    other.close()?;
    Ok(())
}

/// A backend that comes back with a disk of another size announces no change.
#[test]
fn a_disk_that_grew_while_its_backend_was_away_is_news() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut backend = host.backend(&[])?;
    let path = host.dir().join("disk.raw");
    let file = File::create(&path)?;
    file.set_len(16 << 20)?;
    let disk = open(&host, &path.display().to_string(), Config::default())?;
    let is_news = || -> Result<bool> {
        let mut polled = [PollFd::new(disk.news(), PollFlags::POLLIN)];
        Ok(poll(&mut polled, PollTimeout::ZERO)? > 0)
    };
    ensure!(!is_news()?, "nothing has changed");
    backend.kill()?;
    file.set_len(32 << 20)?;
    let _backend = host.backend(&[])?;
    wait_until("the news", is_news)?;
    ensure!(disk.take_news() && disk.geometry().size == 32 << 20, "{:?}", disk.geometry());
    disk.close()?;
    Ok(())
}

/// A driver domain that is destroyed takes its xenstore directory with it; its disks are gone, and say so.
#[test]
fn a_disk_is_gone_with_its_driver_domain() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _backend = host.backend(&[])?;
    let disk = open(&host, "memory:16M", Config::default())?;
    let mut queue = disk.queue(0)?;
    queue.read_at(0, &mut [0; 512])?;
    run(host.toolstack().args(["domain", "destroy", DRIVER_DOMAIN]))?;
    wait_until("the disk to be gone", || Ok(!disk.take_news()))?;
    ensure!(queue.read_at(0, &mut [0; 512]).is_err(), "a read from nowhere succeeded");
    let why = disk.close().err().context("nothing was wrong")?;
    ensure!(matches!(why.cause, Cause::Removed { .. }), "{why}");
    Ok(())
}

/// A disk that is detached reports no error.
#[test]
fn a_disk_is_gone_when_it_is_detached() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _backend = host.backend(&[])?;
    let disk = open(&host, "memory:16M", Config::default())?;
    disk.queue(0)?.read_at(0, &mut [0; 512])?;
    run(host.toolstack().args(["detach", "guest", "xvda"]))?;
    wait_until("the disk to be gone", || Ok(!disk.take_news()))?;
    disk.close()?;
    Ok(())
}

/// Writes that wait are meant for the disk that they were made for, not for the next one of its name.
#[test]
fn another_disk_in_the_place_of_one_in_use_is_not_written_to() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let _backend = host.backend(&[])?;
    let guest = host.create_domain("guest", &["--on-crash", "preserve"])?;
    host.attach("guest", &disk_line("xvda", "delay:100ms,memory:16M"))?;
    let image = host.dir().join("another.img");
    File::create(&image)?.set_len(16 << 20)?;
    let mut load = host.frontend("guest", "bench");
    load.args(["xvda", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--runtime=60s"]);
    let mut load = Process::start("load", host.dir(), &load)?;
    wait_until("some writes", || Ok(requests(&host, guest)? > 100))?;
    // It does not look while the toolstack changes the disk.
    load.signal(Signal::SIGSTOP)?;
    run(host.toolstack().args(["detach", "guest", "xvda", "--force"]))?;
    run(host
        .toolstack()
        .args(["attach", "guest", "--no-wait"])
        .arg(disk_line("xvda", &image.display().to_string())))?;
    load.signal(Signal::SIGCONT)?;
    ensure!(!load.wait(HUNG)?.success(), "nothing happened:\n{}", load.log());
    ensure!(load.log().contains("the device is gone"), "{}", load.log());
    ensure!(std::fs::read(&image)?.iter().all(|byte| *byte == 0), "it was written to");
    Ok(())
}

/// A backend may come back with less than a disk in use needs: I/O waits for one that has it.
#[test]
fn a_disk_waits_for_a_backend_that_can_serve_it() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut backend = host.backend(&["--max-queues", "2"])?;
    let disk = open(&host, "memory:16M", Config { vcpus: 2, ..Config::default() })?;
    let mut queue = disk.queue(1)?;
    queue.read_at(0, &mut [0; 512])?;
    backend.kill()?;
    let mut backend = host.backend(&["--max-queues", "1"])?;
    // The frontend was offered one ring, and closed.
    backend.wait_for("Closed")?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || queue.read_at(0, &mut [0; 512]));
        backend.kill()?;
        let _backend = host.backend(&["--max-queues", "2"])?;
        let outcome = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        outcome.context("I/O did not wait")?;
        ensure!(disk.info().reconnects == 1, "{:?}", disk.info());
        disk.close()?;
        Ok(())
    })
}

/// A backend that is killed under fio with verification comes back, the frontend issues again what
/// was in flight, and fio notices nothing. Twenty times.
#[test]
fn backend_killed_under_fio() -> Result<()> {
    killed_under_fio(&[]).map(drop)
}

/// The same with a frontend that leaves it to the backend, as Linux's does: each new backend takes over the
/// existing rings, by their records.
#[test]
fn backend_killed_under_fio_takes_its_rings_up() -> Result<()> {
    let log = killed_under_fio(&["--no-reissue"])?;
    let taken_up = log.matches("going on where the last backend stopped").count();
    ensure!(taken_up == KILLS * 2, "{taken_up} rings of {} were taken up: {log}", KILLS * 2);
    let with_something = log.matches("open=").count() - log.matches("open=0").count();
    ensure!(with_something > KILLS / 2, "rings were at rest when their backend was killed: {log}");
    Ok(())
}

/// Kills the backend under fio on a disk of two rings. Returns what the backends have logged.
fn killed_under_fio(options: &[&str]) -> Result<String> {
    let host = Host::start(Programs::beside_us()?)?;
    let domain = host.create_domain("guest", &["--vcpus", "2"])?;
    let mut backend = host.backend(&[])?;
    let file = host.dir().join("disk.raw");
    File::create(&file)?.set_len(64 << 20)?;
    host.attach("guest", &disk_line("xvda", &file.display().to_string()))?;
    let (nbd, uri) = host.export("guest", &[&["--vcpus", "2"], options].concat())?;

    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| -> Result<usize> {
            let mut runs = 0;
            while !done.load(Ordering::Relaxed) {
                run(Command::new("fio")
                    .args(["--name=kill", "--ioengine=nbd", "--uri", &uri])
                    .args([
                        "--thread",
                        "--rw=randwrite",
                        "--bs=4k",
                        "--iodepth=32",
                        "--numjobs=2",
                        "--offset_increment=50%",
                        "--size=16m",
                        "--verify=crc32c",
                        "--verify_fatal=1",
                        "--verify_state_save=0",
                    ]))?;
                runs += 1;
            }
            Ok(runs)
        });
        let killed = (0..KILLS).try_for_each(|kill| -> Result<()> {
            wait_until("requests flow", || {
                ensure!(!fio.is_finished(), "fio ended after {kill} kills");
                Ok(requests(&host, domain)? > 200)
            })?;
            backend.kill()?;
            backend = host.backend(&[])?;
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        let runs = fio.join().map_err(|_| anyhow::anyhow!("fio's thread panicked"))?;
        let context = || format!("blkfront: {}\nblkback: {}", nbd.log(), backend.log());
        let runs = runs.with_context(context)?;
        killed.with_context(context)?;
        ensure!(runs > 0);
        Ok(backend.log())
    })
}
