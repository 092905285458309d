//! A disk that is exported to others, until a signal arrives.

use super::{Host, Rings, Wait, say};
use anyhow::{Context, anyhow, ensure};
use blkfront::{Config, Disk, MAX_VCPUS, prepare_process};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Options that `blkfront nbd` and `blkfront ublk` have in common.
#[derive(clap::Args, Debug)]
pub(crate) struct Served {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// vCPUs, each with a thread, a queue, and a ring where the backend has as many
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS.into()))]
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
    /// Opens the disk, its configuration adapted by `suited`. Exits if told to stop before the backend,
    /// which may take its time, has answered.
    pub(crate) fn open(
        &self,
        host: &Host,
        stop: &SignalFd,
        suited: impl FnOnce(Config) -> Config,
    ) -> anyhow::Result<Disk> {
        // The threads would sleep anyway: the ring is not all they wait for.
        ensure!(self.rings.wait() != Wait::Poll, "--wait=poll is for bench alone");
        let config = suited(self.rings.config(self.vcpus));
        let (opening, opened) = UnixStream::pair().context("make a socket")?;
        std::thread::scope(|scope| {
            let disk = scope.spawn(move || {
                let disk = host.open(&self.disk, config);
                // Makes the other end readable.
                drop(opening);
                disk
            });
            let ends = [stop.as_fd(), opened.as_fd()];
            let mut ends = ends.map(|end| PollFd::new(end, PollFlags::POLLIN));
            while poll(&mut ends, PollTimeout::NONE) == Err(Errno::EINTR) {}
            if ends[1].any() != Some(true) {
                tracing::warn!("stopped before the disk was open");
                std::process::exit(0);
            }
            disk.join().unwrap_or_else(|_| Err(anyhow!("opening the disk has panicked")))
        })
    }

    /// Closes the disk.
    pub(crate) fn close(&self, disk: Disk) -> anyhow::Result<ExitCode> {
        if self.stats {
            say(&serde_json::to_string_pretty(&disk.info())?);
        }
        disk.close()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A descriptor that is readable when the program is to end. To be called before threads are started: they
/// inherit the blocked signals, which go to the descriptor.
pub(crate) fn stop_signals() -> anyhow::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("block signals")?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("make a signalfd")
}

/// For serving a block device of this very machine.
pub(crate) fn prepare() {
    if let Err(error) = prepare_process() {
        tracing::warn!(
            "not root: I/O may hang when this machine is short of memory (PR_SET_IO_FLUSHER, mlockall): {error}"
        );
    }
}
