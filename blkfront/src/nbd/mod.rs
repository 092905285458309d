//! An NBD server on a unix socket, for programs that want a disk.
//!
//! Fixed newstyle with `NBD_OPT_GO`, structured replies and many connections (nbd's `doc/proto.md`). A
//! connection is pinned to a vCPU, whose one thread carries its requests from the socket to the
//! ring and back: there is no lock and no other thread in between, and no copy of the data
//! between the socket and the granted pages. While answers are due from the backend the thread spins as
//! [`Config::waiting`] says, but for [`crate::Waiting::Poll`], which is taken for
//! [`crate::Waiting::Event`]: there are sockets to be watched, too.
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
mod handshake;
mod proto;
mod requests;
mod socket;
mod worker;

use crate::{Config, Disk, MAX_DEPTH, MAX_POOL_BYTES};
use connection::MAX_REQUESTS;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use proto::Export;
use requests::{Requests, ZERO_BYTES};
use ring_proto::abi::PAGE_SIZE;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use worker::{Newcomer, Shared, Worker};

/// Clients at a time, unless [`Options::max_connections`] says otherwise: fio with eight jobs and an
/// `nbdcopy` beside it.
pub const DEFAULT_MAX_CONNECTIONS: usize = 16;
/// Bytes in flight for a client, unless [`Options::in_flight`] says otherwise: the depth and size at
/// which a fast disk is busy (32 of 64 KiB), and what `qemu-img convert` transfers at once.
pub const DEFAULT_IN_FLIGHT: usize = 2 << 20;
/// The largest [`Options::in_flight`]: what clients may transfer at once when they were not told a
/// limit, by the protocol.
pub const MAX_IN_FLIGHT: usize = 32 << 20;
/// The longest export name, by the protocol.
const MAX_NAME_BYTES: usize = 4096;
/// How long the listener rests when a client cannot be let in for want of descriptors.
const ACCEPT_REST_MS: u16 = 100;

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

    fn check(&self, vcpus: usize) -> Result<(), Error> {
        let refuse = |field, value: usize, rule: String| Err(Error::Options { field, value, rule });
        if self.export.len() > MAX_NAME_BYTES {
            let rule = format!("at most {MAX_NAME_BYTES} bytes long");
            return refuse("export name's length", self.export.len(), rule);
        }
        if self.in_flight == 0
            || !self.in_flight.is_multiple_of(PAGE_SIZE)
            || self.in_flight > MAX_IN_FLIGHT
        {
            let rule = format!("a multiple of {PAGE_SIZE}, up to {MAX_IN_FLIGHT}");
            return refuse("in_flight", self.in_flight, rule);
        }
        let by_pool = (MAX_POOL_BYTES - ZERO_BYTES) / self.in_flight;
        let most = by_pool.min((MAX_DEPTH - 1) / MAX_REQUESTS).saturating_mul(vcpus);
        if self.max_connections == 0 || self.max_connections > most {
            let rule = format!("1 to {most} with {vcpus} vCPUs and that much in flight");
            return refuse("max_connections", self.max_connections, rule);
        }
        Ok(())
    }
}

/// Why a disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of [`Options`] is out of range.
    #[error("{field} is {value}, but must be {rule}")]
    Options {
        /// The field.
        field: &'static str,
        /// What it is.
        value: usize,
        /// What it may be.
        rule: String,
    },
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

/// A vCPU's thread, as the listener sees it.
#[derive(Debug)]
struct Desk {
    shared: Arc<Shared>,
    inbox: Sender<Newcomer>,
    thread: JoinHandle<io::Result<()>>,
}

/// A socket file, removed when dropped.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Serves a disk. Dropping it before it was run closes the socket.
#[derive(Debug)]
pub struct Server<'a> {
    disk: &'a Disk,
    options: Options,
    listener: UnixListener,
    file: SocketFile,
    workers: Vec<(Worker, Arc<Shared>, Sender<Newcomer>)>,
}

impl<'a> Server<'a> {
    /// Listens on `path` and takes all queues of `disk`, which is to be opened with
    /// [`Options::config`]. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// When an option is out of range, the socket cannot be made or is somebody's, a queue is
    /// taken, or its pool is too small.
    pub fn bind(path: impl AsRef<Path>, disk: &'a Disk, options: Options) -> Result<Self, Error> {
        let path = path.as_ref();
        options.check(disk.vcpus() as usize)?;
        let (listener, file) =
            listen(path).map_err(|source| Error::Socket { path: path.to_owned(), source })?;
        let name: Arc<str> = options.export.as_str().into();
        let places = options.max_connections.div_ceil(disk.vcpus() as usize);
        let geometry = disk.geometry();
        let mut workers = Vec::new();
        for vcpu in 0..disk.vcpus() {
            let bell =
                EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(system("make an eventfd"))?;
            let connections = AtomicUsize::new(0);
            let shared = Arc::new(Shared { connections, bell, stop: AtomicBool::new(false) });
            let (sender, inbox) = channel();
            let depth = places * MAX_REQUESTS;
            let read_only = options.read_only || geometry.read_only;
            let queue = disk.queue(vcpu)?;
            let requests = Requests::new(queue, depth, geometry.sector_size, read_only)
                .ok_or(Error::Pool { vcpu })?;
            let worker = Worker {
                requests,
                inbox,
                shared: shared.clone(),
                name: name.clone(),
                max_pages: options.in_flight / PAGE_SIZE,
                connections: std::iter::repeat_with(|| None).take(places).collect(),
                depth,
            };
            workers.push((worker, shared, sender));
        }
        // Connections go to workers in turn: to another ring first, then to another vCPU of a ring.
        let mut on_ring = vec![0; disk.rings() as usize];
        workers.sort_by_cached_key(|(worker, ..)| {
            let ring = worker.requests.ring();
            let before = &mut on_ring[ring as usize];
            *before += 1;
            (*before, ring)
        });
        Ok(Self { disk, options, listener, file, workers })
    }

    /// What to give to clients, as in the `nbd-uri` specification.
    pub fn uri(&self) -> String {
        let export = escape(self.options.export.as_bytes());
        let path = escape(self.file.0.as_os_str().as_encoded_bytes());
        format!("nbd+unix:///{export}?socket={path}")
    }

    /// Serves until `stop` becomes readable: then requests that have come in are answered and all
    /// connections are closed, a client being given 5 seconds to take its answers.
    ///
    /// # Errors
    /// When threads cannot be made, or one of them or the listener fails.
    pub fn run(self, stop: impl AsFd) -> Result<(), Error> {
        let Self { disk, options, listener, file, workers } = self;
        let mut desks = Vec::new();
        let mut result = Ok(());
        for (n, (worker, shared, inbox)) in workers.into_iter().enumerate() {
            let builder = std::thread::Builder::new().name(format!("nbd-vcpu{n}"));
            match builder.spawn(move || worker.run()) {
                Ok(thread) => desks.push(Desk { shared, inbox, thread }),
                Err(e) => result = Err(system("start a thread")(e)),
            }
        }
        if result.is_ok() {
            result = accept(disk, &options, &listener, &desks, stop);
        }
        drop((listener, file));
        for desk in &desks {
            desk.shared.stop.store(true, Ordering::Relaxed);
            let _ = desk.shared.bell.write(1);
        }
        for desk in desks {
            let ended = desk.thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
            result = result.and(ended.map_err(system("serve a vCPU's connections")));
        }
        result
    }
}

fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
            if !is_socket || !UnixStream::connect(path).is_err_and(refused) {
                return Err(e);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        listener => listener?,
    };
    let file = SocketFile(path.to_owned());
    listener.set_nonblocking(true)?;
    Ok((listener, file))
}

fn accept(
    disk: &Disk,
    options: &Options,
    listener: &UnixListener,
    desks: &[Desk],
    stop: impl AsFd,
) -> Result<(), Error> {
    let mut turn = 0;
    let mut timeout = PollTimeout::NONE;
    loop {
        let mut fds = [stop.as_fd(), listener.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // At rest, the listener would be ready all the time.
        let watched = if timeout.is_none() { 2 } else { 1 };
        match poll(fds.get_mut(..watched).unwrap_or_default(), timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(system("wait for clients")(e)),
        }
        if fds[0].any() == Some(true) {
            return Ok(());
        }
        if let Some(desk) = desks.iter().find(|desk| desk.thread.is_finished()) {
            let name = desk.thread.thread().name().unwrap_or_default().to_owned();
            return Err(system("serve connections")(io::Error::other(format!("{name} ended"))));
        }
        timeout = PollTimeout::NONE;
        match listener.accept() {
            Ok((socket, _)) => {
                let geometry = disk.geometry();
                let export = Export::new(
                    &geometry,
                    disk.features().discard,
                    options.read_only,
                    options.in_flight as u32,
                );
                let_in(Newcomer { socket, export }, desks, options.max_connections, &mut turn);
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                tracing::warn!("an NBD client could not be let in: {e}");
                timeout = ACCEPT_REST_MS.into();
            }
        }
    }
}

/// Gives a client to the vCPU that has fewest, and among equals to the next in turn.
fn let_in(newcomer: Newcomer, desks: &[Desk], max_connections: usize, turn: &mut usize) {
    let load = |desk: &Desk| desk.shared.connections.load(Ordering::Acquire);
    if desks.iter().map(load).sum::<usize>() >= max_connections {
        tracing::warn!(
            "an NBD client was turned away: all {max_connections} connections are in use"
        );
        return;
    }
    let count = desks.len().max(1);
    let in_turn = (0..count).filter_map(|n| desks.get((*turn + n) % count));
    if let Some(desk) = in_turn.min_by_key(|desk| load(desk)) {
        *turn = (*turn + 1) % count;
        desk.shared.connections.fetch_add(1, Ordering::Relaxed);
        // A worker that is gone is noticed by the listener.
        let _ = desk.inbox.send(newcomer);
        let _ = desk.shared.bell.write(1);
    }
}

/// Percent-encodes what may not stand in a path or query of a URI.
fn escape(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut escaped = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}
