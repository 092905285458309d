//! Event channels, each on a file of its own: the kernel takes a per-file lock for notifications, and the
//! events of channels that share a file must be sorted.

use super::abi::{self, BindInterdomain, BindUnboundPort, PortArgument, RestrictDomid};
use super::device::Device;
use crate::{Error, EventChannel, EventFile, Result};
use nix::Error as Errno;
use ring_proto::{DomId, Port};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// One end of a channel. The kernel masks it as it hands out an event, until the port is written back.
#[derive(Debug)]
pub(super) struct Channel {
    file: File,
    port: Port,
}

impl Channel {
    /// Our end of the channel whose other end is `peer`'s `remote`.
    pub(super) fn bind_interdomain(peer: DomId, remote: Port) -> Result<Self> {
        let file = Device::Evtchn.open()?;
        let mut bind = BindInterdomain { remote_domain: peer.0.into(), remote_port: remote.0 };
        // SAFETY: the argument is the struct that this request takes, and lives through the call.
        let bound = unsafe { abi::evtchn_bind_interdomain(file.as_raw_fd(), &raw mut bind) };
        match bound {
            Ok(port) => Self::new(file, port, peer),
            Err(Errno::EINVAL) => {
                let reason = "the peer does not have such a port, or not for this domain";
                Err(Error::Port { peer, port: remote, reason })
            }
            Err(Errno::ESRCH) => Err(Error::Port { peer, port: remote, reason: "no such domain" }),
            Err(error) => Err(Error::io(format!("bind to {remote} of {peer}"), error)),
        }
    }

    /// A new channel, for `peer` to bind to.
    pub(super) fn alloc_unbound(peer: DomId) -> Result<Self> {
        let file = Device::Evtchn.open()?;
        let mut bind = BindUnboundPort { remote_domain: peer.0.into() };
        // SAFETY: as above.
        let bound = unsafe { abi::evtchn_bind_unbound(file.as_raw_fd(), &raw mut bind) };
        let failed = |error| Error::io(format!("make an event channel for {peer}"), error);
        Self::new(file, bound.map_err(failed)?, peer)
    }

    fn new(file: File, port: i32, peer: DomId) -> Result<Self> {
        let failed = |error| Error::io(format!("event channel with {peer}"), error);
        let port = u32::try_from(port).map_err(|_| failed(Errno::EINVAL))?;
        // From here on dropping it unbinds the port.
        let channel = Self { file, port: Port(port) };
        if peer == DomId(0) {
            // The kernel refuses dom0 here.
            return Ok(channel);
        }
        let mut restrict = RestrictDomid { domid: peer.0 };
        // SAFETY: the argument is the struct that this request takes, and lives through the call.
        match unsafe { abi::evtchn_restrict(channel.file.as_raw_fd(), &raw mut restrict) } {
            // Kernels before 4.8 do not have it: one safety net less.
            Ok(_) | Err(Errno::ENOSYS | Errno::ENOTTY) => Ok(channel),
            Err(error) => Err(failed(error)),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<()> {
        let mut notify = PortArgument { port: self.port.0 };
        // SAFETY: the argument is the struct that this request takes, and lives through the call.
        unsafe { abi::evtchn_notify(self.file.as_raw_fd(), &raw mut notify) }
            .map_err(|error| Error::io(format!("notify {}", self.port), error))?;
        Ok(())
    }

    fn take(&mut self) -> Result<bool> {
        // This file yields only this port, and only once for each time it was unmasked.
        let mut port = [0; size_of::<u32>()];
        let failed = |error| Error::io(format!("read {}", self.port), error);
        match (&self.file).read(&mut port) {
            Ok(read) => Ok(read == port.len()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(false),
            // More events than the file can hold: it reports nothing else until it is reset.
            Err(error) if error.raw_os_error() == Some(libc::EFBIG) => {
                // SAFETY: this request takes no argument.
                unsafe { abi::evtchn_reset(self.file.as_raw_fd()) }
                    .map_err(|e| failed(e.into()))?;
                Ok(true)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn file(&self) -> Result<EventFile> {
        let descriptor = self.file.as_fd().try_clone_to_owned();
        let descriptor =
            descriptor.map_err(|error| Error::io(format!("share {}", self.port), error))?;
        Ok(EventFile { descriptor, event_bytes: size_of::<u32>() as u32, unmask: true })
    }

    fn unmask(&mut self) -> Result<bool> {
        (&self.file)
            .write_all(&self.port.0.to_ne_bytes())
            .map(|()| true)
            .map_err(|error| Error::io(format!("unmask {}", self.port), error))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Closing the file does the same, but a poller may hold a copy of the descriptor.
        let mut unbind = PortArgument { port: self.port.0 };
        // SAFETY: the argument is the struct that this request takes, and lives through the call.
        let _ = unsafe { abi::evtchn_unbind(self.file.as_raw_fd(), &raw mut unbind) };
    }
}
