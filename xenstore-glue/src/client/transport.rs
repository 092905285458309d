use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use super::{Endpoint, MAX_OUTSTANDING};

/// A byte stream to xenstore. Reads and writes may be cancelled without losing bytes.
#[derive(Debug)]
pub(super) enum Transport {
    Unix(UnixStream),
    /// The same open file twice, since the kernel identifies a client by it. It is not a pipe, but
    /// tokio's pipe receiver reads from anything that can be polled.
    Device {
        reader: pipe::Receiver,
        writer: File,
    },
}

impl Transport {
    pub(super) async fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Unix(path) => UnixStream::connect(path).await.map(Self::Unix),
            Endpoint::Device(path) => {
                let mut options = pipe::OpenOptions::new();
                let reader = options.read_write(true).unchecked(true).open_receiver(path)?;
                let writer = reader.as_fd().try_clone_to_owned()?.into();
                Ok(Self::Device { reader, writer })
            }
        }
    }

    /// Reads some bytes; 0 at the end of the stream.
    pub(super) async fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => loop {
                stream.readable().await?;
                match stream.try_read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
            },
            Self::Device { reader, .. } => loop {
                reader.readable().await?;
                match reader.try_read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
            },
        }
    }

    /// Writes some of one message, or all of it.
    pub(super) async fn write(&self, message: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => loop {
                stream.writable().await?;
                match stream.try_write(message) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
            },
            // The kernel queues the message and returns; it never reports the device writable
            // (xenbus_file_poll knows only EPOLLIN), so this must not wait for that.
            Self::Device { writer, .. } => (&*writer).write(message),
        }
    }

    /// The most requests that may wait for a reply at a time.
    pub(super) fn max_outstanding(&self) -> usize {
        match self {
            Self::Unix(_) => MAX_OUTSTANDING,
            // The kernel sends a request's payload from the per-file buffer some time after write has
            // returned (`xenbus_dev_request_and_reply` in xenbus_xs.c). A second message written by then
            // overwrites it, and xenstored gets that payload with the first one's header.
            Self::Device { .. } => 1,
        }
    }

    /// Whether a failed write means only that the kernel refused this one request, and the
    /// connection is still good.
    pub(super) fn refuses_single_requests(&self) -> bool {
        matches!(self, Self::Device { .. })
    }
}
