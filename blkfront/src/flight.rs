//! From I/Os to requests and back: split, merge, requeue, complete.
//!
//! An I/O is cut into pieces that each fit a request; pieces of neighbouring I/Os that wait at the same
//! time become one request. Nothing here touches a ring, so an I/O survives any number of them: when a
//! backend is replaced, the pieces of all unanswered requests are assembled anew, within the limits of the
//! new one.

mod table;

use crate::limits::{FlushMode, Limits};
use crate::pool::{IoBuffer, Pool};
use crate::slab::NONE;
use crate::stats::Counters;
use crate::{Completed, Io, IoError, Op};
use ring_proto::abi::{MAX_INDIRECT_PAGES, MAX_INDIRECT_SEGMENTS, SECTORS_PER_PAGE};
use ring_proto::{Body, GrantRef, Segment, Segments, Status, Transfer, encode_segment};
use std::collections::VecDeque;
pub(crate) use table::{Kind, Range};
use table::{Piece, Request, Table};

/// How many of the last waiting requests a new piece is tried against. A sequential stream hits the last
/// one; interleaved streams hit the others, one each.
const MERGE_WINDOW: usize = 4;
/// 512-byte sectors in a page, as the arithmetic here needs it.
const PAGE_SECTORS: u64 = SECTORS_PER_PAGE as u64;

/// Where the last waiting requests begin and end: a piece that touches none of them, as most of a random
/// stream does, is recognized without looking at the requests.
#[derive(Debug)]
struct Edges {
    starts: [u64; MERGE_WINDOW],
    ends: [u64; MERGE_WINDOW],
    newest: usize,
}

impl Edges {
    fn push(&mut self, start: u64, end: u64) {
        self.newest = (self.newest + 1) % MERGE_WINDOW;
        self.set(0, start, end);
    }

    /// Sets those of the request `back` before the newest.
    fn set(&mut self, back: usize, start: u64, end: u64) {
        let place = self.newest.wrapping_sub(back) % MERGE_WINDOW;
        (self.starts[place], self.ends[place]) = (start, end);
    }

    fn touch(&self, start: u64, end: u64) -> bool {
        (0..MERGE_WINDOW).any(|place| self.ends[place] == start || self.starts[place] == end)
    }
}

/// A vCPU's I/Os.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) limits: Limits,
    /// Sectors of the longest request with data.
    longest: u64,
    merge: bool,
    table: Table,
    /// By request: its page of segments, while the backend has it.
    indirect: Box<[Option<IoBuffer>]>,
    /// Requests held back by a plug, or waiting for a slot.
    waiting: VecDeque<u32>,
    edges: Edges,
    /// Of the direct request that [`Flight::body`] made last.
    segments: Segments,
    /// Of the last indirect one, encoded as in its page.
    list: Box<[u8; SEGMENT_LIST_BYTES]>,
}

impl Flight {
    /// `pages` is the size of the data pool: all pieces but flushes and discards hold at least one.
    pub(crate) fn new(depth: usize, pages: usize, merge: bool, limits: Limits) -> Self {
        Self {
            limits,
            longest: longest(limits),
            merge,
            table: Table::new(depth, pages),
            indirect: (0..Self::max_requests(depth, pages)).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(Self::max_requests(depth, pages)),
            edges: Edges { starts: [0; MERGE_WINDOW], ends: [0; MERGE_WINDOW], newest: 0 },
            segments: Segments::EMPTY,
            list: Box::new([0; SEGMENT_LIST_BYTES]),
        }
    }

    /// The most requests there can be at a time.
    pub(crate) fn max_requests(depth: usize, pages: usize) -> usize {
        Table::numbers(depth, pages)
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// The most I/Os there may be at a time.
    pub(crate) fn depth(&self) -> usize {
        self.table.depth()
    }

    /// Whether requests wait to be issued.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes an I/O about `range`, which was checked against the limits, while there is room. A flush that needs
    /// no request completes at once if the limits are `current`. If they are not, another queue may have written
    /// to a new backend that has a cache: then the flush waits for the new limits.
    #[inline(always)]
    pub(crate) fn admit(
        &mut self,
        io: Io,
        mut range: Range,
        current: bool,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        let Io { cookie, op, buffer, .. } = io;
        let fua = op == Op::Write { fua: true };
        let flush_after = fua && !self.becomes_durable(&mut range);
        // Together with its first piece, so that its entry is written once.
        let first = self.first(range);
        let key = self.table.admit((cookie, buffer), (fua, flush_after), first);
        let Some(key) = key else { return };
        if op == Op::Flush && self.limits.flush == FlushMode::None && current {
            return self.table.land(key, done);
        }
        self.line_up(key, first, counters);
        if first.sectors < range.sectors {
            counters.splits.add(1);
            self.assemble(key, behind(range, first, pool), pool, counters);
        }
    }

    /// Makes a write that is to be durable a barrier, if it may be one. Returns whether no flush has to follow.
    fn becomes_durable(&self, range: &mut Range) -> bool {
        let fits = range.segments() <= u32::from(self.limits.direct);
        match self.limits.flush {
            FlushMode::None => true,
            FlushMode::Barrier if fits => {
                range.kind = Kind::Barrier;
                true
            }
            FlushMode::Barrier | FlushMode::Cache => false,
        }
    }

    /// Cuts a range of an I/O into pieces and finds or makes a request for each.
    fn assemble(&mut self, io: u32, mut range: Range, pool: &Pool, counters: &Counters) {
        loop {
            let part = self.first(range);
            let Some(key) = self.table.add(io, part) else { return };
            self.line_up(key, part, counters);
            if part.sectors == range.sectors {
                return;
            }
            counters.splits.add(1);
            range = behind(range, part, pool);
        }
    }

    /// As much of the start of a range as fits a request.
    #[inline]
    fn first(&self, range: Range) -> Range {
        let most = if range.page == NONE { u64::MAX } else { self.longest };
        Range { sectors: range.sectors.min(most), ..range }
    }

    /// Merges the piece `key`, a request by itself, with a waiting request, or queues it.
    #[inline(always)]
    fn line_up(&mut self, key: u32, piece: Range, counters: &Counters) {
        if self.merge && piece.kind.merges() && self.join(key, piece) {
            counters.merges.add(1);
            return;
        }
        self.waiting.push_back(key);
        self.edges.push(piece.sector, piece.sector + piece.sectors);
    }

    /// Back or front merge of the piece `key`, a request by itself, with one of the last waiting requests.
    #[inline]
    fn join(&mut self, key: u32, new: Range) -> bool {
        let end = new.sector + new.sectors;
        self.edges.touch(new.sector, end) && self.join_touching(key, new, end)
    }

    #[inline(never)]
    fn join_touching(&mut self, key: u32, new: Range, end: u64) -> bool {
        let most = self.limits.segments();
        for back in 0..MERGE_WINDOW.min(self.waiting.len()) {
            let Some(place) = self.waiting.get_mut(self.waiting.len() - 1 - back) else { continue };
            let Some(first) = self.table.get_mut(*place) else { continue };
            let old = first.request;
            let behind = old.sector + old.sectors == new.sector;
            let touches = behind || old.sector == end;
            if !touches || old.kind != new.kind || old.segments + new.segments() > most {
                continue;
            }
            let last = if old.last == NONE { *place } else { old.last };
            let joined = Request {
                sector: old.sector.min(new.sector),
                sectors: old.sectors + new.sectors,
                segments: old.segments + new.segments(),
                last: if behind { key } else { last },
                ..old
            };
            if behind {
                first.request = joined;
                if let Some(last) = self.table.get_mut(last) {
                    last.next = key;
                }
            } else if let Some(piece) = self.table.get_mut(key) {
                piece.request = joined;
                piece.next = std::mem::replace(place, key);
            }
            self.edges.set(back, joined.sector, joined.sector + joined.sectors);
            return true;
        }
        false
    }

    /// The next request to issue.
    pub(crate) fn front(&self) -> Option<u32> {
        self.waiting.front().copied()
    }

    /// [`Flight::front`] was issued.
    pub(crate) fn issued(&mut self) {
        self.waiting.pop_front();
    }

    /// [`Flight::front`] found no slot; returns whether for the first time.
    pub(crate) fn blocked(&mut self) -> bool {
        let first = self.front().and_then(|key| self.table.get_mut(key));
        first.is_some_and(|first| !std::mem::replace(&mut first.request.waited, true))
    }

    /// What goes on the ring for a request; `None` while there is no page for its segments.
    #[inline(always)]
    pub(crate) fn body(
        &mut self,
        key: u32,
        pool: &Pool,
        lists: &mut Pool,
    ) -> Option<Body<&[Segment]>> {
        let first = self.table.get(key)?;
        let request = &first.request;
        let transfer = match request.kind {
            Kind::Read => Transfer::Read,
            Kind::Write => Transfer::Write,
            Kind::Barrier => Transfer::Barrier,
            Kind::Flush => {
                return Some(Body::Flush { barrier: self.limits.flush == FlushMode::Barrier });
            }
            Kind::Discard { secure } => {
                let Request { sector, sectors, .. } = *request;
                return Some(Body::Discard { sector, sectors, secure });
            }
        };
        let sector = request.sector;
        if request.segments <= u32::from(self.limits.direct) {
            self.segments.clear();
            if request.segments == 1 {
                self.segments.push(segment(pool, first.page, first.sectors));
            } else {
                each_segment(&self.table, first, pool, |segment| {
                    self.segments.push(segment);
                });
            }
            return Some(Body::Direct { transfer, sector, segments: &self.segments });
        }
        let mut list = lists.alloc(SEGMENT_LIST_BYTES)?;
        let mut places = self.list.as_chunks_mut().0.iter_mut();
        let mut used = 0;
        each_segment(&self.table, first, pool, |segment| {
            if let Some(place) = places.next() {
                *place = encode_segment(&segment);
                used += place.len();
            }
        });
        list.write(0, self.list.get(..used).unwrap_or_default());
        let mut pages = [GrantRef(0); MAX_INDIRECT_PAGES];
        pages[0] = lists.gref(list.page_at(0));
        let nr_segments = request.segments as u16;
        *self.indirect.get_mut(key as usize)? = Some(list);
        Some(Body::Indirect { transfer, sector, nr_segments, pages })
    }

    /// A response came.
    #[inline(always)]
    pub(crate) fn complete(
        &mut self,
        key: u32,
        status: Status,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        if status == Status::Okay {
            self.end(key, Ok(()), pool, counters, done);
        } else {
            self.failed(key, status, pool, counters, done);
        }
    }

    #[cold]
    fn failed(
        &mut self,
        key: u32,
        status: Status,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        let Some(kind) = self.table.get(key).map(|first| first.request.kind) else { return };
        let result = match (status, kind) {
            // As in Linux: there is nothing to flush then.
            (Status::NotSupported, Kind::Flush) => {
                self.limits.flush = FlushMode::None;
                Ok(())
            }
            // Linux completes it here, although nothing was written.
            (Status::NotSupported, Kind::Barrier) => {
                self.limits.flush = FlushMode::None;
                return self.reassemble(key, pool, counters, done);
            }
            (Status::NotSupported, kind) => {
                match kind {
                    Kind::Discard { secure: true } => self.limits.secure_discard = false,
                    Kind::Discard { secure: false } => self.limits.discard = false,
                    _ => {}
                }
                Err(IoError::NotSupported)
            }
            (Status::Error | Status::Okay, _) => Err(IoError::Backend),
        };
        self.end(key, result, pool, counters, done);
    }

    /// Takes a request out, and completes the I/Os that have nothing left to do.
    #[inline(always)]
    fn end(
        &mut self,
        key: u32,
        result: Result<(), IoError>,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        self.drop_list(key);
        let mut next = key;
        while next != NONE {
            let Some((piece, flying)) = self.table.take(next) else { return };
            next = piece.next;
            if result.is_err() && flying.result.is_ok() {
                flying.result = result;
            }
            if flying.left > 0 {
                continue;
            }
            let flush = std::mem::take(&mut flying.flush_after) && flying.result.is_ok();
            if flush && self.limits.flush != FlushMode::None {
                self.assemble(piece.io, Range::FLUSH, pool, counters);
            } else {
                self.table.land(piece.io, done);
            }
        }
    }

    /// The backend is done with a request's page of segments, if it has one.
    fn drop_list(&mut self, key: u32) {
        if let Some(list @ Some(_)) = self.indirect.get_mut(key as usize) {
            *list = None;
        }
    }

    /// Assembles requests anew within `limits`: first those that will not be answered, in the order in
    /// which they were issued, then those that wait.
    pub(crate) fn reissue(
        &mut self,
        unanswered: &[u32],
        limits: Limits,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        (self.limits, self.longest) = (limits, longest(limits));
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting.reserve(waiting.capacity());
        for &key in unanswered.iter().chain(&waiting) {
            self.reassemble(key, pool, counters, done);
        }
    }

    fn reassemble(
        &mut self,
        key: u32,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        let Some(request) = self.table.get(key).map(|first| first.request) else { return };
        let flushes = self.limits.flush != FlushMode::None;
        // There may be no barriers any more, or only smaller ones, or flushes may be needed now.
        let (kind, flush) = match request.kind {
            Kind::Barrier | Kind::Write => (Kind::Write, flushes),
            Kind::Flush if !flushes => return self.end(key, Ok(()), pool, counters, done),
            // A backend may ignore what it does not know, and carry out a plain discard.
            Kind::Discard { secure } if !self.limits.may_discard(secure) => {
                return self.end(key, Err(IoError::NotSupported), pool, counters, done);
            }
            kind => (kind, false),
        };
        self.drop_list(key);
        let (mut next, mut sector) = (key, request.sector);
        while let Some((piece, flying)) = self.table.take(next) {
            flying.flush_after = flush && flying.fua;
            let range = Range { kind, sector, sectors: piece.sectors, page: piece.page };
            self.assemble(piece.io, range, pool, counters);
            sector += piece.sectors;
            next = piece.next;
        }
    }

    /// Fails everything. The backend may still be at work on it, so no buffer is given back.
    pub(crate) fn abandon(&mut self, done: &mut Vec<Completed>) {
        self.waiting.clear();
        self.indirect.fill_with(|| None);
        let kept = done.len();
        self.table.drain(done);
        for completed in done.iter_mut().skip(kept) {
            completed.result = Err(IoError::Gone);
            completed.buffer = None;
        }
    }
}

/// Bytes of the longest list of segments; it fits in one page.
const SEGMENT_LIST_BYTES: usize = MAX_INDIRECT_SEGMENTS * size_of::<Segment>();
const _: () = assert!(SEGMENT_LIST_BYTES <= ring_proto::abi::PAGE_SIZE);

fn longest(limits: Limits) -> u64 {
    u64::from(limits.segments()) * PAGE_SECTORS
}

/// What follows `part`, the first part of a range.
fn behind(range: Range, part: Range, pool: &Pool) -> Range {
    let page = (0..part.sectors / PAGE_SECTORS).fold(range.page, |page, _| pool.next(page));
    let (sector, sectors) = (range.sector + part.sectors, range.sectors - part.sectors);
    Range { kind: range.kind, sector, sectors, page }
}

/// The first `sectors` of a page.
fn segment(pool: &Pool, page: u32, sectors: u64) -> Segment {
    Segment::new(pool.gref(page), 0, (sectors - 1) as u8)
}

fn each_segment(table: &Table, first: &Piece, pool: &Pool, mut to: impl FnMut(Segment)) {
    let mut piece = first;
    loop {
        let (mut page, mut sectors) = (piece.page, piece.sectors);
        while sectors > 0 {
            let part = sectors.min(PAGE_SECTORS);
            to(segment(pool, page, part));
            sectors -= part;
            if sectors > 0 {
                page = pool.next(page);
            }
        }
        if piece.next == NONE {
            return;
        }
        let Some(next) = table.get(piece.next) else { return };
        piece = next;
    }
}
