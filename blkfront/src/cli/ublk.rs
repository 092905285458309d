//! `blkfront ublk`.

use super::units::size;
use super::{Host, Rings, announce, finish, prepare, stop_signals};
use anyhow::Context;
use blkfront::ublk::{BlockDevice, DEFAULT_DEPTH, DEFAULT_MAX_IO, Options};
use std::process::ExitCode;

/// Options of `blkfront ublk`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// N of /dev/ublkbN [default: the first that is free]
    #[arg(long, value_name = "N")]
    id: Option<u32>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// vCPUs, each with a thread, a queue of the device, and a ring where the backend has as many
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Requests a queue holds
    #[arg(long, value_name = "N", default_value_t = DEFAULT_DEPTH)]
    depth: u16,
    /// The longest request [default: 64k]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_io: Option<u64>,
    /// At the end, tell what was done, as JSON
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    rings: Rings,
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    let stop = stop_signals()?;
    let options = Options {
        id: args.id,
        read_only: args.read_only,
        depth: args.depth,
        max_io: match args.max_io {
            Some(bytes) => usize::try_from(bytes).context("--max-io")?,
            None => DEFAULT_MAX_IO,
        },
    };
    prepare();
    let disk = host.open(&args.disk, options.config(args.rings.config(args.vcpus)))?;
    let device = BlockDevice::add(&disk, options)?;
    let path = device.path();
    device.run(stop, || announce(&path.display()))?;
    finish(disk, args.stats)
}
