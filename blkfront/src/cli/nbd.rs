//! `blkfront nbd`.

use super::units::size;
use super::{Host, Rings};
use anyhow::Context;
use blkfront::nbd::{DEFAULT_IN_FLIGHT, DEFAULT_MAX_CONNECTIONS, Options, Server};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `blkfront nbd`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// The unix socket to listen on; made at the start, removed at the end
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The export's name; clients that ask for none get it too
    #[arg(long, value_name = "EXPORT", default_value = "")]
    name: String,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Clients at a time; more are turned away
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS)]
    max_connections: usize,
    /// Data a client may have in flight, which is also the longest request [default: 2m]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    in_flight: Option<u64>,
    /// vCPUs, each with a thread and a queue, to which connections are pinned in turn
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    #[command(flatten)]
    rings: Rings,
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    // Blocked before there are any threads, which inherit it: the signals wait for the descriptor.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("block signals")?;
    let stop = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("make a signalfd")?;
    let options = Options {
        export: args.name.clone(),
        read_only: args.read_only,
        max_connections: args.max_connections,
        in_flight: match args.in_flight {
            Some(bytes) => usize::try_from(bytes).context("--in-flight")?,
            None => DEFAULT_IN_FLIGHT,
        },
    };
    let disk = host.open(&args.disk, options.config(args.rings.config(args.vcpus)))?;
    let server = Server::bind(&args.socket, &disk, options)?;
    println!("{}", server.uri());
    std::io::stdout().flush()?;
    server.run(stop)?;
    disk.close()?;
    Ok(ExitCode::SUCCESS)
}
