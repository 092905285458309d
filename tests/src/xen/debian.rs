//! A whole Debian as dom0, with systemd, to install our package on.

use super::image::Images;
use super::initramfs::Initramfs;
use super::packages::{Root, sources};
use crate::process::run;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The scenario that runs on it.
pub const SCENARIO: &str = "debian";
/// What a dom0 is made of, besides Xen's packages that have its version in their name.
const PACKAGES: &str = "dbus,kmod,systemd-sysv,udev,xen-utils-common";
/// Room for the system and for what is installed; most of it stays a hole.
const DISK: &str = "1500M";

/// `images` with Debian on a disk, which is installed if it is missing, or to `refresh` it. dom0's
/// initramfs, which starts it, has `package` in it.
///
/// # Errors
/// When mmdebstrap or mke2fs are missing or fail.
pub fn install(root: &Root, images: &Images, package: &Path, refresh: bool) -> Result<Images> {
    let dir = images.dom0.parent().context("the images' directory")?;
    let disk = dir.join("debian.ext4");
    if refresh || !disk.exists() {
        make_disk(root, &disk)?;
    }
    // Linux unpacks archives that follow each other.
    let dom0 = dir.join("debian.cpio");
    fs::copy(&images.dom0, &dom0)?;
    let mut more = Initramfs::append(root, &dom0)?;
    more.copy(Path::new("guest/xen-blk.deb"), package)?;
    more.finish()?;
    let (xen, kernel) = (images.xen.clone(), images.kernel.clone());
    Ok(Images { xen, kernel, dom0, disk: Some(disk) })
}

fn make_disk(root: &Root, disk: &PathBuf) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "installing Debian in a directory takes root");
    let dir = tempfile::tempdir_in(disk.parent().context("a disk's directory")?)?;
    let list = dir.path().join("sources.list");
    fs::write(&list, sources(root.suite.name())?)?;
    let system = dir.path().join("root");
    let packages = format!("{PACKAGES},xen-utils-{}", root.suite.xen());
    let mut install = Command::new("mmdebstrap");
    install.args(["--variant=minbase", "--mode=root", "--include", &packages]);
    for left_out in ["doc", "locale", "man"] {
        install.arg(format!("--dpkgopt=path-exclude=/usr/share/{left_out}/*"));
    }
    install.arg(root.suite.name()).arg(&system).arg(&list);
    run(&mut install).context("mmdebstrap (apt-get install mmdebstrap)")?;
    let new = disk.with_extension("new");
    let mut format = Command::new("mke2fs");
    format.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&system).arg(&new).arg(DISK);
    run(&mut format).context("mke2fs (apt-get install e2fsprogs)")?;
    // Only a finished disk may be found.
    Ok(fs::rename(&new, disk)?)
}
