//! I/Os and the pieces that they were cut into.

use crate::slab::{NONE, Slab};
use crate::{IoBuffer, IoError};
use ring_proto::abi::SECTORS_PER_PAGE;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    Barrier,
    Flush,
    Discard { sectors: u64, secure: bool },
}

impl Kind {
    pub(super) fn merges(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// An I/O.
#[derive(Debug)]
pub(super) struct Flying {
    pub(super) cookie: u64,
    pub(super) buffer: Option<IoBuffer>,
    /// It is to be durable when it is complete.
    pub(super) fua: bool,
    /// Pieces not answered.
    pub(super) left: u32,
    pub(super) result: Result<(), IoError>,
    /// A flush is to follow.
    pub(super) flush_after: bool,
    /// The only piece of most, which goes by the I/O's number.
    own: Piece,
    /// `own` is one of the pieces not answered.
    owns: bool,
}

/// A part of an I/O that starts at a page of its buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) io: u32,
    pub(super) page: u32,
    pub(super) sectors: u32,
    /// The piece behind it in its request.
    pub(super) next: u32,
    /// Of the first piece of a request, which goes by that piece's number.
    pub(super) request: Request,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) segments: u32,
    /// Its last piece, if there are several.
    pub(super) last: u32,
    /// Counted as waiting for a slot.
    pub(super) waited: bool,
}

impl Request {
    pub(super) const fn new(kind: Kind, sector: u64, sectors: u32) -> Self {
        let segments = sectors.div_ceil(SECTORS_PER_PAGE as u32);
        Self { kind, sector, sectors, segments, last: NONE, waited: false }
    }
}

/// All of them, by number.
#[derive(Debug)]
pub(super) struct Table {
    ios: Slab<Flying>,
    /// Pieces beside the I/Os' own, whose numbers follow on those.
    more: Slab<Piece>,
    depth: u32,
}

impl Table {
    /// For `depth` I/Os and `pages` pages: a piece beside an I/O's own has one at least.
    pub(super) fn new(depth: usize, pages: usize) -> Self {
        Self { ios: Slab::new(depth), more: Slab::new(pages), depth: depth as u32 }
    }

    /// Numbers that pieces go by.
    pub(super) const fn numbers(depth: usize, pages: usize) -> usize {
        depth + pages
    }

    pub(super) fn len(&self) -> usize {
        self.ios.len()
    }

    pub(super) fn depth(&self) -> usize {
        self.depth as usize
    }

    /// Takes in an I/O of which so much is the first piece. It must not be full.
    #[inline]
    pub(super) fn admit(
        &mut self,
        cookie: u64,
        buffer: Option<IoBuffer>,
        (fua, flush_after): (bool, bool),
        (page, sectors): (u32, u32),
        request: Request,
    ) -> Option<u32> {
        self.ios.insert_with(|io| {
            let own = Piece { io, page, sectors, next: NONE, request };
            Flying { cookie, buffer, fua, left: 1, result: Ok(()), flush_after, own, owns: true }
        })
    }

    /// Takes in a piece of an I/O.
    pub(super) fn insert(&mut self, piece: Piece) -> Option<u32> {
        let flying = self.ios.get_mut(piece.io)?;
        let key = if flying.owns {
            // Cannot fail: `new` made room for every page.
            self.depth + self.more.insert_with(|_| piece)?
        } else {
            (flying.own, flying.owns) = (piece, true);
            piece.io
        };
        flying.left += 1;
        Some(key)
    }

    #[inline]
    pub(super) fn get(&self, key: u32) -> Option<&Piece> {
        match key.checked_sub(self.depth) {
            None => self.ios.get(key).filter(|flying| flying.owns).map(|flying| &flying.own),
            Some(key) => self.more.get(key),
        }
    }

    #[inline]
    pub(super) fn get_mut(&mut self, key: u32) -> Option<&mut Piece> {
        match key.checked_sub(self.depth) {
            None => {
                self.ios.get_mut(key).filter(|flying| flying.owns).map(|flying| &mut flying.own)
            }
            Some(key) => self.more.get_mut(key),
        }
    }

    /// Takes a piece out. Its I/O stays.
    #[inline]
    pub(super) fn take(&mut self, key: u32) -> Option<(Piece, &mut Flying)> {
        let piece = match key.checked_sub(self.depth) {
            None => self.ios.get_mut(key).filter(|flying| flying.owns)?.own,
            Some(key) => self.more.remove(key)?,
        };
        let flying = self.ios.get_mut(piece.io)?;
        flying.owns &= piece.io != key;
        flying.left -= 1;
        Some((piece, flying))
    }

    /// Takes an I/O out.
    #[inline]
    pub(super) fn land(&mut self, io: u32) -> Option<Flying> {
        self.ios.remove(io)
    }

    /// Takes everything out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Flying> + '_ {
        self.more.drain().for_each(drop);
        self.ios.drain()
    }
}
