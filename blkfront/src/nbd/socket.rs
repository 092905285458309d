//! Moves bytes between a socket and granted pages, without a copy in between.
//!
//! The backend may write those pages at any time, so no reference into them may exist and the safe
//! vectored calls of the standard library cannot be used. The kernel has no such scruples.

use crate::IoBuffer;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

/// Pieces of memory in one system call: a megabyte of scattered pages; the kernel's limit is 1024
/// (`UIO_MAXIOV`).
const MAX_PIECES: usize = 256;

/// Pieces of memory that outlive `'a`, for one system call.
struct Pieces<'a> {
    pieces: [libc::iovec; MAX_PIECES],
    count: usize,
    len: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Pieces<'a> {
    fn new() -> Self {
        const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { pieces: [NOTHING; MAX_PIECES], count: 0, len: 0, memory: PhantomData }
    }

    /// Whether there was room.
    fn push(&mut self, base: *mut u8, len: usize) -> bool {
        let before = self.count.checked_sub(1).and_then(|last| self.pieces.get_mut(last));
        match before {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
                last.iov_len += len;
            }
            _ => {
                let Some(piece) = self.pieces.get_mut(self.count) else { return false };
                *piece = libc::iovec { iov_base: base.cast(), iov_len: len };
                self.count += 1;
            }
        }
        self.len += len;
        true
    }

    /// Bytes `offset..` of a buffer, as far as there is room.
    fn push_buffer(&mut self, buffer: &'a IoBuffer, offset: usize) -> bool {
        buffer.runs(offset).all(|(base, len)| self.push(base, len))
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all zeroes is a msghdr: no address, no data, no control messages.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_mut_ptr();
        message.msg_iovlen = self.count;
        message
    }
}

/// Pieces to be filled from a socket.
pub(super) struct Receive<'a>(Pieces<'a>);

impl<'a> Receive<'a> {
    pub(super) fn new() -> Self {
        Self(Pieces::new())
    }

    /// Adds bytes `offset..` of a buffer, as far as there is room; returns whether that was all.
    pub(super) fn fill_buffer(&mut self, buffer: &'a mut IoBuffer, offset: usize) -> bool {
        self.0.push_buffer(buffer, offset)
    }

    pub(super) fn fill_slice(&mut self, slice: &'a mut [u8]) {
        self.0.push(slice.as_mut_ptr(), slice.len());
    }

    pub(super) fn len(&self) -> usize {
        self.0.len
    }

    /// Fills the pieces in order with what there is, without blocking. Returns how many bytes came;
    /// 0 for the end.
    pub(super) fn run(mut self, socket: impl AsFd) -> io::Result<usize> {
        let mut message = self.0.message();
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: the pieces are memory that outlives 'a, was borrowed for writing, and is either ours
        // alone or shared pages, of which there are no references.
        let n = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

/// Pieces to be sent to a socket.
pub(super) struct Send<'a>(Pieces<'a>);

impl<'a> Send<'a> {
    pub(super) fn new() -> Self {
        Self(Pieces::new())
    }

    /// Adds bytes `offset..` of a buffer, as far as there is room; returns whether that was all.
    pub(super) fn buffer(&mut self, buffer: &'a IoBuffer, offset: usize) -> bool {
        self.0.push_buffer(buffer, offset)
    }

    pub(super) fn slice(&mut self, slice: &'a [u8]) -> bool {
        slice.is_empty() || self.0.push(slice.as_ptr().cast_mut(), slice.len())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len
    }

    /// Sends as much as the socket takes now, and returns how many bytes that is.
    pub(super) fn run(mut self, socket: impl AsFd) -> io::Result<usize> {
        let message = self.0.message();
        let fd = socket.as_fd().as_raw_fd();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pieces are memory that outlives 'a; the kernel only reads it.
        let n = unsafe { libc::sendmsg(fd, &message, flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}
