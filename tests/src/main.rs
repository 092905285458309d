//! `cargo xtask`: the project's own commands.

mod xtask;

use clap::{Parser, Subcommand};

/// The project's own commands
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the main job on the embedded platform: a minute, a table, a plot
    Demo(xtask::demo::Options),
    /// Measure the data path beside its limits, on two CPUs
    Bench(xtask::bench::Options),
    /// Install what the tests need, then run all of them
    Test(xtask::test::Options),
    /// Build a Debian package of both programs, with unit, hotplug script and manual pages
    Deb(xtask::deb::Options),
    /// A real Xen host under emulation, and scenarios that run on it
    Xen(xtask::xen::Options),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Demo(options) => xtask::demo::run(&options),
        Command::Bench(options) => xtask::bench::run(&options),
        Command::Test(options) => xtask::test::run(&options),
        Command::Deb(options) => xtask::deb::run(&options),
        Command::Xen(options) => xtask::xen::run(&options),
    }
}
