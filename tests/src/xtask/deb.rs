//! `cargo xtask deb`: a Debian package of the programs, and of what makes them part of a host.

mod manual;
mod third_party;

use super::{cargo, root, step, target};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use xen_blk_tests::process::run as output;

/// The programs, and where they go.
const PROGRAMS: &[(&str, &str)] = &[("blkback", "usr/sbin"), ("blkfront", "usr/bin")];
/// Other files of the package: from where in the repository, to where, with which permissions.
const FILES: &[(&str, &str, u32)] = &[
    ("blkback/dist/block-blkback", "etc/xen/scripts/block-blkback", 0o755),
    ("blkback/dist/blkback.toml", "etc/blkback.toml", 0o644),
    ("blkback/dist/blkback.service", "usr/lib/systemd/system/blkback.service", 0o644),
    ("blkback/dist/sysctl.conf", "usr/lib/sysctl.d/10-blkback.conf", 0o644),
    ("blkback/dist/modprobe.conf", "usr/lib/modprobe.d/blkback.conf", 0o644),
    ("blkback/debian/copyright", "usr/share/doc/xen-blk/copyright", 0o644),
    ("README.md", "usr/share/doc/xen-blk/README.md", 0o644),
    ("blkback/debian/postinst", "DEBIAN/postinst", 0o755),
    ("blkback/debian/prerm", "DEBIAN/prerm", 0o755),
    ("blkback/debian/postrm", "DEBIAN/postrm", 0o755),
];
/// Files that the administrator may change: upgrades ask before they replace them.
const CONFIGURATION: &str = "/etc/blkback.toml\n/etc/xen/scripts/block-blkback\n";
const CHANGELOG: &str = "blkback/debian/changelog";
const DOC: &str = "usr/share/doc/xen-blk";
/// What README.md points to, and where from.
const DOCS: &[&str] = &["docs", "docs/performance"];

/// Options of `cargo xtask deb`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Take our programs as they were built last
    #[arg(long)]
    no_build: bool,
    /// Check the package with lintian, and fail at errors and warnings
    #[arg(long)]
    lint: bool,
}

/// Builds the package, and prints its path.
///
/// # Errors
/// When a step fails.
pub(crate) fn run(options: &Options) -> Result<()> {
    let package = build(options.no_build)?;
    if options.lint {
        let mut lintian = Command::new("lintian");
        step("lintian", lintian.args(["--fail-on", "error,warning", "--info"]).arg(&package))?;
    }
    println!("{}", package.display());
    Ok(())
}

/// Builds the package in `target/deb`.
///
/// # Errors
/// When a step fails.
pub(crate) fn build(no_build: bool) -> Result<PathBuf> {
    if !no_build {
        let packages = ["-p", "blkback", "-p", "blkfront"];
        step("build", cargo(&["build", "--release", "--bins"]).args(packages))?;
    }
    eprintln!("==> package");
    let dir = target().join("deb");
    let tree = dir.join("root");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    for (name, to) in PROGRAMS {
        let built = target().join("release").join(name);
        let to = tree.join(to).join(name);
        install(&to, &fs::read(&built).with_context(|| format!("read {built:?}"))?, 0o755)?;
        output(Command::new("strip").args(["-R", ".comment", "-R", ".note"]).arg(&to))?;
    }
    for (from, to, mode) in FILES {
        install(&tree.join(to), &fs::read(root().join(from)).context(*from)?, *mode)?;
    }
    for directory in DOCS {
        for entry in fs::read_dir(root().join(directory)).context(*directory)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let to = tree.join(DOC).join(directory).join(entry.file_name());
                install(&to, &fs::read(entry.path())?, 0o644)?;
            }
        }
    }
    let blkback = target().join("release/blkback");
    compressed(&tree.join("usr/share/man/man8/blkback.8"), &manual::page(&blkback, 8)?)?;
    let blkfront = target().join("release/blkfront");
    compressed(&tree.join("usr/share/man/man1/blkfront.1"), &manual::page(&blkfront, 1)?)?;
    compressed(&tree.join(DOC).join("changelog"), &fs::read_to_string(root().join(CHANGELOG))?)?;
    compressed(&tree.join(DOC).join("third-party"), &third_party::notices()?)?;
    install(&tree.join("DEBIAN/conffiles"), CONFIGURATION.as_bytes(), 0o644)?;
    describe(&tree)?;

    let architecture = output(Command::new("dpkg").arg("--print-architecture"))?;
    let name = format!("xen-blk_{}_{}.deb", version()?, architecture.trim());
    let package = dir.join(name);
    let mut command = Command::new("dpkg-deb");
    // No file's time is later than this, so that the same sources make the same package.
    command.env("SOURCE_DATE_EPOCH", changelog("Timestamp")?);
    output(command.args(["--root-owner-group", "-Zxz", "--build"]).arg(&tree).arg(&package))?;
    Ok(package)
}

/// Writes the checksums and the control file of what is in `tree`.
fn describe(tree: &Path) -> Result<()> {
    let listed = output(
        Command::new("sh")
            .args([
                "-c",
                "find * -path DEBIAN -prune -o -type f -print0 | sort -z | xargs -0 md5sum",
            ])
            .current_dir(tree),
    )?;
    install(&tree.join("DEBIAN/md5sums"), listed.as_bytes(), 0o644)?;
    let size = output(Command::new("du").args(["-sk", "--apparent-size"]).arg(tree))?;
    let control = fs::read_to_string(root().join("blkback/debian/control"))?
        .replace("@VERSION@", &version()?)
        .replace("@ARCHITECTURE@", output(Command::new("dpkg").arg("--print-architecture"))?.trim())
        .replace("@SIZE@", size.split_whitespace().next().context("du")?)
        .replace("@DEPENDS@", &libraries(tree)?);
    install(&tree.join("DEBIAN/control"), control.as_bytes(), 0o644)
}

/// The packages, with versions, of the libraries that the programs use here.
fn libraries(tree: &Path) -> Result<String> {
    // It has to run in a source package.
    let source = tempfile::tempdir()?;
    fs::create_dir(source.path().join("debian"))?;
    fs::write(
        source.path().join("debian/control"),
        "Source: xen-blk\n\nPackage: xen-blk\nArchitecture: any\n",
    )?;
    let programs = PROGRAMS.iter().map(|(name, to)| tree.join(to).join(name));
    let told = output(
        Command::new("dpkg-shlibdeps")
            .current_dir(source.path())
            .args(["-O", "--ignore-missing-info"])
            .args(programs),
    )
    .context("dpkg-shlibdeps (apt-get install dpkg-dev)")?;
    let depends =
        told.trim().strip_prefix("shlibs:Depends=").context("what dpkg-shlibdeps said")?;
    Ok(depends.to_owned())
}

/// The package's version, which is also the programs'.
fn version() -> Result<String> {
    let version = changelog("Version")?;
    let ours = env!("CARGO_PKG_VERSION");
    ensure!(version == ours, "{CHANGELOG} is of {version}, the programs are of {ours}");
    Ok(version)
}

fn changelog(field: &str) -> Result<String> {
    let mut command = Command::new("dpkg-parsechangelog");
    command.current_dir(root()).args(["-l", CHANGELOG, "-S", field]);
    let value = output(&mut command).context("dpkg-parsechangelog (apt-get install dpkg-dev)")?;
    Ok(value.trim().to_owned())
}

fn install(to: &Path, content: &[u8], mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file's directory")?)?;
    fs::write(to, content).with_context(|| format!("write {to:?}"))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// Installs `text` as `TO.gz`.
fn compressed(to: &Path, text: &str) -> Result<()> {
    install(to, text.as_bytes(), 0o644)?;
    output(Command::new("gzip").args(["-9n"]).arg(to))?;
    Ok(())
}
