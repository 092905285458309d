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
use std::fmt::Display;
use std::io::Write;

/// Writes lines to stdout.
fn say(lines: &impl Display) {
    let mut out = std::io::stdout();
    // It does not matter if nobody reads it.
    let _ = writeln!(out, "{}", lines.to_string().trim_end()).and_then(|()| out.flush());
}
