//! A queue's thread: it carries requests from the kernel to a ring and back.
//!
//! A tag keeps a buffer of contiguous granted pages, and the kernel copies between that and the request: we
//! copy nothing, and one system call answers and fetches any number of requests.

use super::abi::{self, Descriptor, IoCommand};
use crate::{Completed, Io, IoBuffer, IoError, Op, Queue};
use io_uring::{IoUring, opcode, types};
use nix::sys::eventfd::EventFd;
use ring_proto::SharedMemory;
use ring_proto::abi::{PAGE_SIZE, SECTOR_SIZE};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use xen_platform::{Access, LocalRegion, Mapping};

/// The user data of completions that belong to no tag.
const QUEUE: u64 = u64::MAX;
const BELL: u64 = u64::MAX - 1;

/// What a queue's thread is told.
#[derive(Debug)]
pub(super) struct Shared {
    /// Answer everything with an error at once.
    pub(super) give_up: AtomicBool,
    /// There is no block device any more, or there never was: answer nothing.
    pub(super) leave: AtomicBool,
    /// Rung after one of the flags was set.
    pub(super) bell: EventFd,
}

#[derive(Debug)]
struct Tag {
    /// `None` while the buffer is in the queue.
    buffer: Option<IoBuffer>,
    /// Where the kernel copies from and to.
    addr: u64,
    /// Bytes of the request, until it is answered.
    asked: Option<u32>,
}

/// A queue of the device.
pub(super) struct Worker {
    number: u16,
    file: Arc<File>,
    shared: Arc<Shared>,
    descriptors: Descriptors,
    queue: Queue,
    tags: Vec<Tag>,
    /// Tags that the kernel has not aborted.
    live: usize,
    /// Nothing goes to the queue any more.
    given_up: bool,
    /// What the kernel copies from and to after that: a backend may still be at work on the tags' buffers.
    scratch: LocalRegion,
}

impl Worker {
    /// For the device `file`, whose queues have `depth` tags of at most `max_io` bytes.
    ///
    /// # Errors
    /// When the device's requests cannot be mapped, or the queue's pool is not a fresh one of that size.
    pub(super) fn new(
        file: Arc<File>,
        shared: Arc<Shared>,
        number: u16,
        depth: u16,
        max_io: usize,
        mut queue: Queue,
    ) -> io::Result<Self> {
        let descriptors = Descriptors::map(&file, number, depth)?;
        let mut tags = Vec::with_capacity(depth.into());
        for _ in 0..depth {
            // A fresh pool hands its pages out in order.
            let buffer = queue.alloc(max_io);
            let place = buffer.as_ref().and_then(IoBuffer::contiguous);
            let addr = place.ok_or(io::ErrorKind::OutOfMemory)? as u64;
            tags.push(Tag { buffer, addr, asked: None });
        }
        let live = depth.into();
        let scratch = LocalRegion::new(max_io.div_ceil(PAGE_SIZE)).map_err(io::Error::other)?;
        Ok(Self { number, file, shared, descriptors, queue, tags, live, given_up: false, scratch })
    }

    /// Fetches for all tags, calls `ready`, and serves until told to leave or all tags are aborted.
    ///
    /// # Errors
    /// Before `ready`: when the kernel does not let us fetch. Later: when it does not take answers.
    pub(super) fn run(mut self, ready: impl FnOnce()) -> io::Result<()> {
        // One for each tag, and one for each poll.
        let entries = u32::from(self.descriptors.depth) + 2;
        let mut ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(entries.next_power_of_two())?;
        for tag in 0..self.descriptors.depth {
            self.send(&mut ring, abi::FETCH_REQ, tag, 0)?;
        }
        submit(&ring, 0)?;
        // A refusal comes at once, and no request can have come yet.
        if let Some(refused) = ring.completion().next() {
            return Err(io::Error::from_raw_os_error(-refused.result()));
        }
        ready();
        self.wait_for(&mut ring, self.shared.bell.as_fd().as_raw_fd(), BELL)?;
        let mut waits = false;
        let mut done = Vec::with_capacity(self.tags.len());
        loop {
            self.queue.poll(&mut done);
            self.finish(&mut ring, &mut done)?;
            self.queue.plug();
            while let Some((name, result)) = next(&mut ring) {
                match name {
                    QUEUE => waits = false,
                    BELL => {
                        // Does not block: it was reported readable, and nobody else reads it.
                        self.shared.bell.read()?;
                        self.wait_for(&mut ring, self.shared.bell.as_fd().as_raw_fd(), BELL)?;
                    }
                    tag => self.take(&mut ring, tag as u16, result)?,
                }
            }
            self.queue.unplug();
            if !self.given_up && self.shared.give_up.load(Ordering::Relaxed) {
                self.answer_all(&mut ring)?;
            }
            if self.live == 0 || self.shared.leave.load(Ordering::Relaxed) {
                return Ok(());
            }
            if self.queue.in_flight() > 0 {
                submit(&ring, 0)?;
                // With a timeout of zero, this spins as the disk was configured to, but does not sleep.
                if self.queue.wait(&mut done, Some(std::time::Duration::ZERO)) > 0 {
                    self.finish(&mut ring, &mut done)?;
                    continue;
                }
            }
            if !self.queue.arm() {
                continue;
            }
            if !waits {
                self.wait_for(&mut ring, self.queue.as_fd().as_raw_fd(), QUEUE)?;
                waits = true;
            }
            submit(&ring, 1)?;
        }
    }

    /// A completion of a tag: a request, or the end.
    fn take(&mut self, ring: &mut IoUring, tag: u16, result: i32) -> io::Result<()> {
        if result != abi::IO_OK {
            self.live -= 1;
            return Ok(());
        }
        if self.given_up {
            return self.send(ring, abi::COMMIT_AND_FETCH_REQ, tag, -libc::EIO);
        }
        let Some(request) = self.descriptors.get(tag) else { return Ok(()) };
        let Some(slot) = self.tags.get_mut(usize::from(tag)) else { return Ok(()) };
        let bytes = request.sectors.saturating_mul(SECTOR_SIZE as u32);
        let offset = request.start.saturating_mul(SECTOR_SIZE as u64);
        let fua = request.op_flags & abi::IO_FUA != 0;
        let (op, asked) = match request.op_flags as u8 {
            abi::OP_READ => (Op::Read, bytes),
            abi::OP_WRITE => (Op::Write { fua }, bytes),
            abi::OP_FLUSH => (Op::Flush, 0),
            abi::OP_DISCARD => (Op::Discard { len: bytes.into(), secure: false }, 0),
            _ => return self.send(ring, abi::COMMIT_AND_FETCH_REQ, tag, -libc::EOPNOTSUPP),
        };
        let mut buffer = None;
        if asked > 0 {
            // The buffer is there: it came back before the last answer.
            buffer = slot.buffer.take();
            buffer.iter_mut().for_each(|buffer| buffer.set_len(asked as usize));
        }
        slot.asked = Some(asked);
        if let Err(refused) = self.queue.submit(Io { cookie: tag.into(), op, offset, buffer }) {
            if refused.io.buffer.is_some() {
                slot.buffer = refused.io.buffer;
            }
            slot.asked = None;
            let result = -refused.reason.errno();
            return self.send(ring, abi::COMMIT_AND_FETCH_REQ, tag, result);
        }
        Ok(())
    }

    /// Answers what the queue has completed.
    fn finish(&mut self, ring: &mut IoUring, done: &mut Vec<Completed>) -> io::Result<()> {
        for Completed { cookie, result, buffer } in done.drain(..) {
            if matches!(result, Err(IoError::Gone)) {
                // The backend may not know that, and still be at work on the buffer.
                self.give_up();
            }
            let Some(slot) = self.tags.get_mut(cookie as usize) else { continue };
            if buffer.is_some() {
                slot.buffer = buffer;
            }
            // Answered already, when everything was given up.
            let Some(asked) = slot.asked.take() else { continue };
            let result = result.map_or_else(|error| -error.errno(), |()| asked as i32);
            self.send(ring, abi::COMMIT_AND_FETCH_REQ, cookie as u16, result)?;
        }
        Ok(())
    }

    /// From now on nothing goes to the backend, and the kernel copies nothing where the backend may be at
    /// work.
    fn give_up(&mut self) {
        self.given_up = true;
        let addr = self.scratch.base().addr().get() as u64;
        self.tags.iter_mut().for_each(|tag| tag.addr = addr);
    }

    /// Answers everything with an error: the backend may take forever.
    fn answer_all(&mut self, ring: &mut IoUring) -> io::Result<()> {
        self.give_up();
        for tag in 0..self.descriptors.depth {
            let slot = self.tags.get_mut(usize::from(tag));
            if slot.and_then(|slot| slot.asked.take()).is_some() {
                self.send(ring, abi::COMMIT_AND_FETCH_REQ, tag, -libc::EIO)?;
            }
        }
        Ok(())
    }

    /// Fetches the next request of a tag, and returns the result of the one before, if there was one.
    fn send(&self, ring: &mut IoUring, operation: u32, tag: u16, result: i32) -> io::Result<()> {
        let addr = self.tags.get(usize::from(tag)).map_or(0, |slot| slot.addr);
        let command = IoCommand { queue: self.number, tag, result, addr };
        let command = opcode::UringCmd16::new(types::Fd(self.file.as_raw_fd()), operation)
            .cmd(command.bytes())
            .build()
            .user_data(tag.into());
        // SAFETY: the kernel reads and writes the tag's buffer, granted pages to which there are no
        // references, or the scratch memory, to which there are none either. They outlive the command:
        // buffers keep their pages, and all are kept until every tag is aborted, or the ring is gone on
        // whose behalf the kernel would access them.
        let pushed = unsafe { ring.submission().push(&command) };
        // There is room for all tags.
        pushed.map_err(|_| io::ErrorKind::ResourceBusy.into())
    }

    fn wait_for(&self, ring: &mut IoUring, fd: i32, name: u64) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build().user_data(name);
        // SAFETY: it refers to no memory.
        let pushed = unsafe { ring.submission().push(&poll) };
        pushed.map_err(|_| io::ErrorKind::ResourceBusy.into())
    }
}

/// Submits what there is, and waits for `want` completions.
fn submit(ring: &IoUring, want: usize) -> io::Result<()> {
    match ring.submit_and_wait(want) {
        // A signal came, or the kernel is short of something and takes the rest next time.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
            Ok(())
        }
        done => done.map(drop),
    }
}

fn next(ring: &mut IoUring) -> Option<(u64, i32)> {
    ring.completion().next().map(|done| (done.user_data(), done.result()))
}

/// The requests of a queue, by tag: the kernel writes one before it completes the tag's command, and
/// leaves it alone until that is answered.
#[derive(Debug)]
struct Descriptors {
    mapping: Mapping,
    depth: u16,
}

impl Descriptors {
    fn map(file: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let pages = (usize::from(depth) * size_of::<Descriptor>()).div_ceil(PAGE_SIZE);
        let offset = abi::descriptors_offset(queue);
        Ok(Self { mapping: Mapping::of(file, offset, pages, Access::ReadOnly)?, depth })
    }

    fn get(&self, tag: u16) -> Option<Descriptor> {
        if tag >= self.depth {
            return None;
        }
        let at = self.mapping.base().as_ptr().cast::<Descriptor>().wrapping_add(tag.into());
        // SAFETY: within the mapping, as checked; any bytes are a descriptor.
        Some(unsafe { at.read_volatile() })
    }
}
