//! What each end of a virtual block device writes to xenstore, and what the two agree on.
//!
//! | who | when | what |
//! |---|---|---|
//! | backend | before `InitWait` | [`BackendOffer`] |
//! | frontend | before `Initialised` | [`FrontendRequest`] |
//! | backend | before `Connected` | [`DeviceProperties`] |
//!
//! Both ends compute the same [`Agreement`] from offer and request. The rules are those of Xen's
//! public/io/blkif.h, and where deployed peers differ, those of Linux (drivers/block/xen-blkback/xenbus.c,
//! drivers/block/xen-blkfront.c).
//!
//! Everything is read through [`Keys`], a function from a path relative to the peer's directory to a
//! value; with a live store, fetch the keys first. The peer chose the values, so numbers must be plain
//! decimals, counts are checked against the offer before anything is allocated, and what is not
//! acceptable comes back as a [`Refusal`] that is fit for a log and for the `error` node.

mod agreement;
mod device;
mod offer;
mod paths;
mod request;
mod toolstack;
mod vdev;

pub use agreement::Agreement;
pub use device::{DeviceProperties, Discard, MAX_SECTOR_SIZE};
pub use offer::{BackendOffer, MAX_QUEUES};
pub use paths::{BackendKind, DevicePaths, PathError};
pub use request::{FrontendRequest, PROTOCOL_DEFAULT, QueueKeys};
pub use toolstack::{AttachError, Directory, attach_nodes};
pub use vdev::{VdevError, VirtualDevice};

/// A peer's directory: maps a relative path to the value of that node, if there is one.
pub type Keys<'a> = dyn Fn(&str) -> Option<Vec<u8>> + 'a;

/// Nodes to write, in order: paths relative to the writer's own directory, and values.
pub type Nodes = Vec<(String, String)>;

/// Why the other end's keys cannot be accepted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct Refusal {
    /// The key, relative to the directory of the end that wrote it.
    pub key: String,
    /// Its value, escaped and cut to [`Refusal::MAX_VALUE`] characters; `None` if it is missing.
    pub value: Option<String>,
    /// The rule it breaks.
    pub rule: Rule,
}

impl Refusal {
    /// The most characters of a value to show: no valid one is longer, and the peer must not fill
    /// our log.
    pub const MAX_VALUE: usize = 64;

    fn new(key: impl Into<String>, value: Option<&[u8]>, rule: Rule) -> Self {
        let value = value.map(|bytes| {
            bytes.escape_ascii().map(char::from).take(Self::MAX_VALUE).collect::<String>()
        });
        Self { key: key.into(), value, rule }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} = \"{value}\": {}", self.key, self.rule),
            None => write!(f, "{}: {}", self.key, self.rule),
        }
    }
}

/// The rule that a key breaks.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Rule {
    /// The key must be there.
    #[error("missing")]
    Missing,
    /// The value must be a plain decimal number.
    #[error("not a decimal number")]
    NotDecimal,
    /// The value is too large.
    #[error("above {0}")]
    Above(u64),
    /// The value is too small.
    #[error("below {0}")]
    Below(u64),
    /// The value must be a power of two.
    #[error("not a power of two")]
    NotPowerOfTwo,
    /// Another key names the same grant or port.
    #[error("same as {0}")]
    Repeats(String),
    /// The `protocol` is unknown.
    #[error("unknown ABI, known are x86_64-abi, x86_32-abi and this machine's own")]
    UnknownProtocol,
    /// The backend does not offer it.
    #[error("not offered by the backend")]
    NotOffered,
}

/// The most digits of a number: those of 2^64.
const MAX_DIGITS: usize = 20;

/// Reads a number, if the key exists.
fn number(keys: &Keys<'_>, key: &str, max: u64) -> Result<Option<u64>, Refusal> {
    let Some(value) = keys(key) else { return Ok(None) };
    let refuse = |rule| Err(Refusal::new(key, Some(&value), rule));
    if value.is_empty() || value.len() > MAX_DIGITS || !value.iter().all(u8::is_ascii_digit) {
        return refuse(Rule::NotDecimal);
    }
    // 20 digits can still overflow; that is above any limit.
    let number = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
    match number {
        Some(number) if number <= max => Ok(Some(number)),
        _ => refuse(Rule::Above(max)),
    }
}

/// Reads a number that fits in 32 bits, if the key exists.
fn number32(keys: &Keys<'_>, key: &str) -> Result<Option<u32>, Refusal> {
    Ok(number(keys, key, u32::MAX.into())?.and_then(|n| u32::try_from(n).ok()))
}

/// Reads a required number.
fn required32(keys: &Keys<'_>, key: &str) -> Result<u32, Refusal> {
    number32(keys, key)?.ok_or_else(|| Refusal::new(key, None, Rule::Missing))
}

/// Reads a feature: a missing key is no, as everywhere in blkif.h; a number other than 0 is yes.
fn flag(keys: &Keys<'_>, key: &str) -> Result<bool, Refusal> {
    Ok(number32(keys, key)?.is_some_and(|n| n != 0))
}

fn node(key: &str, value: impl ToString) -> (String, String) {
    (key.to_owned(), value.to_string())
}

fn bit(value: bool) -> u8 {
    u8::from(value)
}

#[cfg(test)]
mod tests;
