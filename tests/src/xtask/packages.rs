//! Debian packages that a command needs beside Rust.

use super::step;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

/// A program or file, and the Debian package that has it.
pub(super) type Need = (&'static str, &'static str);

/// Installs those packages whose file is missing.
pub(super) fn install(needs: &[Need]) -> Result<()> {
    // Twice: qemu-system-x86 removes a qemu-utils that is not of the same release.
    for _ in 0..2 {
        let missing = missing(needs);
        if !missing.is_empty() {
            install_packages(&missing)?;
        }
    }
    Ok(())
}

/// The packages whose file is missing.
pub(super) fn missing(needs: &[Need]) -> Vec<&'static str> {
    let absent = needs.iter().filter(|(file, _)| !Path::new(file).exists());
    absent.map(|&(_, package)| package).collect()
}

fn install_packages(missing: &[&str]) -> Result<()> {
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(args);
        command
    };
    step("package lists", &mut apt(&["update", "-q"]))?;
    step(
        &format!("install {}", missing.join(" ")),
        apt(&["install", "-y", "-q", "--no-install-recommends"]).args(missing),
    )
    .with_context(|| format!("install {} by hand", missing.join(" ")))
}
