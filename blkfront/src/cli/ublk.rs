//! `blkfront ublk`.

use super::served::{Served, prepare, stop_signals};
use super::units::size;
use super::{Host, say};
use blkfront::ublk::{BlockDevice, DEFAULT_DEPTH, DEFAULT_MAX_IO, Options};
use std::process::ExitCode;

/// Options of `blkfront ublk`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// N of /dev/ublkbN [default: the first that is free]
    #[arg(long, value_name = "N")]
    id: Option<u32>,
    /// Requests a queue holds
    #[arg(long, value_name = "N", default_value_t = DEFAULT_DEPTH)]
    depth: u16,
    /// The longest request [default: 64k]
    #[arg(long, value_name = "SIZE", value_parser = size::<usize>)]
    max_io: Option<usize>,
    #[command(flatten)]
    served: Served,
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    let stop = stop_signals()?;
    let options = Options {
        id: args.id,
        read_only: args.served.read_only,
        depth: args.depth,
        max_io: args.max_io.unwrap_or(DEFAULT_MAX_IO),
    };
    options.check()?;
    prepare();
    let disk = args.served.open(host, &stop, |config| options.config(config))?;
    let device = BlockDevice::add(&disk, options)?;
    let path = device.path();
    device.run(stop, || say(&path.display()))?;
    args.served.close(disk)
}
