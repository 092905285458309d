//! The configuration file, and the flags that override it.

use crate::metrics::Address;
use crate::storage::Direct;
use crate::tuning::{DataPath, PinGrants, Tuning, WaitMode};
use anyhow::Context;
use clap::Args;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use xen_platform::Choice;
use xenstore_glue::vbd::BackendKind;

/// The configuration file, if no other is named.
pub const DEFAULT_PATH: &str = "/etc/blkback.toml";
/// Where records of requests in flight are kept on Xen; on the embedded platform, a directory of the
/// same name below the platform's own.
const STATE_DIR: &str = "/run/blkback";
/// How often to check the sizes of disks: all of them at once, so that idle disks cause no wake-ups of
/// their own.
const RESIZE_INTERVAL: Duration = Duration::from_secs(5);

/// The daemon's configuration, checked.
#[derive(Debug)]
pub struct Config {
    /// The hypervisor.
    pub platform: Choice,
    /// Directories to watch below `backend`.
    pub kinds: Vec<BackendKind>,
    /// Offers and strategies.
    pub tuning: Tuning,
    /// Where statistics are served.
    pub listen: Option<Address>,
    /// Where records of requests in flight are kept.
    pub state_dir: PathBuf,
    /// How often to check the sizes of disks.
    pub resize_interval: Option<Duration>,
}

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    platform: Option<String>,
    domain: Option<String>,
    kinds: Option<Vec<String>>,
    listen: Option<String>,
    state_dir: Option<PathBuf>,
    resize_interval_s: Option<u64>,
    tuning: Tuning,
}

/// Flags of `blkback serve`. Each goes before what the file says.
#[derive(Args, Debug, Default)]
pub struct Flags {
    /// Configuration file [default: /etc/blkback.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The hypervisor: `xen` or `embedded:DIR` [default: xen, on a machine that runs on it]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// The domain this daemon runs in, on the embedded platform: name or number
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    /// Kinds of backend to serve: vbd3 (backendtype=tap), vbd (phy), qdisk [default: vbd3,vbd]
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    kinds: Option<Vec<String>>,
    /// Where to offer statistics: `unix:PATH`, or `HOST:PORT` with a loopback host
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Address>,
    /// Where to record what is in flight, for the next daemon should this one be killed; a tmpfs
    /// [default: /run/blkback; DIR/blkback on the embedded platform]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Rings a device may have [default: one a CPU, at most 4]
    #[arg(long, value_name = "N")]
    max_queues: Option<u16>,
    /// log2 of the pages of a ring, at the most [default: 4]
    #[arg(long, value_name = "N")]
    max_ring_page_order: Option<u8>,
    /// Segments of an indirect request, at the most; 0 for no indirect requests [default: 256]
    #[arg(long, value_name = "N")]
    max_indirect_segments: Option<u16>,
    /// Offer persistent grants or not [default: true]
    #[arg(long, value_name = "BOOL")]
    persistent_grants: Option<bool>,
    /// Offer the split ring layout or not [default: true]
    #[arg(long, value_name = "BOOL")]
    split_rings: Option<bool>,
    /// How data is reached where grants are not persistent [default: copy]
    #[arg(long)]
    data: Option<DataPath>,
    /// Whether a disk with O_DIRECT works on the guest's pages themselves, not on copies; by auto not in a PV
    /// domain, whose kernel a daemon that is killed then would harm [default: auto]
    #[arg(long)]
    pin_grants: Option<PinGrants>,
    /// Use of O_DIRECT: by auto on devices, and on files where 512-byte sectors work [default: auto]
    #[arg(long)]
    direct: Option<Direct>,
    /// Threads that serve rings, at the most; 0 for one a CPU. With more rings they share [default: 0]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// How ring threads wait for requests [default: adaptive]
    #[arg(long)]
    wait: Option<WaitMode>,
    /// Longest spin of adaptive waiting, in microseconds [default: 50]
    #[arg(long, value_name = "N")]
    spin_us: Option<u64>,
    /// In a driver domain, seconds to wait for a hotplug script; 0 where nobody runs any [default: 3]
    #[arg(long, value_name = "N")]
    script_timeout_s: Option<u64>,
    /// Seconds between looks at the sizes of disks; 0 for only on SIGHUP [default: 5]
    #[arg(long, value_name = "N")]
    resize_interval_s: Option<u64>,
}

impl Config {
    /// Reads the file that the flags name, and applies the flags over it.
    ///
    /// # Errors
    /// Which file, key or flag is wrong, and how.
    pub fn load(flags: Flags) -> anyhow::Result<Self> {
        let file = File::find(flags.config.as_deref())?;
        let mut tuning = file.tuning;
        set(&mut tuning.max_queues, flags.max_queues);
        set(&mut tuning.max_ring_page_order, flags.max_ring_page_order);
        set(&mut tuning.max_indirect_segments, flags.max_indirect_segments);
        set(&mut tuning.persistent_grants, flags.persistent_grants);
        set(&mut tuning.split_rings, flags.split_rings);
        set(&mut tuning.data, flags.data);
        set(&mut tuning.pin_grants, flags.pin_grants);
        set(&mut tuning.direct, flags.direct);
        set(&mut tuning.threads, flags.threads);
        set(&mut tuning.wait, flags.wait);
        set(&mut tuning.spin_us, flags.spin_us);
        set(&mut tuning.script_timeout_s, flags.script_timeout_s);
        tuning.check().map_err(anyhow::Error::msg)?;
        let kinds = flags.kinds.or(file.kinds);
        let kinds = kinds.unwrap_or_else(|| vec!["vbd3".to_owned(), "vbd".to_owned()]);
        let interval = flags.resize_interval_s.or(file.resize_interval_s);
        let interval = interval.map_or(RESIZE_INTERVAL, Duration::from_secs);
        let platform = flags.platform.or(file.platform);
        let domain = flags.domain.or(file.domain);
        let platform = Choice::new(platform.as_deref(), domain.as_deref())?;
        let state_dir = flags.state_dir.or(file.state_dir);
        Ok(Self {
            state_dir: state_dir.unwrap_or_else(|| state_dir_of(&platform)),
            platform,
            kinds: kinds.iter().map(|name| kind(name)).collect::<anyhow::Result<_>>()?,
            tuning,
            listen: flags.listen.or(listen(file.listen)?),
            resize_interval: (!interval.is_zero()).then_some(interval),
        })
    }
}

fn state_dir_of(platform: &Choice) -> PathBuf {
    match platform {
        Choice::Xen => STATE_DIR.into(),
        Choice::Embedded { dir, .. } => dir.join("blkback"),
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

impl File {
    fn find(path: Option<&Path>) -> anyhow::Result<Self> {
        match path {
            Some(path) => read(path),
            None if Path::new(DEFAULT_PATH).exists() => read(Path::new(DEFAULT_PATH)),
            None => Ok(Self::default()),
        }
    }
}

/// Where a daemon with the configuration file `path`, or the usual one, serves statistics.
///
/// # Errors
/// What is wrong with the file.
pub fn listen_address(path: Option<&Path>) -> anyhow::Result<Option<Address>> {
    listen(File::find(path)?.listen)
}

fn listen(text: Option<String>) -> anyhow::Result<Option<Address>> {
    text.map(|text| text.parse().context("listen")).transpose()
}

fn read(path: &Path) -> anyhow::Result<File> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {path:?}"))?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

fn kind(name: &str) -> anyhow::Result<BackendKind> {
    let known = BackendKind::ALL.into_iter().find(|kind| kind.as_str() == name);
    known.with_context(|| format!("backend kind {name:?} is not known: vbd3, vbd or qdisk"))
}
