//! The server on a unix socket.

use super::crew::{Crew, Desks};
use super::{Error, Options, system};
use crate::Disk;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// How long the listener pauses when a client cannot be let in for lack of descriptors.
const ACCEPT_REST_MS: u16 = 100;

/// A socket file, removed when dropped.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Serves a disk. Dropping it before it was run closes the socket.
#[derive(Debug)]
pub struct Server<'a> {
    crew: Crew<'a>,
    listener: UnixListener,
    file: SocketFile,
}

impl<'a> Server<'a> {
    /// Listens on `path` and takes all queues of `disk`, which must have been opened with
    /// [`Options::config`]. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// When an option is out of range, the socket cannot be made or is in use, a queue is taken, or its
    /// pool is too small.
    pub fn bind(path: impl AsRef<Path>, disk: &'a Disk, options: Options) -> Result<Self, Error> {
        let path = path.as_ref();
        let crew = Crew::new(disk, options)?;
        let (listener, file) =
            listen(path).map_err(|source| Error::Socket { path: path.to_owned(), source })?;
        Ok(Self { crew, listener, file })
    }

    /// The URI for clients, as in the `nbd-uri` specification.
    pub fn uri(&self) -> String {
        let export = escape(self.crew.options().export.as_bytes());
        let path = escape(self.file.0.as_os_str().as_encoded_bytes());
        format!("nbd+unix:///{export}?socket={path}")
    }

    /// Serves until `stop` becomes readable or the disk is gone. After that, requests that have come in are
    /// answered and all connections are closed; a client has 5 seconds to take its answers.
    ///
    /// # Errors
    /// When threads cannot be made, or one of them or the listener fails.
    pub fn run(self, stop: impl AsFd) -> Result<(), Error> {
        let Self { crew, listener, file } = self;
        let disk = crew.disk();
        crew.run(|desks| {
            let accepted = accept(disk, &listener, desks, stop);
            drop((listener, file));
            accepted
        })
    }
}

fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
            if !is_socket || !UnixStream::connect(path).is_err_and(refused) {
                let what = if is_socket { "another program listens there" } else { "no socket" };
                return Err(io::Error::new(e.kind(), format!("in use: {what}; take another path")));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        listener => listener?,
    };
    let file = SocketFile(path.to_owned());
    listener.set_nonblocking(true)?;
    Ok((listener, file))
}

fn accept(
    disk: &Disk,
    listener: &UnixListener,
    desks: &mut Desks<'_>,
    stop: impl AsFd,
) -> Result<(), Error> {
    let mut timeout = PollTimeout::NONE;
    loop {
        let mut fds = [stop.as_fd(), disk.news(), listener.as_fd()]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // During a pause, the listener would be ready all the time.
        let watched = if timeout.is_none() { 3 } else { 2 };
        match poll(fds.get_mut(..watched).unwrap_or_default(), timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(system("wait for clients")(e)),
        }
        if fds[0].any() == Some(true) {
            return Ok(());
        }
        if fds[1].any() == Some(true) && !disk.take_news() {
            return Ok(());
        }
        desks.check()?;
        timeout = PollTimeout::NONE;
        match listener.accept() {
            Ok((socket, _)) => desks.let_in(socket, false),
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                tracing::warn!("an NBD client could not be let in: {e}");
                timeout = ACCEPT_REST_MS.into();
            }
        }
    }
}

/// Percent-encodes what may not stand in a path or query of a URI.
fn escape(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut escaped = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_taken_over_from_the_dead_alone() {
        let path = std::env::temp_dir().join(format!("blkfront-{}.sock", std::process::id()));
        let living = UnixListener::bind(&path).unwrap();
        let refused = listen(&path).unwrap_err().to_string();
        assert!(refused.contains("another program listens there"), "{refused}");
        drop(living);
        drop(listen(&path).unwrap());
        assert!(!path.exists());
    }
}
