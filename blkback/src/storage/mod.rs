//! The storage behind virtual disks.
//!
//! A [`Storage`] is a disk, shared by all rings of its device. Each ring's thread opens its own [`Queue`] on
//! it and never shares that, so nothing on the I/O path takes a lock.
//!
//! The buffers of an [`Op`] belong to the device from [`Queue::submit`] until its [`Completion`]: while a
//! queue holds an operation, the device may be writing to them.

mod buffer;
mod claim;
mod delay;
mod device;
mod fault;
mod file;
mod immediate;
mod limit;
mod memory;
mod null;
mod open;
mod uring;

pub use buffer::{IoVec, IoVecs};
pub use file::direct_sectors;
pub use open::{Direct, OpenError, Options, open};
pub use xenstore_glue::vbd::Discard;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xen_platform::{EventFile, LocalRegion};

/// The properties of a disk. They can change while it is in use: see [`Storage::refresh`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size in 512-byte sectors.
    pub sectors: u64,
    /// Logical block size in bytes: the least that is read or written, a power of two from 512.
    pub sector_size: u32,
    /// Physical block size in bytes: the least that is written without reading first.
    pub physical_sector_size: u32,
    /// Nothing may be written or discarded.
    pub read_only: bool,
    /// Limits of [`OpKind::Discard`], if it is supported.
    pub discard: Option<Discard>,
    /// Whether [`OpKind::Flush`] has anything to do.
    pub flush: bool,
    /// Whether reads fill their buffers and writes read theirs. If not (`null`), no data is moved at all.
    pub moves_data: bool,
    /// Alignment that buffer addresses must have, in bytes (O_DIRECT); 1 if any address will do.
    pub buffer_alignment: u32,
    /// Whether opening it made sure that nobody else has it, and that no request of a predecessor is left.
    pub exclusive: bool,
}

impl Geometry {
    /// Whether the device accesses the buffers directly (O_DIRECT), so that the kernel pins them.
    pub const fn pins_buffers(&self) -> bool {
        self.buffer_alignment > 1
    }
}

/// A disk. Opened by [`open`].
pub trait Storage: Send + Sync {
    /// As last read.
    fn geometry(&self) -> Geometry;

    /// Queries the device again, for an online resize.
    ///
    /// # Errors
    /// When it cannot be queried; the geometry stays as it was.
    fn refresh(&self) -> io::Result<Geometry>;

    /// Opens a queue. Called on the thread that will use it.
    ///
    /// # Errors
    /// When the kernel has none of what it takes (files, memory, io_uring).
    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>>;
}

/// What a queue needs to know about the ring that it serves.
pub struct QueueSetup {
    /// Maximum number of operations in flight; tags are below this.
    pub depth: usize,
    /// Memory that buffers often lie in, and how many bytes at its start to register with the kernel where
    /// that helps.
    pub region: Option<(Arc<LocalRegion>, usize)>,
    /// Ends [`Queue::wait`] when it becomes readable.
    pub bell: Option<OwnedFd>,
    /// An event channel, which ends it as well.
    pub events: Option<EventFile>,
}

/// The kind of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// Fill the buffers.
    Read,
    /// Write the buffers.
    Write,
    /// Make every write durable that completed before this was submitted.
    Flush,
    /// Give `bytes` back to the device.
    Discard {
        /// Length in bytes.
        bytes: u64,
        /// The data must become unreadable.
        secure: bool,
    },
}

/// An operation to submit.
#[derive(Clone, Copy, Debug)]
pub struct Op<'a> {
    /// Chosen by the caller: below [`QueueSetup::depth`], and unique among the operations in flight.
    pub tag: u16,
    /// What to do.
    pub kind: OpKind,
    /// In bytes from the start of the disk.
    pub offset: u64,
    /// The memory; empty for flush and discard. Its lengths add up to the operation's. A queue that needs the
    /// list for longer copies it.
    pub buffers: &'a [IoVec],
}

impl Op<'_> {
    /// Bytes to be read or written, 0 for flush and discard.
    pub fn transfer(&self) -> u64 {
        self.buffers.iter().map(|piece| piece.len() as u64).sum()
    }

    /// Checks the operation against a disk of `bytes`; an error is an errno. The ring has checked it against
    /// the geometry, but the disk may have shrunk since, and a write past the end of a file would grow it.
    fn check(&self, bytes: u64, read_only: bool) -> Result<(), i32> {
        let (length, changes) = match self.kind {
            OpKind::Read => (self.transfer(), false),
            OpKind::Write => (self.transfer(), true),
            OpKind::Discard { bytes, .. } => (bytes, true),
            OpKind::Flush => return Ok(()),
        };
        if changes && read_only {
            return Err(libc::EROFS);
        }
        match self.offset.checked_add(length) {
            Some(end) if end <= bytes => Ok(()),
            _ => Err(libc::EIO),
        }
    }
}

/// An operation that has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// [`Op::tag`].
    pub tag: u16,
    /// `Ok` only if all of it was done: a short transfer is continued or fails. `Err` is an errno.
    pub result: Result<(), i32>,
}

/// What ended a [`Queue::wait`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Woken {
    /// An event came and was taken. The next [`Queue::wait`] unmasks the channel.
    Event,
    /// The bell or the event channel is readable, whatever else has happened.
    Descriptor,
    /// An operation has completed, or a signal came.
    Device,
    /// The time is up.
    Time,
}

/// A ring's queue of operations on a disk, used by one thread.
pub trait Queue {
    /// Starts an operation. It may be held back until the next [`Queue::poll`], and completes through `done`,
    /// in this call or a later one.
    ///
    /// The caller has checked `offset` and length against the geometry. If the disk has shrunk since, the
    /// operation completes with an error.
    fn submit(&mut self, op: Op<'_>, done: &mut Vec<Completion>);

    /// Takes completions from the device as far as that needs no system call. What is held back stays so
    /// until the [`Queue::wait`] that is to follow.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Sends held-back operations to the device and takes completions from it, without waiting.
    ///
    /// # Errors
    /// When the queue as a whole is broken, and can only be dropped.
    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Sends held-back operations, and sleeps until an operation completes, the bell is readable, an event
    /// comes or the time is up.
    ///
    /// # Errors
    /// As [`Queue::poll`].
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken>;

    /// Tells the queue whether its thread now sleeps elsewhere, for other queues as well. While it does,
    /// [`Queue::wait`] is not called, the event channel is left to the thread, and completions that come
    /// after a [`Queue::poll`] are signalled to an eventfd, which is returned if there can be any.
    ///
    /// # Errors
    /// When the switch fails.
    fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>>;

    /// Holds no operation back any longer to spread the load: the ring ends, and somebody waits for that.
    fn hurry(&mut self) {}

    /// When to [poll](Queue::poll) a shared queue again even if it has not been signalled.
    fn due(&mut self) -> Option<Instant> {
        None
    }

    /// Whether operations in flight are left to kernel threads, which may need the very CPU that the queue's
    /// thread would spin on meanwhile.
    fn is_left_to_threads(&self) -> bool {
        false
    }

    /// Operations submitted and not completed yet.
    fn in_flight(&self) -> usize;

    /// System calls made since the queue was opened, waits included.
    fn system_calls(&self) -> u64;
}
