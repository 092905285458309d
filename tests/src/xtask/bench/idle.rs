//! What a daemon costs while its devices have nothing to do.

use crate::xtask::packages::Need;
use crate::xtask::target;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::{Patience, Process, run as output};

/// The program that reads the disks.
pub(super) const NEEDS: &[Need] = &[("/usr/bin/nbdcopy", "libnbd-bin")];
/// Devices, each of a guest of its own, with one ring and a file.
pub(super) const DEVICES: u32 = 100;
/// Bound of a ring's memory: 1056 pages that stay mapped, and 1.9 MiB of buffers, tables and stack.
const RING_MIB: f64 = 6.0;
/// What each guest reads once, 16 requests of 256 KiB at a time, before it rests: more than a ring's
/// buffers hold.
const FILE_BYTES: u64 = 16 << 20;
/// How long wake-ups are counted: two of the daemon's looks at the disks' sizes.
const REST: Duration = Duration::from_secs(10);
/// Time for threads that have just worked to fall asleep.
const SETTLE: Duration = Duration::from_secs(1);
/// Rings let go of the guests' pages after a minute without a request: if not by then, something is wrong.
const PURGED: Duration = Duration::from_secs(150);

/// The daemon with all devices connected and idle.
#[derive(Serialize)]
pub(super) struct Idle {
    /// Resident MiB before there were devices.
    pub(super) bare_mib: f64,
    /// Resident MiB with all connected.
    pub(super) connected_mib: f64,
    /// Resident MiB right after all were used, including the guests' pages that the daemon keeps mapped.
    pub(super) used_mib: f64,
    /// Resident MiB once all have been idle for a minute, and it has let go of these pages.
    pub(super) idle_mib: f64,
    /// Wake-ups of any of the daemon's threads per second then.
    pub(super) wakes: f64,
}

impl Idle {
    /// The most resident MiB that a device of one ring may add, as stated on the page.
    pub(super) fn bound_mib(&self) -> f64 {
        RING_MIB
    }
}

/// Measures the daemon.
pub(super) fn measure() -> Result<Idle> {
    let host = Host::start(Programs::in_dir(target().join("release")))?;
    // With default options. In dom0, because in a driver domain xenstore's default quota of 1000 nodes is
    // used up by some thirty disks.
    let backend = host.backend_in_dom0(&[])?;
    let bare_mib = resident(&backend)?;
    let mut frontends = Vec::new();
    for n in 0..DEVICES {
        let guest = format!("guest{n}");
        host.create_domain(&guest, &["--on-crash", "preserve"])?;
        let file = host.dir().join(format!("{guest}.raw"));
        File::create(&file)?.set_len(FILE_BYTES)?;
        let line = format!("vdev=xvda,backendtype=tap,target={}", file.display());
        host.attach(&guest, &line).with_context(|| backend.log())?;
        let mut command = host.frontend(&guest, "nbd");
        command.arg("xvda").args(["--in-flight", "8m", "--max-connections", "1"]);
        command.arg("--socket").arg(host.dir().join(&guest));
        frontends.push(Process::start(&guest, host.dir(), &command)?);
    }
    for frontend in &mut frontends {
        frontend.wait_for("nbd+unix:")?;
    }
    let connected_mib = resident(&backend)?;
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
    let used_mib = resident(&backend)?;
    let mut patience = Patience::new(PURGED);
    while holds_pages(&host)? {
        ensure!(!patience.is_over(), "idle rings keep the guests' pages");
        std::thread::sleep(SETTLE);
    }
    let idle_mib = resident(&backend)?;
    let (from, before) = (Instant::now(), backend.sleeps()?);
    std::thread::sleep(REST);
    let wakes = backend.sleeps()?.saturating_sub(before) as f64 / from.elapsed().as_secs_f64();
    Ok(Idle { bare_mib, connected_mib, used_mib, idle_mib, wakes })
}

fn resident(process: &Process) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("status")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}

/// Whether any ring still has pages of its guest's mapped.
fn holds_pages(host: &Host) -> Result<bool> {
    let stats = host.snapshot()?;
    let devices = stats["devices"].as_array().context("devices")?;
    let mut rings = devices.iter().filter_map(|device| device["rings"].as_array()).flatten();
    Ok(rings.any(|ring| ring["persistent_held"] != 0))
}
