//! The notices of the crates that the programs are linked with, which their licences ask for.

use super::super::cargo;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use xen_blk_tests::process::run as output;

/// Names of files that hold a licence or a notice begin with these.
const NOTICES: &[&str] = &["COPYING", "COPYRIGHT", "LICENCE", "LICENSE", "NOTICE"];

/// A paragraph for each crate: name, version, licence, and its notices.
pub(super) fn notices() -> Result<String> {
    let tree = ["tree", "-p", "blkback", "-p", "blkfront", "-e", "normal", "--prefix", "none"];
    let linked = output(cargo(&tree).args(["--format", "{p}"]))?;
    // NAME vVERSION, perhaps followed by more.
    let linked: BTreeSet<(&str, &str)> = linked
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .collect();
    let metadata: Value =
        serde_json::from_str(&output(&mut cargo(&["metadata", "--format-version", "1"]))?)?;
    let packages = metadata["packages"].as_array().context("cargo metadata")?;
    let mut text = String::new();
    for (name, version) in linked {
        let package = packages.iter().find(|p| p["name"] == name && p["version"] == version);
        let package = package.with_context(|| format!("{name} {version} in cargo metadata"))?;
        // Ours have no source.
        if package["source"].is_null() {
            continue;
        }
        let licence = package["license"].as_str().unwrap_or("see below");
        text.push_str(&format!("==== {name} {version}: {licence}\n\n"));
        let manifest = package["manifest_path"].as_str().context("a manifest's path")?;
        text.push_str(&of_crate(Path::new(manifest).parent().context("a crate's directory")?)?);
    }
    Ok(text)
}

/// The notices in a crate's directory: that of the MIT licence if there is one.
fn of_crate(dir: &Path) -> Result<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_uppercase();
        if entry.file_type()?.is_file() && NOTICES.iter().any(|start| name.starts_with(start)) {
            files.push((name, entry.path()));
        }
    }
    files.sort();
    if files.iter().any(|(name, _)| name.contains("MIT")) {
        files.retain(|(name, _)| name.contains("MIT"));
    }
    let mut text = String::new();
    for (_, path) in files {
        text.push_str(fs::read_to_string(path)?.trim());
        text.push_str("\n\n");
    }
    Ok(text)
}
