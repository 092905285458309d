//! A vCPU's queue in this process, and a backend in another.

use super::rig::{Counts, WARM_UP};
use super::{DEPTH, allocations};
use anyhow::{Context, Result};
use blkfront::{Completed, Config, Disk, Io, Queue, Stats};
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host};
use xen_platform::{Choice, End, Waiting};

/// By then a backend that polls has answered a round.
const ANSWERED: Duration = Duration::from_millis(2);

/// How the vCPUs of a guest are served.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    /// One has a ring of its own; several share one, which a thread owns.
    pub(crate) vcpus: u32,
    /// [`Waiting::Event`]: the vCPU sleeps, and so does the backend. [`Waiting::Poll`]: neither does, and a
    /// round's responses are all there when the vCPU looks, so that it does the same each time.
    pub(crate) waiting: Waiting,
}

/// Runs one vCPU for the warm-up and `rounds`, in the new domain `name`.
pub(crate) fn drive(host: &Host, name: &str, work: Work, rounds: u64) -> Result<Counts> {
    let wait = if work.waiting == Waiting::Event { "event" } else { "poll" };
    let _backend = host.backend(&["--wait", wait])?;
    host.create_domain(name, &["--vcpus", &work.vcpus.to_string()])?;
    host.attach(
        name,
        &format!("vdev=xvda,format=raw,backendtype=tap,backend={DRIVER_DOMAIN},target=null:1G"),
    )?;
    let (platform, endpoint) =
        Choice::new(Some(&host.platform()), Some(name))?.open(End::Frontend)?;
    let config =
        Config { vcpus: work.vcpus, queues: Some(1), waiting: work.waiting, ..Config::default() };
    let disk = Disk::open(platform, endpoint, "xvda", config)?;
    let mut queue = disk.queue(0)?;
    let mut done = Vec::with_capacity(DEPTH as usize);
    allocations::count_here();
    let (mut before, mut allocated) = (Stats::default(), 0);
    for n in 0..WARM_UP + rounds {
        if n == WARM_UP {
            (before, allocated) = (stats(&disk), allocations::counted());
        }
        submit(&mut queue, n)?;
        while done.len() < DEPTH as usize {
            if work.waiting == Waiting::Event {
                queue.wait(&mut done, None);
            } else {
                std::thread::sleep(ANSWERED);
                take(&mut queue, &mut done);
            }
        }
        for completed in done.drain(..) {
            completed.result?;
        }
    }
    let allocations = allocations::counted() - allocated;
    let now = stats(&disk) - before;
    Ok(Counts {
        requests: now.ios,
        allocations,
        system_calls: now.syscalls,
        events: now.events,
        kicks: now.kicks_sent,
        sleeps: now.sleeps,
    })
}

/// A round's requests. A function by itself, so that callgrind can count its instructions.
#[inline(never)]
fn submit(queue: &mut Queue, n: u64) -> Result<()> {
    queue.plug();
    for id in 0..DEPTH {
        let buffer = queue.alloc(4096).context("a buffer")?;
        // No two are neighbours: none is merged.
        let offset = (n * 31 + id) % 8192 * 8192;
        let write = (n + id).is_multiple_of(3);
        let io = if write { Io::write } else { Io::read }(id, offset, buffer);
        queue.submit(io).map_err(|refused| refused.reason)?;
    }
    queue.unplug();
    Ok(())
}

/// A round's responses, likewise.
#[inline(never)]
fn take(queue: &mut Queue, done: &mut Vec<Completed>) {
    queue.poll(done);
}

/// What the ring and its vCPUs have counted.
fn stats(disk: &Disk) -> Stats {
    let mut sum = Stats::default();
    disk.info().rings.iter().for_each(|ring| sum += ring.stats);
    sum
}
