//! `blkfront`: uses a virtual disk of a domain from user space.

mod cli;

use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use xen_platform::in_one_line;

/// Xen block frontend in user space
#[derive(Parser)]
#[command(name = "blkfront", version)]
struct Cli {
    #[command(flatten)]
    host: cli::Host,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a disk's backend, size, features, and which vCPU uses which ring
    ///
    /// Connects to the disk and closes it again: not while it is in use.
    Info(cli::info::Args),
    /// Load a disk as fio would, with fio's own options, from within this process
    ///
    /// What is written to the disk is lost. Jobs are vCPUs, each with a part of the disk to itself. Latencies
    /// are from submission to completion as the job saw it, one clock reading a batch; a job that is held up
    /// submits later and does not count the time it would have waited (coordinated omission). Other than in fio,
    /// random places may come twice before each has come once (norandommap), sequential reads and writes that
    /// are mixed go on from one place, and rate_iops counts both.
    Bench(cli::bench::Args),
    /// Export a disk over NBD on a unix socket, or make it a block device of this machine, /dev/nbdN
    ///
    /// Prints the URI for clients, or the device, when it is ready. SIGTERM and SIGINT end it: requests that
    /// have come in are answered first, and what this machine has cached of a device is written. Whoever may
    /// open the socket may use the disk.
    Nbd(cli::nbd::Args),
    /// Make a disk a block device of this machine, /dev/ublkbN
    ///
    /// Prints the device when it is ready. SIGTERM and SIGINT end it: what this machine has cached is written
    /// first. Takes Linux 6.4 or later.
    #[cfg(feature = "ublk")]
    Ublk(cli::ublk::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let result = match cli.command {
        Command::Info(args) => cli::info::run(&cli.host, &args),
        Command::Bench(args) => cli::bench::run(&cli.host, &args),
        Command::Nbd(args) => cli::nbd::run(&cli.host, &args),
        #[cfg(feature = "ublk")]
        Command::Ublk(args) => cli::ublk::run(&cli.host, &args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("blkfront: {}", in_one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
