//! NBD, for programs that want a disk: a [`Server`] on a unix socket, or a [`BlockDevice`] of the
//! kernel's own client.
//!
//! The server speaks fixed newstyle with `NBD_OPT_GO`, structured replies and many connections (nbd's
//! `doc/proto.md`). A connection is pinned to a vCPU, whose one thread carries its requests from the socket
//! to the ring and back: there is no lock and no other thread in between, and no copy of the data between
//! the socket and the granted pages. While responses are due from the backend, the thread spins as
//! [`Config::waiting`] says, but even with [`crate::Waiting::Poll`] it sleeps after some turns, as there
//! are sockets to watch.
//!
//! ```no_run
//! # fn f(platform: std::sync::Arc<dyn xen_platform::Platform>,
//! #      xenstore: xenstore_glue::client::Endpoint) -> Result<(), Box<dyn std::error::Error>> {
//! use blkfront::nbd::{Options, Server};
//! use blkfront::{Config, Disk};
//!
//! let options = Options::default();
//! let vcpus = 4;
//! let config = options.config(Config { vcpus, ..Config::default() });
//! let disk = Disk::open(platform, xenstore, "xvda", config)?;
//! let server = Server::bind("/run/xvda.sock", &disk, options)?;
//! println!("{}", server.uri());
//! let (stop, _stop_it) = std::os::unix::net::UnixStream::pair()?;
//! server.run(stop)?;
//! # Ok(()) }
//! ```
//!
//! # What a client can and cannot do
//! Whoever may open the socket may read and write the disk; its directory decides who. Nobody can
//! make the server hold more than [`Options::in_flight`] bytes of data and 128 requests: a client
//! that does not take its answers is not read from. Memory and places in the queue are shared out
//! in advance, so that a slow or hostile client delays no other.

mod connection;
mod crew;
mod device;
mod handshake;
mod ioctl;
mod proto;
mod requests;
mod server;
mod socket;
mod worker;

use crate::{Config, InvalidOption, MAX_DEPTH, MAX_POOL_BYTES};
use connection::MAX_REQUESTS;
use requests::ZERO_BYTES;
use ring_proto::abi::PAGE_SIZE;
use std::io;
use std::path::PathBuf;

pub use device::BlockDevice;
pub use server::Server;

/// Clients at a time, unless [`Options::max_connections`] says otherwise: fio with eight jobs and an
/// `nbdcopy` beside it.
pub const DEFAULT_MAX_CONNECTIONS: usize = 16;
/// Bytes in flight for a client, unless [`Options::in_flight`] says otherwise: the depth and size at
/// which a fast disk is busy (32 of 64 KiB), and what `qemu-img convert` transfers at once.
pub const DEFAULT_IN_FLIGHT: usize = 2 << 20;
/// The largest [`Options::in_flight`]: what the protocol lets clients transfer at once if they were told no
/// limit.
pub const MAX_IN_FLIGHT: usize = 32 << 20;
/// The longest export name, by the protocol.
const MAX_NAME_BYTES: usize = 4096;

/// How to serve a disk.
#[derive(Clone, Debug)]
pub struct Options {
    /// The export's name, up to 4096 bytes. Clients that ask for no name get it too.
    pub export: String,
    /// Refuse to write, even if the disk can be written.
    pub read_only: bool,
    /// Clients at a time. Those beyond are turned away.
    pub max_connections: usize,
    /// Bytes of data a client may have in flight: whole pages, up to [`MAX_IN_FLIGHT`]. No single
    /// read or write can be longer.
    pub in_flight: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: String::new(),
            read_only: false,
            max_connections: DEFAULT_MAX_CONNECTIONS,
            in_flight: DEFAULT_IN_FLIGHT,
        }
    }
}

impl Options {
    /// `config` with a pool and a depth that suffice for serving with these options.
    pub fn config(&self, config: Config) -> Config {
        let connections = self.max_connections.div_ceil(config.vcpus.max(1) as usize);
        let pool_bytes = self.in_flight.saturating_mul(connections).saturating_add(ZERO_BYTES);
        let depth = connections.saturating_mul(MAX_REQUESTS).saturating_add(1);
        Config { pool_bytes, depth, ..config }
    }

    /// Whether a disk of this many vCPUs can be served with these options.
    ///
    /// # Errors
    /// What is out of range.
    pub fn check(&self, vcpus: usize) -> Result<(), InvalidOption> {
        let (name, in_flight, connections) =
            (self.export.len(), self.in_flight, self.max_connections);
        InvalidOption::unless(name <= MAX_NAME_BYTES, "export name's length", name, || {
            format!("at most {MAX_NAME_BYTES} bytes")
        })?;
        let fits =
            in_flight.is_multiple_of(PAGE_SIZE) && (PAGE_SIZE..=MAX_IN_FLIGHT).contains(&in_flight);
        InvalidOption::unless(fits, "in_flight", in_flight, || {
            format!("a multiple of {PAGE_SIZE}, up to {MAX_IN_FLIGHT}")
        })?;
        let by_pool = (MAX_POOL_BYTES - ZERO_BYTES) / in_flight;
        let most = by_pool.min((MAX_DEPTH - 1) / MAX_REQUESTS).saturating_mul(vcpus);
        let fits = (1..=most).contains(&connections);
        InvalidOption::unless(fits, "max_connections", connections, || {
            format!("1 to {most} with {vcpus} vCPUs and that much in flight")
        })
    }
}

/// Why a disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of [`Options`].
    #[error(transparent)]
    Options(#[from] InvalidOption),
    /// The disk's pool does not hold what was promised to the clients.
    #[error("vCPU {vcpu} has too few pages: open the disk as Options::config says")]
    Pool {
        /// The vCPU.
        vcpu: u32,
    },
    /// The socket cannot be listened on.
    #[error("{path}: {source}", path = path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's block device cannot be used.
    #[error("{path}: {doing}: {source}{remedy}", path = path.display())]
    Device {
        /// The device.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
        /// What to do about it, after a colon, or nothing.
        remedy: &'static str,
    },
    /// A queue is taken already.
    #[error(transparent)]
    Disk(#[from] crate::Error),
    /// A thread or a descriptor could not be made, or failed.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::System { doing, source: e.into() }
}
