//! What a virtual disk is made of.
//!
//! [`Storage`] is a disk, shared by every ring of its device. Each ring's thread opens a [`Queue`]
//! of its own on it and never shares that, so that nothing on the I/O path takes a lock.
//!
//! The memory that an [`Op`] names is the device's from [`Queue::submit`] until its [`Completion`]: as
//! long as a queue holds an operation the device may be writing there.

mod buffer;
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
pub use open::{Direct, OpenError, Options, open};
pub use xenstore_glue::vbd::Discard;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xen_platform::{EventFile, LocalRegion};

/// What a disk tells of itself. It can change while it is in use: see [`Storage::refresh`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size in 512-byte sectors.
    pub sectors: u64,
    /// Bytes that the device reads or writes at the least (logical block size), a power of two from 512.
    pub sector_size: u32,
    /// Bytes that the device writes without reading first.
    pub physical_sector_size: u32,
    /// Nothing may be written or discarded.
    pub read_only: bool,
    /// What [`OpKind::Discard`] does, if anything.
    pub discard: Option<Discard>,
    /// Whether [`OpKind::Flush`] has anything to do.
    pub flush: bool,
    /// Whether reads fill their buffers and writes look at theirs. Where they do not (`null`), data is not moved at all.
    pub moves_data: bool,
    /// Bytes that the address of every buffer must be a multiple of (O_DIRECT), 1 where any address will do.
    pub buffer_alignment: u32,
    /// Whether it could only be opened because nobody else had it, and no request of a predecessor's was left.
    pub exclusive: bool,
}

impl Geometry {
    /// Whether the device works on the buffers themselves (O_DIRECT), and the kernel pins them for it.
    pub const fn pins_buffers(&self) -> bool {
        self.buffer_alignment > 1
    }
}

/// A disk. Opened by [`open`].
pub trait Storage: Send + Sync {
    /// As last read.
    fn geometry(&self) -> Geometry;

    /// Looks at the device again, for an online resize.
    ///
    /// # Errors
    /// When it cannot be looked at; the geometry stays as it was.
    fn refresh(&self) -> io::Result<Geometry>;

    /// Opens a queue. Called on the thread that will use it.
    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>>;
}

/// What a queue needs to know of the ring that it serves.
pub struct QueueSetup {
    /// Operations in flight at the most; tags are below this.
    pub depth: usize,
    /// Memory that buffers often lie in: its first so many bytes, to be registered with the kernel where
    /// that helps.
    pub region: Option<(Arc<LocalRegion>, usize)>,
    /// What ends [`Queue::wait`] when it becomes readable.
    pub bell: Option<OwnedFd>,
    /// An event channel that ends it as well.
    pub events: Option<EventFile>,
}

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// Fill the buffers.
    Read,
    /// Write the buffers.
    Write,
    /// Every write that completed before this was submitted is durable when it completes.
    Flush,
    /// Give `bytes` back to the device.
    Discard {
        /// Length in bytes.
        bytes: u64,
        /// The data must become unreadable.
        secure: bool,
    },
}

/// An operation, as it is submitted.
#[derive(Clone, Copy, Debug)]
pub struct Op<'a> {
    /// Chosen by the caller, below [`QueueSetup::depth`], of one operation in flight at a time.
    pub tag: u16,
    /// What is to be done.
    pub kind: OpKind,
    /// Where, in bytes from the start of the disk.
    pub offset: u64,
    /// The memory, empty for flush and discard. The sum of its lengths is the operation's length. A queue that
    /// needs the list for longer copies it.
    pub buffers: &'a [IoVec],
}

impl Op<'_> {
    /// Length in bytes of what is read or written, 0 for flush and discard.
    pub fn transfer(&self) -> u64 {
        self.buffers.iter().map(|piece| piece.len() as u64).sum()
    }

    /// Why a disk of `bytes` cannot do this, as an errno. The ring checked it against the geometry,
    /// but the disk may have shrunk since, and a write past the end of a file would grow it.
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
    /// `Ok` only when all of it was done: a short transfer is finished or failed, never passed on. `Err` is an errno.
    pub result: Result<(), i32>,
}

/// What ended a [`Queue::wait`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Woken {
    /// An event came and was taken. The next [`Queue::wait`] unmasks the channel.
    Event,
    /// The bell or the event channel is readable, whatever else.
    Descriptor,
    /// An operation has completed, or a signal came.
    Device,
    /// The time is up.
    Time,
}

/// A ring's way to the disk, used by one thread.
pub trait Queue {
    /// Starts an operation. It may be held back until the next [`Queue::poll`], and completes
    /// through `done`, now or from a later call.
    ///
    /// The caller checked `offset` and length against the geometry; a disk that has shrunk since completes with an error.
    fn submit(&mut self, op: Op<'_>, done: &mut Vec<Completion>);

    /// Takes what the device has completed, as far as that needs no system call. What is held back stays so,
    /// for the [`Queue::wait`] that is to follow.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Sends what was held back to the device and takes what it has completed, without waiting.
    ///
    /// # Errors
    /// When the queue is broken as a whole; no more can be done on it than to drop it.
    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Sleeps until an operation has completed, the bell is readable or the time is up. Also sends what was held back.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken>;

    /// From now on its thread sleeps for other queues too, and elsewhere, or does not any more. While it
    /// does, [`Queue::wait`] is not called, the event channel is left to the thread, and every completion
    /// there may be after a [`Queue::poll`] is signalled to an eventfd, which is returned if there are any.
    ///
    /// # Errors
    /// When that cannot be had.
    fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>>;

    /// When to [poll](Queue::poll) again without having been signalled, while it is shared.
    fn due(&mut self) -> Option<Instant> {
        None
    }

    /// Whether what is in flight is done by threads of the kernel, which may want the very CPU that the
    /// queue's thread would spin on until then.
    fn is_left_to_threads(&self) -> bool {
        false
    }

    /// Operations submitted and not completed yet.
    fn in_flight(&self) -> usize;

    /// System calls made since the queue was opened, waits included.
    fn system_calls(&self) -> u64;
}
