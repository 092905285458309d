//! `cargo xtask test`.

use super::packages::{self, Need};
use super::{cargo, step, target, xen};
use anyhow::Result;

/// What tests use.
const NEEDS: &[Need] = &[
    ("/usr/bin/cc", "gcc"),
    ("/usr/include/stdio.h", "libc6-dev"),
    ("/usr/include/xen/io/blkif.h", "libxen-dev"),
    ("/usr/bin/xenstore-ls", "xenstore-utils"),
    ("/usr/bin/fio", "fio"),
    ("/usr/bin/nbdcopy", "libnbd-bin"),
    ("/usr/bin/qemu-io", "qemu-utils"),
    ("/usr/bin/curl", "curl"),
    ("/usr/bin/valgrind", "valgrind"),
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/bin/strip", "binutils"),
    ("/usr/bin/xz", "xz-utils"),
    ("/sbin/e2fsck", "e2fsprogs"),
];

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave out the checks of format, lints and documentation
    #[arg(long)]
    no_lint: bool,
    /// Leave out real Xen, which is 400 MB of packages and some minutes of emulation
    #[arg(long)]
    no_xen: bool,
}

/// Installs what is missing and runs every test.
///
/// # Errors
/// The first step that fails.
pub(crate) fn run(options: &Options) -> Result<()> {
    packages::install(NEEDS)?;
    if !options.no_lint {
        step("format", &mut cargo(&["fmt", "--all", "--check"]))?;
        step(
            "lints",
            &mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
        )?;
        step(
            "documentation",
            cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
        )?;
    }
    step("build", &mut cargo(&["build", "--workspace", "--bins"]))?;
    step("tests", &mut cargo(&["test", "--workspace"]))?;
    // It uses loom's atomics, so it is a build of its own.
    step(
        "memory ordering (loom)",
        cargo(&["test", "--package", "ring-proto", "--release", "--lib", "loom"])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", target().join("loom")),
    )?;
    if !options.no_xen {
        xen::short()?;
    }
    Ok(())
}
