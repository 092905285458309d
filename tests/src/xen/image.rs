//! What a host boots from: the hypervisor, a kernel, and an initramfs for dom0 and one for guests.
//!
//! Both have the same system in them, so that a guest can be a driver domain. What it does is up to
//! the scripts in it, and which of these is in the arguments of the kernel.

use super::initramfs::Initramfs;
use super::machine::LINUX;
use super::modules::Modules;
use super::packages::Root;
use crate::process::output;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAMS: &[&str] = &[
    "sbin/e2fsck",
    "sbin/mke2fs",
    "usr/bin/bash",
    "usr/bin/fio",
    // For the hotplug scripts' locks.
    "usr/bin/flock",
    "usr/bin/xenstore-exists",
    "usr/bin/xenstore-list",
    "usr/bin/xenstore-ls",
    "usr/bin/xenstore-read",
    "usr/bin/xenstore-rm",
    "usr/bin/xenstore-watch",
    "usr/bin/xenstore-write",
];
/// Xen's own, in the directory of its version.
const XEN_PROGRAMS: &[&str] = &[
    "libxl-save-helper",
    "lsevtchn",
    "xen-init-dom0",
    "xenconsole",
    "xenconsoled",
    "xenstored",
    "xl",
];
const MODULES: &[&str] = &[
    "brd",
    "crc32c_generic",
    "ext4",
    "loop",
    "nbd",
    "null_blk",
    "xen-blkback",
    "xen-blkfront",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
    "xen-privcmd",
    "xenfs",
];

/// The files a host boots from.
#[derive(Debug)]
pub struct Images {
    /// The hypervisor, an ELF file.
    pub xen: PathBuf,
    /// dom0's kernel; guests have it too.
    pub kernel: PathBuf,
    /// dom0's initramfs, in which the guests' is.
    pub dom0: PathBuf,
}

/// Makes the images in `dir`, with the programs in `ours` and the scripts in `scripts`.
///
/// # Errors
/// When a program or module is not in the packages, or a library of a program is not.
pub fn build(root: &Root, dir: &Path, ours: &[PathBuf], scripts: &Path) -> Result<Images> {
    fs::create_dir_all(dir)?;
    let xen = dir.join("xen");
    let compressed = root.find("boot", &format!("xen-{}-amd64.gz", root.suite.xen()))?;
    fs::write(&xen, output(Command::new("gzip").arg("-dc").arg(compressed))?)?;
    let kernel = root.find("boot", "vmlinuz-")?;

    let guest = dir.join("guest.cpio");
    system(root, &guest, ours, scripts)?;
    // Linux unpacks archives that follow each other.
    let dom0 = dir.join("dom0.cpio");
    fs::copy(&guest, &dom0)?;
    let mut more = Initramfs::append(root, &dom0)?;
    more.text(Path::new("guest/arguments"), LINUX)?;
    more.copy(Path::new("guest/kernel"), &kernel)?;
    more.copy(Path::new("guest/initramfs"), &guest)?;
    more.finish()?;
    Ok(Images { xen, kernel, dom0 })
}

fn system(root: &Root, path: &Path, ours: &[PathBuf], scripts: &Path) -> Result<()> {
    let mut image = Initramfs::create(root, path)?;
    image.programs(PROGRAMS)?;
    let bin = format!("usr/lib/xen-{}/bin", root.suite.xen());
    for name in XEN_PROGRAMS {
        image.program(&format!("{bin}/{name}"))?;
    }
    image.link(Path::new("xen-bin"), &bin)?;
    image.tree(Path::new("etc/xen"), &root.dir.join("etc/xen"))?;
    image.modules(&Modules::find(root)?, MODULES)?;
    for path in ours {
        image.ours(path)?;
    }
    image.tree(Path::new("scripts"), scripts)?;
    image.link(Path::new("init"), "scripts/init.sh")?;
    image.finish()
}
