//! An operation in flight: what is left of it, and the entry for that.

use super::{CLAIM, DISK, REGION};
use crate::storage::device::AtOnce;
use crate::storage::file::punch_hole;
use crate::storage::{IoVec, IoVecs, Op, OpKind};
use io_uring::types::FsyncFlags;
use io_uring::{opcode, squeue};
use std::ops::Range;

/// Pieces that the kernel takes at a time: UIO_MAXIOV. The rest follows as after a short transfer.
const MAX_PIECES: usize = 1024;

/// How often an operation that was interrupted or met a shortage is retried before it fails: a device that
/// says EAGAIN for ever must not keep it in flight.
const MAX_RETRIES: u32 = 16;

#[derive(Default)]
pub(super) struct Slot {
    /// The operation in flight, if any.
    pub(super) kind: Option<OpKind>,
    /// The memory. The part of the piece at `head` that was moved is cut off.
    pieces: IoVecs,
    /// The first piece that has something left.
    head: usize,
    /// Bytes still to be moved.
    left: u64,
    /// Where they start on the disk.
    offset: u64,
    retries: u32,
}

pub(super) enum Step {
    Again,
    End(Result<(), i32>),
}

impl Slot {
    /// Begins an operation.
    pub(super) fn begin(&mut self, op: &Op<'_>) {
        self.kind = Some(op.kind);
        self.pieces.clear();
        self.pieces.extend_from_slice(op.buffers);
        (self.head, self.left, self.offset, self.retries) = (0, op.transfer(), op.offset, 0);
    }

    /// The entry for what is left, or for as much of it as is done `at_once`.
    pub(super) fn entry(
        &self,
        at_once: AtOnce,
        registered: &Range<usize>,
    ) -> Option<squeue::Entry> {
        let pieces = first(self.pieces.get(self.head..).unwrap_or_default(), at_once);
        let vector = pieces.as_ptr().cast::<libc::iovec>();
        let count = pieces.len() as u32;
        // No piece is longer than an indirect request: the length fits.
        let single = match pieces {
            [piece] => Some((piece.base(), piece.len().min(at_once.bytes) as u32)),
            _ => None,
        };
        let is_registered = single.is_some_and(|(base, length)| {
            let start = base.addr();
            start >= registered.start
                && start.checked_add(length as usize).is_some_and(|end| end <= registered.end)
        });
        Some(match (self.kind?, single) {
            (OpKind::Read, Some((base, length))) if is_registered => {
                opcode::ReadFixed::new(DISK, base, length, REGION).offset(self.offset).build()
            }
            (OpKind::Read, Some((base, length))) => {
                opcode::Read::new(DISK, base, length).offset(self.offset).build()
            }
            (OpKind::Read, None) => {
                opcode::Readv::new(DISK, vector, count).offset(self.offset).build()
            }
            (OpKind::Write, Some((base, length))) if is_registered => {
                opcode::WriteFixed::new(DISK, base, length, REGION).offset(self.offset).build()
            }
            (OpKind::Write, Some((base, length))) => {
                opcode::Write::new(DISK, base, length).offset(self.offset).build()
            }
            (OpKind::Write, None) => {
                opcode::Writev::new(DISK, vector, count).offset(self.offset).build()
            }
            (OpKind::Flush, _) => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
            (OpKind::Discard { bytes, .. }, _) => opcode::Fallocate::new(CLAIM, bytes)
                .offset(self.offset)
                .mode(punch_hole().bits())
                .build(),
        })
    }

    /// Accounts for what the kernel did.
    pub(super) fn step(&mut self, result: i32) -> Step {
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
            // Flush or discard, which are all or nothing.
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
        self.offset += moved as u64;
        while let Some(piece) = self.pieces.get_mut(self.head) {
            if moved < piece.len() {
                *piece = piece.advanced(moved);
                return;
            }
            moved -= piece.len();
            self.head += 1;
        }
    }
}

/// The first pieces, as many as are done at once. If the first is too long by itself, it alone.
fn first(pieces: &[IoVec], at_once: AtOnce) -> &[IoVec] {
    let mut bytes = 0;
    let fits = |piece: &&IoVec| {
        bytes += piece.len();
        bytes <= at_once.bytes
    };
    let most = at_once.segments.min(MAX_PIECES);
    let count = pieces.iter().take(most).take_while(fits).count().max(1);
    &pieces[..count.min(pieces.len())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr;

    /// The kernel moves a few bytes at a time, within one piece or across several.
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
            let mut slot = Slot::default();
            slot.begin(&Op { tag: 0, kind: OpKind::Read, offset: 4096, buffers: &buffers });
            let mut at = 0;
            while let Step::Again = slot.step(moved.min(total - at) as i32) {
                at += moved;
                let pieces = &slot.pieces[slot.head..];
                assert_eq!(slot.offset, 4096 + at as u64);
                assert_eq!(pieces.iter().map(IoVec::len).sum::<usize>(), total - at);
                assert_eq!(pieces.first().map(|piece| piece.base().addr()), Some(at));
                assert!(slot.entry(AtOnce::ANY, &(0..0)).is_some());
            }
            assert!(at + moved >= total && slot.left == 0);
        }
    }

    #[test]
    fn no_more_is_asked_for_than_is_done_at_once() {
        // SAFETY: nothing is done with the memory: the pieces are only counted.
        let pieces = [4096, 512, 4096, 8192].map(|len| unsafe { IoVec::new(ptr::null_mut(), len) });
        let count = |bytes, segments| first(&pieces, AtOnce { bytes, segments }).len();
        assert_eq!([4096, 4607, 4608, 16895, 16896].map(|bytes| count(bytes, 9)), [1, 1, 2, 3, 4]);
        assert_eq!([1, 3, 9].map(|segments| count(1 << 20, segments)), [1, 3, 4]);
        assert_eq!((count(1, 9), first(&[], AtOnce::ANY).len()), (1, 0));
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
