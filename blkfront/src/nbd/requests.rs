//! The requests of a vCPU's connections, on their way through its queue.

use super::proto::{Command, Errno};
use crate::slab::Slab;
use crate::{Completed, Io, IoBuffer, Op, Queue, Refusal};
use std::collections::VecDeque;

/// Bytes of zeroes written at once. blkif has no command to zero a range (and a discard may leave
/// anything), so zeroes are written. One buffer of them serves all clients: one that zeroes a terabyte
/// takes turns with the others.
pub(super) const ZERO_BYTES: usize = 256 << 10;

/// Who waits for a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Origin {
    /// The connection's place.
    pub(super) connection: usize,
    /// The client's identifier of the request.
    pub(super) cookie: u64,
    /// Where on the disk, in bytes.
    pub(super) offset: u64,
    /// Whether it is a read.
    pub(super) read: bool,
}

/// A request that is over.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) origin: Origin,
    pub(super) result: Result<(), Errno>,
    /// The data of a read or write.
    pub(super) buffer: Option<IoBuffer>,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    /// A single I/O.
    Single,
    /// A flush follows.
    ThenFlush,
    /// Zeroes from `next` to `end`.
    Zeroes { next: u64, end: u64, fua: bool },
}

#[derive(Clone, Copy, Debug)]
struct Request {
    origin: Origin,
    work: Work,
}

/// The requests, and the queue they go through.
#[derive(Debug)]
pub(super) struct Requests {
    queue: Queue,
    requests: Slab<Request>,
    /// Nothing may be written, whatever the device allows.
    read_only: bool,
    /// The zeroes, unless they are being written.
    zeroes: Option<IoBuffer>,
    /// Requests with zeroes to write. The first one has the buffer while it is being written.
    zeroing: VecDeque<u32>,
}

impl Requests {
    /// The ring that they go through.
    pub(super) fn ring(&self) -> u32 {
        self.queue.ring()
    }

    /// For up to `depth` requests at a time. `None` when the queue's pool has no room for the zeroes.
    pub(super) fn new(mut queue: Queue, depth: usize, read_only: bool) -> Option<Self> {
        let mut zeroes = queue.alloc(ZERO_BYTES)?;
        zeroes.write(0, &vec![0; ZERO_BYTES]);
        Some(Self {
            queue,
            requests: Slab::new(depth),
            read_only,
            zeroes: Some(zeroes),
            zeroing: VecDeque::with_capacity(depth),
        })
    }

    pub(super) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.len() == 0
    }

    /// Refuses an invalid request before anything is spent on it. The queue checks again.
    pub(super) fn check(&self, command: Command, offset: u64, len: u32) -> Result<(), Errno> {
        if matches!(command, Command::Flush | Command::Disconnect) {
            return Ok(());
        }
        if self.queue.is_gone() {
            return Err(Refusal::Gone.into());
        }
        let reads = command == Command::Read;
        if self.read_only && !reads {
            return Err(Errno::Perm);
        }
        let op = if reads { Op::Read } else { Op::Write { fua: false } };
        self.queue.allows(op, offset, len.into()).map_err(|refusal| match refusal {
            Refusal::PastEnd { .. } if reads => Errno::Inval,
            refusal => refusal.into(),
        })
    }

    /// Starts a request that passed [`Requests::check`]. Returns it if it is over at once.
    pub(super) fn start(
        &mut self,
        origin: Origin,
        command: Command,
        len: u32,
        buffer: Option<IoBuffer>,
    ) -> Option<Finished> {
        let (op, work) = match command {
            Command::Read => (Op::Read, Work::Single),
            Command::Write { fua } => (Op::Write { fua }, Work::Single),
            Command::Flush | Command::Disconnect => (Op::Flush, Work::Single),
            Command::Trim { fua } => {
                let work = if fua { Work::ThenFlush } else { Work::Single };
                (Op::Discard { len: len.into(), secure: false }, work)
            }
            Command::WriteZeroes { fua } => {
                let end = origin.offset.saturating_add(len.into());
                let work = Work::Zeroes { next: origin.offset, end, fua };
                match self.requests.insert(Request { origin, work }) {
                    Some(key) => self.zeroing.push_back(key),
                    None => return Some(Finished::failed(origin, Errno::NoMem)),
                }
                return None;
            }
        };
        let Some(key) = self.requests.insert(Request { origin, work }) else {
            return Some(Finished::failed(origin, Errno::NoMem));
        };
        self.submit(key, op, origin.offset, buffer)
    }

    fn submit(
        &mut self,
        key: u32,
        op: Op,
        offset: u64,
        buffer: Option<IoBuffer>,
    ) -> Option<Finished> {
        let io = Io { cookie: key.into(), op, offset, buffer };
        let refused = self.queue.submit(io).err()?;
        self.end(key, Err(refused.reason.into()), refused.io.buffer)
    }

    fn end(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        buffer: Option<IoBuffer>,
    ) -> Option<Finished> {
        let origin = self.requests.remove(key)?.origin;
        Some(Finished { origin, result, buffer })
    }

    /// Starts the next write of zeroes, if there is one; returns a request that is over at once. To be
    /// called until it returns `None`, after requests were started or completed.
    pub(super) fn write_zeroes(&mut self) -> Option<Finished> {
        let key = *self.zeroing.front()?;
        if self.queue.is_gone() {
            // The buffer does not come back.
            self.zeroing.pop_front();
            return self.end(key, Err(Refusal::Gone.into()), None);
        }
        let mut buffer = self.zeroes.take()?;
        let Some(Request { work: Work::Zeroes { next, end, .. }, .. }) = self.requests.get_mut(key)
        else {
            self.zeroes = Some(buffer);
            self.zeroing.pop_front();
            return None;
        };
        let (offset, len) = (*next, end.saturating_sub(*next).min(ZERO_BYTES as u64));
        *next = offset.saturating_add(len);
        buffer.set_len(len as usize);
        let io =
            Io { cookie: key.into(), op: Op::Write { fua: false }, offset, buffer: Some(buffer) };
        let refused = self.queue.submit(io).err()?;
        self.zeroes = refused.io.buffer;
        self.zeroing.pop_front();
        self.end(key, Err(refused.reason.into()), None)
    }

    /// Takes a completion from the queue. Returns the request, unless there is more to do for it.
    pub(super) fn complete(&mut self, completed: Completed) -> Option<Finished> {
        let Completed { cookie, result, mut buffer } = completed;
        let key = u32::try_from(cookie).ok()?;
        let result = result.map_err(Errno::from);
        let request = self.requests.get_mut(key)?;
        let flush = match request.work {
            Work::Single => false,
            Work::ThenFlush => true,
            Work::Zeroes { next, end, fua } => {
                self.zeroes = buffer.take();
                self.zeroing.pop_front();
                if result.is_ok() && next < end {
                    self.zeroing.push_back(key);
                    return None;
                }
                fua
            }
        };
        request.work = Work::Single;
        if flush && result.is_ok() {
            return self.submit(key, Op::Flush, 0, None);
        }
        self.end(key, result, buffer)
    }

    /// Stops zeroing for a client that has left.
    pub(super) fn abandon(&mut self, connection: usize) {
        for &key in &self.zeroing {
            if let Some(request) = self.requests.get_mut(key)
                && request.origin.connection == connection
                && let Work::Zeroes { next, end, .. } = &mut request.work
            {
                *end = *next;
            }
        }
    }
}

impl Finished {
    fn failed(origin: Origin, errno: Errno) -> Self {
        Self { origin, result: Err(errno), buffer: None }
    }
}
