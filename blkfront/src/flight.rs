//! From I/Os to requests and back: split, merge, requeue, complete.
//!
//! An I/O is cut into pieces that each fit a request; pieces of neighbouring I/Os that wait together
//! become one request. Nothing here touches a ring, so an I/O survives any number of them: when a
//! backend is replaced, the pieces of every unanswered request are put together anew, within whatever limits
//! the new one has.

use crate::limits::{FlushMode, Limits};
use crate::pool::{IoBuffer, Pool};
use crate::slab::{NONE, Slab};
use crate::stats::Counters;
use crate::{Completed, Io, IoError, Op};
use ring_proto::abi::{MAX_INDIRECT_PAGES, MAX_INDIRECT_SEGMENTS, SECTOR_SIZE, SECTORS_PER_PAGE};
use ring_proto::{Body, GrantRef, Segment, Segments, Status, Transfer, encode_segment};
use std::collections::VecDeque;

/// Requests at the tail of those waiting that a new piece is tried against. The last one is hit by a
/// sequential stream; the others by as many interleaved streams.
const MERGE_WINDOW: usize = 4;
/// 512-byte sectors in a page, as the arithmetic here needs it.
const PAGE_SECTORS: u32 = SECTORS_PER_PAGE as u32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    Barrier,
    Flush,
    Discard { sectors: u64, secure: bool },
}

impl Kind {
    fn merges(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

#[derive(Debug)]
struct Flying {
    cookie: u64,
    buffer: Option<IoBuffer>,
    /// It is to be durable when it is complete.
    fua: bool,
    /// Pieces not answered.
    left: u32,
    result: Result<(), IoError>,
    /// A flush is to follow.
    flush_after: bool,
}

/// A part of an I/O that starts at a page of its buffer.
#[derive(Clone, Copy, Debug)]
struct Piece {
    io: u32,
    page: u32,
    sectors: u32,
    /// The piece behind it in its request.
    next: u32,
    /// Of the first piece of a request, which goes by that piece's number.
    request: Request,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    sector: u64,
    sectors: u32,
    segments: u32,
    /// Its last piece, if there are several.
    last: u32,
    /// Counted as waiting for a slot.
    waited: bool,
}

/// Where the requests that came to wait last begin and end: what touches none of them, as most of a
/// random stream does not, is told without a look at the requests.
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

    /// Of the request that came `back` before the newest.
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
    merge: bool,
    ios: Slab<Flying>,
    pieces: Slab<Piece>,
    /// By request, its page of segments while the backend has it.
    indirect: Box<[Option<IoBuffer>]>,
    /// Requests held back by a plug, or waiting for a slot.
    waiting: VecDeque<u32>,
    edges: Edges,
    /// Of the direct request that [`Flight::body`] made last.
    segments: Segments,
    /// Of the indirect one, as they stand in its page.
    list: Box<[u8; SEGMENT_LIST_BYTES]>,
}

impl Flight {
    /// `pages` is how many the data pool has: every piece but that of a flush or discard holds one.
    pub(crate) fn new(depth: usize, pages: usize, merge: bool, limits: Limits) -> Self {
        Self {
            limits,
            merge,
            ios: Slab::new(depth),
            pieces: Slab::new(depth + pages),
            indirect: (0..depth + pages).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(depth + pages),
            edges: Edges { starts: [0; MERGE_WINDOW], ends: [0; MERGE_WINDOW], newest: 0 },
            segments: Segments::EMPTY,
            list: Box::new([0; SEGMENT_LIST_BYTES]),
        }
    }

    /// The most requests there can be at a time.
    pub(crate) fn max_requests(depth: usize, pages: usize) -> usize {
        depth + pages
    }

    pub(crate) fn len(&self) -> usize {
        self.ios.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.ios.is_full()
    }

    /// Whether requests wait to be issued.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes an I/O that was checked against the limits, while it is not full. What needs no request is
    /// completed at once.
    pub(crate) fn admit(
        &mut self,
        io: Io,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        let Io { cookie, op, offset, buffer } = io;
        let (sector, flush) = (offset / SECTOR_SIZE as u64, self.limits.flush);
        // What has no data may have a buffer all the same, which stays as it is.
        let has_data = matches!(op, Op::Read | Op::Write { .. });
        let data = buffer.as_ref().filter(|_| has_data);
        let data = data.map(|b| (b.page_at(0), (b.len() / SECTOR_SIZE) as u32));
        let (page, sectors) = data.unwrap_or((NONE, 0));
        let barrier = flush == FlushMode::Barrier
            && sectors.div_ceil(PAGE_SECTORS) <= u32::from(self.limits.direct);
        let (kind, flush_after) = match op {
            Op::Read => (Kind::Read, false),
            Op::Write { fua: true } if barrier => (Kind::Barrier, false),
            Op::Write { fua } => (Kind::Write, fua && flush != FlushMode::None),
            Op::Flush => (Kind::Flush, false),
            Op::Discard { len, secure } => {
                (Kind::Discard { sectors: len / SECTOR_SIZE as u64, secure }, false)
            }
        };
        let fua = op == Op::Write { fua: true };
        let flying = Flying { cookie, buffer, fua, left: 0, result: Ok(()), flush_after };
        let Some(key) = self.ios.insert(flying) else { return };
        if op == Op::Flush && flush == FlushMode::None {
            return self.land(key, done);
        }
        self.assemble(key, kind, sector, page, sectors, pool, counters);
    }

    /// Cuts a range into pieces and finds or makes a request for each.
    #[expect(clippy::too_many_arguments, reason = "a range of an I/O, and what is done with it")]
    fn assemble(
        &mut self,
        io: u32,
        kind: Kind,
        mut sector: u64,
        mut page: u32,
        mut sectors: u32,
        pool: &Pool,
        counters: &Counters,
    ) {
        let most = self.limits.segments() * PAGE_SECTORS;
        loop {
            let part = sectors.min(most);
            self.add_piece(io, page, kind, sector, part, counters);
            sectors -= part;
            if sectors == 0 {
                return;
            }
            counters.splits.add(1);
            sector += u64::from(part);
            for _ in 0..part / PAGE_SECTORS {
                page = pool.next(page);
            }
        }
    }

    fn add_piece(
        &mut self,
        io: u32,
        page: u32,
        kind: Kind,
        sector: u64,
        sectors: u32,
        counters: &Counters,
    ) {
        let segments = sectors.div_ceil(PAGE_SECTORS);
        let request = Request { kind, sector, sectors, segments, last: NONE, waited: false };
        let piece = Piece { io, page, sectors, next: NONE, request };
        // Cannot fail: `new` made room for every page and every I/O.
        let Some(key) = self.pieces.insert(piece) else { return };
        if let Some(flying) = self.ios.get_mut(io) {
            flying.left += 1;
        }
        if self.merge && kind.merges() && self.join(key, &request) {
            counters.merges.add(1);
            return;
        }
        self.waiting.push_back(key);
        self.edges.push(sector, sector + u64::from(sectors));
    }

    /// Back or front merge of the piece `key`, a request by itself, with one of the last requests that wait.
    fn join(&mut self, key: u32, new: &Request) -> bool {
        let end = new.sector + u64::from(new.sectors);
        if !self.edges.touch(new.sector, end) {
            return false;
        }
        let most = self.limits.segments();
        for back in 0..MERGE_WINDOW.min(self.waiting.len()) {
            let Some(place) = self.waiting.get_mut(self.waiting.len() - 1 - back) else { continue };
            let Some(first) = self.pieces.get_mut(*place) else { continue };
            let old = first.request;
            let behind = old.sector + u64::from(old.sectors) == new.sector;
            let touches = behind || old.sector == end;
            if !touches || old.kind != new.kind || old.segments + new.segments > most {
                continue;
            }
            let last = if old.last == NONE { *place } else { old.last };
            let joined = Request {
                sector: old.sector.min(new.sector),
                sectors: old.sectors + new.sectors,
                segments: old.segments + new.segments,
                last: if behind { key } else { last },
                ..old
            };
            if behind {
                first.request = joined;
                if let Some(last) = self.pieces.get_mut(last) {
                    last.next = key;
                }
            } else if let Some(piece) = self.pieces.get_mut(key) {
                piece.request = joined;
                piece.next = std::mem::replace(place, key);
            }
            self.edges.set(back, joined.sector, joined.sector + u64::from(joined.sectors));
            return true;
        }
        false
    }

    /// The request that is next to be issued.
    pub(crate) fn front(&self) -> Option<u32> {
        self.waiting.front().copied()
    }

    /// [`Flight::front`] was issued.
    pub(crate) fn issued(&mut self) {
        self.waiting.pop_front();
    }

    /// [`Flight::front`] found no slot: says whether for the first time.
    pub(crate) fn blocked(&mut self) -> bool {
        let first = self.front().and_then(|key| self.pieces.get_mut(key));
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
        let request = self.pieces.get(key)?.request;
        let transfer = match request.kind {
            Kind::Read => Transfer::Read,
            Kind::Write => Transfer::Write,
            Kind::Barrier => Transfer::Barrier,
            Kind::Flush => {
                return Some(Body::Flush { barrier: self.limits.flush == FlushMode::Barrier });
            }
            Kind::Discard { sectors, secure } => {
                return Some(Body::Discard { sector: request.sector, sectors, secure });
            }
        };
        let sector = request.sector;
        if request.segments <= u32::from(self.limits.direct) {
            self.segments.clear();
            each_segment(&self.pieces, key, pool, |segment| {
                self.segments.push(segment);
            });
            return Some(Body::Direct { transfer, sector, segments: &self.segments });
        }
        let mut list = lists.alloc(SEGMENT_LIST_BYTES)?;
        let mut places = self.list.as_chunks_mut().0.iter_mut();
        let mut used = 0;
        each_segment(&self.pieces, key, pool, |segment| {
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
    pub(crate) fn complete(
        &mut self,
        key: u32,
        status: Status,
        pool: &Pool,
        counters: &Counters,
        done: &mut Vec<Completed>,
    ) {
        let Some(kind) = self.pieces.get(key).map(|first| first.request.kind) else { return };
        let result = match (status, kind) {
            (Status::Okay, _) => Ok(()),
            // As in Linux: there is nothing to flush, then.
            (Status::NotSupported, Kind::Flush) => {
                self.limits.flush = FlushMode::None;
                Ok(())
            }
            // Here Linux calls it done. It was not written.
            (Status::NotSupported, Kind::Barrier) => {
                self.limits.flush = FlushMode::None;
                return self.reassemble(key, pool, counters);
            }
            (Status::NotSupported, kind) => {
                if matches!(kind, Kind::Discard { .. }) {
                    self.limits.discard = false;
                }
                Err(IoError::NotSupported)
            }
            (Status::Error, _) => Err(IoError::Backend),
        };
        self.drop_list(key);
        let mut next = key;
        while let Some(piece) = self.pieces.remove(next) {
            next = piece.next;
            let Some(flying) = self.ios.get_mut(piece.io) else { continue };
            flying.left -= 1;
            flying.result = flying.result.and(result);
            if flying.left > 0 {
                continue;
            }
            let flush = std::mem::take(&mut flying.flush_after) && flying.result.is_ok();
            if flush && self.limits.flush != FlushMode::None {
                self.assemble(piece.io, Kind::Flush, 0, NONE, 0, pool, counters);
            } else {
                self.land(piece.io, done);
            }
        }
    }

    /// The backend is done with a request's page of segments, if it has one.
    fn drop_list(&mut self, key: u32) {
        if let Some(list) = self.indirect.get_mut(key as usize) {
            *list = None;
        }
    }

    fn land(&mut self, key: u32, done: &mut Vec<Completed>) {
        if let Some(Flying { cookie, buffer, result, .. }) = self.ios.remove(key) {
            done.push(Completed { cookie, result, buffer });
        }
    }

    /// Puts requests that will not be answered, in the order in which they were issued, and those that
    /// wait, together anew within `limits`.
    pub(crate) fn reissue(
        &mut self,
        unanswered: &[u32],
        limits: Limits,
        pool: &Pool,
        counters: &Counters,
    ) {
        self.limits = limits;
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting.reserve(waiting.capacity());
        for &key in unanswered.iter().chain(&waiting) {
            self.reassemble(key, pool, counters);
        }
    }

    fn reassemble(&mut self, key: u32, pool: &Pool, counters: &Counters) {
        let Some(request) = self.pieces.get(key).map(|first| first.request) else { return };
        // There may be no barriers now, or none that take so much, or flushes where none were needed.
        let (kind, flush) = match request.kind {
            Kind::Barrier | Kind::Write => (Kind::Write, self.limits.flush != FlushMode::None),
            kind => (kind, false),
        };
        self.drop_list(key);
        let (mut next, mut sector) = (key, request.sector);
        while let Some(piece) = self.pieces.remove(next) {
            if let Some(flying) = self.ios.get_mut(piece.io) {
                flying.left -= 1;
                flying.flush_after = flush && flying.fua;
            }
            self.assemble(piece.io, kind, sector, piece.page, piece.sectors, pool, counters);
            sector += u64::from(piece.sectors);
            next = piece.next;
        }
    }

    /// Fails everything.
    pub(crate) fn abandon(&mut self, done: &mut Vec<Completed>) {
        self.waiting.clear();
        self.pieces.drain().for_each(drop);
        self.indirect.fill_with(|| None);
        let gone = |flying: Flying| Completed {
            cookie: flying.cookie,
            result: Err(IoError::Gone),
            buffer: flying.buffer,
        };
        done.extend(self.ios.drain().map(gone));
    }
}

/// Bytes of the longest list of segments; it fits in one page.
const SEGMENT_LIST_BYTES: usize = MAX_INDIRECT_SEGMENTS * size_of::<Segment>();
const _: () = assert!(SEGMENT_LIST_BYTES <= ring_proto::abi::PAGE_SIZE);

fn each_segment(pieces: &Slab<Piece>, first: u32, pool: &Pool, mut to: impl FnMut(Segment)) {
    let mut next = first;
    while let Some(piece) = pieces.get(next) {
        let (mut page, mut sectors) = (piece.page, piece.sectors);
        while sectors > 0 {
            let part = sectors.min(PAGE_SECTORS);
            to(Segment::new(pool.gref(page), 0, (part - 1) as u8));
            page = pool.next(page);
            sectors -= part;
        }
        next = piece.next;
    }
}
