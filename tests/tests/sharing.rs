//! Several rings on one thread of the backend.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{Process, run, wait_until};

fn disk_line(target: &str) -> String {
    format!("vdev=xvda,format=raw,backendtype=tap,backend={DRIVER_DOMAIN},target={target}")
}

/// A guest of two vCPUs and its disk.
fn guest(host: &Host, name: &str, target: &str) -> Result<u16> {
    let domain = host.create_domain(name, &["--vcpus", "2"])?;
    host.attach(name, &disk_line(target))?;
    Ok(domain)
}

/// The names of the backend's threads: the number of their rings, or the name of their only ring.
fn threads(backend: &Process) -> Result<Vec<String>> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.pid()))?;
    // One that has ended meanwhile has no name.
    Ok(tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect())
}

fn has_thread(backend: &Process, name: &str) -> Result<bool> {
    Ok(threads(backend)?.iter().any(|thread| thread == name))
}

/// Disks of every kind under load at once, however their thread waits.
#[test]
fn disks_that_share_a_thread_keep_their_data() -> Result<()> {
    for wait in ["event", "adaptive", "poll"] {
        let host = Host::start(Programs::beside_us()?)?;
        let mut backend = host.backend(&["--threads", "1", "--max-queues", "2", "--wait", wait])?;
        let image = host.dir().join("disk.img");
        File::create(&image)?.set_len(16 << 20)?;
        let stores = [&image.display().to_string(), "memory:16M", "delay:300us,memory:16M"];
        let names: Vec<_> = (0..stores.len()).map(|n| format!("guest{n}")).collect();
        for (name, store) in names.iter().zip(stores) {
            // Slow enough for all of them to be busy at once.
            guest(&host, name, &format!("limit:3000iops,{store}"))?;
        }
        let mut loads = Vec::new();
        for name in &names {
            let mut load = host.frontend(name, "bench");
            load.args(["xvda", "--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=16"]);
            load.args(["--numjobs=2", "--verify=crc32c"]);
            loads.push(Process::start(name, host.dir(), &load)?);
        }
        wait_until("all rings are on one thread", || has_thread(&backend, "6 rings"))?;
        for load in &mut loads {
            let status = load.wait(xen_blk_tests::process::HUNG)?;
            ensure!(status.success(), "{wait}: {}", load.describe());
        }
        ensure!(backend.terminate()?.success(), "{}", backend.log());
    }
    Ok(())
}

/// A ring that ends waits for its disk. The others do not.
#[test]
fn a_ring_that_drains_is_not_in_the_way() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let mut backend = host.backend(&["--threads", "1", "--max-queues", "1"])?;
    let neighbour = host.create_domain("neighbour", &["--on-crash", "preserve"])?;
    host.attach("neighbour", &disk_line("memory:64M"))?;
    let slow = guest(&host, "slow", "delay:5s,memory:64M")?;
    let load = |guest: &str, size: &str| {
        let mut load = host.frontend(guest, "bench");
        load.args(["xvda", "--rw=randwrite", "--bs=4k", "--size", size, "--iodepth=8"]);
        load
    };
    let taken = |domain: u16| -> Result<u64> {
        let stats = host.stats()?;
        let devices = stats["devices"].as_array().context("devices")?;
        let device = devices.iter().find(|device| device["domain"] == domain);
        Ok(device.and_then(|device| device["total"]["wr_req"].as_u64()).unwrap_or(0))
    };
    let mut victim = Process::start("slow", host.dir(), &load("slow", "64m"))?;
    wait_until("requests are in flight", || Ok(taken(slow)? > 0))?;
    victim.kill()?;
    let held = || -> Result<bool> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", backend.pid()))?;
        Ok(maps.contains("/memfd:slow "))
    };
    // Little enough to be done long before that, even on a busy machine.
    run(&mut load("neighbour", "4m"))?;
    ensure!(held()?, "the neighbour was served only when the slow disk had answered");
    wait_until("what the slow disk's ring held is let go of", || Ok(!held()?))?;
    // Alone on the thread again.
    let mut last = Process::start(
        "last",
        host.dir(),
        load("neighbour", "4m").args(["--time_based", "--runtime=600"]),
    )?;
    let name = format!("d{neighbour}.xvda r0");
    wait_until("the thread has one ring", || {
        ensure!(last.is_running()?, "{}", last.log());
        has_thread(&backend, &name)
    })
    .with_context(|| format!("{:?}", threads(&backend)))?;
    last.kill()?;
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    Ok(())
}
