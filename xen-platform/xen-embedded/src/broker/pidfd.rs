//! Processes by descriptor: by the time a pid is used, it may be another process's.

use nix::sys::socket::{getsockopt, sockopt::PeerPidfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The process that connected to a socket; `pid` is its number.
pub(super) fn of_peer(socket: &impl AsFd, pid: i32) -> io::Result<OwnedFd> {
    match getsockopt(socket, PeerPidfd) {
        // Before Linux 6.5. It is the same process unless that has died since it connected.
        Err(nix::Error::ENOPROTOOPT) => open(pid),
        found => Ok(found?),
    }
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: a system call on numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(nix::errno::Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has made it for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends SIGKILL and waits until the process has ended.
pub(super) async fn kill(process: Arc<OwnedFd>) -> io::Result<()> {
    let (fd, no_info) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: a system call on numbers, and on no memory.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) };
    match nix::errno::Errno::result(sent) {
        Ok(_) | Err(nix::Error::ESRCH) => {}
        Err(error) => return Err(error.into()),
    }
    // SAFETY: an `OwnedFd` that is shared keeps its descriptor open, and the same one, until it is dropped.
    let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?;
    process.readable().await.map(drop)
}
