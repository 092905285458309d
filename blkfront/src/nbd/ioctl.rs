//! The control of Linux's NBD client: the ioctls of `/dev/nbdN` (`linux/nbd.h`).
//!
//! Not netlink: a device that was attached by ioctl is detached by the kernel when the process dies.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `NBD_MAJOR`: tells its devices from others, whose ioctls may have the same numbers.
pub(super) const MAJOR: u64 = 43;

/// Requests, and what their argument is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Request {
    /// A descriptor: adds a connection. All must come from one thread.
    SetSocket = 0,
    /// Bytes.
    SetBlockSize = 1,
    /// Bytes; also while the device is in use.
    SetSize = 2,
    /// Returns when the device is detached.
    DoIt = 3,
    /// Forgets the connections.
    ClearSocket = 4,
    /// Sends a disconnect on every connection.
    Disconnect = 8,
    /// Seconds; 0 for none.
    SetTimeout = 9,
    /// Transmission flags, as of the protocol.
    SetFlags = 10,
}

/// Asks the driver for something. The device must be of [`MAJOR`].
pub(super) fn ask(device: &File, request: Request, argument: u64) -> io::Result<()> {
    // `_IO(0xab, n)` wherever Xen runs.
    let number = 0xab00 | libc::Ioctl::from(request as u8);
    // SAFETY: these requests take an integer, no pointer. If it is a descriptor, the kernel takes a
    // reference.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), number, argument) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
