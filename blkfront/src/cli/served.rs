//! A disk that is given to others, until a signal comes.

use super::{Host, Rings};
use anyhow::Context;
use blkfront::{Config, Disk, prepare_process};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

/// Options that `blkfront nbd` and `blkfront ublk` have in common.
#[derive(clap::Args, Debug)]
pub(crate) struct Served {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// vCPUs, each with a thread, a queue, and a ring where the backend has as many
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// At the end, tell what was done, as JSON
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    rings: Rings,
}

impl Served {
    /// Opens the disk, with what `suited` makes of its configuration.
    pub(crate) fn open(
        &self,
        host: &Host,
        suited: impl FnOnce(Config) -> Config,
    ) -> anyhow::Result<Disk> {
        host.open(&self.disk, suited(self.rings.config(self.vcpus)))
    }

    /// Closes it.
    pub(crate) fn close(&self, disk: Disk) -> anyhow::Result<ExitCode> {
        if self.stats {
            announce(&serde_json::to_string_pretty(&disk.info())?);
        }
        disk.close()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A descriptor that is readable when the program is to end. Called before there are any threads, which
/// inherit that the signals are blocked: they wait for the descriptor.
pub(crate) fn stop_signals() -> anyhow::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("block signals")?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("make a signalfd")
}

/// For a block device of this machine's own.
pub(crate) fn prepare() {
    if let Err(error) = prepare_process() {
        tracing::warn!("where memory is short this may hang: {error}");
    }
}

/// Tells those who wait for it that the disk can be used, and how.
pub(crate) fn announce(name: &impl Display) {
    let mut out = std::io::stdout();
    // Nobody reads it: no matter.
    let _ = writeln!(out, "{name}").and_then(|()| out.flush());
}
