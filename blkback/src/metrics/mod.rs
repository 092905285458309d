//! Statistics for users outside the daemon, as Prometheus text and as JSON, over HTTP.
//!
//! Both forms are written from a [`Snapshot`], which is also the JSON document itself: its fields
//! are the schema. Taking one loads the rings' counters, which costs a ring's thread no more than a
//! cache line that must come back to its core; no ring waits for a reader.
//!
//! [`Server`] answers `GET /metrics` and `GET /stats`; [`fetch`] is its client.

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
/// Where the Prometheus text is: the path that Prometheus asks for by default.
pub const METRICS_PATH: &str = "/metrics";
