//! What a host boots from: the hypervisor, a kernel, and an initramfs for dom0 and one for guests.
//!
//! Both have the same system in them, so that a guest can be a driver domain. What it does is up to its
//! scripts; the kernel's arguments choose one.

use super::initramfs::Initramfs;
use super::machine::LINUX;
use super::modules::Modules;
use super::packages::Root;
use crate::process::{output, run};
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
    // For the disk of the whole Debian.
    "nvme",
    "xen-blkback",
    "xen-blkfront",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
    "xen-privcmd",
    "xenfs",
];
/// Modules that Debian 12's kernel does not have.
const NEWER_MODULES: &[&str] = &["ublk_drv"];

/// For scenarios that look where time goes; they are large.
const PROFILERS: &[&str] =
    &["usr/bin/blkparse", "usr/bin/btt", "usr/bin/perf", "usr/bin/xenalyze", "usr/sbin/blktrace"];
const XEN_PROFILERS: &[&str] = &["xenperf", "xentop", "xentrace"];
/// The name of our hotplug script in disk lines.
const HOTPLUG: &str = "block-blkback";
/// QEMU does not start without, even if it shows nothing.
const QEMU_KEYMAPS: &str = "usr/share/qemu/keymaps";
const QEMU: &str = "usr/libexec/xen-qemu-system-i386";
/// What an HVM guest boots with, besides Xen's hvmloader.
const FIRMWARE: &[&str] = &[
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/seabios/bios-256k.bin",
];
/// On Debian 12 an HVM guest's kernel and initramfs come through a port, each byte emulated: no more than
/// it needs, and no fio.
const HVM_PROGRAMS: &[&str] =
    &["usr/bin/xenstore-read", "usr/bin/xenstore-watch", "usr/bin/xenstore-write"];
const HVM_MODULES: &[&str] = &["ata_piix", "sd_mod", "xen-blkfront", "xenfs"];

/// The files a host boots from.
#[derive(Debug)]
pub struct Images {
    /// The hypervisor, an ELF file.
    pub xen: PathBuf,
    /// dom0's kernel; guests have it too.
    pub kernel: PathBuf,
    /// dom0's initramfs, which contains the guests'.
    pub dom0: PathBuf,
    /// A disk for the machine, which is not written to.
    pub disk: Option<PathBuf>,
}

/// What the images are made from.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The packages.
    pub root: &'a Root,
    /// Whether there are HVM guests.
    pub hvm: bool,
    /// Whether dom0 and guests have perf and blktrace.
    pub profilers: bool,
    /// Our programs.
    pub ours: &'a [PathBuf],
    /// Our hotplug script.
    pub hotplug: &'a Path,
    /// What dom0 and guests do.
    pub scripts: &'a Path,
}

/// Makes the images in `dir`.
///
/// # Errors
/// When a program or module is not in the packages, or a library of a program is not.
pub fn build(dir: &Path, parts: &Parts<'_>) -> Result<Images> {
    let root = parts.root;
    fs::create_dir_all(dir)?;
    let xen = dir.join("xen");
    let compressed = root.find("boot", &format!("xen-{}-amd64.gz", root.suite.xen()))?;
    fs::write(&xen, output(Command::new("gzip").arg("-dc").arg(compressed))?)?;
    let kernel = root.find("boot", "vmlinuz-")?;

    let guest = dir.join("guest.cpio");
    system(&guest, parts)?;
    // Linux unpacks archives that follow each other.
    let dom0 = dir.join("dom0.cpio");
    fs::copy(&guest, &dom0)?;
    let mut more = Initramfs::append(root, &dom0)?;
    more.text(Path::new("guest/arguments"), LINUX)?;
    more.copy(Path::new("guest/kernel"), &kernel)?;
    more.copy(Path::new("guest/initramfs"), &guest)?;
    // The device model serves qdisk.
    more.program(QEMU)?;
    more.tree(Path::new(QEMU_KEYMAPS), &root.dir.join(QEMU_KEYMAPS))?;
    if parts.hvm {
        let hvmloader = format!("usr/lib/xen-{}/boot/hvmloader", root.suite.xen());
        for name in FIRMWARE.iter().copied().chain([&*hvmloader]) {
            more.copy(Path::new(name), &root.dir.join(name))?;
        }
        let guest = dir.join("hvm.cpio");
        hvm_system(&guest, root, parts.scripts)?;
        run(Command::new("gzip").arg("--force").arg(&guest))?;
        more.copy(Path::new("hvm/kernel"), &kernel)?;
        more.copy(Path::new("hvm/initramfs"), &guest.with_extension("cpio.gz"))?;
    }
    more.finish()?;
    Ok(Images { xen, kernel, dom0, disk: None })
}

fn system(path: &Path, parts: &Parts<'_>) -> Result<()> {
    let root = parts.root;
    let mut image = Initramfs::create(root, path)?;
    image.programs(PROGRAMS)?;
    let bin = format!("usr/lib/xen-{}/bin", root.suite.xen());
    let xen_profilers = if parts.profilers { XEN_PROFILERS } else { &[] };
    for name in XEN_PROGRAMS.iter().chain(xen_profilers) {
        image.program(&format!("{bin}/{name}"))?;
    }
    image.link(Path::new("xen-bin"), &bin)?;
    if parts.profilers {
        image.programs(PROFILERS)?;
    }
    image.tree(Path::new("etc/xen"), &root.dir.join("etc/xen"))?;
    image.add(&Path::new("etc/xen/scripts").join(HOTPLUG), parts.hotplug)?;
    let modules = Modules::find(root)?;
    let newer = NEWER_MODULES.iter().filter(|name| modules.contains(name));
    image.modules(&modules, &MODULES.iter().chain(newer).copied().collect::<Vec<_>>())?;
    for path in parts.ours {
        image.ours(path)?;
    }
    finish(image, parts.scripts)
}

fn hvm_system(path: &Path, root: &Root, scripts: &Path) -> Result<()> {
    let mut image = Initramfs::create(root, path)?;
    image.programs(HVM_PROGRAMS)?;
    image.modules(&Modules::find(root)?, HVM_MODULES)?;
    finish(image, scripts)
}

fn finish(mut image: Initramfs<'_>, scripts: &Path) -> Result<()> {
    image.tree(Path::new("scripts"), scripts)?;
    image.link(Path::new("init"), "scripts/init.sh")?;
    image.finish()
}
