//! Opens the disk that a configuration names.

use super::Storage;
use super::delay::Delay;
use super::fault::Faulty;
use super::file::FileDisk;
use super::limit::{Limited, Unit};
use super::memory::Memory;
use super::null::Null;
use ring_proto::abi::SECTOR_SIZE;
use serde::Deserialize;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use xenstore_glue::disk::{Store, Target, Wrapper};

/// How to open a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Refuse writes and discards.
    pub read_only: bool,
    /// Whether to bypass the page cache of files and devices.
    pub direct: Direct,
    /// Offer discard if the disk supports it.
    pub discard: bool,
    /// Others may use the image at the same time, at their own risk.
    pub shared: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, direct: Direct::Auto, discard: true, shared: false }
    }
}

/// Use of O_DIRECT.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Direct {
    /// Where it works with 512-byte sectors, and on devices that others may write to (w!); the log says where not.
    Auto,
    /// Or the disk is refused; it has the sector size that O_DIRECT needs there.
    On,
    /// Never.
    Off,
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path.
    #[error("{path:?} does not exist: create it or correct the target")]
    Missing {
        /// As configured.
        path: PathBuf,
    },
    /// The path does not name a disk.
    #[error("{path:?} is {kind}: name a raw image file or a block device")]
    Kind {
        /// As configured.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Access is refused.
    #[error("{path:?}: {source}: give the daemon read{} access, or {}", if *.read_only { "" } else { " and write" }, if *.read_only { "choose another path" } else { "make the disk read-only" })]
    Permission {
        /// As configured.
        path: PathBuf,
        /// Whether only reading was asked for.
        read_only: bool,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else holds the device.
    #[error(
        "{path:?} is in use ({}): release it",
        if *.read_only { "a disk or program that may write to it holds it" } else { "mounted, or held by another disk or program" },
    )]
    Busy {
        /// As configured.
        path: PathBuf,
        /// Whether only reading was asked for.
        read_only: bool,
    },
    /// The disk would have no sectors.
    #[error("{path:?} is empty: give it a size, for example with truncate -s")]
    Empty {
        /// As configured.
        path: PathBuf,
    },
    /// The size is not a whole number of sectors.
    #[error(
        "{path:?} has {bytes} bytes, not a multiple of {sector_size}: make it larger with truncate -s %{sector_size}"
    )]
    Size {
        /// As configured.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Bytes of a sector.
        sector_size: u32,
    },
    /// O_DIRECT was demanded and cannot be had.
    #[error(
        "{path:?}: O_DIRECT does not work here: {source}: allow buffered access (direct = auto)"
    )]
    Direct {
        /// As configured.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call failed for another reason.
    #[error("{path:?}: cannot {doing}: {source}")]
    Io {
        /// As configured.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The size of a null or memory disk is zero or not a whole number of sectors.
    #[error("a disk of {bytes} bytes: the size must be a multiple of 512, and not 0")]
    TargetSize {
        /// As configured.
        bytes: u64,
    },
    /// Memory cannot be reserved.
    #[error("cannot reserve {bytes} bytes of memory: {source}: make the disk smaller")]
    Memory {
        /// As configured.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Opens a disk.
///
/// # Errors
/// When it cannot be used; the message says what to do.
pub fn open(target: &Target, options: Options) -> Result<Arc<dyn Storage>, OpenError> {
    let Options { read_only, discard, .. } = options;
    let store: Arc<dyn Storage> = match &target.store {
        Store::Null(bytes) => Arc::new(Null::new(sectors(*bytes)?, read_only, discard)),
        Store::Memory(bytes) => Arc::new(
            Memory::new(sectors(*bytes)?, read_only, discard)
                .map_err(|source| OpenError::Memory { bytes: *bytes, source })?,
        ),
        Store::Path(path) => Arc::new(FileDisk::open(path, options)?),
    };
    Ok(target.wrappers.iter().rev().fold(store, |inner, wrapper| match wrapper {
        Wrapper::Delay(time) => Arc::new(Delay { time: *time, inner }),
        Wrapper::Iops(rate) => Arc::new(Limited::new(*rate, Unit::Operations, inner)),
        Wrapper::Bandwidth(rate) => Arc::new(Limited::new(*rate, Unit::Bytes, inner)),
        Wrapper::Error { operation, parts_per_million } => {
            Arc::new(Faulty::new(*operation, *parts_per_million, inner))
        }
    }))
}

/// Number of sectors of a disk whose size is configured.
fn sectors(bytes: u64) -> Result<u64, OpenError> {
    let sector = SECTOR_SIZE as u64;
    if bytes == 0 || !bytes.is_multiple_of(sector) {
        return Err(OpenError::TargetSize { bytes });
    }
    Ok(bytes / sector)
}
