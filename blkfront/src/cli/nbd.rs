//! `blkfront nbd`.

use super::served::{Served, prepare, stop_signals};
use super::units::size;
use super::{Host, say};
use blkfront::nbd::{BlockDevice, DEFAULT_IN_FLIGHT, DEFAULT_MAX_CONNECTIONS, Options, Server};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `blkfront nbd`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The unix socket to listen on; made at the start, removed at the end
    #[arg(long, value_name = "PATH", required_unless_present = "device")]
    socket: Option<PathBuf>,
    /// Instead of a socket, the kernel's NBD device to attach, such as /dev/nbd0, with a queue a vCPU
    #[arg(long, value_name = "PATH", conflicts_with_all = ["socket", "name", "max_connections"])]
    device: Option<PathBuf>,
    /// The export's name; clients that ask for none get it too
    #[arg(long, value_name = "EXPORT", default_value = "")]
    name: String,
    /// Clients at a time, shared out among the vCPUs; more are turned away
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS)]
    max_connections: usize,
    /// Data a client may have in flight, which is also the longest request [default: 2m]
    #[arg(long, value_name = "SIZE", value_parser = size::<usize>)]
    in_flight: Option<usize>,
    #[command(flatten)]
    served: Served,
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    let stop = stop_signals()?;
    let options = Options {
        export: args.name.clone(),
        read_only: args.served.read_only,
        max_connections: match args.device {
            Some(_) => args.served.vcpus as usize,
            None => args.max_connections,
        },
        in_flight: args.in_flight.unwrap_or(DEFAULT_IN_FLIGHT),
    };
    options.check(args.served.vcpus as usize)?;
    if args.device.is_some() {
        prepare();
    }
    let disk = args.served.open(host, &stop, |config| options.config(config))?;
    if let Some(path) = &args.device {
        BlockDevice::attach(path, &disk, options)?.run(stop, || say(&path.display()))?;
    } else if let Some(path) = &args.socket {
        let server = Server::bind(path, &disk, options)?;
        say(&server.uri());
        server.run(stop)?;
    }
    args.served.close(disk)
}
