//! The subcommands, and what they share.

pub(crate) mod bench;
mod host;
pub(crate) mod info;
pub(crate) mod nbd;
mod rings;
mod served;
#[cfg(feature = "ublk")]
pub(crate) mod ublk;
mod units;

pub(crate) use host::Host;
use rings::{Rings, Wait};
