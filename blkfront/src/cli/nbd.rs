//! `blkfront nbd`.

use super::units::size;
use super::{Host, Rings, announce, finish, prepare, stop_signals};
use anyhow::Context;
use blkfront::nbd::{BlockDevice, DEFAULT_IN_FLIGHT, DEFAULT_MAX_CONNECTIONS, Options, Server};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `blkfront nbd`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// The unix socket to listen on; made at the start, removed at the end
    #[arg(long, value_name = "PATH", required_unless_present = "device")]
    socket: Option<PathBuf>,
    /// Instead of a socket, the kernel's NBD device to attach, such as /dev/nbd0, with a queue a vCPU
    #[arg(long, value_name = "PATH", conflicts_with_all = ["socket", "name", "max_connections"])]
    device: Option<PathBuf>,
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
    /// At the end, tell what was done, as JSON
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    rings: Rings,
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    let stop = stop_signals()?;
    let options = Options {
        export: args.name.clone(),
        read_only: args.read_only,
        max_connections: match args.device {
            Some(_) => args.vcpus as usize,
            None => args.max_connections,
        },
        in_flight: match args.in_flight {
            Some(bytes) => usize::try_from(bytes).context("--in-flight")?,
            None => DEFAULT_IN_FLIGHT,
        },
    };
    if args.device.is_some() {
        prepare();
    }
    let disk = host.open(&args.disk, options.config(args.rings.config(args.vcpus)))?;
    if let Some(path) = &args.device {
        BlockDevice::attach(path, &disk, options)?.run(stop, || announce(&path.display()))?;
    } else if let Some(path) = &args.socket {
        let server = Server::bind(path, &disk, options)?;
        announce(&server.uri());
        server.run(stop)?;
    }
    finish(disk, args.stats)
}
