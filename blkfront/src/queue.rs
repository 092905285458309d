//! A vCPU's queue.

use crate::flight::{Flight, Kind, Range};
use crate::hw::{Failure, HwQueue, Owner};
use crate::limits::Limits;
use crate::link::{Link, Mailbox, Notice};
use crate::owner::{Staged, Staging};
use crate::pool::Pool;
use crate::slab::NONE;
use crate::stats::Counters;
use crate::wait::{Deadline, sleep};
use crate::{Completed, Io, IoBuffer, Op, Refusal, Refused, Stats, Waiting};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use ring_proto::abi::SECTOR_SIZE;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use xen_platform::Spin;

/// Turns of a spin between two looks at the deadline.
const TURNS_PER_LOOK: u32 = 1024;

/// The way to the ring.
#[derive(Debug)]
pub(crate) enum Path {
    /// A ring to ourselves, while there is one.
    Own(Option<Box<HwQueue>>),
    /// A ring that another thread owns.
    Shared(Staging),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backend {
    /// Takes nothing new; it may still answer.
    Down,
    Up,
    Gone,
}

/// A vCPU's handle on a disk. `Send`: owned by one thread at a time.
///
/// To sleep in the caller's own `poll(2)` with other descriptors: drain [`Queue::poll`], and when
/// [`Queue::arm`] returns `true`, wait for [`AsFd::as_fd`] to become readable, then call [`Queue::poll`]
/// again. The descriptor stays the same across reconnects.
#[derive(Debug)]
pub struct Queue {
    vcpu: u32,
    ring: u32,
    pool: Pool,
    /// Pages of segments, for indirect requests.
    lists: Pool,
    flight: Flight,
    path: Path,
    link: Arc<Link>,
    mailbox: Arc<Mailbox>,
    /// Notices taken from the mailbox.
    taken: u32,
    backend: Backend,
    /// The connection's number.
    connection: u32,
    /// Requests on a shared ring, or on their way to or from it.
    on_the_way: usize,
    /// Requests to be issued again on the next connection, in order.
    unanswered: Vec<u32>,
    /// The limits of a new connection, until what is unanswered or waits is assembled for them.
    next_limits: Option<Limits>,
    plugged: bool,
    armed: bool,
    /// Completed, but not taken yet.
    done: Vec<Completed>,
    spin: Spin,
    /// Spinning was not enough for the current wait.
    slept: bool,
    waker: Epoll,
    counters: Arc<Counters>,
    /// The ring's, if it is ours.
    ring_counters: Arc<Counters>,
}

/// What a queue is made of.
pub(crate) struct Parts {
    pub(crate) vcpu: u32,
    pub(crate) ring: u32,
    pub(crate) pool: Pool,
    pub(crate) lists: Pool,
    pub(crate) depth: usize,
    pub(crate) pool_pages: usize,
    pub(crate) merge: bool,
    pub(crate) limits: Limits,
    pub(crate) waiting: Waiting,
    pub(crate) path: Path,
    pub(crate) link: Arc<Link>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) waker: Epoll,
    pub(crate) counters: Arc<Counters>,
    pub(crate) ring_counters: Arc<Counters>,
}

impl Queue {
    /// What a queue with this mailbox is woken by, as yet without its ring.
    pub(crate) fn waker(mailbox: &Mailbox) -> io::Result<Epoll> {
        let waker = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        waker.add(&mailbox.bell, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(waker)
    }

    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { depth, pool_pages, limits, .. } = parts;
        let mut queue = Self {
            vcpu: parts.vcpu,
            ring: parts.ring,
            pool: parts.pool,
            lists: parts.lists,
            flight: Flight::new(depth, pool_pages, parts.merge, limits),
            path: parts.path,
            link: parts.link,
            mailbox: parts.mailbox,
            taken: 0,
            backend: Backend::Down,
            connection: 0,
            on_the_way: 0,
            unanswered: Vec::with_capacity(Flight::max_requests(depth, pool_pages)),
            next_limits: None,
            plugged: false,
            armed: false,
            done: Vec::with_capacity(depth),
            spin: Spin::new(parts.waiting),
            slept: false,
            waker: parts.waker,
            counters: parts.counters,
            ring_counters: parts.ring_counters,
        };
        queue.read_mail();
        queue
    }

    /// A buffer of `len` bytes, or `None` while too few pages of the pool are free. It contains whatever
    /// was there before (this queue's data, or zeroes).
    ///
    /// `None` also once the device is gone: its backend may still be at work on pages that look free, and
    /// would write to the disk what was meant for another place.
    pub fn alloc(&mut self, len: usize) -> Option<IoBuffer> {
        if self.is_gone() { None } else { self.pool.alloc(len) }
    }

    /// Whether everything is refused from now on.
    pub(crate) fn is_gone(&self) -> bool {
        self.backend == Backend::Gone
    }

    /// Takes an I/O of any length. Unless the queue is plugged, it goes to the backend at once, or as
    /// soon as there are slots.
    ///
    /// # Errors
    /// Gives the I/O back. [`Refusal::WouldBlock`] when [`crate::Config::depth`] are inside.
    // Inlined, so that an I/O is not made in memory only to be read from there.
    #[inline(always)]
    pub fn submit(&mut self, io: Io) -> Result<(), Refused> {
        let range = match self.check(&io) {
            Ok(range) => range,
            Err(reason) => return Err(Refused { reason, io }),
        };
        self.counters.ios.add(1);
        let current = io.op != Op::Flush || self.is_current();
        self.flight.admit(io, range, current, &self.pool, &self.counters, &mut self.done);
        if !self.plugged {
            self.issue();
        }
        Ok(())
    }

    /// Whether the limits are those of the latest connection.
    fn is_current(&self) -> bool {
        // Relaxed: who has a completion of a new backend, and tells us of it, took a notice that was posted
        // after the number was stored.
        let latest = self.link.connection.load(Ordering::Relaxed);
        self.next_limits.is_none() && self.connection == latest
    }

    /// What an I/O is about, if it may be taken.
    #[inline(always)]
    fn check(&self, io: &Io) -> Result<Range, Refusal> {
        // A completed I/O counts until it is taken: there is no room for more.
        if self.in_flight() >= self.flight.depth() {
            return Err(Refusal::WouldBlock);
        }
        if self.is_gone() {
            return Err(Refusal::Gone);
        }
        let (kind, len) = match io.op {
            Op::Read => (Kind::Read, None),
            Op::Write { .. } => (Kind::Write, None),
            Op::Discard { len, secure } => (Kind::Discard { secure }, Some(len)),
            Op::Flush => return Ok(Range::FLUSH),
        };
        let (page, len) = match (len, &io.buffer) {
            // An I/O without data may have a buffer all the same, which stays as it is.
            (Some(len), _) => (NONE, len),
            (None, Some(buffer)) if self.pool.owns(buffer) => {
                (buffer.page_at(0), buffer.len() as u64)
            }
            (None, _) => return Err(Refusal::ForeignBuffer),
        };
        self.allows(io.op, io.offset, len)?;
        let sector_size = SECTOR_SIZE as u64;
        Ok(Range { kind, sector: io.offset / sector_size, sectors: len / sector_size, page })
    }

    /// Whether the device as it is now can be asked for `op`, not a flush.
    pub(crate) fn allows(&self, op: Op, offset: u64, len: u64) -> Result<(), Refusal> {
        self.flight.limits.check(op, offset, len, self.size())
    }

    /// Holds I/O back, so that neighbours can be merged and are sent together.
    pub fn plug(&mut self) {
        self.plugged = true;
    }

    /// Sends what was held back.
    pub fn unplug(&mut self) {
        self.plugged = false;
        self.issue();
    }

    /// Puts waiting requests on the ring, as far as there are slots, and tells the backend.
    fn issue(&mut self) {
        if self.backend != Backend::Up || self.next_limits.is_some() {
            return;
        }
        let mut pushed = false;
        while let Some(request) = self.flight.front() {
            let Self { flight, pool, lists, .. } = self;
            let (issued, enough) = match &mut self.path {
                Path::Own(Some(hw)) if !hw.is_full() => {
                    let owner = Owner { user: self.vcpu, request };
                    let body = flight.body(request, pool, lists);
                    (body.is_some_and(|body| hw.push(owner, body)), hw.has_enough())
                }
                Path::Shared(staging) if !staging.requests.is_full() => {
                    let body = flight.body(request, pool, lists).map(|body| body.to_owned());
                    let issued = body.is_some_and(|body| {
                        let staged = Staged { connection: self.connection, request, body };
                        staging.requests.push(staged).is_ok()
                    });
                    self.on_the_way += usize::from(issued);
                    (issued, false)
                }
                Path::Own(_) | Path::Shared(_) => (false, false),
            };
            if !issued {
                if self.flight.blocked() {
                    self.counters.requeues.add(1);
                }
                break;
            }
            self.flight.issued();
            pushed = true;
            if enough {
                self.publish();
            }
        }
        if pushed {
            self.publish();
        }
    }

    fn publish(&mut self) {
        match &mut self.path {
            Path::Own(Some(hw)) => {
                if let Err(failure) = hw.publish() {
                    self.fail(failure);
                }
            }
            Path::Own(None) => {}
            Path::Shared(staging) => {
                if staging.owner.bell.ring_if_asleep() {
                    self.counters.wakeups.add(1);
                    self.counters.syscalls.add(1);
                }
            }
        }
    }

    /// Appends completed I/Os to `done`, without blocking, and returns how many. Also sends what waited for
    /// slots, and notices when a backend goes away or comes back: call it regularly while anything is in
    /// flight.
    pub fn poll(&mut self, done: &mut Vec<Completed>) -> usize {
        let before = done.len();
        if self.armed {
            self.disarm();
        }
        if self.mailbox.has_news(self.taken) {
            self.read_mail();
        }
        done.append(&mut self.done);
        self.take_responses(done);
        if self.next_limits.is_some() {
            self.reissue();
        }
        if self.flight.is_waiting() && !self.plugged {
            self.issue();
        }
        let count = done.len() - before;
        if count > 0 {
            if std::mem::take(&mut self.slept) { self.spin.woken() } else { self.spin.found() }
        }
        count
    }

    fn take_responses(&mut self, done: &mut Vec<Completed>) {
        let Self { flight, pool, counters, path, unanswered, .. } = self;
        match path {
            Path::Own(Some(hw)) => {
                let end = |owner: Owner, status| {
                    flight.complete(owner.request, status, pool, counters, done);
                };
                if let Err(failure) = hw.poll(end) {
                    self.fail(failure);
                }
            }
            Path::Own(None) => {}
            Path::Shared(staging) => {
                while let Ok(outcome) = staging.outcomes.pop() {
                    self.on_the_way -= 1;
                    match outcome.status {
                        Some(status) => {
                            flight.complete(outcome.request, status, pool, counters, done);
                        }
                        None => unanswered.push(outcome.request),
                    }
                }
            }
        }
    }

    fn read_mail(&mut self) {
        while let Some(notice) = self.mailbox.take(&mut self.taken, &self.counters) {
            if self.backend == Backend::Gone {
                continue;
            }
            match notice {
                Notice::Down => self.disconnect(),
                Notice::Hold => self.backend = Backend::Down,
                Notice::Up { connection, limits, ring } => {
                    self.disconnect();
                    self.connection = connection;
                    self.next_limits = Some(limits);
                    if let (Path::Own(own), Some(ring)) = (&mut self.path, ring) {
                        let hw = HwQueue::new(*ring, self.ring_counters.clone());
                        let event = EpollEvent::new(EpollFlags::EPOLLIN, 1);
                        if let Err(e) = self.waker.add(hw.event_fd(), event) {
                            tracing::error!(ring = self.ring, "cannot wait for events: {e}");
                        }
                        *own = Some(Box::new(hw));
                    }
                    self.backend = Backend::Up;
                    self.reissue();
                }
                Notice::Gone => {
                    self.disconnect();
                    self.backend = Backend::Gone;
                    self.unanswered.clear();
                    self.flight.abandon(&mut self.done);
                }
            }
        }
    }

    /// Lets go of the ring, if it is ours, keeping what was answered and noting what was not.
    fn disconnect(&mut self) {
        if self.backend != Backend::Gone {
            self.backend = Backend::Down;
        }
        let Path::Own(own) = &mut self.path else { return };
        let Some(mut hw) = own.take() else { return };
        let Self { flight, pool, counters, done, .. } = self;
        let end = |owner: Owner, status| {
            flight.complete(owner.request, status, pool, counters, done);
        };
        // A backend that closed in good order has answered. If it did not, its errors no longer matter.
        let _ = hw.poll(end);
        self.unanswered.extend(hw.unanswered().iter().map(|owner| owner.request));
        let _ = self.waker.delete(hw.event_fd());
    }

    /// Assembles requests for the new ring, once all that were on the old one have come back.
    fn reissue(&mut self) {
        if self.backend != Backend::Up || self.on_the_way > 0 {
            return;
        }
        if let Some(limits) = self.next_limits.take() {
            let Self { flight, unanswered, pool, counters, done, .. } = self;
            flight.reissue(unanswered, limits, pool, counters, done);
            self.unanswered.clear();
            if !self.plugged {
                self.issue();
            }
        }
    }

    fn fail(&mut self, failure: Failure) {
        // This posts a notice to us as well, which ends everything here.
        self.link.fail(self.ring, failure);
        self.read_mail();
    }

    /// As [`Queue::poll`], but waits as [`crate::Config::waiting`] says until something has
    /// completed, or `timeout` is over. With nothing in the queue it returns at once.
    pub fn wait(&mut self, done: &mut Vec<Completed>, timeout: Option<Duration>) -> usize {
        let (mut deadline, mut turns) = (Deadline::new(timeout), 0_u32);
        loop {
            let count = self.poll(done);
            if count > 0 || self.in_flight() == 0 {
                return count;
            }
            if self.spin.again(|| false) {
                self.counters.spins.add(1);
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(TURNS_PER_LOOK) && deadline.left().is_none() {
                    return 0;
                }
                continue;
            }
            self.slept = true;
            let Some(left) = deadline.left() else { return 0 };
            if self.arm() {
                self.sleep(left);
            }
        }
    }

    fn sleep(&self, timeout: Option<Duration>) {
        let bell = self.mailbox.bell.as_fd();
        let other = match &self.path {
            Path::Own(Some(hw)) => hw.event_fd(),
            _ => bell,
        };
        sleep(&[bell, other], timeout, &self.counters);
    }

    /// Asks for an event and looks once more. Only if this returns `true` is it safe to sleep on the
    /// descriptor; otherwise there is something for [`Queue::poll`].
    pub fn arm(&mut self) -> bool {
        self.armed = true;
        let idle = match &mut self.path {
            Path::Own(Some(hw)) => hw.arm(),
            Path::Own(None) => Ok(true),
            Path::Shared(staging) => {
                self.mailbox.bell.about_to_sleep();
                Ok(staging.outcomes.is_empty())
            }
        };
        match idle {
            Ok(idle) => idle && self.done.is_empty() && !self.mailbox.has_news(self.taken),
            Err(failure) => {
                self.fail(failure);
                false
            }
        }
    }

    fn disarm(&mut self) {
        self.armed = false;
        let taken = match &mut self.path {
            Path::Own(Some(hw)) => hw.take_event(),
            Path::Own(None) => Ok(false),
            Path::Shared(_) => {
                self.mailbox.bell.awake();
                Ok(false)
            }
        };
        match taken {
            Ok(true) => {}
            Ok(false) => {
                self.counters.syscalls.add(1);
                self.mailbox.bell.silence();
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// I/Os submitted, and not yet taken.
    pub fn in_flight(&self) -> usize {
        self.flight.len() + self.done.len()
    }

    /// The vCPU this is the queue of.
    pub fn vcpu(&self) -> u32 {
        self.vcpu
    }

    /// The ring it uses.
    pub fn ring(&self) -> u32 {
        self.ring
    }

    /// Bytes the disk has now.
    pub fn size(&self) -> u64 {
        self.link.sectors.load(Ordering::Relaxed).saturating_mul(SECTOR_SIZE as u64)
    }

    /// What this vCPU has done, without what its ring has ([`crate::RingInfo::stats`]).
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.0.as_fd()
    }
}
