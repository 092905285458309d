//! A reading of all statistics; its JSON form is the answer to `/stats`.

use super::distribution::Distribution;
use super::process::{Clock, Process};
use crate::registry::{DeviceView, Registry};
use crate::stats::{Counts, RingStats};
use ring_proto::Reason;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All statistics at one time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`Snapshot::VERSION`] of the daemon. Fields may be added without a new number; removing one or
    /// changing its meaning takes a new number.
    pub version: u32,
    /// The daemon itself.
    pub process: Process,
    /// Every device, by the path of its backend directory.
    pub devices: Vec<Device>,
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// The backend directory in xenstore.
    pub backend: String,
    /// The kind of backend, as in that path.
    pub kind: String,
    /// The domain that uses it.
    pub domain: u16,
    /// The number of the virtual device.
    pub device: u32,
    /// `xvda` and the like.
    pub name: String,
    /// What backs it: the `target=` of its disk line.
    pub target: String,
    /// This end's xenbus state, by name.
    pub state: String,
    /// This end's xenbus state, by number.
    pub state_number: u8,
    /// Size in 512-byte sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// How data is reached, while connected.
    pub strategy: Option<String>,
    /// How the rings are laid out, while connected.
    pub layout: Option<String>,
    /// The last error.
    pub error: Option<String>,
    /// Its rings, by number; none while not connected. Their counts start at 0 with each connection.
    pub rings: Vec<Ring>,
    /// All rings together.
    pub total: Ring,
}

/// A ring, or several together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ring {
    /// The monotonic counters.
    #[serde(flatten)]
    pub counts: Counts,
    /// Persistent grants held now.
    pub persistent_held: u64,
    /// Requests refused, by [`Reason::NAMES`].
    pub refused: BTreeMap<String, u64>,
    /// Requests taken from the ring at a time.
    pub batch: Distribution,
    /// Nanoseconds from an event to when its requests were taken. Like the next two, measured in one
    /// round out of [`TIMED_ROUNDS`](crate::ring::TIMED_ROUNDS).
    pub ring_wait_ns: Distribution,
    /// Nanoseconds from when a request was taken to when the device had done it.
    pub device_ns: Distribution,
    /// Nanoseconds from when the device was done to when the frontend could see the response.
    pub completion_ns: Distribution,
    /// Figures derived from the above.
    pub derived: Derived,
}

/// Figures derived from a ring's counts. Means and ratios are `null` without values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Derived {
    /// Requests taken from the ring, refused ones included.
    pub requests: u64,
    /// Requests refused for any reason.
    pub refused: u64,
    /// Events received, per request.
    pub events_per_request: Option<f64>,
    /// Events sent, per request.
    pub kicks_per_request: Option<f64>,
    /// Sleeps, per request.
    pub sleeps_per_request: Option<f64>,
    /// System calls, including those that send events, per request.
    pub system_calls_per_request: Option<f64>,
    /// Requests taken at a time, on average.
    pub mean_batch: Option<f64>,
    /// Of `ring_wait_ns`.
    pub ring_wait_ns: Quantiles,
    /// Of `device_ns`.
    pub device_ns: Quantiles,
    /// Of `completion_ns`.
    pub completion_ns: Quantiles,
}

/// Mean and quantiles. The quantiles are upper bounds, at most twice the true ones: see
/// [`Distribution::percentile`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The mean.
    pub mean: Option<f64>,
    /// Half of all values are at most this.
    pub p50: Option<u64>,
    /// 99 of 100 values are at most this.
    pub p99: Option<u64>,
}

impl From<&Distribution> for Quantiles {
    fn from(of: &Distribution) -> Self {
        Self { mean: of.mean(), p50: of.percentile(50), p99: of.percentile(99) }
    }
}

impl Snapshot {
    /// Version of the schema.
    pub const VERSION: u32 = 1;

    /// Reads everything.
    pub fn take(registry: &Registry, clock: &Clock) -> Self {
        let devices = registry.devices().into_iter().map(Device::from).collect();
        Self { version: Self::VERSION, process: clock.process(), devices }
    }
}

impl From<DeviceView> for Device {
    fn from(view: DeviceView) -> Self {
        let rings: Vec<_> = view.rings.iter().map(|stats| Ring::read(stats)).collect();
        Self {
            backend: view.paths.backend(),
            kind: view.paths.kind.as_str().to_owned(),
            domain: view.paths.frontend_domain.0,
            device: view.paths.device,
            name: view.name,
            target: view.target,
            state: format!("{:?}", view.state),
            state_number: view.state as u8,
            sectors: view.sectors,
            read_only: view.read_only,
            strategy: view.strategy.map(str::to_owned),
            layout: view.layout,
            error: view.error,
            total: Ring::total(&rings),
            rings,
        }
    }
}

impl Ring {
    fn read(stats: &RingStats) -> Self {
        let refused = Reason::NAMES.iter().zip(&stats.refused);
        Self {
            counts: Counts::read(stats),
            persistent_held: stats.persistent_held.get(),
            refused: refused.map(|(name, count)| ((*name).to_owned(), count.get())).collect(),
            batch: (&stats.batch).into(),
            ring_wait_ns: (&stats.ring_wait).into(),
            device_ns: (&stats.device).into(),
            completion_ns: (&stats.completion).into(),
            derived: Derived::default(),
        }
        .derive()
    }

    /// All of `rings` together.
    pub fn total(rings: &[Self]) -> Self {
        let add = |sum: Self, ring: &Self| Self {
            persistent_held: sum.persistent_held.saturating_add(ring.persistent_held),
            ..sum.with(ring, u64::saturating_add)
        };
        rings.iter().fold(Self::default(), add).derive()
    }

    /// What happened between `before` and this.
    pub fn since(&self, before: &Self) -> Self {
        // A ring that has counted less than before belongs to a later connection.
        let anew = self.batch.sum < before.batch.sum;
        let nothing = Self::default();
        self.with(if anew { &nothing } else { before }, u64::saturating_sub).derive()
    }

    fn with(&self, other: &Self, op: fn(u64, u64) -> u64) -> Self {
        let mut refused = other.refused.clone();
        for name in self.refused.keys() {
            refused.entry(name.clone()).or_default();
        }
        for (name, count) in &mut refused {
            *count = op(self.refused.get(name).copied().unwrap_or(0), *count);
        }
        Self {
            counts: self.counts.with(&other.counts, op),
            persistent_held: self.persistent_held,
            refused,
            batch: self.batch.with(&other.batch, op),
            ring_wait_ns: self.ring_wait_ns.with(&other.ring_wait_ns, op),
            device_ns: self.device_ns.with(&other.device_ns, op),
            completion_ns: self.completion_ns.with(&other.completion_ns, op),
            derived: Derived::default(),
        }
    }

    fn derive(mut self) -> Self {
        let Counts { events, kicks, sleeps, system_calls, .. } = self.counts;
        let requests = self.batch.sum;
        let each = |count: u64| (requests > 0).then(|| count as f64 / requests as f64);
        self.derived = Derived {
            requests,
            refused: self.refused.values().fold(0, |sum, count| sum.saturating_add(*count)),
            events_per_request: each(events),
            kicks_per_request: each(kicks),
            sleeps_per_request: each(sleeps),
            system_calls_per_request: each(system_calls.saturating_add(kicks)),
            mean_batch: self.batch.mean(),
            ring_wait_ns: (&self.ring_wait_ns).into(),
            device_ns: (&self.device_ns).into(),
            completion_ns: (&self.completion_ns).into(),
        };
        self
    }
}
