//! Serves a ring.
//!
//! A round takes some of the pending requests, fetches the data of all writes among them together, starts
//! them, takes completions from the device, delivers the data of all reads among these together, and answers.
//! Responses are pushed a few at a time, with an event where the frontend asked for one.

use super::budget::Budget;
use super::clock::{Clock, Nanos};
use super::data::{Data, Unreachable};
use super::inflight::Inflight;
use super::setup::{Exit, Orders, RingSetup};
use super::sleep::Sleep;
use crate::stats::RingStats;
use crate::storage::{Completion, IoVecs, Op, OpKind, Queue, QueueSetup};
use ring_proto::abi::{SECTOR_SIZE, Segment};
use ring_proto::{
    Body, Limits, RawRequest, Request, RequestConsumer, Response, ResponseProducer, Status,
    Transfer,
};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use xen_platform::{EventChannel, MappedGrants};

/// Most requests taken in a round. The frontend works on their responses while the next are carried out; a
/// submission to the device for so many costs nothing any more.
const MAX_ROUND: usize = 16;
/// Responses that are pushed at a time, for the frontend to work on meanwhile. Waking one that sleeps takes
/// longer than the rest of a round.
const PUBLISH_EVERY: u32 = 8;

/// A request, from when it is taken until its response.
struct Entry {
    id: u64,
    /// For the response.
    operation: u8,
    op: OpKind,
    /// A flush is still to come before `op`...
    flush_first: bool,
    /// ...and another after it.
    flush_last: bool,
    /// In bytes.
    offset: u64,
    /// When it was taken, if that is timed.
    taken: Option<Nanos>,
    status: Status,
    /// The memory of its data.
    buffers: IoVecs,
}

impl Entry {
    fn new() -> Self {
        Self {
            id: 0,
            operation: 0,
            op: OpKind::Flush,
            flush_first: false,
            flush_last: false,
            offset: 0,
            taken: None,
            status: Status::Error,
            buffers: IoVecs::new(),
        }
    }
}

pub(super) struct Worker {
    pub(super) requests: RequestConsumer,
    responses: ResponseProducer,
    pub(super) inflight: Inflight,
    pub(super) channel: Box<dyn EventChannel>,
    limits: Limits,
    /// Whether the disk moves data.
    moves_data: bool,
    orders: Arc<Orders>,
    /// As long as this lives, something of the frontend's is held.
    pub(super) alive: Arc<dyn Send + Sync>,
    pub(super) stats: Arc<RingStats>,
    // Before `table` and `data`: a queue that is dropped waits for its operations, which use their memory.
    pub(super) queue: Box<dyn Queue>,
    /// Requests in flight, by tag.
    table: Vec<Entry>,
    /// Number of requests that were begun and not yet answered.
    pub(super) in_flight: usize,
    /// Requests were begun, and none has been answered since: it is the disk's turn.
    pub(super) awaits_disk: bool,
    pub(super) data: Data,
    /// Tags of requests that were prepared in this round.
    ready: Vec<u16>,
    /// Completions of this round.
    done: Vec<Completion>,
    /// Tags of requests to be answered in this round.
    ended: Vec<u16>,
    /// Whether any of them is timed.
    is_timed: bool,
    /// Segments of the indirect request at hand.
    segments: Vec<Segment>,
    /// Something has completed since a request was put off, which may start now.
    freed: bool,
    /// A barrier is being carried out; nothing else starts.
    pub(super) barrier: bool,
    /// No more requests are taken.
    pub(super) draining: bool,
    pub(super) clock: Clock,
    pub(super) sleep: Sleep,
    /// When the last event came, until the first requests after it are taken.
    pub(super) woken: Option<Nanos>,
}

impl Worker {
    /// Called on the thread that serves the ring; `bell` wakes that thread while it sleeps in the queue.
    pub(super) fn new(
        setup: RingSetup,
        orders: Arc<Orders>,
        bell: OwnedFd,
        alive: Arc<dyn Send + Sync>,
    ) -> Result<Self, Exit> {
        let slots = setup.requests.slots() as usize;
        let data = Data::new(&setup)?;
        let queue = setup.storage.open_queue(QueueSetup {
            depth: slots,
            region: data.region(),
            bell: Some(bell),
            events: Some(setup.channel.file()?),
        })?;
        Ok(Self {
            requests: setup.requests,
            responses: setup.responses,
            inflight: setup.inflight,
            channel: setup.channel,
            limits: setup.limits,
            moves_data: setup.storage.geometry().moves_data,
            orders,
            alive,
            stats: setup.stats,
            queue,
            data,
            table: std::iter::repeat_with(Entry::new).take(slots).collect(),
            in_flight: 0,
            awaits_disk: false,
            ready: Vec::with_capacity(slots),
            done: Vec::with_capacity(slots),
            ended: Vec::with_capacity(slots),
            is_timed: false,
            segments: Vec::new(),
            freed: false,
            barrier: false,
            draining: false,
            clock: Clock::new(),
            sleep: Sleep::default(),
            woken: None,
        })
    }

    /// Does one round. Returns whether to do another before the thread spins or sleeps. With `sleeps_next`, a
    /// thread that has no other ring sleeps if not: it then submits and waits in one system call.
    pub(super) fn round(&mut self, sleeps_next: bool) -> Result<bool, Exit> {
        if self.orders.stopped() {
            self.stop();
        }
        let handled = if self.draining { 0 } else { self.take()? };
        if !self.ready.is_empty() {
            self.start();
        }
        let sleeps_next = sleeps_next
            && !self.draining
            && self.inflight.waiting() == 0
            && self.requests.poll()? == 0;
        if sleeps_next {
            self.queue.reap(&mut self.done);
        } else {
            self.queue.poll(&mut self.done)?;
        }
        let ended = self.complete();
        if ended > 0 || handled > 0 {
            self.awaits_disk = ended == 0 && self.in_flight > 0;
        }
        Ok(ended > 0 || handled > 0 && !sleeps_next)
    }

    /// Takes no more requests.
    pub(super) fn stop(&mut self) {
        if !std::mem::replace(&mut self.draining, true) {
            self.queue.hurry();
        }
    }

    /// Ends the service. Returns what it has mapped of the frontend's data, for the caller to unmap.
    pub(super) fn close(self) -> Vec<Arc<dyn MappedGrants>> {
        // The queue waits for its operations, which use the memory.
        drop(self.queue);
        self.data.into_mappings()
    }

    /// Whether it has stopped and nothing is in flight. Requests still on the ring are left to whoever serves
    /// it next.
    pub(super) fn is_drained(&self) -> bool {
        self.draining && self.in_flight == 0
    }

    /// Takes requests from the ring until it is empty, the round is full or one must wait. Returns how many
    /// were begun or answered.
    fn take(&mut self) -> Result<usize, Exit> {
        if self.barrier {
            return Ok(0);
        }
        // A request put off waits until something completes: trying again costs grant operations.
        let put_off = self.inflight.waiting() > 0;
        if put_off && self.in_flight > 0 && !std::mem::take(&mut self.freed) {
            return Ok(0);
        }
        let waiting = self.requests.poll()?;
        if waiting == 0 && !put_off {
            return Ok(0);
        }
        self.clock.tick();
        let now = self.clock.sample();
        self.limits.sectors = self.orders.sectors();
        self.data.tick();
        let (mut taken, mut handled, mut raw) = (0, 0, RawRequest::default());
        let mut budget = Budget::new(self.moves_data);
        while !self.barrier && handled < MAX_ROUND && !budget.is_spent() {
            // No request is taken while another waits.
            let resumed = self.inflight.resume(&mut raw);
            let next = match resumed {
                None => self.inflight.take(&mut self.requests, &mut raw).inspect(|_| taken += 1),
                resumed => resumed,
            };
            let Some(tag) = next else { break };
            if !self.accept(tag, &raw, now, resumed.is_some(), &mut budget) {
                self.inflight.put_off(tag);
                break;
            }
            handled += 1;
        }
        if taken > 0 {
            self.sleep.used();
            self.stats.batch.record(taken, 1);
            if let (Some(woken), Some(now)) = (self.woken.take(), now) {
                self.stats.ring_wait.record(now.get().saturating_sub(woken.get()), taken);
            }
        }
        Ok(handled)
    }

    /// Prepares or answers a request; `false` if it must wait, perhaps not for the first time (`resumed`).
    fn accept(
        &mut self,
        tag: u16,
        raw: &RawRequest,
        now: Option<Nanos>,
        resumed: bool,
        budget: &mut Budget,
    ) -> bool {
        let request = match raw.validate(&self.limits) {
            Ok(request) => request,
            Err(refused) => {
                self.stats.refused[refused.reason.kind()].add(1);
                self.answer(tag, refused.id, refused.operation, refused.reason.status());
                return true;
            }
        };
        let barrier = matches!(
            request.body,
            Body::Flush { barrier: true } | Body::Direct { transfer: Transfer::Barrier, .. }
        );
        if barrier && self.in_flight > 0 {
            return false;
        }
        match self.prepare(tag, &request, now, budget) {
            Ok(()) => {
                self.barrier = barrier;
                self.in_flight += 1;
                self.ready.push(tag);
            }
            Err(Refusal::Busy) => {
                self.stats.oo_req.add(u64::from(!resumed));
                return false;
            }
            Err(Refusal::Status(status)) => {
                self.answer(tag, request.id, request.response_operation(), status);
            }
        }
        true
    }

    /// Fills the table's entry for a request and finds memory for its data.
    fn prepare(
        &mut self,
        tag: u16,
        request: &Request<&[Segment]>,
        now: Option<Nanos>,
        budget: &mut Budget,
    ) -> Result<(), Refusal> {
        let entry = &mut self.table[usize::from(tag)];
        entry.id = request.id;
        entry.operation = request.response_operation();
        (entry.flush_first, entry.flush_last) = (false, false);
        entry.taken = now;
        entry.buffers.clear();
        match &request.body {
            Body::Direct { transfer, sector, segments } => {
                entry.offset = sector * SECTOR_SIZE as u64;
                self.memory(tag, *transfer, segments, budget)?;
            }
            Body::Indirect { transfer, sector, nr_segments, pages } => {
                entry.offset = sector * SECTOR_SIZE as u64;
                let mut segments = std::mem::take(&mut self.segments);
                let result = self
                    .data
                    .indirect(pages, *nr_segments, &mut segments, budget)
                    .map_err(|e| unreachable_status(&self.stats, e))
                    .and_then(|()| self.indirect(tag, *transfer, *sector, &segments, budget));
                self.segments = segments;
                result?;
            }
            Body::Flush { .. } => {
                entry.op = OpKind::Flush;
                self.stats.f_req.add(1);
            }
            Body::Discard { sector, sectors, secure } => {
                entry.offset = sector * SECTOR_SIZE as u64;
                entry.op = OpKind::Discard { bytes: sectors * SECTOR_SIZE as u64, secure: *secure };
                self.stats.ds_req.add(1);
            }
        }
        Ok(())
    }

    fn indirect(
        &mut self,
        tag: u16,
        transfer: Transfer,
        sector: u64,
        segments: &[Segment],
        budget: &mut Budget,
    ) -> Result<(), Refusal> {
        self.limits.check_segments(sector, segments).map_err(|reason| {
            self.stats.refused[reason.kind()].add(1);
            Refusal::Status(reason.status())
        })?;
        self.memory(tag, transfer, segments, budget)?;
        self.stats.indirect_req.add(1);
        Ok(())
    }

    #[inline(always)]
    fn memory(
        &mut self,
        tag: u16,
        transfer: Transfer,
        segments: &[Segment],
        budget: &mut Budget,
    ) -> Result<(), Refusal> {
        let write = transfer != Transfer::Read;
        let entry = &mut self.table[usize::from(tag)];
        entry.op = if write { OpKind::Write } else { OpKind::Read };
        entry.flush_first = matches!(transfer, Transfer::FlushWrite | Transfer::Barrier);
        entry.flush_last = transfer == Transfer::Barrier;
        self.data
            .prepare(tag, write, segments, &mut entry.buffers, budget)
            .map_err(|e| unreachable_status(&self.stats, e))?;
        let sectors = segments.iter().map(|s| u64::from(s.sectors())).sum();
        budget.moves(sectors * SECTOR_SIZE as u64);
        if write {
            self.stats.wr_req.add(1);
            self.stats.wr_sect.add(sectors);
            if entry.flush_first {
                self.stats.f_req.add(1);
            }
        } else {
            self.stats.rd_req.add(1);
            self.stats.rd_sect.add(sectors);
        }
        Ok(())
    }

    /// Sends what was prepared to the device.
    fn start(&mut self) {
        self.data.copy();
        for n in 0..self.ready.len() {
            let tag = self.ready[n];
            if self.data.refused(tag) {
                self.stats.grant_errors.add(1);
                self.end(tag, Status::Error);
            } else {
                self.submit(tag);
            }
        }
        self.ready.clear();
    }

    fn submit(&mut self, tag: u16) {
        let Entry { op, flush_first, offset, buffers, .. } = &self.table[usize::from(tag)];
        if *flush_first {
            return self.flush(tag);
        }
        self.queue.submit(Op { tag, kind: *op, offset: *offset, buffers }, &mut self.done);
    }

    fn flush(&mut self, tag: u16) {
        let flush = Op { tag, kind: OpKind::Flush, offset: 0, buffers: &[] };
        self.queue.submit(flush, &mut self.done);
    }

    /// Answers requests that the device has completed, as many as a turn may unmap. Returns how many.
    fn complete(&mut self) -> usize {
        if !self.done.is_empty() {
            self.take_completions();
        }
        if self.ended.is_empty() {
            // Refusals may have been answered all the same.
            self.publish();
            return 0;
        }
        let device_done = std::mem::take(&mut self.is_timed).then(|| self.clock.now());
        self.data.copy();
        let mut budget = Budget::new(self.moves_data);
        let (mut count, mut timed) = (0, 0);
        while let Some(&tag) = self.ended.get(count) {
            if budget.is_spent() {
                // The clock is to be read again for the rest.
                self.is_timed = device_done.is_some();
                break;
            }
            count += 1;
            let Entry { id, operation, taken, mut status, .. } = self.table[usize::from(tag)];
            if status == Status::Okay && self.data.refused(tag) {
                self.stats.grant_errors.add(1);
                status = Status::Error;
            }
            // Unmap before answering: a frontend that finds a grant still in use when the response arrives
            // disables the device.
            self.data.release(tag, &mut budget);
            self.in_flight -= 1;
            if let (Some(taken), Some(done)) = (taken, device_done) {
                self.stats.device.record(done.get().saturating_sub(taken.get()), 1);
                timed += 1;
            }
            self.answer(tag, id, operation, status);
            if self.responses.unpublished() >= PUBLISH_EVERY {
                self.publish();
            }
        }
        self.ended.drain(..count);
        self.freed = true;
        if self.in_flight == 0 {
            self.barrier = false;
        }
        self.publish();
        if let Some(done) = device_done {
            self.stats.completion.record(self.clock.since(done), timed);
        }
        count
    }

    /// Handles completions in their order, as many as a turn may copy.
    fn take_completions(&mut self) {
        // A write that follows its flush may complete while it is submitted, and be appended to `done`.
        let (mut budget, mut taken) = (Budget::new(self.moves_data), 0);
        while !budget.is_spent()
            && let Some(&Completion { tag, result }) = self.done.get(taken)
        {
            taken += 1;
            let entry = &mut self.table[usize::from(tag)];
            match result {
                Ok(()) if entry.flush_first => {
                    entry.flush_first = false;
                    self.submit(tag);
                }
                Ok(()) if entry.flush_last => {
                    entry.flush_last = false;
                    self.flush(tag);
                }
                Ok(()) => {
                    if entry.op == OpKind::Read {
                        self.data.filled(tag, &mut budget);
                    }
                    self.end(tag, Status::Okay);
                }
                Err(errno) => {
                    self.stats.device_errors.add(1);
                    let status = status_of(errno, entry.op);
                    self.end(tag, status);
                }
            }
        }
        self.done.drain(..taken);
    }

    fn end(&mut self, tag: u16, status: Status) {
        let entry = &mut self.table[usize::from(tag)];
        entry.status = status;
        self.is_timed |= entry.taken.is_some();
        self.ended.push(tag);
    }

    #[inline(always)]
    fn answer(&mut self, tag: u16, id: u64, operation: u8, status: Status) {
        self.inflight.answer(tag, self.responses.index());
        let pushed = self.responses.push(&Response { id, operation, status });
        debug_assert!(pushed.is_ok(), "one response a request taken");
    }

    fn publish(&mut self) {
        if self.responses.unpublished() == 0 {
            return;
        }
        self.stats.system_calls.set(self.queue.system_calls() + self.sleep.calls);
        let wanted = self.responses.publish();
        self.inflight.published();
        if !wanted {
            self.stats.kicks_saved.add(1);
            return;
        }
        self.stats.kicks.add(1);
        if let Err(error) = self.channel.notify() {
            tracing::warn!(%error, "could not send an event");
        }
    }
}

/// Why a request does not start.
enum Refusal {
    Busy,
    Status(Status),
}

fn unreachable_status(stats: &RingStats, why: Unreachable) -> Refusal {
    match why {
        Unreachable::Busy => Refusal::Busy,
        Unreachable::Refused => {
            stats.grant_errors.add(1);
            Refusal::Status(Status::Error)
        }
    }
}

/// Only a request without data may be answered with "not supported": Linux's frontend takes that for the
/// success of a barrier, and the data would be lost (`blkif_interrupt` in xen-blkfront.c).
fn status_of(errno: i32, op: OpKind) -> Status {
    let dataless = matches!(op, OpKind::Flush | OpKind::Discard { .. });
    let error = io::Error::from_raw_os_error(errno);
    if dataless && error.kind() == io::ErrorKind::Unsupported {
        Status::NotSupported
    } else {
        Status::Error
    }
}
