//! `cargo xtask bench`: the data path beside its limits, all from one run.
//!
//! The backend has CPU 1 to itself and the client CPU 0; 4 KiB random reads over one ring.

use super::{cargo, step, target, uring};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::time::Duration;
use xen_blk_tests::cpu;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::run as output;

const CLIENT_CPU: usize = 0;
const BACKEND_CPU: &str = "1";
/// Size of the file: it stays in the page cache.
const FILE_BYTES: u64 = 1 << 30;
const DEPTHS: [&str; 2] = ["1", "32"];
const WAITS: [&str; 3] = ["poll", "adaptive", "event"];

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Rounds; each measures everything once, the median is shown
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

/// What one measurement gave.
#[derive(Clone, Debug)]
struct Sample {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
    /// CPU time an I/O, client and backend.
    cpu_us: f64,
    /// System calls an I/O, client and backend.
    calls: f64,
}

/// Measurements by name, in the order of the first round.
#[derive(Default)]
struct Samples {
    names: Vec<String>,
    samples: BTreeMap<String, Vec<Sample>>,
}

impl Samples {
    fn add(&mut self, name: String, sample: Sample) {
        eprintln!("    {name}: {:.0} IOPS", sample.iops);
        if !self.names.contains(&name) {
            self.names.push(name.clone());
        }
        self.samples.entry(name).or_default().push(sample);
    }
}

/// Measures and prints a table; leaves `bench.json` behind.
///
/// # Errors
/// What failed.
pub(crate) fn run(options: &Options) -> Result<()> {
    let cpus = std::thread::available_parallelism()?.get();
    ensure!(cpus >= 2, "two CPUs are needed, one for each end");
    step("build", &mut cargo(&["build", "--release", "--workspace", "--bins"]))?;
    step(
        "the bare ring hop, in C from Xen's ring.h and in ours: million requests a second",
        &mut cargo(&["run", "--release", "--quiet", "--package", "ring-proto", "--example", "hop"]),
    )?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("disk.raw");
    std::io::copy(&mut std::io::repeat(0x5a).take(FILE_BYTES), &mut File::create(&file)?)?;
    let mut samples = Samples::default();
    for round in 1..=options.rounds {
        eprintln!("==> round {round} of {}", options.rounds);
        for depth in DEPTHS {
            let time = Duration::from_secs(options.seconds.into());
            let path = file.clone();
            // A thread of its own, which takes its place on a CPU with it when it ends.
            let plain = std::thread::spawn(move || {
                uring::random_read(&path, depth.parse()?, CLIENT_CPU, time)
            });
            let iops = plain.join().map_err(|_| anyhow::anyhow!("io_uring thread panicked"))??;
            let sample = Sample {
                iops,
                p50_us: f64::NAN,
                p99_us: f64::NAN,
                cpu_us: 1e6 / iops,
                calls: f64::NAN,
            };
            samples.add(format!("plain io_uring, cached file | {depth} | one CPU"), sample);
            for wait in WAITS {
                for (disk, target) in
                    [("null", "null:64G".into()), ("cached file", file.display().to_string())]
                {
                    let sample = measure(options, &target, depth, wait)?;
                    samples.add(format!("{disk} | {depth} | {wait}"), sample);
                }
            }
        }
    }
    report(&samples)
}

fn measure(options: &Options, target_line: &str, depth: &str, wait: &str) -> Result<Sample> {
    let host = Host::start(Programs::in_dir(target().join("release")))?;
    host.create_domain("guest", &["--on-crash", "preserve"])?;
    let backend = host.backend_on(BACKEND_CPU, &["--wait", wait, "--direct", "off"])?;
    let line = format!("vdev=xvda,backendtype=tap,backend={DRIVER_DOMAIN},target={target_line}");
    host.attach("guest", &line)?;
    let mut command = host.frontend("guest", "bench");
    let (seconds, size) = (options.seconds.to_string(), FILE_BYTES.to_string());
    command.args(["xvda", "--rw=randread", "--bs=4k", "--iodepth", depth, "--size", &size]);
    command.args(["--runtime", &seconds, "--time_based", "--ramp_time=1", "--json"]);
    command.args(["--wait", wait, "--cpus", &CLIENT_CPU.to_string()]);
    let before = cpu::used(backend.pid())?;
    let report: Value = serde_json::from_str(&output(&mut command)?)?;
    let backend_cpu = (cpu::used(backend.pid())? - before).as_secs_f64();
    let number = |pointer: &str| {
        report.pointer(pointer).and_then(Value::as_f64).with_context(|| pointer.to_owned())
    };
    // The backend's time includes that of ramping up, and so do the ring's own counts.
    let all = number("/rings/0/stats/ios")?;
    let client_cpu = number("/cpu/user_ns_per_io")? + number("/cpu/system_ns_per_io")?;
    Ok(Sample {
        iops: number("/total/iops")?,
        p50_us: number("/total/latency_ns/p50")? / 1e3,
        p99_us: number("/total/latency_ns/p99")? / 1e3,
        cpu_us: client_cpu / 1e3 + backend_cpu * 1e6 / all,
        calls: number("/rings/0/syscalls_per_io")?,
    })
}

fn median(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<f64> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    let at = |n: usize| values.get(n).copied().unwrap_or(f64::NAN);
    (at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
}

fn report(all: &Samples) -> Result<()> {
    println!(
        "\n| disk | depth | waits | IOPS, median (lowest–highest) | p50 us | p99 us | CPU us an I/O | client system calls an I/O |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut rows = Vec::new();
    for name in &all.names {
        let samples = &all.samples[name];
        let (iops, low, high) = median(samples, |s| s.iops);
        let of = |value: fn(&Sample) -> f64| median(samples, value).0;
        let show = |value: f64, digits: usize| {
            if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
        };
        println!(
            "| {name} | {:.0} k ({:.0}–{:.0}) | {} | {} | {} | {} |",
            iops / 1e3,
            low / 1e3,
            high / 1e3,
            show(of(|s| s.p50_us), 2),
            show(of(|s| s.p99_us), 2),
            show(of(|s| s.cpu_us), 2),
            show(of(|s| s.calls), 3),
        );
        rows.push(json!({
            "row": name,
            "iops": samples.iter().map(|s| s.iops).collect::<Vec<_>>(),
            "p50_us": of(|s| s.p50_us),
            "p99_us": of(|s| s.p99_us),
            "cpu_us_per_io": of(|s| s.cpu_us),
        }));
    }
    let dir = target().join("bench");
    std::fs::create_dir_all(&dir)?;
    let path = dir.join("bench.json");
    serde_json::to_writer_pretty(File::create(&path)?, &rows)?;
    println!("\nLeft behind: {}", path.display());
    Ok(())
}
