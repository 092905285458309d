//! A Xen block frontend in user space.
//!
//! [`Disk::open`] connects to a disk's backend through xenstore and the rings that both share. Each
//! vCPU (a thread of the caller's) then takes its own [`Queue`] and submits and completes I/O
//! on it. No lock stands between vCPUs, or between submission and completion: a queue that has a ring to
//! itself works on the ring directly, and where several queues share one, a thread owns the ring and
//! every queue reaches it over single-producer, single-consumer queues.
//!
//! Blocking:
//! ```no_run
//! # fn f(disk: &blkfront::Disk) -> Result<(), Box<dyn std::error::Error>> {
//! let mut queue = disk.queue(0)?;
//! let mut sector = [0; 512];
//! queue.read_at(0, &mut sector)?;
//! # Ok(()) }
//! ```
//! Many at once:
//! ```no_run
//! # fn f(disk: &blkfront::Disk) -> Result<(), Box<dyn std::error::Error>> {
//! # use blkfront::Io;
//! let mut queue = disk.queue(0)?;
//! let mut done = Vec::with_capacity(32);
//! queue.plug();
//! for n in 0..32 {
//!     let buffer = queue.alloc(4096).ok_or("no pages left")?;
//!     queue.submit(Io::read(n, n * 4096, buffer))?;
//! }
//! queue.unplug();
//! while done.len() < 32 {
//!     queue.wait(&mut done, None);
//! }
//! # Ok(()) }
//! ```
//!
//! # What a backend can and cannot do
//! It sees, and can change at any time, what is in the queues' granted buffers; that is what a disk
//! is for. Everything else it writes is checked: response ids and operations against what is in
//! flight, indices against the ring, every key in xenstore. A backend that breaks the protocol loses
//! its device ([`Violation`]); what was in flight fails with [`IoError::Gone`]. Data always goes through
//! pages that were zeroed and then hold only what is on its way to or from this disk: a toolstack that calls
//! a backend untrusted (XSA-403) asks for no more.
//!
//! # Memory
//! A disk takes, for each ring, its pages (1 to 16; 2 to 19 if it is split) and 32 bytes a slot, and for each vCPU
//! [`Config::pool_bytes`] of data pages, a page for each indirect request that so much data can be
//! split into, and some 200 bytes for each of [`Config::depth`] I/Os. Rings are
//! allocated when the disk is opened, the rest when a vCPU's queue is taken: an I/O allocates nothing.

mod blocking;
mod config;
mod control;
mod disk;
mod error;
mod fabric;
mod flight;
mod hw;
mod info;
mod io;
mod limits;
mod link;
mod local;
mod mapping;
pub mod nbd;
mod owner;
mod pool;
mod queue;
mod rings;
mod slab;
mod stats;
#[cfg(feature = "ublk")]
pub mod ublk;
mod wait;

pub use config::{
    Config, DEFAULT_DEPTH, DEFAULT_INDIRECT_SEGMENTS, DEFAULT_POOL_BYTES, MAX_DEPTH,
    MAX_POOL_BYTES, MAX_TIMEOUT, MAX_VCPUS, Protocol,
};
pub use disk::Disk;
pub use error::{Cause, Error, InvalidOption, IoError, Refusal, Refused, Result, Violation};
pub use info::{Features, Geometry, Info, RingInfo};
pub use io::{Completed, Io, Op};
pub use local::prepare_process;
pub use mapping::map_vcpus;
pub use pool::IoBuffer;
pub use queue::Queue;
pub use stats::Stats;
pub use xen_platform::{DEFAULT_SPIN, Waiting};

#[cfg(test)]
mod tests;
