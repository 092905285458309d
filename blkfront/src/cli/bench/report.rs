//! The figures, as a table or as JSON.

use super::job::Job;
use super::worker::{Outcome, Side};
use crate::cli::Wait;
use crate::cli::info::features;
use crate::cli::units::{show_bytes, show_count, show_ns};
use blkfront::{Info, Stats};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// Incremented with each change that readers of the JSON must know about.
const VERSION: u32 = 1;

/// The results of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    version: u32,
    job: Job,
    wait: &'static str,
    disk: Info,
    elapsed_s: f64,
    total: Figures,
    read: Figures,
    write: Figures,
    /// I/Os that failed.
    errors: u64,
    verify: Verified,
    cpu: Cpu,
    rings: Vec<RingFigures>,
}

/// Reads, writes, or both.
#[derive(Debug, Serialize)]
struct Figures {
    ios: u64,
    bytes: u64,
    iops: f64,
    bytes_per_s: f64,
    latency_ns: Latency,
}

#[derive(Debug, Default, Serialize)]
struct Latency {
    min: u64,
    mean: f64,
    stddev: f64,
    p50: u64,
    p90: u64,
    p99: u64,
    p99_9: u64,
    p99_99: u64,
    max: u64,
}

#[derive(Debug, Serialize)]
struct Verified {
    /// Read back at the end.
    bytes: u64,
    /// Blocks that differ from what was written.
    faults: u64,
}

/// The CPU time of this process, without the backend's.
#[derive(Debug, Serialize)]
pub(crate) struct Cpu {
    user_s: f64,
    system_s: f64,
    user_ns_per_io: f64,
    system_ns_per_io: f64,
}

impl Cpu {
    pub(crate) fn new(user: Duration, system: Duration, ios: u64) -> Self {
        let per_io = |time: Duration| per(time.as_nanos() as f64, ios);
        Self {
            user_s: user.as_secs_f64(),
            system_s: system.as_secs_f64(),
            user_ns_per_io: per_io(user),
            system_ns_per_io: per_io(system),
        }
    }
}

/// What a ring and its vCPUs did in the run.
#[derive(Debug, Serialize)]
struct RingFigures {
    ring: u32,
    slots: u32,
    vcpus: Vec<u32>,
    syscalls_per_io: f64,
    stats: Stats,
}

fn per(amount: f64, ios: u64) -> f64 {
    if ios == 0 { 0.0 } else { amount / ios as f64 }
}

impl Figures {
    fn new(side: &Side, elapsed: f64) -> Self {
        let rate = |amount: u64| if elapsed > 0.0 { amount as f64 / elapsed } else { 0.0 };
        let latency = side.latency.as_ref().filter(|latency| !latency.is_empty());
        let latency_ns = latency.map_or_else(Latency::default, |latency| Latency {
            min: latency.min(),
            mean: latency.mean(),
            stddev: latency.stdev(),
            p50: latency.value_at_quantile(0.5),
            p90: latency.value_at_quantile(0.9),
            p99: latency.value_at_quantile(0.99),
            p99_9: latency.value_at_quantile(0.999),
            p99_99: latency.value_at_quantile(0.9999),
            max: latency.max(),
        });
        Self {
            ios: side.ios,
            bytes: side.bytes,
            iops: rate(side.ios),
            bytes_per_s: rate(side.bytes),
            latency_ns,
        }
    }
}

impl Report {
    pub(crate) fn new(
        disk: Info,
        job: &Job,
        wait: Wait,
        outcome: Outcome,
        cpu: Cpu,
        stats: Vec<Stats>,
    ) -> Self {
        let mut total = Side::default();
        total += &outcome.reads;
        total += &outcome.writes;
        let elapsed_s = outcome.elapsed.as_secs_f64();
        let figures = |side| Figures::new(side, elapsed_s);
        let ring = |(info, stats): (&blkfront::RingInfo, Stats)| RingFigures {
            ring: info.ring,
            slots: info.slots,
            vcpus: info.vcpus.clone(),
            syscalls_per_io: per(stats.syscalls as f64, stats.ios),
            stats,
        };
        Self {
            version: VERSION,
            job: job.clone(),
            wait: match wait {
                Wait::Poll => "poll",
                Wait::Event => "event",
                Wait::Adaptive => "adaptive",
            },
            elapsed_s,
            total: figures(&total),
            read: figures(&outcome.reads),
            write: figures(&outcome.writes),
            errors: outcome.errors,
            verify: Verified { bytes: outcome.verified, faults: outcome.faults },
            cpu,
            rings: disk.rings.iter().zip(stats).map(ring).collect(),
            disk,
        }
    }

    /// Whether anything went wrong.
    pub(crate) fn failed(&self) -> bool {
        self.errors > 0 || self.verify.faults > 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let disk = &self.disk;
        writeln!(
            f,
            "{} of domain {}: {}, {}; {}",
            disk.device,
            disk.domain,
            disk.backend,
            show_bytes(disk.geometry.size as f64),
            features(&disk.features)
        )?;
        let (jobs, depth) = (self.job.numjobs, self.job.iodepth);
        let seconds = self.elapsed_s;
        let jobs = if jobs == 1 { "1 job".to_owned() } else { format!("{jobs} jobs") };
        writeln!(f, "{jobs} of depth {depth}, {} waits, {seconds:.2} s\n", self.wait)?;
        let head = ["", "IOPS", "bytes/s", "min", "mean", "p50", "p99", "p99.9", "max"];
        row(f, &head.map(str::to_owned))?;
        let mixed = self.read.ios > 0 && self.write.ios > 0;
        let sides = [("read", &self.read), ("write", &self.write), ("total", &self.total)];
        for (name, side) in sides {
            if side.ios > 0 && (name != "total" || mixed) {
                figures(f, name, side)?;
            }
        }
        let cpu = &self.cpu;
        let (user, system) = (show_ns(cpu.user_ns_per_io), show_ns(cpu.system_ns_per_io));
        writeln!(f, "\nCPU time an I/O (of this side): {user} user, {system} system\n")?;
        let head = [
            "ring",
            "vCPUs",
            "I/Os",
            "requests",
            "merges",
            "splits",
            "requeues",
            "kicks",
            "events",
            "sleeps",
            "calls/IO",
            "contended",
        ];
        row(f, &head.map(str::to_owned))?;
        for ring in &self.rings {
            ring_row(f, ring)?;
        }
        if self.job.verify.is_some() {
            let Verified { bytes, faults } = self.verify;
            let bytes = show_bytes(bytes as f64);
            writeln!(f, "\nverify: {bytes} read back, {faults} blocks differ")?;
        }
        if self.errors > 0 {
            writeln!(f, "\n{} I/Os failed", self.errors)?;
        }
        Ok(())
    }
}

fn figures(f: &mut fmt::Formatter<'_>, name: &str, side: &Figures) -> fmt::Result {
    let latency = &side.latency_ns;
    let ns = |ns: u64| show_ns(ns as f64);
    row(
        f,
        &[
            name.to_owned(),
            show_count(side.iops),
            show_bytes(side.bytes_per_s),
            ns(latency.min),
            show_ns(latency.mean),
            ns(latency.p50),
            ns(latency.p99),
            ns(latency.p99_9),
            ns(latency.max),
        ],
    )
}

fn ring_row(f: &mut fmt::Formatter<'_>, ring: &RingFigures) -> fmt::Result {
    let stats = &ring.stats;
    let vcpus: Vec<String> = ring.vcpus.iter().map(u32::to_string).collect();
    let count = |n: u64| show_count(n as f64);
    row(
        f,
        &[
            ring.ring.to_string(),
            vcpus.join(","),
            count(stats.ios),
            count(stats.requests),
            count(stats.merges),
            count(stats.splits),
            count(stats.requeues),
            count(stats.kicks_sent),
            count(stats.events),
            count(stats.sleeps),
            format!("{:.3}", ring.syscalls_per_io),
            stats.contended.to_string(),
        ],
    )
}

fn row(f: &mut fmt::Formatter<'_>, cells: &[String]) -> fmt::Result {
    for (n, cell) in cells.iter().enumerate() {
        if n == 0 { write!(f, "{cell:<6}")? } else { write!(f, "{cell:>11}")? }
    }
    writeln!(f)
}
