//! Raw files and block devices.

use super::device::{self, AtOnce, Device};
use super::uring::UringQueue;
use super::{Direct, Discard, Geometry, OpenError, Options, Queue, QueueSetup, Storage};
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::unistd::{Whence, lseek};
use ring_proto::abi::{PAGE_SIZE, SECTOR_SIZE};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Offsets and lengths that O_DIRECT may ask for, smallest first.
const DIRECT_UNITS: [u32; 2] = [SECTOR_SIZE as u32, PAGE_SIZE as u32];

/// How long a predecessor's last requests may hold an image: a slow disk's worst second, and less than
/// the ten that a toolstack waits for us.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often to look meanwhile.
const LOCK_LOOK: Duration = Duration::from_millis(10);

/// A raw file or a block device.
pub(super) struct FileDisk(Arc<Backing>);

/// What all queues of a disk share.
pub(super) struct Backing {
    pub(super) file: File,
    /// Bytes that belong to the disk now. Queues look at every operation against it.
    bytes: AtomicU64,
    is_device: bool,
    /// How much to ask for at a time.
    pub(super) at_once: AtOnce,
    /// Reads and writes go through the page cache.
    pub(super) cached: bool,
    lost: AtomicBool,
    geometry: Mutex<Geometry>,
}

impl FileDisk {
    pub(super) fn open(path: &Path, options: Options) -> Result<Self, OpenError> {
        let failed = |source| open_error(path, options.read_only, source);
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let metadata = std::fs::metadata(path).map_err(failed)?;
        let kind = metadata.file_type();
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            let kind = if kind.is_dir() { "a directory" } else { "not a disk" };
            return Err(OpenError::Kind { path: path.into(), kind });
        }

        let (file, unit) = open_file(path, is_device, options)?;
        if !is_device && !options.shared {
            lock(&file, path, options)?;
        }
        let bytes = size_of(&file, is_device).map_err(failed)?;
        let device = is_device.then(|| Device::probe(&file)).transpose().map_err(failed)?;
        let sector_size = device.as_ref().map_or(SECTOR_SIZE as u32, |d| d.sector_size).max(unit);
        if bytes == 0 {
            return Err(OpenError::Empty { path: path.into() });
        }
        if !bytes.is_multiple_of(u64::from(sector_size)) {
            return Err(OpenError::Size { path: path.into(), bytes, sector_size });
        }

        let discard = (options.discard && !options.read_only)
            .then(|| match &device {
                Some(device) => device.discard,
                None => file_discard(&file, bytes, metadata.blksize()),
            })
            .flatten();
        let direct = unit != 0;
        let geometry = Geometry {
            sectors: bytes / SECTOR_SIZE as u64,
            sector_size,
            physical_sector_size: match &device {
                Some(device) => device.physical_sector_size,
                // Smaller writes into a page that is not cached read it first.
                None => PAGE_SIZE as u32,
            },
            read_only: options.read_only,
            discard,
            flush: !options.read_only,
            moves_data: true,
            buffer_alignment: if direct { sector_size } else { 1 },
            exclusive: !options.read_only && !options.shared,
        };
        tracing::debug!(?path, direct, ?geometry, "opened");
        Ok(Self(Arc::new(Backing {
            file,
            bytes: AtomicU64::new(bytes),
            is_device,
            at_once: device.filter(|_| direct).map_or(AtOnce::ANY, |device| device.at_once),
            cached: !direct,
            lost: AtomicBool::new(false),
            geometry: Mutex::new(geometry),
        })))
    }
}

impl Storage for FileDisk {
    fn geometry(&self) -> Geometry {
        self.0.geometry().clone()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        let bytes = size_of(&self.0.file, self.0.is_device)?;
        let mut geometry = self.0.geometry();
        // A last piece of a sector cannot be offered.
        let bytes = bytes - bytes % u64::from(geometry.sector_size);
        geometry.sectors = bytes / SECTOR_SIZE as u64;
        self.0.bytes.store(bytes, Ordering::Relaxed);
        Ok(geometry.clone())
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(UringQueue::new(self.0.clone(), setup)?))
    }
}

impl Backing {
    /// The file once more, for a queue that is to be told by itself of data that could not be written back: the
    /// kernel tells each open file once. `None` where that cannot be had, or nothing is written back.
    pub(super) fn reopen(&self) -> Option<File> {
        let open = || {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            File::options().read(true).write(true).open(path).ok()
        };
        (self.cached && !self.geometry().read_only).then(open).flatten()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether writes that were acknowledged may be lost: see [`Backing::synced`].
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// What to make of the outcome of a flush, an errno where it failed.
    ///
    /// When the kernel cannot write back the page cache it says so once to each open file, marks the
    /// pages clean and goes on: the next flush would succeed without the data. As in QEMU
    /// (`page_cache_inconsistent` in block/file-posix.c), none succeeds any more, of no queue. Each has an
    /// open file of its own ([`Self::reopen`]), so that none depends on when another hears of it. A
    /// device's own cache is no better.
    ///
    /// And Linux's frontend takes a flush that failed for one that succeeded, and sends no more
    /// (`blkif_interrupt` in xen-blkfront.c): so that its guest hears of it, no write succeeds either.
    pub(super) fn synced(&self, outcome: Result<(), i32>) -> Result<(), i32> {
        let Err(errno) = outcome else {
            return if self.is_lost() { Err(libc::EIO) } else { Ok(()) };
        };
        let error = io::Error::from_raw_os_error(errno);
        if error.kind() != io::ErrorKind::Unsupported && !self.lost.swap(true, Ordering::AcqRel) {
            tracing::error!(
                %error,
                "a flush failed: writes since the last one may be lost, and writes and flushes fail until the disk is attached again"
            );
        }
        outcome
    }

    pub(super) fn geometry(&self) -> MutexGuard<'_, Geometry> {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the image for us: alone, or together with other readers. A device has O_EXCL for that.
///
/// Both go with the open file, which requests in the kernel hold too: a predecessor that was killed
/// keeps them until its last write has landed, so that none can land on top of ours.
fn lock(file: &File, path: &Path, options: Options) -> Result<(), OpenError> {
    let lock = || if options.read_only { file.try_lock_shared() } else { file.try_lock() };
    patiently(lock, |error| matches!(error, TryLockError::WouldBlock)).map_err(
        |error| match error {
            TryLockError::WouldBlock => {
                OpenError::Busy { path: path.into(), read_only: options.read_only }
            }
            TryLockError::Error(source) => {
                OpenError::Io { path: path.into(), doing: "lock the file", source }
            }
        },
    )
}

/// Tries again for a while if somebody holds what is tried for: a predecessor's last requests may.
fn patiently<T, E>(
    attempt: impl Fn() -> Result<T, E>,
    is_held: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let since = Instant::now();
    loop {
        match attempt() {
            Err(error) if is_held(&error) && since.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(LOCK_LOOK);
            }
            outcome => return outcome,
        }
    }
}

/// Opens the file, past the page cache if that is wanted and works. Also returns the bytes that
/// O_DIRECT moves at the least, 0 without it.
fn open_file(path: &Path, is_device: bool, options: Options) -> Result<(File, u32), OpenError> {
    let open = |flags: OFlag| {
        // A device that is written must be ours alone: O_EXCL refuses one that is mounted.
        let exclusive = is_device && !options.read_only && !options.shared;
        let flags = if exclusive { flags | OFlag::O_EXCL } else { flags };
        let mut open = OpenOptions::new();
        open.read(true).write(!options.read_only).custom_flags(flags.bits());
        patiently(|| open.open(path), |error| error.raw_os_error() == Some(libc::EBUSY))
    };
    let failed = |source| open_error(path, options.read_only, source);
    if options.direct == Direct::Off {
        return Ok((open(OFlag::empty()).map_err(failed)?, 0));
    }
    let refused = match open(OFlag::O_DIRECT) {
        // A device tells its sector size itself.
        Ok(file) if is_device => return Ok((file, 1)),
        Ok(file) => match direct_unit(&file) {
            Ok(unit) if unit == SECTOR_SIZE as u32 || options.direct == Direct::On => {
                return Ok((file, unit));
            }
            Ok(unit) => io::Error::other(format!("it needs {unit}-byte sectors")),
            Err(source) => source,
        },
        Err(source) if source.raw_os_error() == Some(libc::EINVAL) => source,
        Err(source) => return Err(failed(source)),
    };
    if options.direct == Direct::On {
        return Err(OpenError::Direct { path: path.into(), source: refused });
    }
    tracing::info!(?path, "using the page cache: no O_DIRECT: {refused}");
    Ok((open(OFlag::empty()).map_err(failed)?, 0))
}

/// Bytes that O_DIRECT moves at the least, found by reading: statx tells it only of some file
/// systems, and of some of those wrongly. What is read must be data: of a hole the kernel says nothing.
fn direct_unit(file: &File) -> io::Result<u32> {
    let (data, least) = match lseek(file, 0, Whence::SeekData) {
        Ok(data) => (data as u64, 0),
        Err(_) => (0, device::sector_size_below(file)),
    };
    let mut memory = vec![0; 3 * PAGE_SIZE];
    let aligned = memory.as_ptr().align_offset(PAGE_SIZE);
    let mut outcome = Ok(0);
    for unit in DIRECT_UNITS.into_iter().filter(|unit| *unit >= least) {
        let length = unit as usize;
        // Aligned to the unit and no better, as buffers will be.
        outcome = file.read_at(&mut memory[aligned + length..][..length], data);
        if outcome.is_ok() {
            return Ok(unit);
        }
    }
    outcome.map(|_| 0)
}

/// Whether holes can be punched into the file, and how large.
fn file_discard(file: &File, bytes: u64, block: u64) -> Option<Discard> {
    // Behind the end there is nothing to lose.
    let offset = i64::try_from(bytes).ok()?;
    match fallocate(file, punch_hole(), offset, SECTOR_SIZE as i64) {
        Ok(()) => Some(Discard {
            granularity: u32::try_from(block).unwrap_or(PAGE_SIZE as u32),
            alignment: 0,
            secure: false,
        }),
        Err(reason) => {
            tracing::info!("no discard: the file system cannot punch holes: {reason}");
            None
        }
    }
}

/// Mode of fallocate(2) that gives space back. A block device takes it too, and its sectors read as
/// zeroes afterwards.
pub(super) fn punch_hole() -> FallocateFlags {
    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
}

fn size_of(file: &File, is_device: bool) -> io::Result<u64> {
    if is_device { device::bytes(file) } else { Ok(file.metadata()?.len()) }
}

/// Says what can be done about a failure to open.
fn open_error(path: &Path, read_only: bool, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            OpenError::Permission { path, read_only, source }
        }
        Some(libc::EBUSY) => OpenError::Busy { path, read_only },
        _ => OpenError::Io { path, doing: "open it", source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Op, OpKind};
    use std::time::Duration;

    /// One ring's flush is told of the loss of what another has written.
    #[test]
    fn after_a_failed_write_back_no_queue_flushes_with_success() {
        let path = std::env::temp_dir().join(format!("blkback-lost-{}", std::process::id()));
        File::create(&path).and_then(|file| file.set_len(4096)).expect("create");
        let options = Options { direct: Direct::Off, ..Options::default() };
        let disk = FileDisk::open(&path, options).expect("open");
        std::fs::remove_file(&path).expect("remove");
        let setup = QueueSetup { depth: 1, region: None, bell: None, events: None };
        let mut queue = disk.open_queue(setup).expect("queue");
        let mut flush = || {
            let mut done = Vec::new();
            let op = Op { tag: 0, kind: OpKind::Flush, offset: 0, buffers: &[] };
            queue.submit(op, &mut done);
            while done.is_empty() {
                queue.wait(Some(Duration::from_secs(1))).expect("wait");
                queue.poll(&mut done).expect("poll");
            }
            done.remove(0).result
        };
        assert_eq!(flush(), Ok(()));
        // As if it had come from another queue.
        let failed = Err(libc::ENOSPC);
        assert_eq!(disk.0.synced(failed), failed);
        assert_eq!(flush(), Err(libc::EIO));
    }
}
