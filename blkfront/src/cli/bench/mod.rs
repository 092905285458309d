//! `blkfront bench`.

mod crc32c;
mod job;
mod report;
mod verify;
mod worker;

use super::units::show_count;
use super::{Host, Rings, say};
use anyhow::{Context, anyhow};
use blkfront::{Config, Disk, MAX_DEPTH, MAX_POOL_BYTES, Stats};
use job::{Job, JobArgs};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use report::{Cpu, Report};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use worker::{Outcome, Worker};

/// How often the state of the run is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Options of `blkfront bench`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// CPUs to pin the jobs to, in turn
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// Write JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    job: JobArgs,
    #[command(flatten)]
    rings: Rings,
}

/// What the jobs and the main thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Set from outside: finish what is in flight, submit no more.
    pub(crate) stop: AtomicBool,
    /// I/Os completed by each job, for progress.
    pub(crate) done: Vec<AtomicU64>,
    /// All jobs and the main thread are ready.
    pub(crate) ready: Barrier,
    /// When the run began; latencies are measured on this clock.
    pub(crate) epoch: Instant,
}

impl Shared {
    fn ios(&self) -> u64 {
        self.done.iter().map(|done| done.load(Ordering::Relaxed)).sum()
    }
}

/// What the process had used at a point in time.
#[derive(Clone, Debug)]
struct Usage {
    user: Duration,
    system: Duration,
    /// I/Os completed, including the ramp and the read-back.
    ios: u64,
    rings: Vec<Stats>,
}

impl Usage {
    fn now(disk: &Disk, shared: &Shared) -> anyhow::Result<Self> {
        let usage = getrusage(UsageWho::RUSAGE_SELF).context("read the CPU time used")?;
        let time = |t: TimeVal| {
            let micros = t.tv_sec().unsigned_abs() * 1_000_000 + t.tv_usec().unsigned_abs();
            Duration::from_micros(micros)
        };
        let rings = disk.info().rings.iter().map(|ring| ring.stats).collect();
        let (user, system) = (time(usage.user_time()), time(usage.system_time()));
        Ok(Self { user, system, ios: shared.ios(), rings })
    }
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    let job = Job::new(&args.job)?;
    let disk = host.open(&args.disk, config(args, &job)?)?;
    let job = Arc::new(job.fit(&disk.geometry())?);
    let report = load(&disk, args, &job)?;
    // Report the figures even if closing fails.
    let closed = disk.close();
    if args.json {
        say(&serde_json::to_string_pretty(&report)?);
    } else {
        say(&report);
    }
    closed?;
    Ok(if report.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn config(args: &Args, job: &Job) -> anyhow::Result<Config> {
    let depth = job.iodepth;
    if depth == 0 || depth > MAX_DEPTH {
        return Err(anyhow!("iodepth is {depth}, but must be within 1 to {MAX_DEPTH}"));
    }
    let pool_bytes = job.buffer_bytes().saturating_mul(depth);
    if pool_bytes > MAX_POOL_BYTES {
        let max = MAX_POOL_BYTES >> 20;
        return Err(anyhow!(
            "iodepth {depth} of the largest block is {} MiB a job, above {max}: take less of either",
            pool_bytes >> 20
        ));
    }
    Ok(Config { depth, pool_bytes, ..args.rings.config(job.numjobs) })
}

fn load(disk: &Disk, args: &Args, job: &Arc<Job>) -> anyhow::Result<Report> {
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        done: (0..job.numjobs).map(|_| AtomicU64::new(0)).collect(),
        ready: Barrier::new(job.numjobs as usize + 1),
        epoch: Instant::now(),
    });
    let mut queues = Vec::new();
    for vcpu in 0..job.numjobs {
        queues.push(disk.queue(vcpu)?);
    }
    let mut threads = Vec::new();
    for (n, queue) in queues.into_iter().enumerate() {
        let worker = Worker::new(n, queue, job.clone(), shared.clone())?;
        let cpu = args.cpus.get(n % args.cpus.len().max(1)).copied();
        let thread = std::thread::Builder::new().name(format!("job{n}"));
        threads.push(thread.spawn(move || worker.run(cpu)).context("start a job")?);
    }
    stop_on_interrupt(&shared)?;
    shared.ready.wait();
    let (from, to) = watch(disk, job, &shared, || threads.iter().all(|t| t.is_finished()))?;
    let mut outcome = Outcome::default();
    for thread in threads {
        outcome += thread.join().map_err(|_| anyhow!("a job panicked"))??;
    }
    let rings = to.rings.iter().zip(&from.rings).map(|(now, then)| *now - *then).collect();
    let cpu = Cpu::new(to.user - from.user, to.system - from.system, to.ios - from.ios);
    Ok(Report::new(disk.info(), job, args.rings.wait(), outcome, cpu, rings))
}

/// Shows progress; returns the usage at the end of the ramp and at the end of the run.
fn watch(
    disk: &Disk,
    job: &Job,
    shared: &Shared,
    ended: impl Fn() -> bool,
) -> anyhow::Result<(Usage, Usage)> {
    let begin = Instant::now();
    let mut from = Usage::now(disk, shared)?;
    let mut ramping = !job.ramp_time.is_zero();
    let terminal = std::io::stderr().is_terminal();
    let (mut shown, mut before) = (begin, 0);
    while !ended() {
        std::thread::sleep(LOOK);
        if ramping && begin.elapsed() >= job.ramp_time {
            ramping = false;
            from = Usage::now(disk, shared)?;
        }
        let since = shown.elapsed();
        if terminal && since >= Duration::from_secs(1) {
            let done = shared.ios();
            let iops = (done - before) as f64 / since.as_secs_f64();
            let ramp = if ramping { " (ramp)" } else { "" };
            let seconds = begin.elapsed().as_secs();
            eprint!("\r\x1b[K{seconds} s: {} IOPS{ramp}", show_count(iops));
            let _ = std::io::stderr().flush();
            (shown, before) = (Instant::now(), done);
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    Ok((from, Usage::now(disk, shared)?))
}

/// The first interrupt ends the run early, figures included; the second ends the process.
fn stop_on_interrupt(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let shared = Arc::downgrade(shared);
    let wait = move || {
        runtime.block_on(async {
            for code in [None, Some(130)] {
                if tokio::signal::ctrl_c().await.is_err() {
                    return;
                }
                if let Some(code) = code {
                    std::process::exit(code);
                }
                if let Some(shared) = shared.upgrade() {
                    shared.stop.store(true, Ordering::Relaxed);
                }
            }
        });
    };
    std::thread::Builder::new().name("interrupt".into()).spawn(wait).context("start a thread")?;
    Ok(())
}
