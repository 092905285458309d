//! Requirements on Linux, with or without Xen.

use super::Finding;
use blkback::config;
use blkback::storage::direct_sectors;
use nix::sys::resource::{Resource, getrlimit};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// What one ring keeps pinned if the disk is a file and data is copied: 64 buffers of a page.
const PINNED_A_RING: u64 = 64 << 12;
/// Files that a ring has open, roughly: event channel, eventfd, io_uring and gntdev.
const FILES_A_RING: u64 = 8;
/// Rings of a host that is not small, for which there should be room.
const MANY_RINGS: u64 = 128;
/// The most mappings of a ring: its persistent grants, and those of requests in flight.
const MAPS_A_RING: u64 = 1056 + 2048;
/// The package's setting of `vm.max_map_count`.
const MANY_MAPS: u64 = 1 << 20;

pub(super) fn findings() -> Vec<Finding> {
    let mut findings = vec![io_uring(), memlock(), open_files()];
    findings.extend(maps());
    findings.push(configuration());
    findings
}

fn io_uring() -> Finding {
    let Err(error) = io_uring::IoUring::new(8) else {
        return Finding::ok("io_uring", "can be used");
    };
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let remedy = match disabled.as_deref().map(str::trim) {
        Ok("1") => "sysctl kernel.io_uring_disabled=0, or add the user to kernel.io_uring_group",
        Ok("2") => "sysctl kernel.io_uring_disabled=0",
        _ if error.raw_os_error() == Some(libc::ENOSYS) => "use Linux 6.1 or later",
        _ => "let the service's system call filter pass @aio",
    };
    Finding::fail("io_uring", format!("refused: {error}"), remedy)
}

fn memlock() -> Finding {
    const ABOUT: &str = "RLIMIT_MEMLOCK";
    let Ok((soft, _)) = getrlimit(Resource::RLIMIT_MEMLOCK) else {
        return Finding::warn(ABOUT, "unknown", "mount /proc");
    };
    let rings = soft / PINNED_A_RING;
    if has_ipc_lock() {
        Finding::ok(ABOUT, "does not bind this process, which has CAP_IPC_LOCK")
    } else if rings >= MANY_RINGS {
        Finding::ok(ABOUT, format!("enough for {rings} rings"))
    } else {
        let found = format!("{} KiB, enough for {rings} rings at their largest", soft >> 10);
        Finding::warn(ABOUT, found, "LimitMEMLOCK=infinity in the service")
    }
}

/// Whether the limit does not apply to this process (`capable(CAP_IPC_LOCK)` in Linux's io_uring), as
/// for root, unless its capabilities were taken away.
fn has_ipc_lock() -> bool {
    /// Its number, from linux/capability.h.
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    effective.is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}

fn open_files() -> Finding {
    const ABOUT: &str = "RLIMIT_NOFILE";
    let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return Finding::warn(ABOUT, "unknown", "mount /proc");
    };
    let rings = soft / FILES_A_RING;
    let found = format!("{soft} files, enough for about {rings} rings");
    if rings >= MANY_RINGS {
        Finding::ok(ABOUT, found)
    } else {
        Finding::warn(ABOUT, found, "LimitNOFILE=65536 in the service")
    }
}

fn maps() -> Option<Finding> {
    const ABOUT: &str = "vm.max_map_count";
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?;
    let maps: u64 = text.trim().parse().ok()?;
    let rings = maps / MAPS_A_RING;
    let found = format!("{maps}, enough for about {rings} rings at their largest");
    Some(if rings >= MANY_RINGS {
        Finding::ok(ABOUT, found)
    } else {
        Finding::warn(ABOUT, found, format!("sysctl vm.max_map_count={MANY_MAPS}"))
    })
}

fn configuration() -> Finding {
    let path = config::DEFAULT_PATH;
    match config::listen_address(None) {
        Err(error) => Finding::fail(path, format!("{error:#}"), "mend it"),
        Ok(_) if Path::new(path).exists() => Finding::ok(path, "can be read"),
        Ok(_) => Finding::ok(path, "not there: everything has a default"),
    }
}

/// Whether a disk's file or device can bypass the page cache. Checked as the current user: the
/// service's sandbox may see less.
pub(super) fn direct_io(path: &Path) -> Finding {
    let about = path.display().to_string();
    match std::fs::metadata(path).map(|found| found.file_type()) {
        Ok(kind) if kind.is_file() || kind.is_block_device() => {}
        Ok(_) => {
            let remedy = "name a raw image file or a block device";
            return Finding::fail(about, "is neither a file nor a block device", remedy);
        }
        Err(error) => return Finding::fail(about, error.to_string(), "correct the path"),
    }
    match direct_sectors(path) {
        Ok(512) => Finding::ok(about, "O_DIRECT works"),
        Ok(sector) => {
            let found = format!(
                "O_DIRECT needs sectors of {sector} bytes: with direct = \"auto\", the page cache is used"
            );
            let remedy = "fine; or direct = \"on\", if the guest's frontend can do with such sectors \
                          (Linux's cannot)";
            Finding::warn(about, found, remedy)
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let found = "its file system has no O_DIRECT: the page cache will be used";
            let remedy = "fine for trying things out; else use a block device, or a file on ext4 \
                          or XFS";
            Finding::warn(about, found, remedy)
        }
        Err(error) => Finding::fail(about, error.to_string(), "try it as root"),
    }
}
