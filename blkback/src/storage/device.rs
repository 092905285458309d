//! The properties of a block device.

use super::Discard;
use ring_proto::abi::{PAGE_SIZE, SECTOR_SIZE};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;

/// From linux/fs.h.
mod ioctl {
    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), libc::c_uint);
    nix::ioctl_read_bad!(blksectget, nix::request_code_none!(0x12, 103), libc::c_ushort);
}

/// Properties that do not change while a device is open.
pub(super) struct Device {
    pub(super) sector_size: u32,
    pub(super) physical_sector_size: u32,
    pub(super) discard: Option<Discard>,
    pub(super) at_once: AtOnce,
}

/// The most that a device takes as one request. The kernel would split a larger one, but may not for a caller
/// that must not block: io_uring then repeats all of it on a worker thread (`bio_split_rw` in Linux's
/// block/blk-merge.c). USB storage takes 120 KiB, null_blk 127.5 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct AtOnce {
    pub(super) bytes: usize,
    /// Pieces of memory of at most a page each.
    pub(super) segments: usize,
}

impl AtOnce {
    pub(super) const ANY: Self = Self { bytes: usize::MAX, segments: usize::MAX };
}

impl Device {
    pub(super) fn probe(file: &File) -> io::Result<Self> {
        let mut physical = 0;
        // SAFETY: BLKPBSZGET writes one unsigned int.
        unsafe { ioctl::blkpbszget(file.as_raw_fd(), &mut physical) }?;
        let mut sectors: libc::c_ushort = 0;
        // SAFETY: BLKSECTGET writes one unsigned short.
        unsafe { ioctl::blksectget(file.as_raw_fd(), &mut sectors) }?;
        let sector_size = sector_size(file)?;
        let sysfs = Sysfs::of(file.metadata()?.rdev());
        Ok(Self {
            sector_size,
            physical_sector_size: physical.max(sector_size),
            discard: sysfs.discard(),
            at_once: sysfs.at_once(sectors),
        })
    }
}

/// Size of a logical sector in bytes.
pub(super) fn sector_size(file: &File) -> io::Result<u32> {
    let mut logical = 0;
    // SAFETY: BLKSSZGET writes one int.
    unsafe { ioctl::blksszget(file.as_raw_fd(), &mut logical) }?;
    u32::try_from(logical)
        .ok()
        .filter(|size| size.is_power_of_two() && *size >= SECTOR_SIZE as u32)
        .ok_or_else(|| io::Error::other(format!("the device claims sectors of {logical} bytes")))
}

/// Size in bytes.
pub(super) fn bytes(file: &File) -> io::Result<u64> {
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 writes a u64; its number says size_t, which is the same on every 64-bit target.
    unsafe { ioctl::blkgetsize64(file.as_raw_fd(), &mut bytes) }?;
    Ok(bytes as u64)
}

/// Sector size in bytes of the device below a file's file system, 0 if there is none or it is not known.
pub(super) fn sector_size_below(file: &File) -> u32 {
    let device = file.metadata().map(|metadata| metadata.dev());
    device.ok().and_then(|device| Sysfs::of(device).queue("logical_block_size")).unwrap_or(0)
}

/// A device's directory in sysfs.
struct Sysfs {
    device: PathBuf,
}

impl Sysfs {
    fn of(number: u64) -> Self {
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        Self { device: format!("/sys/dev/block/{major}:{minor}").into() }
    }

    /// An attribute of the request queue, which a partition shares with its disk.
    fn queue<T: FromStr>(&self, name: &str) -> Option<T> {
        ["queue", "../queue"].into_iter().find_map(|queue| {
            std::fs::read_to_string(self.device.join(queue).join(name)).ok()?.trim().parse().ok()
        })
    }

    /// The longest request is `sectors` of 512 bytes.
    fn at_once(&self, sectors: libc::c_ushort) -> AtOnce {
        let segments = self.queue("max_segments").unwrap_or(usize::MAX).max(1);
        let bytes = (usize::from(sectors) * SECTOR_SIZE).min(segments.saturating_mul(PAGE_SIZE));
        // Whole pages, so that the rest is aligned as well as the first part.
        AtOnce { bytes: (bytes - bytes % PAGE_SIZE).max(PAGE_SIZE), segments }
    }

    /// Both limits must be nonzero: space is given back by fallocate(2), which promises zeroes.
    fn discard(&self) -> Option<Discard> {
        let able = |name| self.queue::<u64>(name).is_some_and(|most| most > 0);
        if !able("discard_max_bytes") {
            return None;
        }
        if !able("write_zeroes_max_bytes") {
            tracing::info!("no discard: {} cannot promise zeroes", self.device.display());
            return None;
        }
        let alignment = std::fs::read_to_string(self.device.join("discard_alignment")).ok();
        Some(Discard {
            granularity: self.queue("discard_granularity")?,
            alignment: alignment.and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            secure: false,
        })
    }
}
