//! The commands of `cargo xtask`.

pub(crate) mod bench;
mod compare;
pub(crate) mod deb;
pub(crate) mod demo;
mod packages;
mod plot;
pub(crate) mod test;
pub(crate) mod xen;

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The workspace's root.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Where cargo puts what it builds.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// Runs a step; its output goes to ours.
fn step(what: &str, command: &mut Command) -> Result<()> {
    eprintln!("==> {what}");
    let status = command.status()?;
    if !status.success() {
        bail!("{what}: {command:?}: {status}");
    }
    Ok(())
}
