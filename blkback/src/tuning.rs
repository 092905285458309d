//! What an operator can set for the devices of a daemon.

use crate::storage::Direct;
use ring_proto::abi::{MAX_INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER};
use serde::Deserialize;
use std::num::NonZeroUsize;
use std::time::Duration;
use xen_platform::{DEFAULT_SPIN, Waiting};
use xenstore_glue::vbd::{BackendOffer, MAX_QUEUES};

/// Default number of rings of a device: the most that Linux's frontend asks for.
const DEFAULT_QUEUES: usize = 4;

/// More threads than any machine has CPUs.
const MAX_THREADS: usize = 4096;

/// If perhaps nobody runs hotplug scripts: as long as a script takes, and time to spare.
const DEFAULT_SCRIPT_TIMEOUT: Duration = Duration::from_secs(3);

/// Offers and strategies, the same for every device.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tuning {
    /// Rings a device may have; 0 for one per CPU, up to four.
    pub max_queues: u16,
    /// log2 of a ring's pages.
    pub max_ring_page_order: u8,
    /// Segments of an indirect request; 0 for none.
    pub max_indirect_segments: u16,
    /// Offer persistent grants.
    pub persistent_grants: bool,
    /// Offer the split ring layout.
    pub split_rings: bool,
    /// How data is accessed if grants are not persistent.
    pub data: DataPath,
    /// Whether a disk may work on the guest's pages themselves instead of copies.
    pub pin_grants: PinGrants,
    /// Whether files bypass the page cache.
    pub direct: Direct,
    /// The most threads that serve rings; 0 for one per CPU. If there are more rings, they share threads.
    pub threads: usize,
    /// How ring threads wait.
    pub wait: WaitMode,
    /// The longest spin of [`WaitMode::Adaptive`], in microseconds.
    pub spin_us: u64,
    /// In a driver domain, seconds after `InitWait` within which `xl devd`, if present, will have run
    /// a disk's hotplug script.
    pub script_timeout_s: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            max_queues: 0,
            max_ring_page_order: MAX_RING_PAGE_ORDER,
            max_indirect_segments: MAX_INDIRECT_SEGMENTS as u16,
            persistent_grants: true,
            split_rings: true,
            data: DataPath::Copy,
            pin_grants: PinGrants::Auto,
            direct: Direct::Auto,
            threads: 0,
            wait: WaitMode::Adaptive,
            spin_us: DEFAULT_SPIN.as_micros() as u64,
            script_timeout_s: DEFAULT_SCRIPT_TIMEOUT.as_secs(),
        }
    }
}

/// How the data of a frontend without persistent grants is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DataPath {
    /// By grant copy.
    Copy,
    /// By mapping for each request.
    Map,
}

/// Whether a disk with O_DIRECT may work on mapped pages, which the kernel pins for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PinGrants {
    /// Where a daemon that is killed over it does no harm ([`xen_platform::Platform::may_pin`]).
    Auto,
    /// Everywhere, except for disks that others may have open.
    On,
    /// Nowhere.
    Off,
}

/// How ring threads wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WaitMode {
    /// Sleep at once.
    Event,
    /// Spin a little first, while that pays.
    Adaptive,
    /// Never sleep. Takes a CPU a thread.
    Poll,
}

/// CPUs that this process may use.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

impl Tuning {
    /// Checks that every number is within its limit.
    ///
    /// # Errors
    /// A message that names the one that is not.
    pub fn check(&self) -> Result<(), String> {
        let within = |key, value: usize, most: usize| {
            let error = || Err(format!("{key} is {value}, but must be within 0 to {most}"));
            if value <= most { Ok(()) } else { error() }
        };
        within("max-queues", self.max_queues.into(), MAX_QUEUES.into())?;
        let order = self.max_ring_page_order.into();
        within("max-ring-page-order", order, MAX_RING_PAGE_ORDER.into())?;
        let segments = self.max_indirect_segments.into();
        within("max-indirect-segments", segments, MAX_INDIRECT_SEGMENTS)?;
        within("threads", self.threads, MAX_THREADS)
    }

    /// What is written before `InitWait`.
    pub fn offer(&self) -> BackendOffer {
        let queues = match self.max_queues {
            0 => cpus().min(DEFAULT_QUEUES) as u16,
            n => n,
        };
        BackendOffer {
            max_queues: queues,
            max_ring_page_order: self.max_ring_page_order,
            max_indirect_segments: self.max_indirect_segments,
            persistent: self.persistent_grants,
            split_ring: self.split_rings,
        }
    }

    /// The most threads that serve rings.
    pub fn threads(&self) -> usize {
        if self.threads == 0 { cpus() } else { self.threads }
    }

    /// How ring threads wait.
    pub fn waiting(&self) -> Waiting {
        match self.wait {
            WaitMode::Event => Waiting::Event,
            WaitMode::Adaptive => Waiting::Adaptive(Duration::from_micros(self.spin_us)),
            WaitMode::Poll => Waiting::Poll,
        }
    }

    /// How long to wait for a hotplug script that perhaps nobody runs.
    pub fn script_timeout(&self) -> Duration {
        // Beyond a day nobody sees a difference, and a day added to now cannot overflow.
        Duration::from_secs(self.script_timeout_s.min(24 * 60 * 60))
    }
}
