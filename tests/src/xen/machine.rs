//! A machine under QEMU that boots a Xen host, runs one scenario and switches itself off.

use super::image::Images;
use super::scenario::SHELL;
use crate::process::{Process, tied};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// dom0 switches the machine off by itself this long before it is killed.
const GRACE: Duration = Duration::from_secs(20);
/// Arguments of every Linux here. Its watchdog finds emulated time stamp counters unstable, and code is
/// patched that other CPUs are running; when these handle the trap (a PV vCPU takes its event channels
/// first), the patch has been forgotten, and 6.12 panics.
pub(super) const LINUX: &str = "console=hvc0 loglevel=6 clocksource=xen tsc=reliable";
const CPU: &str = "qemu64,+svm,+npt,+nrip-save";
/// Lines of the console that are shown when a scenario fails.
const SHOWN_LINES: usize = 60;

/// The outcome of a scenario.
#[derive(Debug)]
pub struct Outcome {
    /// What dom0 and the guests reported: `{"name": …, "value": …}` each.
    pub results: Vec<Value>,
    /// Everything that hypervisor, dom0 and guests said.
    pub console: PathBuf,
    /// Wall-clock time from power-on to power-off.
    pub took: Duration,
}

impl Outcome {
    /// The values of the results with that name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.results.iter().filter(move |result| result["name"] == name).map(|r| &r["value"])
    }

    /// Why the scenario failed, if it did.
    pub fn failure(&self) -> Option<String> {
        if let Some(failure) = self.named("failure").next() {
            return Some(failure.as_str().unwrap_or_default().to_owned());
        }
        match self.named("end").next() {
            None => Some("dom0 did not come to the end of the scenario".into()),
            Some(end) if end["status"] != 0 => Some(format!("dom0's script ended with {end}")),
            Some(_) => None,
        }
    }

    /// The last lines of the console.
    pub fn console_tail(&self) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }
}

/// QEMU without its serial ports.
///
/// `qemu64` because it is twice as fast to emulate as later models, and `max` has SMAP, which kills dom0;
/// the virtualisation that is added to it is for PVH guests. Six CPUs, two each for dom0, for guests and
/// for driver domains, with one vCPU on each: if vCPUs shared an emulated CPU, waiting for each other would
/// cost them time slices.
fn qemu(images: &Images, scenario: &str, limit: Duration) -> Command {
    let dom0 = format!(
        "{} {LINUX} scenario={scenario} limit={},{}",
        images.kernel.display(),
        limit.as_secs(),
        images.dom0.display()
    );
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "6", "-m", "4096"]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.arg("-kernel").arg(&images.xen).arg("-append").arg(
        "console=com1 com1=115200,8n1 loglvl=warning guest_loglvl=warning dom0_mem=1408M,max:1408M \
         dom0_max_vcpus=2 dom0_vcpus_pin sched=null",
    );
    command.arg("-initrd").arg(dom0);
    if let Some(disk) = &images.disk {
        let drive = format!("file={},format=raw,if=none,id=disk,snapshot=on", disk.display());
        command.args(["-drive", &drive, "-device", "nvme,serial=debian,drive=disk"]);
    }
    command
}

/// Boots the images for a scenario and waits until the machine is off, at most `limit`. Leaves its files in
/// `dir`.
///
/// # Errors
/// When QEMU cannot be started, ends with an error, or hangs.
pub fn run(images: &Images, scenario: &str, dir: &Path, limit: Duration) -> Result<Outcome> {
    let console = dir.join("console.log");
    let results = dir.join("results.jsonl");
    for path in [&console, &results, &dir.join("qemu.log")] {
        let _ = fs::remove_file(path);
    }
    let mut command = qemu(images, scenario, limit.saturating_sub(GRACE));
    // Results have a port of their own, as everybody writes to the first one.
    for path in [&console, &results] {
        command.arg("-serial").arg(format!("file:{}", path.display()));
    }
    let start = Instant::now();
    let mut machine = Process::start("qemu", dir, &command)?;
    let status = machine.wait(limit).with_context(|| format!("see {}", console.display()))?;
    if !status.success() {
        bail!("QEMU: {status}\n{}", machine.log());
    }
    let text = fs::read_to_string(&results).unwrap_or_default();
    let results = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).with_context(|| format!("a result: {line}")))
        .collect::<Result<_>>()?;
    Ok(Outcome { results, console, took: start.elapsed() })
}

/// Boots the images with dom0's console on this terminal.
///
/// # Errors
/// When QEMU cannot be started or ends with an error.
pub fn interact(images: &Images) -> Result<()> {
    let mut command = qemu(images, SHELL, Duration::ZERO);
    // Ctrl-A X ends it; Ctrl-C goes to dom0.
    command.args(["-serial", "mon:stdio", "-serial", "null"]);
    let status = tied(&command).status()?;
    anyhow::ensure!(status.success(), "QEMU: {status}");
    Ok(())
}
