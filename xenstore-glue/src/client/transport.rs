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
    /// Twice the same open file, which is what the kernel knows a client by. It is no pipe, but
    /// tokio reads from anything that can be polled as from one.
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
            // The kernel passes a request's payload on from the buffer that it was written to, some
            // time after write has returned (`xenbus_dev_request_and_reply` in xenbus_xs.c): the next
            // message written takes its place, and xenstored gets it with the header of the one before.
            Self::Device { .. } => 1,
        }
    }

    /// Whether a failed write means that this one request is refused, by the kernel, and the
    /// connection is as good as before.
    pub(super) fn refuses_single_requests(&self) -> bool {
        matches!(self, Self::Device { .. })
    }
}
