//! `cargo xtask xen`: a real Xen host under emulation.

use super::{cargo, compare, deb, step, target};
use anyhow::{Result, bail};
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use xen_blk_tests::xen::image::Images;
use xen_blk_tests::xen::packages::Root;
use xen_blk_tests::xen::{Suite, debian, image, machine, scenario};

/// Our programs that dom0 gets.
const OURS: &[&str] = &["blkback", "blkfront"];

/// What `cargo xtask test` runs: one attachment with everything used once, and what only real Xen can show
/// of a backend that is killed.
const SHORT: [&str; 2] = ["dom0-phy", "kill"];
/// For each of these, on a slow machine. They take a quarter of it.
const SHORT_LIMIT: Duration = Duration::from_secs(480);

/// Options of `cargo xtask xen`.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Action,
    /// The Debian release that Xen and Linux are taken from
    #[arg(long, global = true, value_enum, default_value_t = Release::Bookworm)]
    suite: Release,
    /// Look for newer packages
    #[arg(long, global = true)]
    refresh: bool,
    /// Take our programs as they were built last
    #[arg(long, global = true)]
    no_build: bool,
}

#[derive(Subcommand)]
enum Action {
    /// List the scenarios
    List,
    /// Run scenarios, each on a freshly booted host
    Run {
        /// Their names
        #[arg(required = true, value_name = "SCENARIO")]
        scenarios: Vec<String>,
        /// Seconds after which a host that is not done is killed
        #[arg(long, default_value_t = 300)]
        limit: u64,
    },
    /// An interactive host on this terminal
    Shell,
}

/// Debian releases.
#[derive(Clone, Copy, ValueEnum)]
enum Release {
    /// Debian 12: Xen 4.17, Linux 6.1
    Bookworm,
    /// Debian 13: Xen 4.20, Linux 6.12
    Trixie,
}

impl From<Release> for Suite {
    fn from(release: Release) -> Self {
        match release {
            Release::Bookworm => Self::Bookworm,
            Release::Trixie => Self::Trixie,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// The first scenario that fails, or what was missing to run it.
pub(crate) fn run(options: &Options) -> Result<()> {
    let suite = Suite::from(options.suite);
    match &options.command {
        Action::List => {
            for (name, about) in scenario::list()? {
                println!("{name:<12} {about}");
            }
            Ok(())
        }
        Action::Run { scenarios, limit } => {
            scenarios.iter().try_for_each(|name| scenario::check(name))?;
            let (root, images) = prepare(suite, &programs(options)?, options.refresh, scenarios)?;
            let limit = Duration::from_secs(*limit);
            scenarios.iter().try_for_each(|name| {
                if name == debian::SCENARIO {
                    let package = deb::build(true)?;
                    let images = debian::install(&root, &images, &package, options.refresh)?;
                    return run_one(suite, &images, name, limit);
                }
                run_one(suite, &images, name, limit)
            })
        }
        Action::Shell => {
            machine::interact(&prepare(suite, &programs(options)?, options.refresh, &[])?.1)
        }
    }
}

fn cache() -> PathBuf {
    target().join("xen")
}

/// Runs the scenarios of [`SHORT`] with the debug build that tests use.
///
/// # Errors
/// As for [`run`].
pub(crate) fn short() -> Result<()> {
    let scenarios = SHORT.map(str::to_owned);
    let (_, images) = prepare(Suite::Bookworm, &target().join("debug"), false, &scenarios)?;
    scenarios.iter().try_for_each(|name| run_one(Suite::Bookworm, &images, name, SHORT_LIMIT))
}

/// Where our programs are, built unless told not to.
fn programs(options: &Options) -> Result<PathBuf> {
    if !options.no_build {
        let packages = ["-p", "blkback", "-p", "blkfront"];
        step("build", cargo(&["build", "--release", "--bins"]).args(packages))?;
    }
    Ok(target().join("release"))
}

fn prepare(
    suite: Suite,
    programs: &Path,
    refresh: bool,
    scenarios: &[String],
) -> Result<(Root, Images)> {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        bail!(
            "qemu-system-x86_64 is missing: apt-get install --no-install-recommends qemu-system-x86"
        );
    }
    eprintln!("==> packages of {}", suite.name());
    let root = Root::prepare(suite, &cache(), refresh)?;
    let needs = scenarios.iter().map(|name| scenario::needs(name)).collect::<Result<Vec<_>>>()?;
    let needed = |what: &str| needs.iter().flatten().any(|need| need == what);
    let ours: Vec<_> = OURS.iter().map(|name| programs.join(name)).collect();
    let parts = image::Parts {
        root: &root,
        hvm: needed("hvm"),
        profilers: needed("profilers"),
        ours: &ours,
        hotplug: &super::root().join("blkback/dist/block-blkback"),
        scripts: &scenario::scripts(),
    };
    let images = image::build(&cache().join(suite.name()).join("images"), &parts)?;
    Ok((root, images))
}

fn run_one(suite: Suite, images: &Images, scenario: &str, limit: Duration) -> Result<()> {
    let dir = cache().join(suite.name()).join("runs").join(scenario);
    fs::create_dir_all(&dir)?;
    eprintln!("==> {scenario} on {}", suite.name());
    let outcome = machine::run(images, scenario, &dir, limit)?;
    let failure = outcome.failure();
    let all = json!({
        "scenario": scenario,
        "suite": suite.name(),
        "took_s": outcome.took.as_secs_f64(),
        "failure": failure,
        "results": outcome.results,
    });
    let report = dir.join("result.json");
    serde_json::to_writer_pretty(File::create(&report)?, &all)?;
    show(&outcome);
    for file in outcome.named("file") {
        fs::write(dir.join(text(&file["name"])), text(&file["text"]))?;
    }
    if let Some(tables) = compare::tables(&outcome) {
        fs::write(dir.join("tables.md"), &tables)?;
        println!("{tables}");
    }
    eprintln!("Left behind: {}, {}", report.display(), outcome.console.display());
    if let Some(failure) = failure {
        bail!("{scenario}: {failure}\n\nThe console's end:\n{}", outcome.console_tail());
    }
    println!("{scenario}: passed in {:.0} s", outcome.took.as_secs_f64());
    Ok(())
}

/// Prints what people want to see at once.
fn show(outcome: &machine::Outcome) {
    for boot in outcome.named("boot") {
        println!("Xen {}, Linux {}", text(&boot["xen"]), text(&boot["linux"]));
    }
    for job in outcome.named("fio").filter_map(|fio| fio.pointer("/jobs/0")) {
        let number = |pointer: &str| job.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0);
        println!(
            "{:<14} read {:>8.0} IOPS {:>8.0} KiB/s  write {:>8.0} IOPS {:>8.0} KiB/s  error {}",
            text(&job["jobname"]),
            number("/read/iops"),
            number("/read/bw"),
            number("/write/iops"),
            number("/write/bw"),
            job["error"],
        );
    }
    for name in ["blkfront", "queues", "queue", "discard", "filesystem", "report", "dmesg-errors"] {
        for value in outcome.named(name) {
            println!("{name}: {}", text(value).replace('\n', "\n    "));
        }
    }
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
