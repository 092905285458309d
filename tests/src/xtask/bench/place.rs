//! The files and devices that are measured on: made when first asked for, removed at the end.

use super::case::Disk;
use crate::xtask::target;
use anyhow::{Context, Result};
use std::cell::OnceCell;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use xen_blk_tests::process::run as output;
use xen_blk_tests::scratch::Scratch;

/// Size of the used part of every disk: it fits the page cache.
pub(super) const BYTES: u64 = 1 << 30;

/// A directory in `target/bench` with the files behind the disks.
pub(super) struct Place {
    dir: Scratch,
    cached: OnceCell<PathBuf>,
    direct: OnceCell<PathBuf>,
    device: OnceCell<LoopDevice>,
}

impl Place {
    pub(super) fn new() -> Result<Self> {
        let parent = target().join("bench");
        std::fs::create_dir_all(&parent)?;
        // Not in /tmp, which may be a tmpfs: that has no O_DIRECT.
        let dir = Scratch::new(&parent)?;
        Ok(Self { dir, cached: OnceCell::new(), direct: OnceCell::new(), device: OnceCell::new() })
    }

    /// For sockets and logs.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The file or device of a disk, in the page cache if it should be; `None` for a null disk.
    pub(super) fn path(&self, disk: Disk) -> Result<Option<&Path>> {
        Ok(match disk {
            Disk::Null => None,
            Disk::CachedFile => Some(self.cached()?),
            Disk::DirectFile => Some(made(&self.direct, || {
                let path = filled(self.dir().join("direct.raw"))?;
                // Reads past the page cache are fastest if nothing of the file is in it.
                output(Command::new("dd").arg(format!("of={}", path.display())).args([
                    "oflag=nocache",
                    "conv=notrunc,fdatasync",
                    "count=0",
                ]))?;
                Ok(path)
            })?),
            Disk::BlockDevice => {
                let file = self.cached()?;
                Some(&made(&self.device, || LoopDevice::attach(file))?.path)
            }
        })
    }

    /// Read each time: some machines reclaim memory unused for half a minute (DAMON), and measurements of
    /// this file may be further apart.
    fn cached(&self) -> Result<&Path> {
        let path = made(&self.cached, || filled(self.dir().join("cached.raw")))?;
        std::io::copy(&mut File::open(path)?, &mut std::io::sink())?;
        Ok(path)
    }
}

fn made<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if cell.get().is_none() {
        let _ = cell.set(make()?);
    }
    cell.get().context("just set")
}

/// Written in full: the first write to a block of a sparse file costs more than any later one.
fn filled(path: PathBuf) -> Result<PathBuf> {
    let mut file = File::create(&path)?;
    std::io::copy(&mut std::io::repeat(0x5a).take(BYTES), &mut file)?;
    file.sync_all()?;
    Ok(path)
}

/// A loop device that goes when this does, or when this process dies.
struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    fn attach(file: &Path) -> Result<Self> {
        let mut command = Command::new("losetup");
        let name = output(command.args(["--find", "--show"]).arg(file))?;
        let path = PathBuf::from(name.trim());
        let open = File::open(&path);
        // While it is open, this only marks it: the kernel detaches it when it is closed for the last time.
        output(Command::new("losetup").arg("--detach").arg(&path))?;
        Ok(Self { path, _open: open? })
    }
}
