//! A queue on io_uring.

mod events;
mod slot;

use super::file::Backing;
use super::{Completion, Op, OpKind, Queue, QueueSetup, Woken};
use events::{EVENT, Events};
use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, SubmissionQueue, cqueue, opcode, squeue};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ring_proto::SharedMemory;
use slot::{Slot, Step};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};
use xen_platform::LocalRegion;

/// The disk among the registered files.
const DISK: Fixed = Fixed(0);
/// The file by which the disk was opened and others are kept away, until the kernel has torn the ring down.
/// It may be the same file. A device can be discarded by no other.
const CLAIM: Fixed = Fixed(1);
/// The bell, if there is one, which ends a wait as well. The event channel comes next.
const BELL: Fixed = Fixed(2);

/// Index of the region among the registered buffers: it is the only one.
const REGION: u16 = 0;

/// What the ring may do once it is set up, with registered files only. Should somebody get to write its
/// entries, they reach this disk and its event channel, and nothing else.
const ALLOWED: [u8; 10] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// IORING_UNREGISTER_BUFFERS, IORING_UNREGISTER_FILES, IORING_REGISTER_EVENTFD and
/// IORING_UNREGISTER_EVENTFD of linux/io_uring.h.
const ALLOWED_REGISTER: [u8; 4] = [1, 3, 4, 5];

/// User data of the poll of the bell; that of an operation is its tag.
const RUNG: u64 = 1 << 32;

/// User data of entries that cancel a poll.
const CANCEL: u64 = 3 << 32;

/// One thread's io_uring on a file or block device.
pub(super) struct UringQueue {
    ring: IoUring,
    operations: Operations,
    /// Completions found while waiting, for the next poll to hand out.
    ready: Vec<Completion>,
    /// Whether the bell is being polled, if there is one. A poll fires once, and the next wait starts
    /// another, which finds a descriptor that is still readable: a multishot poll would not report it a
    /// second time.
    bell: Option<bool>,
    events: Option<Events>,
    /// Cancellations in flight.
    cancels: usize,
    /// Signalled when there are completions to take, while the queue is shared. An epoll on the ring itself
    /// does not hear of work that is deferred to us (`IORING_SETUP_DEFER_TASKRUN`).
    signals: Option<EventFd>,
    system_calls: u64,
    /// Registered with the kernel; kept until the ring is gone.
    _region: Option<Arc<LocalRegion>>,
}

/// Operations in flight.
struct Operations {
    backing: Arc<Backing>,
    read_only: bool,
    /// By tag.
    slots: Vec<Slot>,
    /// Slots with an operation that the kernel has or is about to get.
    busy: usize,
    flushes: Flushes,
    /// Addresses that lie in the registered buffer.
    registered: Range<usize>,
    /// Nothing is retried or continued: the queue is being dropped.
    closing: bool,
}

/// The flushes of a queue. The kernel gets one at a time: of two at once it would tell only one that data was
/// lost, and let the other succeed. Flushes that arrive meanwhile are merged into one.
struct Flushes {
    /// The first of these is in flight, on behalf of all.
    together: Vec<u16>,
    /// Submitted since it began.
    later: Vec<u16>,
}

impl UringQueue {
    pub(super) fn new(backing: Arc<Backing>, setup: QueueSetup) -> io::Result<Self> {
        // Each tag and the bell have at most one entry, and the event channel a chain: the ring is never
        // full. The completion ring is twice as long, and cannot overflow.
        let entries = setup.depth + 1 + events::ENTRIES;
        let ring = build(u32::try_from(entries).map_err(io::Error::other)?)?;
        let submitter = ring.submitter();
        let own = backing.reopen();
        let claim = backing.file.as_raw_fd();
        let mut files = vec![own.as_ref().map_or(claim, AsRawFd::as_raw_fd), claim];
        files.extend(setup.bell.iter().map(AsRawFd::as_raw_fd));
        let place = files.len() as u32;
        files.extend(setup.events.iter().map(|file| file.descriptor.as_raw_fd()));
        submitter.register_files(&files)?;
        let events = setup.events.map(|file| Events::new(file, place)).transpose()?;
        let region = setup.region.filter(|(region, bytes)| register_region(&ring, region, *bytes));
        let mut restrictions: Vec<_> = ALLOWED.map(Restriction::sqe_op).into();
        restrictions.extend(ALLOWED_REGISTER.map(Restriction::register_op));
        let flags = Flags::FIXED_FILE | Flags::IO_LINK | Flags::SKIP_SUCCESS;
        restrictions.push(Restriction::sqe_flags_allowed(flags.bits()));
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;

        let registered = region.as_ref().map_or(0..0, |(region, bytes)| {
            let base = region.base().addr().get();
            base..base + bytes
        });
        let read_only = backing.geometry().read_only;
        let slots = std::iter::repeat_with(Slot::default).take(setup.depth).collect();
        Ok(Self {
            ring,
            operations: Operations {
                backing,
                read_only,
                slots,
                busy: 0,
                flushes: Flushes {
                    together: Vec::with_capacity(setup.depth),
                    later: Vec::with_capacity(setup.depth),
                },
                registered,
                closing: false,
            },
            ready: Vec::with_capacity(setup.depth),
            bell: setup.bell.map(|_| false),
            events,
            cancels: 0,
            signals: None,
            system_calls: 0,
            _region: region.map(|(region, _)| region),
        })
    }

    /// Takes the completions that are available, without a system call.
    fn take_completions(&mut self, done: &mut Vec<Completion>) {
        let (_, mut submission, completion) = self.ring.split();
        for entry in completion {
            match entry.user_data() {
                ..RUNG => self.operations.complete(&entry, &mut submission, done),
                RUNG..EVENT => self.bell = Some(false),
                EVENT..CANCEL => {
                    if let Some(events) = &mut self.events {
                        events.complete(entry.result());
                    }
                }
                CANCEL.. => self.cancels = self.cancels.saturating_sub(1),
            }
        }
    }

    /// Takes completions for the next poll to hand out. Returns whether there were any.
    fn settle(&mut self) -> bool {
        let any = !self.ring.completion().is_empty();
        let mut ready = std::mem::take(&mut self.ready);
        self.take_completions(&mut ready);
        self.ready = ready;
        any
    }

    /// Cancels what is in flight on the event channel. If the queue `closes`, also on the bell, and waits for
    /// all operations.
    fn withdraw(&mut self, closes: bool) -> io::Result<()> {
        loop {
            self.settle();
            let event = self.events.as_ref().is_some_and(Events::armed).then_some(EVENT);
            let bell = (closes && self.bell == Some(true)).then_some(RUNG);
            let mut polls = bell.into_iter().chain(event).peekable();
            let done = polls.peek().is_none();
            if done && self.cancels == 0 && !(closes && self.operations.busy > 0) {
                return Ok(());
            }
            if self.cancels == 0 {
                let mut submission = self.ring.submission();
                for poll in polls {
                    // A poll that fires just now is not found: then try again, if need be. (Not PollRemove,
                    // which does not find a read that waits: whoever was woken by something else may have
                    // taken the event between poll and read.)
                    let cancel = opcode::AsyncCancel::new(poll).build().flags(Flags::FIXED_FILE);
                    let pushed = push(&mut submission, &cancel.user_data(CANCEL));
                    self.cancels += usize::from(pushed);
                }
            }
            self.enter(1, None)?;
        }
    }

    /// The only system call: submits what was queued and waits for `want` completions. Returns `false` if it
    /// ended before they came or the time was up, as when interrupted.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<bool> {
        self.system_calls += 1;
        let submitter = self.ring.submitter();
        let outcome = match timeout {
            None => submitter.submit_and_wait(want),
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&timeout))
            }
        };
        match outcome {
            Ok(_) => Ok(true),
            Err(e) => match e.raw_os_error() {
                Some(libc::ETIME) => Ok(true),
                // A signal came, or the kernel is short of something and takes the rest next time.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(false),
                _ => Err(e),
            },
        }
    }
}

impl Queue for UringQueue {
    fn submit(&mut self, op: Op<'_>, done: &mut Vec<Completion>) {
        self.operations.begin(&op, &mut self.ring.submission(), done);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
        self.take_completions(done);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        done.append(&mut self.ready);
        let submission = self.ring.submission();
        // The kernel flags completions that only a system call can bring.
        let calls = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if calls {
            self.enter(0, None)?;
        }
        self.take_completions(done);
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken> {
        // Take completions of operations and polls that are there already.
        self.settle();
        let mut submission = self.ring.submission();
        if let Some(armed) = &mut self.bell
            && !*armed
        {
            let poll = opcode::PollAdd::new(BELL, libc::POLLIN as u32).build();
            *armed = push(&mut submission, &poll.user_data(RUNG));
        }
        let mut pending = !self.ready.is_empty();
        if let Some(events) = &mut self.events {
            events.arm(&mut submission);
            pending |= events.pending();
        }
        drop(submission);
        let waited = self.enter(usize::from(!pending), timeout)?;
        // A call that also submits does not report that the time is up.
        let time_is_up = !self.settle() && waited && !pending;
        Ok(match self.events.as_mut().and_then(Events::woken) {
            Some(woken) => woken,
            None if self.bell == Some(false) => Woken::Descriptor,
            None if time_is_up => Woken::Time,
            None => Woken::Device,
        })
    }

    fn share(&mut self, shared: bool) -> io::Result<Option<BorrowedFd<'_>>> {
        if !shared {
            self.signals = None;
            self.ring.submitter().unregister_eventfd()?;
            return Ok(None);
        }
        self.withdraw(false)?;
        if let Some(events) = &mut self.events {
            events.reset();
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let signals = EventFd::from_value_and_flags(0, flags)?;
        self.ring.submitter().register_eventfd(signals.as_raw_fd())?;
        let signals: &EventFd = self.signals.insert(signals);
        Ok(Some(signals.as_fd()))
    }

    fn due(&mut self) -> Option<Instant> {
        // A completion may have queued more, such as the rest of a transfer, for the next poll to submit.
        (!self.ring.submission().is_empty()).then(Instant::now)
    }

    fn is_left_to_threads(&self) -> bool {
        // io_uring hands operations that the page cache cannot do at once to a worker.
        self.operations.busy > 0 && self.operations.backing.cached
    }

    fn in_flight(&self) -> usize {
        self.operations.busy + self.ready.len()
    }

    fn system_calls(&self) -> u64 {
        self.system_calls
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        // The kernel may still be writing into buffers whose owners trust that they are free once
        // this returns.
        self.operations.closing = true;
        if let Err(e) = self.withdraw(true) {
            tracing::error!("cannot wait for {} operations: {e}", self.operations.busy);
            std::process::abort();
        }
        // The kernel tears a ring down some time after it was closed, but a device must be free to be opened
        // again, and memory be unpinned, at once. Unregistering what was never registered fails, which is
        // fine. (Before Linux 6.13 this waits for everything that uses a registered file, even a poll.)
        let _ = self.ring.submitter().unregister_files();
        let _ = self.ring.submitter().unregister_buffers();
    }
}

impl Operations {
    fn begin(
        &mut self,
        op: &Op<'_>,
        submission: &mut SubmissionQueue<'_>,
        done: &mut Vec<Completion>,
    ) {
        let tag = op.tag;
        let checked = op.check(self.backing.bytes(), self.read_only);
        // An offset near the end of the numbers was refused above.
        let op = &if checked.is_ok() { self.backing.whole_sectors(*op) } else { *op };
        let idle = match op.kind {
            OpKind::Read | OpKind::Write => op.transfer() == 0,
            OpKind::Flush => self.read_only,
            OpKind::Discard { bytes, .. } => bytes == 0,
        };
        let refused = match op.kind {
            OpKind::Discard { secure: true, .. } => Err(libc::EOPNOTSUPP),
            OpKind::Write if self.backing.is_lost() => Err(libc::EIO),
            _ => Ok(()),
        };
        let checked = checked.and(refused);
        if checked.is_err() || idle {
            done.push(Completion { tag, result: checked });
            return;
        }
        let slot = &mut self.slots[usize::from(tag)];
        if slot.kind.is_some() {
            // Must not happen. The memory of the operation in flight must not be given up for it.
            done.push(Completion { tag, result: Err(libc::EBUSY) });
            return;
        }
        slot.begin(op);
        self.busy += 1;
        if op.kind == OpKind::Flush {
            self.flushes.later.push(tag);
            if self.flushes.together.is_empty() {
                self.flush(submission, done);
            }
        } else {
            self.queue(tag, submission, done);
        }
    }

    /// Begins one flush for all that wait; none may be in flight.
    fn flush(&mut self, submission: &mut SubmissionQueue<'_>, done: &mut Vec<Completion>) {
        std::mem::swap(&mut self.flushes.together, &mut self.flushes.later);
        if let Some(&tag) = self.flushes.together.first() {
            self.queue(tag, submission, done);
        }
    }

    /// Queues what is left of an operation.
    fn queue(&mut self, tag: u16, to: &mut SubmissionQueue<'_>, done: &mut Vec<Completion>) {
        let Some(entry) =
            self.slots[usize::from(tag)].entry(self.backing.at_once, &self.registered)
        else {
            return;
        };
        if !push(to, &entry.user_data(u64::from(tag))) {
            // Cannot happen: the ring has an entry for each tag.
            self.end(tag, Err(libc::EBUSY), to, done);
        }
    }

    fn complete(
        &mut self,
        entry: &cqueue::Entry,
        submission: &mut SubmissionQueue<'_>,
        done: &mut Vec<Completion>,
    ) {
        // The user data is the tag that `queue` put there.
        let tag = entry.user_data() as u16;
        match self.slots[usize::from(tag)].step(entry.result()) {
            Step::Again if self.closing => self.end(tag, Err(libc::ECANCELED), submission, done),
            Step::Again => self.queue(tag, submission, done),
            Step::End(result) => self.end(tag, result, submission, done),
        }
    }

    fn end(
        &mut self,
        tag: u16,
        result: Result<(), i32>,
        submission: &mut SubmissionQueue<'_>,
        done: &mut Vec<Completion>,
    ) {
        let Some(kind) = self.slots[usize::from(tag)].kind.take() else { return };
        if kind != OpKind::Flush {
            self.busy -= 1;
            done.push(Completion { tag, result });
            return;
        }
        // A flush cancelled because the queue closes says nothing about the disk.
        let cancelled = self.closing && result == Err(libc::ECANCELED);
        let result = if cancelled { result } else { self.backing.synced(result) };
        for tag in self.flushes.together.drain(..) {
            self.slots[usize::from(tag)].kind = None;
            self.busy -= 1;
            done.push(Completion { tag, result });
        }
        self.flush(submission, done);
    }
}

/// Queues an entry; false when the ring is full.
fn push(submission: &mut SubmissionQueue<'_>, entry: &squeue::Entry) -> bool {
    // SAFETY: an entry of `Slot::entry` names memory that stays valid until the operation completes, by
    // IoVec::new's contract. The vector itself belongs to the slot, and is read during submission, before
    // anything can change it. Entries of `Events::arm` name memory that `Events` keeps. `Drop` waits for
    // both. The others name no memory.
    unsafe { submission.push(entry) }.is_ok()
}

/// Builds a ring, disabled at first. Completions are processed when we ask, not whenever they arrive.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled().setup_submit_all();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    builder.build(entries).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => io::Error::other("io_uring is too old: use Linux 6.1 or later"),
        _ => error,
    })
}

/// Registers the first `bytes` of the memory that buffers often lie in, which saves the kernel looking up its
/// pages again and again. It works without, only slower.
fn register_region(ring: &IoUring, region: &LocalRegion, bytes: usize) -> bool {
    static WARNED: Once = Once::new();
    let vector = libc::iovec { iov_base: region.base().as_ptr().cast(), iov_len: bytes };
    debug_assert!(bytes <= region.len(), "a part of the region");
    // SAFETY: the queue keeps the region until the ring has let go of it.
    match unsafe { ring.submitter().register_buffers(&[vector]) } {
        Ok(()) => true,
        Err(e) => {
            WARNED.call_once(|| {
                tracing::warn!("cannot register {bytes} bytes of buffers, going without: {e}; raise RLIMIT_MEMLOCK");
            });
            false
        }
    }
}
