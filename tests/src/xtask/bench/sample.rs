//! The figures of one measurement, and of several together.

use serde::Serialize;

/// One end's share of an I/O. What could not be counted is `None`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct End {
    /// CPU time, microseconds.
    pub(super) cpu_us: Option<f64>,
    /// System calls.
    pub(super) calls: Option<f64>,
    /// Events sent to the other end.
    pub(super) kicks: Option<f64>,
    /// Times a thread gave up its CPU to wait.
    pub(super) sleeps: Option<f64>,
    /// Instructions: in user space and in the kernel if perf counts them, in user space if callgrind does.
    pub(super) instructions: Option<f64>,
}

/// One measurement.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Sample {
    pub(super) iops: f64,
    /// Latencies in microseconds.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) p99_9_us: Option<f64>,
    pub(super) client: End,
    pub(super) backend: End,
    /// IOPS of each device, where there are several.
    pub(super) devices: Vec<f64>,
    /// Lock acquisitions on the client's path that had to wait.
    pub(super) contended: Option<u64>,
}

impl Sample {
    /// The sample of a limit that has a rate and nothing else.
    pub(super) fn rate(iops: f64) -> Self {
        Self { iops, ..Self::default() }
    }

    /// (highest - lowest) / mean of the devices' IOPS.
    pub(super) fn unfairness(&self) -> Option<f64> {
        let lowest = self.devices.iter().copied().reduce(f64::min)?;
        let highest = self.devices.iter().copied().reduce(f64::max)?;
        let mean = self.devices.iter().sum::<f64>() / self.devices.len() as f64;
        (self.devices.len() > 1).then_some((highest - lowest) / mean)
    }
}

/// Median, lowest and highest.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

impl Spread {
    /// `None` without values.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Some(Self {
            median: *values.get(values.len() / 2)?,
            lowest: *values.first()?,
            highest: *values.last()?,
        })
    }
}
