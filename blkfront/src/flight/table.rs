//! I/Os and the pieces that they were cut into.
//!
//! Values here are written and read whole, or field by field, but never one way shortly after the other: a
//! load that covers several recent stores must wait until they have reached the cache, for as long as the
//! rest of an I/O takes.

use crate::slab::{NONE, Slab};
use crate::{Completed, IoBuffer, IoError};
use ring_proto::abi::SECTORS_PER_PAGE;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Barrier,
    Flush,
    Discard { secure: bool },
}

impl Kind {
    pub(super) fn merges(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// What a request is to do, or a part of that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) kind: Kind,
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
    /// The first page of its data, if it has any.
    pub(crate) page: u32,
}

/// An I/O.
#[derive(Debug)]
pub(super) struct Flying {
    cookie: u64,
    buffer: Option<IoBuffer>,
    /// What its caller will get.
    pub(super) result: Result<(), IoError>,
    /// Pieces not answered.
    pub(super) left: u32,
    /// Must be durable on completion.
    pub(super) fua: bool,
    /// A flush is to follow.
    pub(super) flush_after: bool,
    /// Its number is in use.
    busy: bool,
    /// The only piece of most I/Os, which goes by the I/O's number; of no I/O (`NONE`) once taken out.
    own: Piece,
}

/// A part of an I/O that starts at a page of its buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) io: u32,
    pub(super) page: u32,
    pub(super) sectors: u64,
    /// The next piece of the same request.
    pub(super) next: u32,
    /// Used in the first piece of a request, which goes by that piece's number.
    pub(super) request: Request,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) sector: u64,
    pub(super) sectors: u64,
    pub(super) segments: u32,
    /// Its last piece, if it has several.
    pub(super) last: u32,
    /// Counted as waiting for a slot.
    pub(super) waited: bool,
}

impl Piece {
    /// A request by itself, for `range` alone.
    #[inline]
    fn new(io: u32, range: Range) -> Self {
        let Range { kind, sector, sectors, page } = range;
        let (segments, last, waited) = (range.segments(), NONE, false);
        let request = Request { kind, sector, sectors, segments, last, waited };
        Self { io, page, sectors, next: NONE, request }
    }
}

impl Flying {
    fn new() -> Self {
        Self {
            cookie: 0,
            buffer: None,
            result: Ok(()),
            left: 0,
            fua: false,
            flush_after: false,
            busy: false,
            own: Piece::new(NONE, Range::FLUSH),
        }
    }

    #[inline]
    fn has_own(&self) -> bool {
        self.own.io != NONE
    }
}

impl Range {
    pub(crate) const FLUSH: Self = Self { kind: Kind::Flush, sector: 0, sectors: 0, page: NONE };

    /// Pages of its data.
    #[inline]
    pub(super) fn segments(&self) -> u32 {
        self.sectors.div_ceil(SECTORS_PER_PAGE.into()) as u32
    }
}

/// All I/Os and pieces, by number.
#[derive(Debug)]
pub(super) struct Table {
    ios: Box<[Flying]>,
    /// Numbers of I/Os that are free; the one freed last is used first.
    free: Vec<u32>,
    /// Pieces other than the I/Os' own; their numbers follow those.
    more: Slab<Piece>,
    depth: u32,
}

impl Table {
    /// For `depth` I/Os and `pages` pages: a piece other than an I/O's own holds at least one.
    pub(super) fn new(depth: usize, pages: usize) -> Self {
        Self {
            ios: std::iter::repeat_with(Flying::new).take(depth).collect(),
            free: (0..depth as u32).rev().collect(),
            more: Slab::new(pages),
            depth: depth as u32,
        }
    }

    /// How many numbers pieces may have.
    pub(super) const fn numbers(depth: usize, pages: usize) -> usize {
        depth + pages
    }

    pub(super) fn len(&self) -> usize {
        self.ios.len() - self.free.len()
    }

    pub(super) fn depth(&self) -> usize {
        self.ios.len()
    }

    /// Adds an I/O whose first piece is `range`, while there are fewer than `depth`.
    #[inline(always)]
    pub(super) fn admit(
        &mut self,
        (cookie, buffer): (u64, Option<IoBuffer>),
        (fua, flush_after): (bool, bool),
        range: Range,
    ) -> Option<u32> {
        let io = self.free.pop()?;
        let flying = self.ios.get_mut(io as usize)?;
        let own = Piece::new(io, range);
        *flying =
            Flying { cookie, buffer, result: Ok(()), left: 1, fua, flush_after, busy: true, own };
        Some(io)
    }

    /// Adds another piece of an I/O.
    pub(super) fn add(&mut self, io: u32, range: Range) -> Option<u32> {
        let flying = self.ios.get_mut(io as usize)?;
        let key = if flying.has_own() {
            // Cannot fail: `new` made room for every page.
            self.depth + self.more.insert(Piece::new(io, range))?
        } else {
            flying.own = Piece::new(io, range);
            io
        };
        flying.left += 1;
        Some(key)
    }

    #[inline]
    pub(super) fn get(&self, key: u32) -> Option<&Piece> {
        match self.ios.get(key as usize) {
            Some(flying) => flying.has_own().then_some(&flying.own),
            None => self.more.get(key.checked_sub(self.depth)?),
        }
    }

    #[inline]
    pub(super) fn get_mut(&mut self, key: u32) -> Option<&mut Piece> {
        match self.ios.get_mut(key as usize) {
            Some(flying) => flying.has_own().then_some(&mut flying.own),
            None => self.more.get_mut(key.checked_sub(self.depth)?),
        }
    }

    /// Takes a piece out. Its I/O stays.
    #[inline]
    pub(super) fn take(&mut self, key: u32) -> Option<(Piece, &mut Flying)> {
        if (key as usize) < self.ios.len() {
            let flying = self.ios.get_mut(key as usize).filter(|flying| flying.has_own())?;
            let piece = flying.own;
            flying.own.io = NONE;
            flying.left -= 1;
            return Some((piece, flying));
        }
        let piece = self.more.remove(key.checked_sub(self.depth)?)?;
        let flying = self.ios.get_mut(piece.io as usize)?;
        flying.left -= 1;
        Some((piece, flying))
    }

    /// Takes an I/O out, and appends what its caller gets to `done`.
    #[inline(always)]
    pub(super) fn land(&mut self, io: u32, done: &mut Vec<Completed>) {
        let Some(flying) = self.ios.get_mut(io as usize) else { return };
        if std::mem::take(&mut flying.busy) {
            self.free.push(io);
            // As `push`, but made where it is to stay: what `push` is given waits in memory while the vector
            // may grow, and is loaded from there right after it was stored.
            done.extend(std::iter::once_with(|| Completed {
                cookie: flying.cookie,
                result: flying.result,
                buffer: flying.buffer.take(),
            }));
        }
    }

    /// Takes everything out, as [`Table::land`].
    pub(super) fn drain(&mut self, done: &mut Vec<Completed>) {
        self.more.drain().for_each(drop);
        for io in 0..self.depth {
            if let Some(flying) = self.ios.get_mut(io as usize) {
                flying.own.io = NONE;
            }
            self.land(io, done);
        }
    }
}
