//! `cargo xtask demo`: the measurement that started this project, with its lock gone.
//!
//! A guest of four vCPUs runs fio's IOmeter file-server profile on a null disk and on a file, over one ring
//! and over one ring per vCPU.

use super::plot::{self, Bars};
use super::{cargo, root, step, target};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;
use xen_blk_tests::cpu;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{Process, run as output, tied};
use xen_blk_tests::scratch::Scratch;

/// fio's job, as `blkfront bench` knows it.
const PROFILE: &str = "iometer-file-access-server";
/// vCPUs of the guest, as in the measurements of the seed work.
const VCPUS: &str = "4";
/// Outstanding I/Os of each vCPU: the profile's "moderate".
const DEPTH: &str = "64";
/// How much of the disks is used.
const FILE_BYTES: u64 = 1 << 30;
/// Contended acquisitions of the ring's lock, and all of them, in the seed work's run.
const SEED_LOCK: (u64, u64) = (47_500, 1_348_488);

/// Options of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seconds of each of the four runs
    #[arg(long, default_value_t = 8)]
    seconds: u32,
}

/// One run's figures.
struct Row {
    disk: &'static str,
    rings: &'static str,
    report: Value,
    backend_cpu: Duration,
}

/// Runs the demonstration.
///
/// # Errors
/// What failed, with the output of the program that did.
pub(crate) fn run(options: &Options) -> Result<()> {
    step("build", &mut cargo(&["build", "--release", "--workspace", "--bins"]))?;
    let host = Host::start(Programs::in_dir(target().join("release")))?;
    host.create_domain("guest", &["--vcpus", VCPUS, "--on-crash", "preserve"])?;
    let backend = host.backend(&[])?;
    let dir = target().join("demo");
    std::fs::create_dir_all(&dir)?;
    // Not in /tmp, which may be a tmpfs: that has no O_DIRECT.
    let scratch = Scratch::new(&dir)?;
    let file = scratch.path().join("disk.raw");
    // Written in full: the first write to a block of a sparse file costs more than any later one.
    let mut disk = File::create(&file)?;
    std::io::copy(&mut std::io::repeat(0x5a).take(FILE_BYTES), &mut disk)?;
    // Otherwise the first run, which bypasses the page cache, would write all of it back, page by page.
    disk.sync_all()?;
    let disks =
        [("null", "xvda", "null:64G".to_owned()), ("file", "xvdb", file.display().to_string())];
    let mut rows = Vec::new();
    for (disk, vdev, target) in disks {
        let line = format!(
            "vdev={vdev},format=raw,access=rw,backendtype=tap,backend={DRIVER_DOMAIN},target={target}"
        );
        eprintln!("==> xen-embedded attach guest '{line}'");
        host.attach("guest", &line)?;
        for rings in ["1", VCPUS] {
            rows.push(measure(&host, &backend, options, disk, vdev, rings)?);
        }
    }
    report(&rows, &dir)
}

fn measure(
    host: &Host,
    backend: &Process,
    options: &Options,
    disk: &'static str,
    vdev: &str,
    rings: &'static str,
) -> Result<Row> {
    eprintln!("==> IOmeter file server, {disk} disk, {VCPUS} vCPUs, {rings} ring(s)");
    let mut command = host.frontend("guest", "bench");
    let size = FILE_BYTES.to_string();
    let seconds = options.seconds.to_string();
    command.arg(vdev).args(["--profile", PROFILE, "--numjobs", VCPUS, "--iodepth", DEPTH]);
    command.args(["--queues", rings, "--size", &size, "--runtime", &seconds, "--json"]);
    let mut command = tied(&command);
    // Progress is for people, who look at the terminal.
    command.stderr(std::process::Stdio::inherit());
    let before = cpu::used(backend.pid())?;
    let text = output(&mut command)?;
    let backend_cpu = cpu::used(backend.pid())? - before;
    let report = serde_json::from_str(&text).context("the report of blkfront bench")?;
    Ok(Row { disk, rings, report, backend_cpu })
}

impl Row {
    fn number(&self, pointer: &str) -> f64 {
        self.report.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    fn rings(&self) -> impl Iterator<Item = &Value> {
        self.report["rings"].as_array().into_iter().flatten()
    }

    fn contended(&self) -> u64 {
        self.rings().filter_map(|ring| ring["stats"]["contended"].as_u64()).sum()
    }

    fn iops(&self) -> f64 {
        self.number("/total/iops")
    }

    fn latency_us(&self, which: &str) -> f64 {
        self.number(&format!("/total/latency_ns/{which}")) / 1e3
    }

    /// Microseconds of CPU time per I/O, frontend and backend.
    fn cpu_us(&self) -> (f64, f64) {
        let ios = self.number("/total/ios");
        let front = self.number("/cpu/user_ns_per_io") + self.number("/cpu/system_ns_per_io");
        (front / 1e3, self.backend_cpu.as_secs_f64() * 1e6 / ios)
    }

    fn label(&self) -> String {
        format!("{}, {} ring{}", self.disk, self.rings, if self.rings == "1" { "" } else { "s" })
    }
}

fn report(rows: &[Row], dir: &Path) -> Result<()> {
    println!(
        "\n{:<16} {:>9} {:>9} {:>9} {:>9} {:>9} {:>15} {:>10}",
        "", "IOPS", "MiB/s", "p50 us", "p99 us", "p99.9 us", "CPU us an I/O", "contended"
    );
    for row in rows {
        let (front, back) = row.cpu_us();
        println!(
            "{:<16} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>6.1} + {:>6.1} {:>10}",
            row.label(),
            row.iops(),
            row.number("/total/bytes_per_s") / f64::from(1 << 20),
            row.latency_us("p50"),
            row.latency_us("p99"),
            row.latency_us("p99_9"),
            front,
            back,
            row.contended(),
        );
    }
    println!(
        "\nCPU time is frontend + backend. Contended: acquisitions of a lock on the ring's path that had\n\
         to wait. The ring lock of the seed work: {} of {}.",
        SEED_LOCK.0, SEED_LOCK.1
    );
    write_json(rows, &dir.join("demo.json"))?;
    let bars = |value: &dyn Fn(&Row) -> f64| {
        rows.iter().map(|row| (row.label(), value(row))).collect::<Vec<_>>()
    };
    plot::bars(
        &dir.join("demo.svg"),
        "IOmeter file server, 4 vCPUs, 64 I/Os each",
        &[
            Bars { title: "IOPS", values: bars(&Row::iops) },
            Bars { title: "p50, us", values: bars(&|row| row.latency_us("p50")) },
            Bars { title: "p99, us", values: bars(&|row| row.latency_us("p99")) },
        ],
    )?;
    let shown = dir.strip_prefix(root()).unwrap_or(dir);
    println!("Left behind: {0}/demo.json, {0}/demo.svg", shown.display());
    Ok(())
}

fn write_json(rows: &[Row], path: &Path) -> Result<()> {
    let runs: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "disk": row.disk,
                "rings": row.rings,
                "backend_cpu_s": row.backend_cpu.as_secs_f64(),
                "report": row.report,
            })
        })
        .collect();
    let all = json!({ "profile": PROFILE, "seed_lock": SEED_LOCK, "runs": runs });
    Ok(serde_json::to_writer_pretty(File::create(path)?, &all)?)
}
