//! Raw files and block devices.

use super::claim::Claim;
use super::device::{self, AtOnce, Device};
use super::uring::UringQueue;
use super::{
    Direct, Discard, Geometry, Op, OpKind, OpenError, Options, Queue, QueueSetup, Storage,
};
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
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

/// Alignments that O_DIRECT may require of offsets and lengths, smallest first.
const DIRECT_UNITS: [u32; 2] = [SECTOR_SIZE as u32, PAGE_SIZE as u32];

/// How long to wait for an image that a predecessor's last requests hold: enough for a slow disk, and less
/// than the ten seconds that a toolstack waits for us.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often to try meanwhile.
const LOCK_LOOK: Duration = Duration::from_millis(10);

/// A raw file or a block device.
pub(super) struct FileDisk(Arc<Backing>);

/// What all queues of a disk share.
pub(super) struct Backing {
    pub(super) file: File,
    /// Current size of the disk in bytes. Queues check every operation against it.
    bytes: AtomicU64,
    is_device: bool,
    /// What a discard must be aligned to, in bytes.
    discard_unit: u64,
    /// The most to ask of the device at a time.
    pub(super) at_once: AtOnce,
    /// Reads and writes go through the page cache.
    pub(super) cached: bool,
    lost: AtomicBool,
    geometry: Mutex<Geometry>,
    /// Given up once the file is closed.
    _claim: Option<Claim>,
}

impl FileDisk {
    pub(super) fn open(path: &Path, options: Options) -> Result<Self, OpenError> {
        let failed = |source| open_error(path, options.read_only, source);
        // Checked before it is opened: opening a pipe would wait for its other end.
        let metadata = std::fs::metadata(path).map_err(failed)?;
        let kind = metadata.file_type();
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            let kind = if kind.is_dir() { "a directory" } else { "not a disk" };
            return Err(OpenError::Kind { path: path.into(), kind });
        }

        let claim = (is_device && !options.shared)
            .then(|| claim(metadata.rdev(), path, options))
            .transpose()?;
        let (file, unit) = open_file(path, is_device, options)?;
        if !is_device && !options.shared {
            lock(&file, path, options)?;
        }
        let bytes = size_of(&file, is_device).map_err(failed)?;
        let device = is_device.then(|| Device::probe(&file)).transpose().map_err(failed)?;
        let sector_size = unit.max(SECTOR_SIZE as u32);
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
            discard_unit: device.as_ref().map_or(1, |device| device.sector_size.into()),
            at_once: device.filter(|_| direct).map_or(AtOnce::ANY, |device| device.at_once),
            cached: !direct,
            lost: AtomicBool::new(false),
            geometry: Mutex::new(geometry),
            _claim: claim,
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
        // A partial sector at the end cannot be offered.
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
    /// Opens the file again, so that a queue hears by itself of data that could not be written back: the
    /// kernel reports that once to each open file. `None` if that is impossible, or nothing is written back.
    pub(super) fn reopen(&self) -> Option<File> {
        let open = || {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            File::options().read(true).write(true).open(path).inspect(leave_access_time).ok()
        };
        (self.cached && !self.geometry().read_only).then(open).flatten()
    }

    /// As much of a discard as the device takes, which may have larger sectors than the disk. The rest stays as it
    /// is: a guest may expect nothing of what it has discarded.
    pub(super) fn whole_sectors<'a>(&self, mut op: Op<'a>) -> Op<'a> {
        if let OpKind::Discard { bytes, .. } = &mut op.kind {
            let end = op.offset.saturating_add(*bytes) / self.discard_unit * self.discard_unit;
            op.offset = op.offset.next_multiple_of(self.discard_unit);
            *bytes = end.saturating_sub(op.offset);
        }
        op
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether acknowledged writes may be lost: see [`Backing::synced`].
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Turns the outcome of a flush, an errno if it failed, into the result to report.
    ///
    /// If the kernel fails to write back the page cache, it reports that once to each open file and marks the
    /// pages clean: the next flush would succeed without the data. So from then on no flush of any queue
    /// succeeds, as in QEMU (`page_cache_inconsistent` in block/file-posix.c). Each queue has an open file of
    /// its own ([`Self::reopen`]), so that none depends on when another hears of the failure. A device's own
    /// cache is no better.
    ///
    /// Linux's frontend treats a failed flush as successful and sends no more of them (`blkif_interrupt` in
    /// xen-blkfront.c): writes fail as well, so that its guest hears of it.
    pub(super) fn synced(&self, outcome: Result<(), i32>) -> Result<(), i32> {
        let Err(errno) = outcome else {
            return if self.is_lost() { Err(libc::EIO) } else { Ok(()) };
        };
        let error = io::Error::from_raw_os_error(errno);
        if error.kind() != io::ErrorKind::Unsupported && !self.lost.swap(true, Ordering::AcqRel) {
            tracing::error!(
                %error,
                "a flush failed: writes since the last one may be lost, and writes and flushes fail from now on: stop the guest, mend the disk and attach it again"
            );
        }
        outcome
    }

    pub(super) fn geometry(&self) -> MutexGuard<'_, Geometry> {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Claims a device among the disks of this process. One that was just detached may still be closing it.
fn claim(device: u64, path: &Path, options: Options) -> Result<Claim, OpenError> {
    let read_only = options.read_only;
    let claim = || Claim::new(device, read_only).ok_or(());
    patiently(claim, |()| true).map_err(|()| OpenError::Busy { path: path.into(), read_only })
}

/// Locks the image: exclusively, or shared with other readers. A device has O_EXCL and [`Claim`] for that.
///
/// The lock and O_EXCL belong to the open file, which requests in the kernel hold too: a predecessor that was
/// killed keeps the image until its last write has landed, so that none can land on top of ours.
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

/// Retries for a while if somebody holds the disk, as a predecessor's last requests may.
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

/// Opens the file, with O_DIRECT if that is wanted and works. Also returns the least that O_DIRECT moves, in
/// bytes, or 0 without it: the page cache takes sectors of 512 bytes whatever those of the device.
fn open_file(path: &Path, is_device: bool, options: Options) -> Result<(File, u32), OpenError> {
    let open = |flags: OFlag| {
        // A device that we write to must be ours alone: O_EXCL refuses one that is mounted.
        let exclusive = is_device && !options.read_only && !options.shared;
        let flags = if exclusive { flags | OFlag::O_EXCL } else { flags };
        let mut open = OpenOptions::new();
        open.read(true).write(!options.read_only).custom_flags(flags.bits());
        patiently(|| open.open(path), |error| error.raw_os_error() == Some(libc::EBUSY))
            .inspect(leave_access_time)
    };
    let failed = |source| open_error(path, options.read_only, source);
    if options.direct == Direct::Off {
        return Ok((open(OFlag::empty()).map_err(failed)?, 0));
    }
    let refused = match open(OFlag::O_DIRECT) {
        Ok(file) => match direct_unit(&file, is_device) {
            Ok(unit)
                if unit == SECTOR_SIZE as u32
                    || options.direct == Direct::On
                    // Another host may write to it, and would not see our page cache, nor we its writes.
                    || is_device && options.shared =>
            {
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

/// Has reads leave the access time as it is. Nobody looks at a disk's, and asking whether it is due for an update
/// takes a twentieth of each read from the page cache. Only the owner and the privileged may; others go without.
fn leave_access_time(file: &File) {
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    let _ = flags.and_then(|flags| fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NOATIME)));
}

/// The least that O_DIRECT moves on a file or device, in bytes.
///
/// # Errors
/// Where it does not work (`EINVAL`), or the file cannot be opened or read.
pub fn direct_sectors(path: &Path) -> io::Result<u32> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let is_device = file.metadata()?.file_type().is_block_device();
    leave_access_time(&file);
    direct_unit(&file, is_device)
}

/// The least that O_DIRECT moves, in bytes. A device reports it. For a file it is found by reading: statx knows
/// it for some file systems only, and wrongly for some of those. Data must be read: a hole tells nothing.
fn direct_unit(file: &File, is_device: bool) -> io::Result<u32> {
    if is_device {
        return device::sector_size(file);
    }
    let (data, least) = match lseek(file, 0, Whence::SeekData) {
        Ok(data) => (data as u64, 0),
        Err(_) => (0, device::sector_size_below(file)),
    };
    let mut memory = vec![0; 3 * PAGE_SIZE];
    let aligned = memory.as_ptr().align_offset(PAGE_SIZE);
    // If the device below has larger sectors than any of these.
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for unit in DIRECT_UNITS.into_iter().filter(|unit| *unit >= least) {
        let length = unit as usize;
        // Aligned to the unit and no more, as buffers will be.
        match file.read_at(&mut memory[aligned + length..][..length], data) {
            Ok(_) => return Ok(unit),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// The limits of discard, if holes can be punched into the file.
fn file_discard(file: &File, bytes: u64, block: u64) -> Option<Discard> {
    // Beyond the end there is nothing to lose.
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

/// The mode of fallocate(2) that gives space back. Block devices take it too, and read as zeroes there
/// afterwards.
pub(super) fn punch_hole() -> FallocateFlags {
    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
}

fn size_of(file: &File, is_device: bool) -> io::Result<u64> {
    if is_device { device::bytes(file) } else { Ok(file.metadata()?.len()) }
}

/// Turns a failure to open into an error that says what to do.
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
    use std::time::Duration;

    /// The kernel may report the loss of one ring's writes to another ring's flush.
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
