//! What our backend serves, as `params` names it.
//!
//! ```text
//! params   = { transport } { wrapper "," } store
//! transport= "aio:" | "tap:" | "phy:" | "raw:"        written by the toolstack, ignored
//! wrapper  = "delay:" number ("ns" | "us" | "ms" | "s")  every request takes that much longer
//!          | "limit:" number "iops" | "limit:" size "/s" requests or bytes per second
//!          | "error:" [ operation "@" ] percent "%"    that share of the requests fails
//! store    = "null:" size                             accepts writes; reads leave buffers as they are
//!          | "memory:" size                           gone when the device closes
//!          | "file:" path | path                      file or block device
//! operation= "read" | "write" | "flush" | "discard"
//! ```
//! The first wrapper is the outermost. A path is anything that begins with `/` or has no `word:` in
//! front; in the latter case it is relative to `/dev`, as for Xen's block script. After `file:` it is
//! taken verbatim. Image formats other than raw (`qcow2:` and the like) are refused by name.

use super::{SizeError, format_size, parse_size};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// What the backend serves. Displays as a string that parses to the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The wrappers that requests pass, outermost first; at most [`Target::MAX_WRAPPERS`].
    pub wrappers: Vec<Wrapper>,
    /// What is behind them.
    pub store: Store,
}

/// What serves the requests.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Store {
    /// Accepts writes, and leaves read buffers as they are; the size in bytes.
    Null(u64),
    /// Memory of the backend; the size in bytes.
    Memory(u64),
    /// A file or block device.
    Path(PathBuf),
}

/// A layer in front of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wrapper {
    /// Every request takes that much longer.
    Delay(Duration),
    /// Requests per second.
    Iops(u64),
    /// Bytes per second.
    Bandwidth(u64),
    /// Some requests fail.
    Error {
        /// Which requests; `None` for any.
        operation: Option<Faulty>,
        /// How many in a million.
        parts_per_million: u32,
    },
}

/// An operation that can be made to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Faulty {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes and barriers.
    Flush,
    /// Discards.
    Discard,
}

/// Why `params` cannot be served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TargetError {
    /// `params` is empty.
    #[error("the target is empty: name a file, a block device, null:SIZE or memory:SIZE")]
    Empty,
    /// An image format that we do not read.
    #[error("{0} images cannot be served: convert to raw, or attach with backendtype=qdisk")]
    Format(String),
    /// An unknown word in front of a colon.
    #[error("unknown word {0:?} in front of a colon; if it is part of a path, write file:PATH")]
    Unknown(String),
    /// Not a size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A disk consists of whole sectors, at least one.
    #[error("{0:?} is no size of a disk: it must be a multiple of 512 bytes, and not 0")]
    Sectors(String),
    /// A malformed wrapper.
    #[error(
        "{0:?} is none of delay:200us, limit:5000iops, limit:100M/s, error:1% or error:write@0.5%"
    )]
    Wrapper(String),
    /// A wrapper with nothing to wrap.
    #[error("{0:?} stands in front of a disk: {0},/path")]
    Bare(String),
    /// More wrappers than anyone needs.
    #[error("more than {} wrappers", Target::MAX_WRAPPERS)]
    TooMany,
    /// A path with a NUL in it.
    #[error("a path cannot have a NUL byte in it")]
    Nul,
}

impl Faulty {
    const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Discard];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
        }
    }
}

/// Parts per million in one percent.
const PERCENT: u32 = 10_000;
const UNITS: [(&str, u64); 4] = [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];
/// The longest delay: longer than any guest waits, short enough that sums cannot overflow.
const MAX_DELAY: Duration = Duration::from_secs(3600);
const FOREIGN_FORMATS: [&str; 6] = ["qcow", "qcow2", "vhd", "vhdx", "qed", "vmdk"];

impl Target {
    /// Each wrapper costs every request a little, and a stack frame.
    pub const MAX_WRAPPERS: usize = 8;
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(params: &str) -> Result<Self, TargetError> {
        let mut wrappers = Vec::new();
        let mut rest = params;
        loop {
            let (word, behind) = split_word(rest);
            match word {
                Some("aio" | "tap" | "phy" | "raw") if wrappers.is_empty() => rest = behind,
                Some(word @ ("delay" | "limit" | "error")) => {
                    let (argument, next) = behind.split_once(',').unwrap_or((behind, ""));
                    let this = || format!("{word}:{argument}");
                    let wrapper = wrapper(word, argument);
                    wrappers.push(wrapper.ok_or_else(|| TargetError::Wrapper(this()))?);
                    if next.is_empty() {
                        return Err(TargetError::Bare(this()));
                    }
                    if wrappers.len() > Self::MAX_WRAPPERS {
                        return Err(TargetError::TooMany);
                    }
                    rest = next;
                }
                _ => return Ok(Self { wrappers, store: store(word, rest, behind)? }),
            }
        }
    }
}

/// A lower-case word in front of a colon, and the text after the colon.
fn split_word(text: &str) -> (Option<&str>, &str) {
    match text.split_once(':') {
        Some((word, behind))
            if !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) =>
        {
            (Some(word), behind)
        }
        _ => (None, text),
    }
}

fn store(word: Option<&str>, whole: &str, behind: &str) -> Result<Store, TargetError> {
    let path = |text: &str| match text {
        "" => Err(TargetError::Empty),
        _ if text.contains('\0') => Err(TargetError::Nul),
        _ => Ok(Store::Path(PathBuf::from(text))),
    };
    match word {
        None if whole.is_empty() || whole.starts_with('/') => path(whole),
        None => path(&format!("/dev/{whole}")),
        Some("file") => path(behind),
        Some("null") => Ok(Store::Null(disk_size(behind)?)),
        Some("memory") => Ok(Store::Memory(disk_size(behind)?)),
        Some(format) if FOREIGN_FORMATS.contains(&format) => {
            Err(TargetError::Format(format.to_owned()))
        }
        Some(word) => Err(TargetError::Unknown(word.to_owned())),
    }
}

fn disk_size(text: &str) -> Result<u64, TargetError> {
    match parse_size(text)? {
        bytes if bytes > 0 && bytes % 512 == 0 => Ok(bytes),
        _ => Err(TargetError::Sectors(text.to_owned())),
    }
}

fn wrapper(word: &str, argument: &str) -> Option<Wrapper> {
    match word {
        "delay" => delay(argument).map(Wrapper::Delay),
        "limit" => limit(argument),
        _ => {
            let (operation, percent) = match argument.split_once('@') {
                Some((name, percent)) => {
                    let operation = Faulty::ALL.into_iter().find(|item| item.as_str() == name)?;
                    (Some(operation), percent)
                }
                None => (None, argument),
            };
            let parts_per_million = parts_per_million(percent.strip_suffix('%')?)?;
            Some(Wrapper::Error { operation, parts_per_million })
        }
    }
}

fn delay(argument: &str) -> Option<Duration> {
    let (unit, nanoseconds) = UNITS.into_iter().find(|(unit, _)| argument.ends_with(unit))?;
    let number = decimal(argument.strip_suffix(unit)?)?;
    let delay = Duration::from_nanos(number.checked_mul(nanoseconds)?);
    (delay <= MAX_DELAY).then_some(delay)
}

fn limit(argument: &str) -> Option<Wrapper> {
    let wrapper = match argument.strip_suffix("iops") {
        Some(number) => Wrapper::Iops(decimal(number)?),
        None => Wrapper::Bandwidth(parse_size(argument.strip_suffix("/s")?).ok()?),
    };
    // At 0 nothing would ever complete.
    (!matches!(wrapper, Wrapper::Iops(0) | Wrapper::Bandwidth(0))).then_some(wrapper)
}

/// Reads `12`, `0.5` or `0.0001`: a percentage with up to four decimals.
fn parts_per_million(percent: &str) -> Option<u32> {
    let (whole, fraction) = percent.split_once('.').unwrap_or((percent, "0"));
    if fraction.is_empty() || fraction.len() > 4 {
        return None;
    }
    let whole = u32::try_from(decimal(whole)?).ok()?.checked_mul(PERCENT)?;
    let parts = whole.checked_add(u32::try_from(decimal(&format!("{fraction:0<4}"))?).ok()?)?;
    (parts <= 100 * PERCENT).then_some(parts)
}

/// Only digits: `parse` would take a sign.
fn decimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for wrapper in &self.wrappers {
            write!(f, "{wrapper},")?;
        }
        self.store.fmt(f)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null(bytes) => write!(f, "null:{}", format_size(*bytes)),
            Self::Memory(bytes) => write!(f, "memory:{}", format_size(*bytes)),
            Self::Path(path) if path.is_absolute() => write!(f, "{}", path.display()),
            Self::Path(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl fmt::Display for Wrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delay(delay) => {
                let nanoseconds = delay.as_nanos();
                let exact = |(_, each): &&(&str, u64)| nanoseconds % u128::from(*each) == 0;
                let (unit, each) = UNITS.iter().rev().find(exact).unwrap_or(&UNITS[0]);
                write!(f, "delay:{}{unit}", nanoseconds / u128::from(*each))
            }
            Self::Iops(number) => write!(f, "limit:{number}iops"),
            Self::Bandwidth(bytes) => write!(f, "limit:{}/s", format_size(*bytes)),
            Self::Error { operation, parts_per_million } => {
                f.write_str("error:")?;
                if let Some(operation) = operation {
                    write!(f, "{}@", operation.as_str())?;
                }
                let (whole, fraction) = (parts_per_million / PERCENT, parts_per_million % PERCENT);
                write!(f, "{whole}")?;
                if fraction != 0 {
                    write!(f, ".{}", format!("{fraction:04}").trim_end_matches('0'))?;
                }
                f.write_str("%")
            }
        }
    }
}
