//! The modules of the packages' kernel.

use super::packages::Root;
use crate::process::output;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// The names of the modules that a module needs stand after this, in its `.modinfo` section.
const MODULE_DEPENDS: &[u8] = b"\0depends=";

/// The name its file has in an image.
pub(super) fn file_name(module: &str) -> String {
    format!("{}.ko", canonical(module))
}

/// Modules are named with `-` and `_` alike.
fn canonical(module: &str) -> String {
    module.replace('-', "_")
}

/// The modules of the packages' kernel.
pub(super) struct Modules {
    pub(super) release: String,
    files: BTreeMap<String, PathBuf>,
}

impl Modules {
    pub(super) fn find(root: &Root) -> Result<Self> {
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

    /// Whether the kernel has a module of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.files.contains_key(&canonical(name))
    }

    /// A module, decompressed: an emulated CPU would take long.
    pub(super) fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.files.get(name);
        let path = path.with_context(|| format!("no module {name} for {}", self.release))?;
        if path.extension().is_some_and(|extension| extension == "xz") {
            output(Command::new("xz").arg("-dc").arg(path))
        } else {
            Ok(fs::read(path)?)
        }
    }

    /// Appends a module, after those that it needs and that are not in `order` yet.
    pub(super) fn load_order(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
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
