//! A disk as a block device of this machine, `/dev/ublkbN`, by Linux's ublk (6.4 or later).
//!
//! ublk hands a block device's requests to a process by io_uring. Each vCPU has a queue of the device and a
//! thread that carries requests between that and the ring; data is copied once, by the kernel, from or to
//! granted pages.
//!
//! ```no_run
//! # fn f(platform: std::sync::Arc<dyn xen_platform::Platform>,
//! #      xenstore: xenstore_glue::client::Endpoint) -> Result<(), Box<dyn std::error::Error>> {
//! use blkfront::ublk::{BlockDevice, Options};
//! use blkfront::{Config, Disk};
//!
//! let options = Options::default();
//! let config = options.config(Config { vcpus: 2, ..Config::default() });
//! let disk = Disk::open(platform, xenstore, "xvda", config)?;
//! let device = BlockDevice::add(&disk, options)?;
//! let path = device.path();
//! let (stop, _stop_it) = std::os::unix::net::UnixStream::pair()?;
//! device.run(stop, || println!("{}", path.display()))?;
//! # Ok(()) }
//! ```

mod abi;
mod control;
mod queue;

use crate::local::{News, sync, wait_for_news};
use crate::{Config, Disk, InvalidOption, MAX_DEPTH, MAX_POOL_BYTES};
use abi::{DeviceInfo, Parameters};
use control::Registered;
use nix::sys::eventfd::{EfdFlags, EventFd};
use queue::{Shared, Worker};
use ring_proto::abi::{PAGE_SIZE, SECTOR_SIZE};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// Requests a queue holds, unless [`Options::depth`] says otherwise: as many as a ring of one page.
pub const DEFAULT_DEPTH: u16 = 32;
/// Bytes of the longest request, unless [`Options::max_io`] says otherwise: with [`DEFAULT_DEPTH`], two
/// mebibytes a vCPU. xen-gntalloc grants as much for one vCPU without being told to (1024 pages in all).
pub const DEFAULT_MAX_IO: usize = 64 << 10;

/// How long a backend may take for what is in flight when the device is removed.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How to make a device of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// N of `/dev/ublkbN`; the kernel chooses if `None`.
    pub id: Option<u32>,
    /// Refuse to write, even if the disk can be written.
    pub read_only: bool,
    /// Requests a queue holds.
    pub depth: u16,
    /// Bytes of the longest request: whole pages.
    pub max_io: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { id: None, read_only: false, depth: DEFAULT_DEPTH, max_io: DEFAULT_MAX_IO }
    }
}

impl Options {
    /// `config` with a pool and a depth that suffice for these options.
    pub fn config(&self, config: Config) -> Config {
        let depth = usize::from(self.depth);
        Config { pool_bytes: self.max_io.saturating_mul(depth), depth, ..config }
    }

    /// Whether a device can have these options.
    ///
    /// # Errors
    /// What is out of range.
    pub fn check(&self) -> Result<(), InvalidOption> {
        let (depth, max_io) = (usize::from(self.depth), self.max_io);
        let fits = (1..=MAX_DEPTH).contains(&depth);
        InvalidOption::unless(fits, "depth", depth, || format!("1 to {MAX_DEPTH}"))?;
        let most = MAX_POOL_BYTES / depth;
        let fits = max_io.is_multiple_of(PAGE_SIZE) && (PAGE_SIZE..=most).contains(&max_io);
        InvalidOption::unless(fits, "max_io", max_io, || {
            format!("a multiple of {PAGE_SIZE}, up to {most} with that depth")
        })
    }
}

/// Why there can be no device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of [`Options`].
    #[error(transparent)]
    Options(#[from] InvalidOption),
    /// The kernel refused something.
    #[error("ublk: {doing}: {source}{remedy}")]
    Kernel {
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
}

fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Kernel { doing, source: e.into(), remedy: "" }
}

/// A device that is not visible yet. Dropping it removes it.
#[derive(Debug)]
pub struct BlockDevice<'a> {
    disk: &'a Disk,
    options: Options,
    device: Registered,
}

/// A queue's thread.
#[derive(Debug)]
struct Thread {
    shared: Arc<Shared>,
    thread: JoinHandle<io::Result<()>>,
}

impl<'a> BlockDevice<'a> {
    /// Makes a device of `disk`, which must have been opened with [`Options::config`].
    ///
    /// # Errors
    /// When an option is out of range, the kernel has no ublk, or the number is taken.
    pub fn add(disk: &'a Disk, options: Options) -> Result<Self, Error> {
        options.check()?;
        let info = DeviceInfo {
            queues: disk.vcpus() as u16,
            depth: options.depth,
            max_io_bytes: options.max_io as u32,
            id: options.id.unwrap_or(abi::ANY_DEVICE),
            pid: std::process::id() as i32,
            flags: abi::F_IOCTL_NUMBERS,
            ..DeviceInfo::default()
        };
        let device = Registered::add(info, parameters(disk, &options))?;
        Ok(Self { disk, options, device })
    }

    /// The block device, once it runs.
    pub fn path(&self) -> PathBuf {
        format!("/dev/ublkb{}", self.device.info().id).into()
    }

    /// Serves until `stop` becomes readable, the disk is gone, or a thread fails. Calls `ready` when the
    /// device can be used, unless it ends before that. At the end, what the kernel has cached is written
    /// back, for at most five seconds, and the device is removed.
    ///
    /// # Errors
    /// When a queue is taken, or threads cannot be made or one of them fails.
    pub fn run(mut self, stop: impl AsFd, ready: impl FnOnce()) -> Result<(), Error> {
        let mut threads = Vec::new();
        let started = self.start(&mut threads);
        let mut result = started.and_then(|ended| {
            let ends = [stop.as_fd(), ended.as_fd()];
            if !self.appear(&threads, &ends)? {
                return Ok(());
            }
            ready();
            wait(self.disk, &self.path(), &ends)?;
            let device = File::open(self.path()).map_err(failed("open the block device"))?;
            if self.disk.take_news() && !sync(&device) {
                tell(&threads, |shared| &shared.give_up);
            }
            Ok(())
        });
        if result.is_err() {
            tell(&threads, |shared| &shared.give_up);
        }
        result = result.and(self.stop(&threads));
        // Tags of a device that never started are not aborted.
        tell(&threads, |shared| &shared.leave);
        for Thread { thread, .. } in threads {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
            // An error that ended a thread is the cause of later ones.
            result = ended.map_err(failed("serve a queue")).and(result);
        }
        result
    }

    /// Makes the block device, and returns whether it can be used. The kernel looks for partitions first,
    /// for which a backend may take its time: this is given up when one of `ends` becomes readable.
    fn appear(&mut self, threads: &[Thread], ends: &[BorrowedFd<'_>]) -> Result<bool, Error> {
        let (starts, started) = UnixStream::pair().map_err(failed("make a socket"))?;
        let ends: Vec<_> = std::iter::once(started.as_fd()).chain(ends.iter().copied()).collect();
        let (disk, path, device) = (self.disk, self.path(), &mut self.device);
        std::thread::scope(|scope| {
            let start = Builder::new().name("start".to_owned()).spawn_scoped(scope, move || {
                let result = device.start();
                // Not earlier: this tells that the device is there.
                drop(starts);
                result
            });
            let start = start.map_err(failed("start a thread"))?;
            let news = wait(disk, &path, &ends);
            let appeared = matches!(news, Ok(News::Ended(0)));
            if !appeared {
                tell(threads, |shared| &shared.give_up);
            }
            let result = start
                .join()
                .unwrap_or_else(|_| Err(failed("start the device")(io::Error::other("panicked"))));
            news?;
            if appeared { result.map(|()| true) } else { Ok(false) }
        })
    }

    /// Removes the block device. The kernel waits for all requests, which a backend may never answer: after
    /// a while they are given up.
    fn stop(&mut self, threads: &[Thread]) -> Result<(), Error> {
        std::thread::scope(|scope| {
            let (stopped, waits) = channel::<()>();
            let patience =
                Builder::new().name("patience".to_owned()).spawn_scoped(scope, move || {
                    if waits.recv_timeout(STOP_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                        tell(threads, |shared| &shared.give_up);
                    }
                });
            if patience.is_err() {
                // Nobody would end the wait.
                tell(threads, |shared| &shared.give_up);
            }
            let result = self.device.stop();
            drop(stopped);
            result
        })
    }

    /// Starts the threads, and returns a socket that is readable when one of them has ended.
    fn start(&self, threads: &mut Vec<Thread>) -> Result<UnixStream, Error> {
        let &DeviceInfo { id, queues, depth, .. } = self.device.info();
        let path = format!("/dev/ublkc{id}");
        let file = File::options().read(true).write(true).open(path);
        let file = Arc::new(file.map_err(failed("open the device of requests"))?);
        let (ended, at_work) = UnixStream::pair().map_err(failed("make a socket"))?;
        let (ready, fetched) = channel();
        for number in 0..queues {
            let queue = self.disk.queue(number.into())?;
            let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
            let bell = bell.map_err(failed("make an eventfd"))?;
            let (give_up, leave) = (AtomicBool::new(false), AtomicBool::new(false));
            let shared = Arc::new(Shared { give_up, leave, bell });
            let worker = Worker::new(
                file.clone(),
                shared.clone(),
                number,
                depth,
                self.options.max_io,
                queue,
            );
            let worker = worker.map_err(failed("set a queue up"))?;
            let at_work = at_work.try_clone().map_err(failed("make a socket"))?;
            let ready = ready.clone();
            let thread = Builder::new().name(format!("ublk-vcpu{number}"));
            let thread = thread.spawn(move || {
                // The sender goes with it, so `fetched` ends when all threads have sent or failed.
                let result = worker.run(move || {
                    let _ = ready.send(());
                });
                // Wakes whoever waits, although other threads hold the socket.
                let _ = at_work.shutdown(std::net::Shutdown::Both);
                result
            });
            threads.push(Thread { shared, thread: thread.map_err(failed("start a thread"))? });
        }
        drop(ready);
        // The device cannot be started earlier. A thread that cannot fetch has ended.
        if fetched.iter().take(queues.into()).count() < queues.into() {
            let source = io::Error::other("a queue's thread has ended");
            return Err(Error::Kernel { doing: "fetch requests", source, remedy: "" });
        }
        Ok(ended)
    }
}

/// Waits until the disk is gone or one of `ends` is readable.
fn wait(disk: &Disk, path: &Path, ends: &[BorrowedFd<'_>]) -> Result<News, Error> {
    loop {
        match wait_for_news(disk, ends).map_err(failed("wait for the disk"))? {
            News::Resized => tracing::warn!(
                "the disk's size has changed; {} keeps its own until it is made anew",
                path.display()
            ),
            news => return Ok(news),
        }
    }
}

fn tell(threads: &[Thread], what: impl Fn(&Shared) -> &AtomicBool) {
    for Thread { shared, .. } in threads {
        what(shared).store(true, Ordering::Relaxed);
        let _ = shared.bell.write(1);
    }
}

fn parameters(disk: &Disk, options: &Options) -> Parameters {
    let (geometry, features) = (disk.geometry(), disk.features());
    let read_only = options.read_only || geometry.read_only;
    // This backend may have no cache, but the next one may: a needless flush costs nothing, while one that
    // the kernel omits is lost.
    let mut attributes = abi::ATTR_VOLATILE_CACHE | abi::ATTR_FUA;
    if read_only {
        attributes |= abi::ATTR_READ_ONLY;
    }
    // Both are powers of two.
    let logical_shift = geometry.sector_size.trailing_zeros() as u8;
    let physical_shift = (geometry.physical_sector_size.trailing_zeros() as u8).max(logical_shift);
    let mut parameters = Parameters {
        len: size_of::<Parameters>() as u32,
        kinds: abi::KIND_BASIC,
        attributes,
        logical_shift,
        physical_shift,
        optimal_shift: physical_shift,
        minimal_shift: physical_shift,
        max_sectors: (options.max_io / SECTOR_SIZE) as u32,
        sectors: geometry.size / SECTOR_SIZE as u64,
        ..Parameters::default()
    };
    if features.discard && !read_only {
        parameters.kinds |= abi::KIND_DISCARD;
        parameters.discard_alignment = features.discard_alignment;
        parameters.discard_granularity = features.discard_granularity;
        // The most whose bytes fit a u32.
        parameters.max_discard_sectors = u32::MAX / SECTOR_SIZE as u32;
        parameters.max_discard_segments = 1;
    }
    parameters
}
