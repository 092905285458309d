//! Event channels on pairs of eventfds.

use super::connection::Connection;
use crate::{Error, EventChannel, EventFile, Result};
use ring_proto::{DomId, Port};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One end. `waits` is an eventfd that the peer writes, `notifies` one that the peer reads; both are
/// non-blocking.
///
/// Unlike on Xen, `waits` becomes readable even while the channel is masked: poll it only when it is not.
#[derive(Debug)]
pub(super) struct Channel {
    connection: Arc<Connection>,
    port: Port,
    waits: OwnedFd,
    notifies: OwnedFd,
    masked: bool,
}

impl Channel {
    /// Binds to `remote`, or waits for `peer` to bind to us.
    pub(super) fn open(
        connection: Arc<Connection>,
        peer: DomId,
        remote: Option<Port>,
    ) -> Result<Self> {
        let (port, [waits, notifies]) = connection.open_port(peer, remote)?;
        Ok(Self { connection, port, waits, notifies, masked: false })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waits.as_fd()
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<()> {
        match nix::unistd::write(&self.notifies, &1_u64.to_ne_bytes()) {
            // EAGAIN: the counter is at its limit, so an event is waiting there anyway.
            Ok(_) | Err(nix::Error::EAGAIN) => Ok(()),
            Err(e) => Err(Error::io(format!("notify {}", self.port), e)),
        }
    }

    fn take(&mut self) -> Result<bool> {
        if self.masked {
            return Ok(false);
        }
        match nix::unistd::read(&self.waits, &mut [0; size_of::<u64>()]) {
            Ok(_) => {
                self.masked = true;
                Ok(true)
            }
            Err(nix::Error::EAGAIN) => Ok(false),
            Err(e) => Err(Error::io(format!("read {}", self.port), e)),
        }
    }

    fn file(&self) -> Result<EventFile> {
        let descriptor = self.waits.try_clone();
        let descriptor =
            descriptor.map_err(|error| Error::io(format!("share {}", self.port), error))?;
        Ok(EventFile { descriptor, event_bytes: size_of::<u64>() as u32, unmask: false })
    }

    fn unmask(&mut self) -> Result<bool> {
        // An event that came meanwhile is still counted in the eventfd.
        self.masked = false;
        Ok(false)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // If the broker is gone, so is the port.
        let _ = self.connection.close_port(self.port);
    }
}
