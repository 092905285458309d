//! Initramfs images of dom0 and of guests: a few programs with their libraries, a few modules.

use super::cpio::Archive;
use super::machine::LINUX;
use super::packages::Root;
use super::scenario::Script;
use crate::process::run;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
const LIBRARIES: &[&str] = &["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];
/// The names of the modules that a module needs stand after this, in its `.modinfo` section.
const MODULE_DEPENDS: &[u8] = b"\0depends=";
/// Programs of both images.
const PROGRAMS: &[&str] = &["usr/bin/fio", "sbin/mke2fs", "sbin/e2fsck"];
const DOM0_PROGRAMS: &[&str] = &[
    "usr/bin/bash",
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
const XEN_PROGRAMS: &[&str] = &["libxl-save-helper", "lsevtchn", "xen-init-dom0", "xenconsole"];
const XEN_DAEMONS: &[&str] = &["xenconsoled", "xenstored", "xl"];
const DOM0_MODULES: &[&str] = &[
    "brd",
    "crc32c_generic",
    "ext4",
    "loop",
    "null_blk",
    "xen-blkback",
    "xen-blkfront",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
    "xen-privcmd",
    "xenfs",
];
const GUEST_MODULES: &[&str] = &[
    "crc32c_generic",
    "ext4",
    "nbd",
    "xen-blkfront",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
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

/// Makes the images in `dir`, dom0's with the programs in `ours` and `scenario`.
///
/// # Errors
/// When a program or module is not in the packages, or a library of a program is not.
pub fn build(root: &Root, dir: &Path, ours: &[PathBuf], scenario: &Script) -> Result<Images> {
    let xen = dir.join("xen");
    let compressed = root.find("boot", &format!("xen-{}-amd64.gz", root.suite.xen()))?;
    fs::write(&xen, output(Command::new("gzip").arg("-dc").arg(compressed))?)?;
    let kernel = root.find("boot", "vmlinuz-")?;
    let modules = Modules::find(root)?;

    let guest_path = dir.join("guest.cpio");
    let mut guest = Image::create(root, &guest_path)?;
    guest.programs(PROGRAMS)?;
    guest.modules(&modules, GUEST_MODULES)?;
    guest.script("init", include_str!("scripts/guest-init.sh"))?;
    guest.script("job", scenario.guest)?;
    guest.finish()?;

    let dom0_path = dir.join("dom0.cpio");
    let mut dom0 = Image::create(root, &dom0_path)?;
    dom0.programs(PROGRAMS)?;
    dom0.programs(DOM0_PROGRAMS)?;
    let bin = format!("usr/lib/xen-{}/bin", root.suite.xen());
    for name in XEN_PROGRAMS.iter().chain(XEN_DAEMONS) {
        dom0.program(&format!("{bin}/{name}"))?;
    }
    dom0.archive.link(Path::new("xen-bin"), &bin)?;
    dom0.tree(Path::new("etc/xen"))?;
    dom0.modules(&modules, DOM0_MODULES)?;
    for path in ours {
        let name = path.file_name().context("a program's name")?;
        dom0.add(&Path::new("usr/local/bin").join(name), path)?;
        dom0.libraries(path)?;
    }
    dom0.archive.file(Path::new("guest/arguments"), false, LINUX.as_bytes())?;
    dom0.copy(Path::new("guest/kernel"), &kernel)?;
    dom0.copy(Path::new("guest/initramfs"), &guest_path)?;
    dom0.script("init", include_str!("scripts/dom0-init.sh"))?;
    dom0.script("lib.sh", include_str!("scripts/dom0-lib.sh"))?;
    dom0.script("scenario", scenario.dom0)?;
    dom0.finish()?;
    Ok(Images { xen, kernel, dom0: dom0_path })
}

struct Image<'a> {
    root: &'a Root,
    archive: Archive<BufWriter<File>>,
}

impl<'a> Image<'a> {
    /// With what every image has.
    fn create(root: &'a Root, path: &Path) -> Result<Self> {
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
        image.add(Path::new("usr/lib64/ld-linux-x86-64.so.2"), &root.dir.join(LOADER))?;
        Ok(image)
    }

    fn finish(self) -> Result<()> {
        self.archive.finish()?;
        Ok(())
    }

    fn script(&mut self, name: &str, text: &str) -> Result<()> {
        Ok(self.archive.file(Path::new(name), true, text.as_bytes())?)
    }

    /// Adds a file, executable; links are followed.
    fn add(&mut self, name: &Path, from: &Path) -> Result<()> {
        if self.archive.contains(name) {
            return Ok(());
        }
        let content = fs::read(from).with_context(|| format!("read {from:?}"))?;
        Ok(self.archive.file(name, true, &content)?)
    }

    fn copy(&mut self, name: &Path, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {from:?}"))?;
        Ok(self.archive.file(name, false, &content)?)
    }

    fn programs(&mut self, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| self.program(name))
    }

    /// Adds a program of the packages with its libraries.
    fn program(&mut self, name: &str) -> Result<()> {
        let path = self.root.dir.join(name);
        self.add(&merged(Path::new(name)), &path)?;
        self.libraries(&path)
    }

    /// Adds the libraries of a program: those that the suite's own loader finds for it.
    fn libraries(&mut self, program: &Path) -> Result<()> {
        let root = self.root;
        let dirs: Vec<_> =
            LIBRARIES.iter().map(|dir| root.dir.join(dir).display().to_string()).collect();
        let mut list = Command::new(root.dir.join(LOADER));
        list.args(["--library-path", &dirs.join(":"), "--list"]).arg(program);
        for line in run(&mut list)?.lines() {
            // NAME => PATH (ADDRESS); what has no arrow is the loader or the kernel's.
            let Some((name, found)) = line.trim().split_once(" => ") else { continue };
            let path = found.split(" (").next().unwrap_or(found);
            let inside = Path::new(path).strip_prefix(&root.dir);
            let Ok(inside) = inside else { bail!("{program:?} needs {name}: {found}") };
            self.add(&merged(inside), Path::new(path))?;
        }
        Ok(())
    }

    /// Adds a directory of the packages.
    fn tree(&mut self, name: &Path) -> Result<()> {
        for entry in fs::read_dir(self.root.dir.join(name))? {
            let entry = entry?;
            let name = name.join(entry.file_name());
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                let to = fs::read_link(entry.path())?;
                self.archive.link(&name, to.to_str().context("a link's target")?)?;
            } else if kind.is_dir() {
                self.tree(&name)?;
            } else {
                self.add(&name, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Adds modules and those they need, with the table that modprobe reads.
    fn modules(&mut self, modules: &Modules, names: &[&str]) -> Result<()> {
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

fn file_name(module: &str) -> String {
    format!("{}.ko", canonical(module))
}

/// Modules are named with `-` and `_` alike.
fn canonical(module: &str) -> String {
    module.replace('-', "_")
}

/// Paths of packages in a system whose /usr is merged.
fn merged(path: &Path) -> PathBuf {
    if path.starts_with("usr") { path.to_owned() } else { Path::new("usr").join(path) }
}

/// The modules of the packages' kernel.
struct Modules {
    release: String,
    files: BTreeMap<String, PathBuf>,
}

impl Modules {
    fn find(root: &Root) -> Result<Self> {
        // Only one kernel is unpacked.
        let dir = root.find("lib/modules", "")?;
        let release =
            dir.file_name().and_then(|name| name.to_str()).context("the kernel's name")?;
        let mut files = BTreeMap::new();
        let mut todo = vec![dir.join("kernel")];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                let name = entry.file_name();
                if entry.file_type()?.is_dir() {
                    todo.push(entry.path());
                } else if let Some((name, _)) = name.to_str().and_then(|n| n.split_once(".ko")) {
                    files.insert(canonical(name), entry.path());
                }
            }
        }
        Ok(Self { release: release.to_owned(), files })
    }

    /// A module, unpacked: an emulated CPU would take long.
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.files.get(name);
        let path = path.with_context(|| format!("no module {name} for {}", self.release))?;
        if path.extension().is_some_and(|extension| extension == "xz") {
            output(Command::new("xz").arg("-dc").arg(path))
        } else {
            Ok(fs::read(path)?)
        }
    }

    /// Appends a module, after those that it needs and that are not there.
    fn load_order(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let name = canonical(name);
        if order.contains(&name) {
            return Ok(());
        }
        for need in depends(&self.read(&name)?) {
            self.load_order(&need, order)?;
        }
        order.push(name);
        Ok(())
    }
}

/// The modules that a module needs.
fn depends(module: &[u8]) -> Vec<String> {
    let at = module.windows(MODULE_DEPENDS.len()).position(|window| window == MODULE_DEPENDS);
    let list =
        at.and_then(|at| module[at + MODULE_DEPENDS.len()..].split(|&byte| byte == 0).next());
    let list = list.map(String::from_utf8_lossy).unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(canonical).collect()
}

/// What a command writes, as bytes.
fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}
