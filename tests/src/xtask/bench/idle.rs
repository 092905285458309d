//! What a daemon costs whose devices have nothing to do.

use crate::xtask::packages::Need;
use crate::xtask::target;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::{Process, run as output};

/// What reads the disks.
pub(super) const NEEDS: &[Need] = &[("/usr/bin/nbdcopy", "libnbd-bin")];
/// Devices, each of a guest of its own, with one ring and a file.
pub(super) const DEVICES: u32 = 100;
/// Bound of a ring's memory: 1056 pages that stay mapped, and 1.9 MiB of buffers, tables and stack.
const RING_MIB: f64 = 6.0;
/// What each guest reads once, 16 requests of 256 KiB at a time, before it rests: more than fills a
/// ring's buffers.
const FILE_BYTES: u64 = 16 << 20;
/// How long wake-ups are counted: two of the daemon's looks at the disks' sizes.
const REST: Duration = Duration::from_secs(10);
/// Until threads that have just worked are asleep.
const SETTLE: Duration = Duration::from_secs(1);

/// The daemon with all devices connected and idle.
#[derive(Serialize)]
pub(super) struct Idle {
    /// Resident MiB before there were devices.
    pub(super) bare_mib: f64,
    /// Resident MiB with all connected.
    pub(super) connected_mib: f64,
    /// Resident MiB after all were used: the guests' pages that the daemon keeps mapped included.
    pub(super) used_mib: f64,
    /// Of these, the daemon's own.
    pub(super) own_mib: f64,
    /// Times a second that any thread of the daemon woke.
    pub(super) wakes: f64,
}

impl Idle {
    /// The most resident MiB that a device of one ring may add: what the page says of a ring.
    pub(super) fn bound_mib(&self) -> f64 {
        RING_MIB
    }
}

/// Measures.
pub(super) fn measure() -> Result<Idle> {
    let host = Host::start(Programs::in_dir(target().join("release")))?;
    // With the options it has from itself. In dom0: in a driver domain, xenstore's default quota of
    // 1000 nodes ends at some thirty disks.
    let backend = host.backend_in_dom0(&[])?;
    let bare_mib = memory(&backend)?.0;
    let mut frontends = Vec::new();
    for n in 0..DEVICES {
        let guest = format!("guest{n}");
        host.create_domain(&guest, &["--on-crash", "preserve"])?;
        let file = host.dir().join(format!("{guest}.raw"));
        File::create(&file)?.set_len(FILE_BYTES)?;
        let line = format!("vdev=xvda,backendtype=tap,target={}", file.display());
        host.attach(&guest, &line).with_context(|| backend.log())?;
        let mut command = host.frontend(&guest, "nbd");
        command.arg("xvda").arg("--socket").arg(host.dir().join(&guest));
        frontends.push(Process::start(&guest, host.dir(), &mut command)?);
    }
    for frontend in &mut frontends {
        frontend.wait_for("nbd+unix:")?;
    }
    let connected_mib = memory(&backend)?.0;
    for n in 0..DEVICES {
        let socket = host.dir().join(format!("guest{n}"));
        let from = format!("nbd+unix:///?socket={}", socket.display());
        output(
            Command::new("nbdcopy")
                .args(["--connections=1", "--requests=16"])
                .args([&from, "null:"]),
        )?;
    }
    std::thread::sleep(SETTLE);
    let (used_mib, own_mib) = memory(&backend)?;
    let (from, before) = (Instant::now(), switches(&backend)?);
    std::thread::sleep(REST);
    let wakes = (switches(&backend)? - before) as f64 / from.elapsed().as_secs_f64();
    Ok(Idle { bare_mib, connected_mib, used_mib, own_mib, wakes })
}

/// Resident MiB, and those among them that are not shared.
fn memory(process: &Process) -> Result<(f64, f64)> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let mib = |key: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).context("status")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    };
    Ok((mib("VmRSS:")?, mib("RssAnon:")?))
}

fn switches(process: &Process) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", process.pid()))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.context("status")?.trim().parse::<u64>()?;
    }
    Ok(sum)
}
