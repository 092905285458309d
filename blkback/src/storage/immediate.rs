//! Queues whose operations complete as they are submitted, for disks with no device behind them.

use super::{Completion, Op, Queue, QueueSetup, Woken};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A queue whose operations `execute` carries out; its errors are errnos.
pub(super) struct Immediate<F> {
    execute: F,
    /// The bell and the event channel, whose events are left to whoever is woken.
    wake: Vec<OwnedFd>,
    system_calls: u64,
}

impl<F: FnMut(&Op<'_>) -> Result<(), i32>> Immediate<F> {
    pub(super) fn new(setup: QueueSetup, execute: F) -> Self {
        let channel = setup.events.map(|file| file.descriptor);
        let wake = setup.bell.into_iter().chain(channel).collect();
        Self { execute, wake, system_calls: 0 }
    }
}

impl<F: FnMut(&Op<'_>) -> Result<(), i32>> Queue for Immediate<F> {
    fn submit(&mut self, op: Op<'_>, done: &mut Vec<Completion>) {
        done.push(Completion { tag: op.tag, result: (self.execute)(&op) });
    }

    fn reap(&mut self, _done: &mut Vec<Completion>) {}

    fn poll(&mut self, _done: &mut Vec<Completion>) -> io::Result<()> {
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken> {
        self.system_calls += 1;
        // Built for each sleep: it borrows the descriptors, and costs nothing beside sleeping.
        let mut polled: Vec<_> =
            self.wake.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        match ppoll(&mut polled, timeout.map(TimeSpec::from), None) {
            Ok(0) => Ok(Woken::Time),
            Ok(_) => Ok(Woken::Descriptor),
            Err(nix::Error::EINTR) => Ok(Woken::Device),
            Err(e) => Err(e.into()),
        }
    }

    fn share(&mut self, _shared: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        Ok(None)
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn system_calls(&self) -> u64 {
        self.system_calls
    }
}
