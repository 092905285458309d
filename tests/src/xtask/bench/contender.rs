//! What is measured: ours, limits, peers. To add one, write a file with an implementation of [`Contender`],
//! and a line in [`all`].

use super::case::Case;
use super::meter::Meter;
use super::place::Place;
use super::sample::Sample;
use super::{limits, ours, peers};
use crate::xtask::packages::Need;
use anyhow::{Context, Result};
use serde_json::Value;
use std::time::SystemTime;

/// The CPU that every client is pinned to.
pub(super) const CLIENT_CPU: usize = 0;
/// The CPU that every backend is pinned to.
pub(super) const BACKEND_CPU: usize = 1;

/// Something that cases can be measured on.
pub(super) trait Contender {
    fn name(&self) -> &'static str;

    /// What it needs installed.
    fn needs(&self) -> &'static [Need] {
        &[]
    }

    /// Builds its parts.
    fn prepare(&self) -> Result<()> {
        Ok(())
    }

    /// The case that it measures when asked for this one; `None` if it has nothing like it.
    fn takes(&self, case: &Case) -> Option<Case>;

    /// Measures once.
    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample>;
}

/// All of them, ours first.
pub(super) fn all() -> Vec<Box<dyn Contender>> {
    vec![
        Box::new(ours::Ours),
        Box::new(limits::hop::Hop),
        Box::new(limits::eventfd::RoundTrip),
        Box::new(limits::memcpy::Memcpy),
        Box::new(limits::uring::PlainUring),
        Box::new(limits::fio::Fio),
        Box::new(peers::qemu::StorageDaemon),
        Box::new(peers::rust_vmm::Null),
        Box::new(peers::nbdkit::Nbdkit),
    ]
}

/// Has a client read other places than in the round before, which whatever is below a file may still have.
pub(super) fn seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64
}

/// IOPS and latencies of a report of `blkfront bench`, or of a program that reports alike.
pub(super) fn read_report(report: &Value) -> Result<Sample> {
    let number = |pointer: &str| {
        report.pointer(pointer).and_then(Value::as_f64).with_context(|| pointer.to_owned())
    };
    let micros = |which: &str| {
        Ok::<_, anyhow::Error>(Some(number(&format!("/total/latency_ns/{which}"))? / 1e3))
    };
    Ok(Sample {
        iops: number("/total/iops")?,
        p50_us: micros("p50")?,
        p99_us: micros("p99")?,
        p99_9_us: micros("p99_9")?,
        ..Sample::default()
    })
}
