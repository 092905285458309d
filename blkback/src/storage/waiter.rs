//! Sleeping where no device has anything to say.

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// [`super::Queue::wait`] for queues whose operations complete as they are submitted.
pub(super) struct Waiter {
    wake: Vec<OwnedFd>,
    calls: u64,
}

impl Waiter {
    pub(super) fn new(wake: Vec<OwnedFd>) -> Self {
        Self { wake, calls: 0 }
    }

    /// Sleeps until a wake descriptor is readable, a signal arrives or the time is up.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.calls += 1;
        // A list a sleep: it borrows the descriptors, and costs nothing beside sleeping.
        let mut polled: Vec<_> =
            self.wake.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        match ppoll(&mut polled, timeout.map(TimeSpec::from), None) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// System calls made.
    pub(super) fn calls(&self) -> u64 {
        self.calls
    }
}
