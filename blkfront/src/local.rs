//! What block devices of the local machine have in common.

use crate::Disk;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::channel;
use std::time::Duration;

/// How long the kernel may take to write back its cache when a device ends: as long as clients of a
/// [`crate::nbd::Server`] have to take their answers.
const SYNC_TIMEOUT: Duration = Duration::from_secs(5);

/// Prepares the process to carry I/O for its own kernel, which, short of memory, would write to the very
/// disk this process serves, and have it wait for that. Locks the process's memory, and keeps it from
/// waiting for I/O when it needs more. To be called before threads are started, which inherit it. Needs
/// root.
///
/// # Errors
/// The first of the two that is not permitted. All works without, until memory is short.
pub fn prepare_process() -> io::Result<()> {
    /// Linux's number (`linux/prctl.h`), from 5.6 on.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: it sets a flag of this thread's; the unused arguments are to be 0.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?)
}

/// Has the kernel write back what it has cached of a device, and returns whether that was done in time. If
/// not, it goes on until done or the device is gone.
pub(crate) fn sync(device: &File) -> bool {
    let (done, wait) = channel();
    let Ok(device) = device.try_clone() else { return false };
    let thread = std::thread::Builder::new().name("sync".to_owned());
    let spawned = thread.spawn(move || {
        // An error concerns the writer, who gets it from its own fsync.
        let _ = device.sync_all();
        let _ = done.send(());
    });
    spawned.is_ok() && wait.recv_timeout(SYNC_TIMEOUT).is_ok()
}

/// What [`wait_for_news`] has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum News {
    /// The disk has another size.
    Resized,
    /// The disk cannot be used any more.
    Gone,
    /// The end with this index is readable.
    Ended(usize),
}

/// Waits for news of a disk, or for any of `ends` to be readable.
///
/// # Errors
/// As `poll`.
pub(crate) fn wait_for_news(disk: &Disk, ends: &[BorrowedFd<'_>]) -> io::Result<News> {
    let mut fds: Vec<_> = ends.iter().map(|end| PollFd::new(*end, PollFlags::POLLIN)).collect();
    fds.push(PollFd::new(disk.news(), PollFlags::POLLIN));
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let ended = fds.iter().take(ends.len()).position(|fd| fd.any() == Some(true));
        return Ok(match ended {
            Some(end) => News::Ended(end),
            None if disk.take_news() => News::Resized,
            None => News::Gone,
        });
    }
}
