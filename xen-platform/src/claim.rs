//! One user per device, among the processes of a domain.

use crate::{Error, Result};
use nix::Error as Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::os::fd::OwnedFd;

/// Locks the byte `device` of a file that all processes of the domain can open. Such a lock goes with its
/// holder, however that ends, and leaves nothing behind. It belongs to the open file, so `file` must have
/// been opened for this alone.
pub(crate) fn claim(file: File, device: u32) -> Result<Option<OwnedFd>> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: device.into(),
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(Some(file.into())),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(error) => Err(Error::io(format!("claim device {device}"), error)),
    }
}
