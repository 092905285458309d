//! The pair itself, on the embedded platform: as it ships, with every check on.

use super::case::{Case, Data, Disk, Layout};
use super::contender::{CLIENT_CPU, Contender, read_report, seed};
use super::meter::Meter;
use super::place::{BYTES, Place};
use super::sample::{End, Sample};
use crate::xtask::{cargo, step, target};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::Command;
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};

/// The largest depth a one-page union ring holds.
const ONE_PAGE: u32 = 32;
/// Clients that share a CPU take turns of some milliseconds: in a second, eight have forty each, and one more or less is
/// a difference between them that says nothing.
pub(super) const MANY_SLICES: Duration = Duration::from_secs(3);
/// log2 of the pages of a ring for greater depths.
const LARGE_ORDER: &str = "2";

/// Our frontend on our backend.
pub(super) struct Ours;

impl Contender for Ours {
    fn name(&self) -> &'static str {
        "xen-blk"
    }

    fn prepare(&self) -> Result<()> {
        let packages = ["--package=blkback", "--package=blkfront", "--package=xen-embedded"];
        step("build", cargo(&["build", "--release", "--bins"]).args(packages))
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        Some(*case)
    }

    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample> {
        let several = case.rings > 1 || case.devices > 1;
        let meter = &if several { meter.at_least(MANY_SLICES) } else { *meter };
        let host = Host::start(Programs::in_dir(target().join("release")))?;
        let backend = host.backend_by(meter.backend(), &backend_options(case))?;
        let path = place.path(case.disk)?;
        let target = path.map_or_else(|| "null:64G".to_owned(), |path| path.display().to_string());
        let line = format!("vdev=xvda,backendtype=tap,backend={DRIVER_DOMAIN},target={target}");
        // One guest per device: a domain is one process.
        let guests: Vec<String> = (0..case.devices).map(|n| format!("guest{n}")).collect();
        for guest in &guests {
            host.create_domain(
                guest,
                &["--vcpus", &case.rings.to_string(), "--on-crash", "preserve"],
            )?;
            host.attach(guest, &line)?;
        }
        let clients = guests.iter().map(|guest| client(&host, guest, case, meter)).collect();
        let observed = meter.observe(clients, &[backend.pid()], || host.snapshot())?;
        let mut sample = Sample::default();
        let worst = |worst: &mut Option<f64>, new: Option<f64>| {
            *worst = [*worst, new].into_iter().flatten().reduce(f64::max);
        };
        for report in &observed.reports {
            let one = read_report(report)?;
            sample.iops += one.iops;
            worst(&mut sample.p50_us, one.p50_us);
            worst(&mut sample.p99_us, one.p99_us);
            worst(&mut sample.p99_9_us, one.p99_9_us);
        }
        let requests = Counts::between(&observed.looks)?;
        if case.devices > 1 {
            let seconds = observed.window.as_secs_f64();
            sample.devices = requests.devices.iter().map(|requests| requests / seconds).collect();
            // Clients do not start and end together: the window is the same for all.
            sample.iops = sample.devices.iter().sum();
        }
        observed.share(&mut sample);
        requests.backend(&mut sample.backend);
        client_counts(&observed.reports, &mut sample)?;
        Ok(sample)
    }
}

fn backend_options(case: &Case) -> Vec<&'static str> {
    let mut options = vec!["--max-queues", "8", "--wait", case.backend.option()];
    options
        .extend(["--direct", if matches!(case.disk, Disk::CachedFile) { "off" } else { "auto" }]);
    match case.data {
        Data::Persistent => {}
        Data::Bounced => options.extend(["--pin-grants", "off"]),
        Data::Copy => options.extend(["--persistent-grants", "false", "--data", "copy"]),
        Data::Map => options.extend(["--persistent-grants", "false", "--data", "map"]),
    }
    options
}

fn client(host: &Host, guest: &str, case: &Case, meter: &Meter) -> Command {
    let mut command = host.frontend(guest, "bench");
    let number = |n: u32| n.to_string();
    let millis = |time: Duration| format!("{}ms", time.as_millis());
    command.arg("xvda").args(case.job.options());
    command.args(["--iodepth", &number(case.depth), "--numjobs", &number(case.rings)]);
    // All jobs share the used part of a file; a null disk has room for each.
    let size = BYTES / u64::from(case.rings);
    command.args(["--queues", &number(case.rings), "--size", &size.to_string()]);
    command.args(["--runtime", &millis(meter.time), "--time_based"]);
    command.args(["--ramp_time", &millis(meter.ramp()), "--randseed", &seed().to_string()]);
    command.args(["--wait", case.client.option(), "--cpus", &CLIENT_CPU.to_string(), "--json"]);
    if case.depth > ONE_PAGE {
        command.args(["--ring-order", LARGE_ORDER]);
    }
    if case.layout == Layout::Split {
        command.arg("--split");
    }
    command
}

/// What the backend counted in the window.
struct Counts {
    /// Requests of each device.
    devices: Vec<f64>,
    kicks: f64,
    sleeps: f64,
    calls: f64,
}

impl Counts {
    fn between((before, after): &(Value, Value)) -> Result<Self> {
        let devices = |snapshot: &Value| {
            snapshot["devices"].as_array().cloned().context("no devices in the statistics")
        };
        let (before, after) = (devices(before)?, devices(after)?);
        let grown = |pointer: &str| -> Vec<f64> {
            let number = |device: &Value| {
                device.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN)
            };
            before
                .iter()
                .zip(&after)
                .map(|(before, after)| number(after) - number(before))
                .collect()
        };
        let sum = |pointer: &str| grown(pointer).iter().sum::<f64>();
        // Counts start anew with each connection.
        let requests = grown("/total/derived/requests");
        ensure!(
            requests.iter().all(|requests| *requests >= 0.0),
            "a device was not connected all the time that it was measured: is the machine too busy?"
        );
        let (kicks, sleeps) = (sum("/total/kicks"), sum("/total/sleeps"));
        Ok(Self { devices: requests, kicks, sleeps, calls: sum("/total/system_calls") + kicks })
    }

    /// If perf has counted calls, its count stands.
    fn backend(&self, end: &mut End) {
        let requests = self.devices.iter().sum::<f64>();
        if requests == 0.0 {
            return;
        }
        end.kicks = Some(self.kicks / requests);
        end.sleeps = Some(self.sleeps / requests);
        end.calls = end.calls.or(Some(self.calls / requests));
    }
}

fn client_counts(reports: &[Value], sample: &mut Sample) -> Result<()> {
    let rings = || reports.iter().filter_map(|report| report["rings"].as_array()).flatten();
    let sum = |what: &str| rings().filter_map(|ring| ring["stats"][what].as_u64()).sum::<u64>();
    let ios = sum("ios") as f64;
    let end = &mut sample.client;
    end.kicks = Some(sum("kicks_sent") as f64 / ios);
    end.sleeps = Some(sum("sleeps") as f64 / ios);
    end.calls = end.calls.or(Some(sum("syscalls") as f64 / ios));
    sample.contended = Some(sum("contended"));
    Ok(())
}
