//! A vCPU's queue.

use crate::{Completed, Io, IoBuffer, Refused, Stats, Waiting};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// A vCPU's handle on a disk. `Send`: owned by one thread at a time.
///
/// To sleep in one's own `poll(2)` together with other descriptors: drain [`Queue::poll`], and when
/// [`Queue::arm`] says so, wait for [`AsFd::as_fd`] to become readable, then [`Queue::poll`] again.
/// The descriptor stays the same across reconnects.
#[derive(Debug)]
pub struct Queue {
    wake: nix::sys::epoll::Epoll,
}

impl Queue {
    /// A buffer of `len` bytes, or `None` while too few pages of the pool are free. What is in it is
    /// whatever was there before (this queue's data, or zeroes).
    pub fn alloc(&mut self, len: usize) -> Option<IoBuffer> {
        let _ = len;
        None
    }

    /// Takes an I/O of any length. Unless the queue is plugged, it goes to the backend at once, or as
    /// soon as there are slots.
    ///
    /// # Errors
    /// Gives the I/O back. [`crate::Refusal::WouldBlock`] when [`crate::Config::depth`] are inside.
    pub fn submit(&mut self, io: Io) -> Result<(), Refused> {
        let _ = io;
        Ok(())
    }

    /// Holds I/O back, so that neighbours can be merged and all be sent with one notification.
    pub fn plug(&mut self) {}

    /// Sends what was held back.
    pub fn unplug(&mut self) {}

    /// Appends what has completed, without blocking, and says how many those are. Also sends what
    /// waited for slots, and notices a backend that went away or came back: call it regularly while
    /// anything is in flight.
    pub fn poll(&mut self, done: &mut Vec<Completed>) -> usize {
        let _ = done;
        0
    }

    /// As [`Queue::poll`], but waits as [`crate::Config::waiting`] says until something has
    /// completed, or `timeout` is over. With nothing in the queue it returns at once.
    pub fn wait(&mut self, done: &mut Vec<Completed>, timeout: Option<Duration>) -> usize {
        let _ = (done, timeout);
        0
    }

    /// Asks for an event and looks once more. Only when this says `true` is it safe to sleep on the
    /// descriptor; otherwise there is something for [`Queue::poll`].
    pub fn arm(&mut self) -> bool {
        false
    }

    /// I/Os submitted and not yet taken back.
    pub fn in_flight(&self) -> usize {
        0
    }

    /// The vCPU this is the queue of.
    pub fn vcpu(&self) -> u32 {
        0
    }

    /// Bytes the disk has now.
    pub fn size(&self) -> u64 {
        0
    }

    /// How this thread waits from now on.
    pub fn set_waiting(&mut self, waiting: Waiting) {
        let _ = waiting;
    }

    /// What this vCPU has done.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Reads into `to`, of any length that is a multiple of the sector size. Blocks. Nothing else may
    /// be in flight on this queue.
    ///
    /// # Errors
    /// As [`Queue::submit`] and [`Completed::result`], as an `io::Error`.
    pub fn read_at(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let _ = (offset, to);
        Ok(())
    }

    /// Writes `from`. As [`Queue::read_at`].
    ///
    /// # Errors
    /// As [`Queue::read_at`].
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        let _ = (offset, from);
        Ok(())
    }

    /// Makes completed writes durable. As [`Queue::read_at`].
    ///
    /// # Errors
    /// As [`Queue::read_at`].
    pub fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Gives `len` bytes from `offset` back. As [`Queue::read_at`].
    ///
    /// # Errors
    /// As [`Queue::read_at`].
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.0.as_fd()
    }
}
