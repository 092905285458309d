//! Debian packages of a suite, with everything they depend on, unpacked in a directory.
//!
//! apt is given a sources list, package lists and a state of its own, so that the suite need not be
//! the one this machine runs, and nothing is installed.

use super::Suite;
use crate::process::run;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the images are made of, besides Xen's packages that have its version in their name.
const PACKAGES: &[&str] = &[
    "bash",
    "blktrace",
    "busybox-static",
    "e2fsprogs",
    "fio",
    "linux-image-amd64",
    "linux-perf",
    "qemu-system-xen",
    "util-linux",
    "xen-utils-common",
    "xenstore-utils",
];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Packages still have files in these (merged /usr).
const MERGED: &[&str] = &["bin", "sbin", "lib", "lib64"];

pub(super) fn sources(suite: &str) -> Result<String> {
    let mut ask = Command::new("apt-get");
    ask.args(["indextargets", "--format", "$(SITE) $(RELEASE)", "Identifier: Packages"]);
    let mut lines = BTreeSet::new();
    for target in run(&mut ask)?.lines() {
        let Some((site, release)) = target.split_once(' ') else { continue };
        let suffix = if release.ends_with("-security") { "-security" } else { "" };
        if suffix.is_empty() && release.contains('-') {
            continue; // updates, backports
        }
        lines.insert(format!("deb [signed-by={KEYRING}] {site} {suite}{suffix} main\n"));
    }
    ensure!(!lines.is_empty(), "apt knows no Debian archive: is this machine Debian's?");
    Ok(lines.into_iter().collect())
}

/// The unpacked packages of a suite.
#[derive(Debug)]
pub struct Root {
    /// Where they are unpacked.
    pub dir: PathBuf,
    /// The suite they are from.
    pub suite: Suite,
}

impl Root {
    /// Those in `cache`; downloads and unpacks what is missing, or, to `refresh`, outdated.
    ///
    /// # Errors
    /// When apt or dpkg-deb fail, with what they say.
    pub fn prepare(suite: Suite, cache: &Path, refresh: bool) -> Result<Self> {
        let apt = Apt { suite, dir: cache.join(suite.name()) };
        let root = Self { dir: apt.dir.join("root"), suite };
        let stamp = apt.dir.join("unpacked");
        // The first line is what was asked for, the others are the packages that this came to.
        let unpacked = fs::read_to_string(&stamp).unwrap_or_default();
        if !refresh && unpacked.lines().next() == Some(&apt.wanted()) {
            return Ok(root);
        }
        let packages = apt.download()?;
        // Names of package files hold their versions.
        let names: Vec<_> = packages.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        let now = format!("{}\n{}", apt.wanted(), names.join("\n"));
        if unpacked == now {
            return Ok(root);
        }
        let _ = fs::remove_file(&stamp);
        if root.dir.exists() {
            fs::remove_dir_all(&root.dir)?;
        }
        for name in MERGED {
            fs::create_dir_all(root.dir.join("usr").join(name))?;
            symlink(Path::new("usr").join(name), root.dir.join(name))?;
        }
        for package in &packages {
            unpack(package, &root.dir)?;
        }
        fs::write(&stamp, now)?;
        Ok(root)
    }

    /// The one entry of a directory whose name starts with `prefix`.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, dir: &str, prefix: &str) -> Result<PathBuf> {
        for entry in fs::read_dir(self.dir.join(dir))? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()) {
                return Ok(entry.path());
            }
        }
        anyhow::bail!("no {prefix}* in {dir} of the packages of {}", self.suite.name())
    }
}

fn unpack(package: &Path, root: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("start dpkg-deb")?;
    let tar = archive.stdout.take().context("dpkg-deb's output")?;
    // `dpkg-deb -x` would put directories in the place of the links of a merged /usr.
    let status = Command::new("tar")
        .args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"])
        .arg(root)
        .stdin(tar)
        .status()?;
    let archive = archive.wait()?;
    anyhow::ensure!(status.success() && archive.success(), "unpack {package:?}");
    Ok(())
}

struct Apt {
    suite: Suite,
    dir: PathBuf,
}

impl Apt {
    /// The packages to ask for.
    fn wanted(&self) -> String {
        let xen = self.suite.xen();
        format!("{} xen-hypervisor-{xen}-amd64 xen-utils-{xen}", PACKAGES.join(" "))
    }

    /// The files of those asked for and of all that they depend on.
    fn download(&self) -> Result<Vec<PathBuf>> {
        let name = self.suite.name();
        for dir in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(self.dir.join(dir))?;
        }
        // Nothing is installed.
        fs::write(self.dir.join("status"), "")?;
        fs::write(self.dir.join("sources.list"), sources(name)?)?;
        run(self.get().arg("update")).context("package lists")?;
        let install = || {
            let mut command = self.get();
            command.arg("install").args(self.wanted().split(' '));
            command
        };
        run(install().arg("--download-only")).context("download packages")?;
        // It prints 'URI' FILE SIZE CHECKSUM of what it would fetch: with an empty directory of archives,
        // that is all.
        let elsewhere = tempfile::tempdir()?;
        let archives = format!("Dir::Cache::archives={}", elsewhere.path().display());
        let wanted = run(install().args(["-o", &archives, "--print-uris"]))?;
        let files = wanted.lines().filter(|line| line.starts_with('\''));
        Ok(files
            .filter_map(|line| line.split(' ').nth(1))
            .map(|file| self.dir.join("archives").join(file))
            .collect())
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y"]);
        for (option, file) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache::archives", "archives"),
        ] {
            command.arg("-o").arg(format!("{option}={}", self.dir.join(file).display()));
        }
        for option in [
            "Dir::Etc::sourceparts=-",
            "Dir::Cache::pkgcache=",
            "Dir::Cache::srcpkgcache=",
            "APT::Install-Recommends=false",
        ] {
            command.args(["-o", option]);
        }
        for option in ["APT::Architecture", "APT::Architectures"] {
            command.arg("-o").arg(format!("{option}=amd64"));
        }
        command
    }
}
