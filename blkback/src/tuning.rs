//! What an operator can set for the devices of a daemon.

use crate::storage::Direct;
use ring_proto::abi::{MAX_INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER};
use serde::Deserialize;
use std::num::NonZeroUsize;
use std::time::Duration;
use xen_platform::{DEFAULT_SPIN, Waiting};
use xenstore_glue::vbd::{BackendOffer, MAX_QUEUES};

/// Rings a device gets without being told otherwise: as many as Linux's frontend asks for at the most.
const DEFAULT_QUEUES: usize = 4;

/// More threads than any machine has CPUs.
const MAX_THREADS: usize = 4096;

/// Where nobody may be there to run hotplug scripts: what a script takes, with time to spare.
const DEFAULT_SCRIPT_TIMEOUT: Duration = Duration::from_secs(3);

/// Offers and strategies, the same for every device.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tuning {
    /// Rings a device may have; 0 for one a CPU, up to four.
    pub max_queues: u16,
    /// log2 of the pages of a ring.
    pub max_ring_page_order: u8,
    /// Segments of an indirect request; 0 for none.
    pub max_indirect_segments: u16,
    /// Offer persistent grants.
    pub persistent_grants: bool,
    /// Offer the split ring layout.
    pub split_rings: bool,
    /// How data is reached where grants are not persistent.
    pub data: DataPath,
    /// Whether a disk may work on the guest's pages themselves, and not on copies.
    pub pin_grants: PinGrants,
    /// Whether files are read past the page cache.
    pub direct: Direct,
    /// Threads that serve rings, at the most; 0 for one a CPU. Rings share them where there are more.
    pub threads: usize,
    /// How ring threads wait.
    pub wait: WaitMode,
    /// The longest spin of [`WaitMode::Adaptive`], in microseconds.
    pub spin_us: u64,
    /// In a driver domain, seconds from `InitWait` on in which `xl devd`, if it is there, will have
    /// run a disk's hotplug script.
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
    /// Everywhere.
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
    /// Whether every number is within its limit.
    ///
    /// # Errors
    /// Which is not, for a person to read.
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

    /// How many threads serve rings, at the most.
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

    /// How long a hotplug script is waited for where it is not sure that anybody runs it.
    pub fn script_timeout(&self) -> Duration {
        // Beyond a day nobody sees the difference, and adding it to now cannot overflow.
        Duration::from_secs(self.script_timeout_s.min(24 * 60 * 60))
    }
}
