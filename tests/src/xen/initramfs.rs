//! An initramfs: programs of the packages with their libraries, modules, our programs and scripts.

use super::cpio::Archive;
use super::modules::{Modules, file_name};
use super::packages::Root;
use crate::process::run;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The dynamic loader.
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
/// Where their libraries are.
const LIBRARIES: &[&str] = &["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];

/// An initramfs being written.
pub(super) struct Initramfs<'a> {
    root: &'a Root,
    archive: Archive<BufWriter<File>>,
}

impl<'a> Initramfs<'a> {
    /// One that is unpacked over another one, to whose file it is appended.
    pub(super) fn append(root: &'a Root, path: &Path) -> Result<Self> {
        let file = File::options().append(true).open(path)?;
        Ok(Self { root, archive: Archive::new(BufWriter::new(file)) })
    }

    /// One with what every system needs.
    pub(super) fn create(root: &'a Root, path: &Path) -> Result<Self> {
        let mut archive = Archive::new(BufWriter::new(File::create(path)?));
        for name in ["bin", "sbin", "lib", "lib64"] {
            archive.directory(&Path::new("usr").join(name))?;
            archive.link(Path::new(name), &format!("usr/{name}"))?;
        }
        for name in ["dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var/lib", "var/log"]
        {
            archive.directory(Path::new(name))?;
        }
        archive.link(Path::new("var/run"), "/run")?;
        archive.link(Path::new("var/lock"), "/run/lock")?;
        archive.link(Path::new("etc/mtab"), "/proc/self/mounts")?;
        let mut image = Self { root, archive };
        image.copy(Path::new("etc/mke2fs.conf"), &root.dir.join("etc/mke2fs.conf"))?;
        image.add(Path::new("usr/bin/busybox"), &root.dir.join("usr/bin/busybox"))?;
        image.archive.link(Path::new("usr/bin/sh"), "busybox")?;
        image.add(Path::new(LOADER), &root.dir.join(LOADER))?;
        Ok(image)
    }

    pub(super) fn finish(self) -> Result<()> {
        self.archive.finish()?;
        Ok(())
    }

    pub(super) fn text(&mut self, name: &Path, text: &str) -> Result<()> {
        Ok(self.archive.file(name, false, text.as_bytes())?)
    }

    pub(super) fn link(&mut self, name: &Path, to: &str) -> Result<()> {
        Ok(self.archive.link(name, to)?)
    }

    /// Adds a file, executable; links are followed.
    pub(super) fn add(&mut self, name: &Path, from: &Path) -> Result<()> {
        if self.archive.contains(name) {
            return Ok(());
        }
        let content = fs::read(from).with_context(|| format!("read {from:?}"))?;
        Ok(self.archive.file(name, true, &content)?)
    }

    pub(super) fn copy(&mut self, name: &Path, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {from:?}"))?;
        Ok(self.archive.file(name, false, &content)?)
    }

    pub(super) fn programs(&mut self, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| self.program(name))
    }

    /// Adds a program of the packages with its libraries.
    pub(super) fn program(&mut self, name: &str) -> Result<()> {
        let path = self.root.dir.join(name);
        self.add(&merged(Path::new(name)), &path)?;
        self.libraries(&path)
    }

    /// Adds a program of ours, without what only a debugger needs: memory is short.
    pub(super) fn ours(&mut self, path: &Path) -> Result<()> {
        let name = path.file_name().context("a program's name")?;
        let stripped = tempfile::NamedTempFile::new()?;
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped.path()).arg(path))?;
        self.add(&Path::new("usr/local/bin").join(name), stripped.path())?;
        self.libraries(path)
    }

    /// Adds the libraries that a program or a library needs.
    fn libraries(&mut self, program: &Path) -> Result<()> {
        for line in run(Command::new("readelf").arg("-d").arg(program))?.lines() {
            // 0x0000000000000001 (NEEDED)             Shared library: [NAME]
            if !line.contains("(NEEDED)") {
                continue;
            }
            let name = line.split(['[', ']']).nth(1).context("a library's name")?;
            let dirs = LIBRARIES.iter().map(|dir| Path::new(dir).join(name));
            let found =
                dirs.map(|path| (self.root.dir.join(&path), path)).find(|(at, _)| at.exists());
            match found {
                Some((_, path)) if self.archive.contains(&path) => {}
                Some((at, path)) => {
                    self.add(&path, &at)?;
                    self.libraries(&at)?;
                }
                None if LOADER.ends_with(name) => {}
                None => bail!("{program:?} needs {name}, which is not there"),
            }
        }
        Ok(())
    }

    /// Adds the directory `from` as `name`.
    pub(super) fn tree(&mut self, name: &Path, from: &Path) -> Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let name = name.join(entry.file_name());
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                let to = fs::read_link(entry.path())?;
                self.archive.link(&name, to.to_str().context("a link's target")?)?;
            } else if kind.is_dir() {
                self.tree(&name, &entry.path())?;
            } else {
                self.add(&name, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Adds modules and those they need, with the table that modprobe reads.
    pub(super) fn modules(&mut self, modules: &Modules, names: &[&str]) -> Result<()> {
        let dir = Path::new("usr/lib/modules").join(&modules.release);
        let mut all = Vec::new();
        for name in names {
            modules.load_order(name, &mut all)?;
        }
        let mut table = String::new();
        for name in &all {
            let mut order = Vec::new();
            modules.load_order(name, &mut order)?;
            order.reverse();
            let files: Vec<_> = order.iter().map(|name| file_name(name)).collect();
            // The module, then those to be loaded before it, the first of them last.
            table.push_str(&format!("{}: {}\n", file_name(name), files[1..].join(" ")));
            self.archive.file(&dir.join(file_name(name)), false, &modules.read(name)?)?;
        }
        Ok(self.archive.file(&dir.join("modules.dep"), false, table.as_bytes())?)
    }
}

/// A package's path in a system whose /usr is merged.
fn merged(path: &Path) -> PathBuf {
    if path.starts_with("usr") { path.to_owned() } else { Path::new("usr").join(path) }
}
