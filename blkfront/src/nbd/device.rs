//! A block device of the kernel: its NBD client, on sockets that we make for it.

use super::crew::{Crew, Desks};
use super::ioctl::{MAJOR, Request, ask};
use super::{Error, Options, system};
use crate::local::{News, sync, wait_for_news};
use crate::{Disk, InvalidOption};
use nix::sys::stat::{major, minor};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// With several connections, the kernel drops one that does not answer in 30 seconds, and the device fails
/// when none is left. A backend may be away for longer; that is not the connection's fault.
const PATIENCE_SECONDS: u64 = 7 * 24 * 3600;
/// How often to check whether the device is ready: that takes the kernel milliseconds.
const LOOK: Duration = Duration::from_millis(2);

/// A disk as the kernel's `/dev/nbdN`, with a connection, and so a hardware queue, per vCPU.
#[derive(Debug)]
pub struct BlockDevice<'a> {
    crew: Crew<'a>,
    path: PathBuf,
    file: File,
    sockets: Vec<UnixStream>,
}

impl<'a> BlockDevice<'a> {
    /// Takes the device `path` and all queues of `disk`, which must have been opened with
    /// [`Options::config`] and as many [`Options::max_connections`] as it has vCPUs.
    ///
    /// # Errors
    /// When the device is not there or not free, an option is out of range, a queue is taken, or its
    /// pool is too small.
    pub fn attach(path: impl AsRef<Path>, disk: &'a Disk, options: Options) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        let file = open(&path)?;
        let options = Options { max_connections: disk.vcpus() as usize, ..options };
        let in_flight = options.in_flight;
        let crew = Crew::new(disk, options)?;
        let mut sockets = Vec::new();
        let set = |request, argument| {
            ask(&file, request, argument).map_err(|e| {
                // Attached already, by ioctl or by netlink.
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
        // Only now is the device ours.
        limit_requests(&path, &file, in_flight)?;
        let export = crew.export();
        set(Request::SetBlockSize, export.min_block.into())?;
        set(Request::SetSize, export.size)?;
        set(Request::SetFlags, export.flags(false).into())?;
        if sockets.len() > 1 {
            set(Request::SetTimeout, PATIENCE_SECONDS)?;
        }
        Ok(Self { crew, path, file, sockets })
    }

    /// Serves until `stop` becomes readable, the disk is gone, or somebody detaches the device. Calls
    /// `ready` when the device can be used. At the end, what the kernel has cached is written back, for at
    /// most five seconds, requests are answered, and the device is detached.
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
                    // Joining it tells why.
                    return Ok(());
                }
                thread::sleep(LOOK);
            }
            ready();
            thread::scope(|scope| {
                let file = &file;
                let (resized, news) = sync_channel(1);
                let resize = thread::Builder::new().name("nbd-resize".to_owned());
                let resize = resize.spawn_scoped(scope, move || resize_at(news, disk, file));
                resize.map_err(system("start a thread"))?;
                serve(disk, desks, &resized, [stop.as_fd(), ended.as_fd()])?;
                // A resize and a disconnect wait for requests, which may wait for a backend that is away:
                // fail those that are left.
                if disk.take_news() && !sync(file) {
                    disk.give_up();
                }
                // Fails if somebody else has detached the device.
                let _ = ask(file, Request::Disconnect, 0);
                Ok(())
            })
        });
        let Some(kernel) = attached else { return result };
        let done = kernel.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
        let _ = ask(&file, Request::ClearSocket, 0);
        result.and(done.map_err(failed))
    }
}

/// Waits until any of `ends` is readable or the disk is gone; has the device resized meanwhile.
fn serve(
    disk: &Disk,
    desks: &Desks<'_>,
    resized: &SyncSender<()>,
    ends: [BorrowedFd<'_>; 2],
) -> Result<(), Error> {
    while wait_for_news(disk, &ends).map_err(system("wait for the disk"))? == News::Resized {
        desks.check()?;
        // If full, a look at the size is still to come.
        let _ = resized.try_send(());
    }
    Ok(())
}

/// Tells the kernel the disk's size whenever there is news of it. Newer kernels first wait until nothing is
/// in flight (`blk_mq_freeze_queue` in `nbd_set_size`), so the thread that is to notice the end cannot do
/// this.
fn resize_at(news: Receiver<()>, disk: &Disk, file: &File) {
    for () in news {
        if let Err(e) = ask(file, Request::SetSize, disk.geometry().size) {
            tracing::warn!("the NBD device could not be resized: {e}");
        }
    }
}

/// Limits the kernel's requests to what may be in flight, which it does not ask for. By default they are up
/// to 128 KiB long, or with newer kernels up to 4 MiB (`BLK_DEF_MAX_SECTORS_CAP`).
fn limit_requests(path: &Path, file: &File, in_flight: usize) -> Result<(), Error> {
    let number = file.metadata().map_err(|e| device("look at", "")(path, e))?.rdev();
    let (major, minor) = (major(number), minor(number));
    let limit = format!("/sys/dev/block/{major}:{minor}/queue/max_sectors_kb");
    lower(limit.as_ref(), in_flight)
}

/// Lowers `limit`, a file with KiB in it, to `bytes` at most.
fn lower(limit: &Path, bytes: usize) -> Result<(), Error> {
    let failed = |doing| move |e| device(doing, "")(limit, e);
    let now = fs::read_to_string(limit).map_err(failed("read the longest request"))?;
    let longest = now.trim().parse::<usize>().unwrap_or(usize::MAX).saturating_mul(1 << 10);
    if longest <= bytes {
        return Ok(());
    }
    let lowered = fs::write(limit, (bytes >> 10).to_string());
    Ok(lowered.or_else(|e| {
        let rule =
            || format!("at least {longest}, the longest request: {} stays: {e}", limit.display());
        InvalidOption::unless(false, "in_flight", bytes, rule)
    })?)
}

/// Has a thread run the device in the kernel. The socket reads end of file when that is over.
fn start(file: &File) -> io::Result<(UnixStream, JoinHandle<io::Result<()>>)> {
    let (ended, at_work) = UnixStream::pair()?;
    let file = file.try_clone()?;
    let thread = thread::Builder::new().name("nbd-device".to_owned()).spawn(move || {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_requests_are_made_to_fit() {
        let limit = std::env::temp_dir().join(format!("max_sectors_kb-{}", std::process::id()));
        for (before, after) in [("1280\n", "512"), ("512\n", "512\n"), ("128\n", "128\n")] {
            fs::write(&limit, before).unwrap();
            lower(&limit, 512 << 10).unwrap();
            assert_eq!(fs::read_to_string(&limit).unwrap(), after);
        }
        fs::remove_file(&limit).unwrap();
        // A file of the kernel's that nobody can write.
        let fixed = Path::new("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
        if fixed.exists() {
            let refused = lower(fixed, 512 << 10).unwrap_err().to_string();
            assert!(refused.starts_with("in_flight is 524288, but must be at least"), "{refused}");
        }
    }
}
