//! The harness that end-to-end tests, the demonstration and the benchmarks run on.
//!
//! Everything runs as it is deployed: separate processes, real sockets, real files.

pub mod cpu;
pub mod host;
pub mod process;
pub mod scratch;
pub mod xen;
