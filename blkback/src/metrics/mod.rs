//! Statistics for those outside the daemon: as Prometheus text and as JSON, over HTTP.
//!
//! [`Snapshot`] is the one reading that both forms are written from, and the JSON document itself:
//! its fields are the schema. Taking one loads the rings' counters, which costs a ring's thread no
//! more than a cache line that has to come back to its core; no ring waits for a reader.
//!
//! [`Server`] answers `GET /metrics` and `GET /stats`; [`fetch`] asks it.

mod address;
mod client;
mod distribution;
mod process;
mod prometheus;
mod server;
mod snapshot;
#[cfg(test)]
mod tests;

pub use address::{Address, AddressError, DEFAULT_ADDRESS};
pub use client::{FetchError, fetch};
pub use distribution::Distribution;
pub use process::{Clock, Process};
pub use server::{ListenError, Server};
pub use snapshot::{Derived, Device, Quantiles, Ring, Snapshot};

/// Where the JSON document is.
pub const STATS_PATH: &str = "/stats";
/// Where the Prometheus text is: the path that Prometheus asks for if it is not told another.
pub const METRICS_PATH: &str = "/metrics";
