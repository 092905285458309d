//! A queue on io_uring.

use super::file::{Backing, punch_hole};
use super::{Completion, IoVec, Op, OpKind, Queue, QueueCounters, QueueSetup, Woken};
use io_uring::register::Restriction;
use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, SubmissionQueue, cqueue, opcode, squeue};
use ring_proto::SharedMemory;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Once};
use std::time::Duration;
use xen_platform::LocalRegion;

/// The disk among the registered files: there is no other.
const DISK: Fixed = Fixed(0);

/// The region among the registered buffers: there is no other.
const REGION: u16 = 0;

/// What the ring is allowed to do once it is set up. Should somebody get to write its entries, they
/// reach this disk and nothing else.
const ALLOWED: [u8; 9] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
];

/// IORING_UNREGISTER_BUFFERS and IORING_UNREGISTER_FILES of linux/io_uring.h.
const ALLOWED_REGISTER: [u8; 2] = [1, 3];

/// User data of the poll of wake descriptor `n` is this plus `n`; that of an operation is its tag.
const WAKE: u64 = 1 << 32;

/// Pieces that the kernel takes at a time: UIO_MAXIOV. The rest follows as after a short transfer.
const MAX_PIECES: usize = 1024;

/// Times that an operation is begun again when it was interrupted or the kernel was out of
/// something, before it fails: a device that says EAGAIN for ever must not keep it in flight.
const MAX_RETRIES: u32 = 16;

/// One thread's ring on a file or block device.
pub(super) struct RingQueue {
    ring: IoUring,
    flight: Flight,
    /// Completed while it waited, to be handed out by the next poll.
    ready: Vec<Completion>,
    wake: Vec<Wake>,
    system_calls: u64,
    /// Registered with the kernel; kept until the ring is gone.
    _region: Option<Arc<LocalRegion>>,
}

/// A descriptor that ends a wait. Its poll fires once and is begun again by the next wait: that finds
/// a descriptor which is still readable, where a multishot poll would not report it a second time.
struct Wake {
    descriptor: OwnedFd,
    armed: bool,
}

/// Operations on their way.
struct Flight {
    backing: Arc<Backing>,
    read_only: bool,
    /// By tag.
    slots: Vec<Slot>,
    /// Slots with an operation that the kernel has or is about to get.
    busy: usize,
    /// Addresses that lie in the registered buffer.
    registered: Range<usize>,
    /// Nothing is begun again: the queue is being dropped.
    closing: bool,
}

#[derive(Default)]
struct Slot {
    op: Option<Op>,
    /// Bytes still to be moved.
    left: u64,
    /// Where the next of them is on the disk.
    offset: u64,
    /// First piece of the buffers with something left to move.
    head: usize,
    /// That piece as it was submitted, where it has been cut.
    cut: Option<IoVec>,
    retries: u32,
}

impl RingQueue {
    pub(super) fn new(backing: Arc<Backing>, setup: QueueSetup) -> io::Result<Self> {
        // Every tag and every descriptor has one entry at the most, so that the ring is never full;
        // the completion ring is twice as long, and cannot overflow.
        let entries = u32::try_from(setup.depth + setup.wake.len()).map_err(io::Error::other)?;
        let ring = build(entries)?;
        let submitter = ring.submitter();
        submitter.register_files(&[backing.file.as_raw_fd()])?;
        let region = setup.region.filter(|region| register_region(&ring, region));
        let mut restrictions: Vec<_> = ALLOWED.map(Restriction::sqe_op).into();
        restrictions.extend(ALLOWED_REGISTER.map(Restriction::register_op));
        restrictions.push(Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;

        let registered = region.as_ref().map_or(0..0, |region| {
            let base = region.base().addr().get();
            base..base + region.len()
        });
        let read_only = backing.geometry().read_only;
        let slots = std::iter::repeat_with(Slot::default).take(setup.depth).collect();
        let wake = setup.wake.into_iter().map(|descriptor| Wake { descriptor, armed: false });
        Ok(Self {
            ring,
            flight: Flight { backing, read_only, slots, busy: 0, registered, closing: false },
            ready: Vec::with_capacity(setup.depth),
            wake: wake.collect(),
            system_calls: 0,
            _region: region,
        })
    }

    /// Takes completions that are there, without a system call.
    fn take_completions(&mut self, done: &mut Vec<Completion>) {
        let (_, mut submission, completion) = self.ring.split();
        for entry in completion {
            match entry.user_data().checked_sub(WAKE) {
                Some(index) => self.wake[index as usize].armed = false,
                None => self.flight.complete(&entry, &mut submission, done),
            }
        }
    }

    /// The one system call there is: submits what was queued and waits for `want` completions. Whether
    /// the time is up.
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
            Ok(_) => Ok(false),
            Err(e) => match e.raw_os_error() {
                Some(libc::ETIME) => Ok(true),
                // A signal came, or the kernel is short of something and takes the rest next time.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(false),
                _ => Err(e),
            },
        }
    }
}

impl Queue for RingQueue {
    fn submit(&mut self, op: Op, done: &mut Vec<Completion>) {
        self.flight.begin(op, &mut self.ring.submission(), done);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
        self.take_completions(done);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        done.append(&mut self.ready);
        let submission = self.ring.submission();
        // The kernel says when it has completions that only a system call can bring.
        let calls = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if calls {
            self.enter(0, None)?;
        }
        self.take_completions(done);
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Woken> {
        // What is known already, of operations and of descriptors.
        let mut ready = std::mem::take(&mut self.ready);
        self.take_completions(&mut ready);
        self.ready = ready;
        let mut submission = self.ring.submission();
        for (wake, user_data) in self.wake.iter_mut().zip(WAKE..).filter(|(wake, _)| !wake.armed) {
            let events = libc::POLLIN as u32;
            let poll = opcode::PollAdd::new(Fd(wake.descriptor.as_raw_fd()), events);
            wake.armed = push(&mut submission, &poll.build().user_data(user_data));
        }
        drop(submission);
        let want = usize::from(self.ready.is_empty());
        let time_is_up = self.enter(want, timeout)?;
        let mut ready = std::mem::take(&mut self.ready);
        self.take_completions(&mut ready);
        self.ready = ready;
        Ok(match time_is_up {
            _ if self.wake.iter().any(|wake| !wake.armed) => Woken::Descriptor,
            true => Woken::Time,
            false => Woken::Device,
        })
    }

    fn in_flight(&self) -> usize {
        self.flight.busy + self.ready.len()
    }

    fn counters(&self) -> QueueCounters {
        QueueCounters { system_calls: self.system_calls }
    }
}

impl Drop for RingQueue {
    fn drop(&mut self) {
        // The kernel may still be writing into buffers whose owners trust that they are free once
        // this returns.
        self.flight.closing = true;
        let mut done = std::mem::take(&mut self.ready);
        self.take_completions(&mut done);
        while self.flight.busy > 0 {
            if let Err(e) = self.enter(1, None) {
                tracing::error!("cannot wait for {} operations: {e}", self.flight.busy);
                std::process::abort();
            }
            self.take_completions(&mut done);
        }
        // The kernel takes a ring apart some time after it was closed. A device must be free for
        // the next to open, and memory be unpinned, at once. What was never registered cannot be
        // taken back, which is fine.
        let _ = self.ring.submitter().unregister_files();
        let _ = self.ring.submitter().unregister_buffers();
    }
}

impl Flight {
    fn begin(&mut self, op: Op, submission: &mut SubmissionQueue<'_>, done: &mut Vec<Completion>) {
        let left = op.transfer();
        let checked = op.check(self.backing.bytes(), self.read_only);
        let idle = match op.kind {
            OpKind::Read | OpKind::Write { .. } => left == 0,
            OpKind::Flush => self.read_only,
            OpKind::Discard { bytes, .. } => bytes == 0,
        };
        let secure = matches!(op.kind, OpKind::Discard { secure: true, .. });
        let checked = checked.and(if secure { Err(libc::EOPNOTSUPP) } else { Ok(()) });
        if checked.is_err() || idle {
            done.push(op.complete(checked));
            return;
        }
        let tag = op.tag;
        let slot = &mut self.slots[usize::from(tag)];
        if slot.op.is_some() {
            // Must not happen; the memory of the operation in flight must not go for it.
            done.push(op.complete(Err(libc::EBUSY)));
            return;
        }
        *slot = Slot { left, offset: op.offset, op: Some(op), ..Slot::default() };
        self.busy += 1;
        self.queue(tag, submission, done);
    }

    /// Queues what is left of an operation.
    fn queue(&mut self, tag: u16, to: &mut SubmissionQueue<'_>, done: &mut Vec<Completion>) {
        let Some(entry) = self.slots[usize::from(tag)].entry(&self.registered) else { return };
        if !push(to, &entry.user_data(u64::from(tag))) {
            // Cannot be: the ring has an entry for each tag.
            self.end(tag, Err(libc::EBUSY), done);
        }
    }

    fn complete(
        &mut self,
        entry: &cqueue::Entry,
        submission: &mut SubmissionQueue<'_>,
        done: &mut Vec<Completion>,
    ) {
        // User data is what `queue` put there.
        let tag = entry.user_data() as u16;
        match self.slots[usize::from(tag)].step(entry.result()) {
            Step::Again if self.closing => self.end(tag, Err(libc::ECANCELED), done),
            Step::Again => self.queue(tag, submission, done),
            Step::End(result) => self.end(tag, result, done),
        }
    }

    fn end(&mut self, tag: u16, result: Result<(), i32>, done: &mut Vec<Completion>) {
        let slot = &mut self.slots[usize::from(tag)];
        let cut = slot.cut.take();
        let Some(mut op) = slot.op.take() else { return };
        if let Some(piece) = cut {
            op.buffers[slot.head] = piece;
        }
        self.busy -= 1;
        let durable = matches!(op.kind, OpKind::Flush | OpKind::Write { fua: true });
        let result = if durable { self.backing.synced(result) } else { result };
        done.push(op.complete(result));
    }
}

enum Step {
    Again,
    End(Result<(), i32>),
}

impl Slot {
    /// The entry for what is left.
    fn entry(&self, registered: &Range<usize>) -> Option<squeue::Entry> {
        let op = self.op.as_ref()?;
        let pieces = &op.buffers[self.head.min(op.buffers.len())..];
        let vector = pieces.as_ptr().cast::<libc::iovec>();
        let count = pieces.len().min(MAX_PIECES) as u32;
        // No piece is longer than an indirect request: the length fits.
        let single = match pieces {
            [piece] => Some((piece.base(), piece.len() as u32)),
            _ => None,
        };
        let is_registered = single.is_some_and(|(base, length)| {
            let start = base.addr();
            start >= registered.start
                && start.checked_add(length as usize).is_some_and(|end| end <= registered.end)
        });
        Some(match (op.kind, single) {
            (OpKind::Read, Some((base, length))) if is_registered => {
                opcode::ReadFixed::new(DISK, base, length, REGION).offset(self.offset).build()
            }
            (OpKind::Read, Some((base, length))) => {
                opcode::Read::new(DISK, base, length).offset(self.offset).build()
            }
            (OpKind::Read, None) => {
                opcode::Readv::new(DISK, vector, count).offset(self.offset).build()
            }
            (OpKind::Write { fua }, Some((base, length))) if is_registered => {
                opcode::WriteFixed::new(DISK, base, length, REGION)
                    .offset(self.offset)
                    .rw_flags(durable(fua))
                    .build()
            }
            (OpKind::Write { fua }, Some((base, length))) => opcode::Write::new(DISK, base, length)
                .offset(self.offset)
                .rw_flags(durable(fua))
                .build(),
            (OpKind::Write { fua }, None) => opcode::Writev::new(DISK, vector, count)
                .offset(self.offset)
                .rw_flags(durable(fua))
                .build(),
            (OpKind::Flush, _) => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
            (OpKind::Discard { bytes, .. }, _) => opcode::Fallocate::new(DISK, bytes)
                .offset(self.offset)
                .mode(punch_hole().bits())
                .build(),
        })
    }

    /// Accounts for what the kernel did.
    fn step(&mut self, result: i32) -> Step {
        let Ok(moved) = u32::try_from(result) else {
            let errno = result.wrapping_neg();
            let passing = matches!(errno, libc::EINTR | libc::EAGAIN);
            if passing && self.retries < MAX_RETRIES {
                self.retries += 1;
                return Step::Again;
            }
            return Step::End(Err(errno));
        };
        if self.left == 0 {
            // Flush or discard, which are done or not.
            return Step::End(Ok(()));
        }
        if moved == 0 {
            // The file ends here although the disk does not.
            return Step::End(Err(libc::EIO));
        }
        self.left = self.left.saturating_sub(u64::from(moved));
        if self.left == 0 {
            return Step::End(Ok(()));
        }
        self.advance(moved as usize);
        Step::Again
    }

    /// Steps over `moved` bytes, fewer than are left.
    fn advance(&mut self, mut moved: usize) {
        let Some(op) = self.op.as_mut() else { return };
        self.offset += moved as u64;
        while let Some(piece) = op.buffers.get_mut(self.head) {
            if moved < piece.len() {
                self.cut.get_or_insert(*piece);
                *piece = piece.advanced(moved);
                return;
            }
            moved -= piece.len();
            if let Some(whole) = self.cut.take() {
                *piece = whole;
            }
            self.head += 1;
        }
    }
}

/// Flags of pwritev2(2).
fn durable(fua: bool) -> i32 {
    if fua { libc::RWF_DSYNC } else { 0 }
}

/// Queues an entry; false when the ring is full.
fn push(submission: &mut SubmissionQueue<'_>, entry: &squeue::Entry) -> bool {
    // SAFETY: entries come from `Slot::entry` and `RingQueue::wait`. The memory of the former belongs
    // to an Op that its slot holds until the completion, and stays valid by IoVec::new's contract;
    // `Drop` waits for it. The vector itself is read while it is submitted, before anything can
    // change it. The latter point at nothing.
    unsafe { submission.push(entry) }.is_ok()
}

/// Makes a ring, disabled, with the best flags that the kernel takes.
fn build(entries: u32) -> io::Result<IoUring> {
    let single: fn(&mut Builder) = |builder| {
        // Linux 6.1: completions are worked on when we ask, not whenever they arrive.
        builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        builder.setup_submit_all();
    };
    let cooperative: fn(&mut Builder) = |builder| {
        // Linux 5.19.
        builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    };
    let plain: fn(&mut Builder) = |_| {};
    let mut outcome = Err(io::ErrorKind::InvalidInput.into());
    for flags in [single, cooperative, plain] {
        let mut builder = IoUring::builder();
        flags(builder.setup_r_disabled());
        outcome = builder.build(entries);
        match &outcome {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            _ => break,
        }
    }
    outcome
}

/// Registers the memory that buffers often lie in, which saves the kernel from looking up its pages
/// again and again. Without it everything works, only slower.
fn register_region(ring: &IoUring, region: &LocalRegion) -> bool {
    static WARNED: Once = Once::new();
    let vector = libc::iovec { iov_base: region.base().as_ptr().cast(), iov_len: region.len() };
    // SAFETY: the queue keeps the region until the ring has let go of it.
    match unsafe { ring.submitter().register_buffers(&[vector]) } {
        Ok(()) => true,
        Err(e) => {
            WARNED.call_once(|| {
                let bytes = region.len();
                tracing::warn!("cannot register {bytes} bytes of buffers, going without: {e}; raise RLIMIT_MEMLOCK");
            });
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel moves a few bytes at a time, from within one piece to across several.
    #[test]
    fn short_transfers_are_continued_where_they_ended() {
        let lengths = [512, 1024, 512, 4096];
        let total: usize = lengths.iter().sum();
        // SAFETY: nothing is done with the memory: the pieces are only counted.
        let piece =
            |at: usize, len| unsafe { IoVec::new(std::ptr::without_provenance_mut(at), len) };
        let starts = lengths.iter().scan(0, |at, len| Some(std::mem::replace(at, *at + len)));
        let buffers: Vec<_> = starts.zip(lengths).map(|(at, len)| piece(at, len)).collect();
        for moved in [1, 511, 512, 513, 1000, 1536, 6143] {
            let op = Op { tag: 0, kind: OpKind::Read, offset: 4096, buffers: buffers.clone() };
            let mut slot =
                Slot { left: total as u64, offset: op.offset, op: Some(op), ..Slot::default() };
            let mut at = 0;
            while let Step::Again = slot.step(moved.min(total - at) as i32) {
                at += moved;
                let pieces = &slot.op.as_ref().map_or(&[][..], |op| &op.buffers[slot.head..]);
                assert_eq!(slot.offset, 4096 + at as u64);
                assert_eq!(pieces.iter().map(IoVec::len).sum::<usize>(), total - at);
                assert_eq!(pieces.first().map(|piece| piece.base().addr()), Some(at));
                assert!(slot.entry(&(0..0)).is_some());
            }
            assert!(at + moved >= total && slot.left == 0);
            // Cut pieces that were stepped over are whole again.
            let pieces = slot.op.map(|op| op.buffers).unwrap_or_default();
            let whole = pieces[..slot.head].iter().map(IoVec::len);
            assert!(whole.eq(lengths[..slot.head].iter().copied()));
        }
    }

    #[test]
    fn the_end_of_a_file_is_an_error_and_interruptions_are_not_for_ever() {
        let new = || Slot { left: 512, ..Slot::default() };
        assert!(matches!(new().step(0), Step::End(Err(libc::EIO))));
        assert!(matches!(new().step(-libc::ENOSPC), Step::End(Err(libc::ENOSPC))));
        let mut slot = new();
        for _ in 0..MAX_RETRIES {
            assert!(matches!(slot.step(-libc::EAGAIN), Step::Again));
        }
        assert!(matches!(slot.step(-libc::EAGAIN), Step::End(Err(libc::EAGAIN))));
    }
}
