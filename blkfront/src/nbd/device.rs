//! A block device of the kernel's: its NBD client, on sockets that we made for it.

use super::crew::{Crew, Desks};
use super::ioctl::{MAJOR, Request, ask};
use super::{Error, Options, system};
use crate::local::{News, sync, wait_for_news};
use crate::{Disk, InvalidOption};
use nix::sys::stat::major;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

/// With several connections, the kernel drops one that does not answer in 30 seconds, and when it has
/// none left, it fails. A backend may be away for longer; that is not the connection's fault.
const PATIENCE_SECONDS: u64 = 7 * 24 * 3600;
/// Bytes of the longest request of the kernel's, unless somebody has raised `max_sectors_kb`: it does not
/// ask how much may be in flight (`nbd_dev_add` of drivers/block/nbd.c).
const KERNEL_REQUEST: usize = 128 << 10;
/// How often it is looked at whether the device is there: it takes the kernel milliseconds.
const LOOK: Duration = Duration::from_millis(2);

/// A disk as the kernel's `/dev/nbdN`, with a connection, and so a hardware queue, a vCPU.
#[derive(Debug)]
pub struct BlockDevice<'a> {
    crew: Crew<'a>,
    path: PathBuf,
    file: File,
    sockets: Vec<UnixStream>,
}

impl<'a> BlockDevice<'a> {
    /// Takes the device `path` and all queues of `disk`, which is to be opened with
    /// [`Options::config`] and [`Options::max_connections`] as many as it has vCPUs.
    ///
    /// # Errors
    /// When the device is not there or not free, an option is out of range, a queue is taken, or its
    /// pool is too small.
    pub fn attach(path: impl AsRef<Path>, disk: &'a Disk, options: Options) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        let file = open(&path)?;
        InvalidOption::unless(
            options.in_flight >= KERNEL_REQUEST,
            "in_flight",
            options.in_flight,
            || format!("at least {KERNEL_REQUEST} for a block device, whose requests are as long"),
        )?;
        let options = Options { max_connections: disk.vcpus() as usize, ..options };
        let crew = Crew::new(disk, options)?;
        let mut sockets = Vec::new();
        let set = |request, argument| {
            ask(&file, request, argument).map_err(|e| {
                // What is attached already, by ioctl or by netlink.
                let busy = matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EINVAL));
                let remedy = if busy && request == Request::SetSocket {
                    ": it is in use: take another one, or free it: nbd-client -d"
                } else {
                    ""
                };
                device("attach", remedy)(&path, e)
            })
        };
        for _ in 0..disk.vcpus() {
            let (ours, theirs) = UnixStream::pair().map_err(system("make a socket"))?;
            // The kernel keeps the socket; the descriptor may be closed.
            set(Request::SetSocket, theirs.as_raw_fd() as u64)?;
            sockets.push(ours);
        }
        let export = crew.export();
        set(Request::SetBlockSize, export.min_block.into())?;
        set(Request::SetSize, export.size)?;
        set(Request::SetFlags, export.flags(false).into())?;
        if sockets.len() > 1 {
            set(Request::SetTimeout, PATIENCE_SECONDS)?;
        }
        Ok(Self { crew, path, file, sockets })
    }

    /// Serves until `stop` becomes readable, the disk is gone, or somebody detaches the device. It
    /// calls `ready` when the device can be used. At the end what the kernel has cached is written,
    /// for at most five seconds, requests are answered, and the device detached.
    ///
    /// # Errors
    /// When threads cannot be made or one of them fails, or the kernel does not attach the device.
    pub fn run(self, stop: impl AsFd, ready: impl FnOnce()) -> Result<(), Error> {
        let Self { crew, path, file, sockets } = self;
        let disk = crew.disk();
        let failed = |e| device("attach", "")(&path, e);
        let mut attached = None;
        let result = crew.run(|desks| {
            for socket in sockets {
                desks.let_in(socket, true);
            }
            let (ended, kernel) = start(&file).map_err(system("start a thread"))?;
            let kernel = &*attached.insert(kernel);
            while size(&file).map_err(failed)? == 0 && disk.geometry().size > 0 {
                if kernel.is_finished() {
                    // Why, it tells when it is joined.
                    return Ok(());
                }
                std::thread::sleep(LOOK);
            }
            ready();
            serve(disk, desks, &file, [stop.as_fd(), ended.as_fd()])?;
            // A disconnect waits for the connections, and they perhaps for a backend that is away:
            // then the end of the connections must do.
            if !disk.take_news() || sync(&file) {
                // Refused where somebody else has detached it.
                let _ = ask(&file, Request::Disconnect, 0);
            }
            Ok(())
        });
        let Some(kernel) = attached else { return result };
        let done = kernel.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
        let _ = ask(&file, Request::ClearSocket, 0);
        result.and(done.map_err(failed))
    }
}

/// Until any of `ends` is readable, or the disk is gone; resizes the device meanwhile.
fn serve(
    disk: &Disk,
    desks: &Desks<'_>,
    file: &File,
    ends: [BorrowedFd<'_>; 2],
) -> Result<(), Error> {
    while wait_for_news(disk, &ends).map_err(system("wait for the disk"))? == News::Resized {
        desks.check()?;
        if let Err(e) = ask(file, Request::SetSize, disk.geometry().size) {
            tracing::warn!("the NBD device could not be resized: {e}");
        }
    }
    Ok(())
}

/// Has the kernel use the device, and says by the end of a socket when it does so no more.
fn start(file: &File) -> io::Result<(UnixStream, JoinHandle<io::Result<()>>)> {
    let (ended, at_work) = UnixStream::pair()?;
    let file = file.try_clone()?;
    let thread = std::thread::Builder::new().name("nbd-device".to_owned()).spawn(move || {
        let done = ask(&file, Request::DoIt, 0);
        drop(at_work);
        done
    })?;
    Ok((ended, thread))
}

fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

fn device(doing: &'static str, remedy: &'static str) -> impl FnOnce(&Path, io::Error) -> Error {
    move |path, source| Error::Device { path: path.to_owned(), doing, source, remedy }
}

fn open(path: &Path) -> Result<File, Error> {
    let file = File::options().read(true).write(true).open(path).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::NotFound => {
                ": load the kernel module, and have it make enough: modprobe nbd nbds_max=16"
            }
            io::ErrorKind::PermissionDenied => ": only root may attach a block device",
            _ => "",
        };
        device("open", remedy)(path, e)
    })?;
    let about = file.metadata().map_err(|e| device("open", "")(path, e))?;
    if !about.file_type().is_block_device() || major(about.rdev()) != MAJOR {
        let other = io::Error::from(io::ErrorKind::InvalidInput);
        return Err(device("open", ": it is no NBD device such as /dev/nbd0")(path, other));
    }
    Ok(file)
}
