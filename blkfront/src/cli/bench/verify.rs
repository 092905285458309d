//! Data that says where and when it was written, as fio's verify headers do.
//!
//! A write consists of chunks of the smallest block size, each with a header, so that a chunk can be
//! checked alone, whatever sizes it was written and is read in.

use super::crc32c::crc32c;
use std::fmt;

/// `BLKF`, little-endian: tells data that is not ours from a torn write.
const MAGIC: u32 = 0x464b_4c42;
/// Magic, crc32c of all that follows, offset, generation.
const HEADER: usize = 4 + 4 + 8 + 8;

/// What is wrong with a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    NotWritten,
    Checksum,
    Offset(u64),
    Generation { found: u64, expected: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWritten => f.write_str("there is no header, it was never written"),
            Self::Checksum => f.write_str("the checksum is wrong, it is torn or damaged"),
            Self::Offset(found) => write!(f, "it is the data of offset {found}"),
            Self::Generation { found, expected } => {
                write!(f, "it is of write {found}, not {expected}")
            }
        }
    }
}

/// What a job has written to its part of the disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    start: u64,
    chunk: usize,
    /// The last write to each chunk; 0 for none.
    generations: Vec<u64>,
    /// Writes so far.
    generation: u64,
    bytes: Vec<u8>,
}

impl Ledger {
    pub(crate) fn new(start: u64, size: u64, chunk: u64, largest: u64) -> anyhow::Result<Self> {
        let chunks = usize::try_from(size / chunk)?;
        Ok(Self {
            start,
            chunk: usize::try_from(chunk)?,
            generations: vec![0; chunks],
            generation: 0,
            bytes: vec![0; usize::try_from(largest)?],
        })
    }

    fn first(&self, offset: u64) -> usize {
        usize::try_from((offset - self.start) / self.chunk as u64).unwrap_or(usize::MAX)
    }

    /// The data of a new write of `len` bytes.
    pub(crate) fn fill(&mut self, offset: u64, len: usize) -> &[u8] {
        self.generation += 1;
        let first = self.first(offset);
        let Some(bytes) = self.bytes.get_mut(..len) else { return &[] };
        let chunks = bytes.chunks_exact_mut(self.chunk);
        for ((n, chunk), place) in
            (first..).zip(chunks).zip(self.generations.iter_mut().skip(first))
        {
            *place = self.generation;
            let at = self.start + (n * self.chunk) as u64;
            let mut noise = at ^ self.generation.rotate_left(32) | 1;
            if let Some(payload) = chunk.get_mut(HEADER..) {
                for word in payload.chunks_mut(8) {
                    noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    word.copy_from_slice(noise.to_le_bytes().get(..word.len()).unwrap_or_default());
                }
            }
            put(chunk, 8, &at.to_le_bytes());
            put(chunk, 16, &self.generation.to_le_bytes());
            let crc = crc32c(chunk.get(8..).unwrap_or_default());
            put(chunk, 0, &MAGIC.to_le_bytes());
            put(chunk, 4, &crc.to_le_bytes());
        }
        bytes
    }

    /// Checks what `read` yields for byte `offset` of the disk. Calls `fault` with the offset of each chunk
    /// that was written and does not match.
    pub(crate) fn check(
        &mut self,
        offset: u64,
        len: usize,
        read: impl FnOnce(&mut [u8]) -> usize,
        mut fault: impl FnMut(u64, Fault),
    ) {
        let first = self.first(offset);
        let Some(bytes) = self.bytes.get_mut(..len) else { return };
        read(bytes);
        let written = self.generations.iter().skip(first);
        for ((n, chunk), expected) in (first..).zip(bytes.chunks_exact(self.chunk)).zip(written) {
            let at = self.start + (n * self.chunk) as u64;
            if *expected == 0 {
                continue;
            }
            if let Err(found) = check_chunk(chunk, at, *expected) {
                fault(at, found);
            }
        }
    }

    /// Whether any of the `len` bytes from `offset` was written.
    pub(crate) fn any(&self, offset: u64, len: usize) -> bool {
        let chunks = self.generations.iter().skip(self.first(offset)).take(len / self.chunk);
        chunks.into_iter().any(|generation| *generation != 0)
    }
}

fn check_chunk(chunk: &[u8], at: u64, expected: u64) -> Result<(), Fault> {
    if word(chunk, 0) as u32 != MAGIC {
        return Err(Fault::NotWritten);
    }
    if crc32c(chunk.get(8..).unwrap_or_default()) != (word(chunk, 0) >> 32) as u32 {
        return Err(Fault::Checksum);
    }
    let (offset, found) = (word(chunk, 8), word(chunk, 16));
    if offset != at {
        return Err(Fault::Offset(offset));
    }
    if found != expected {
        return Err(Fault::Generation { found, expected });
    }
    Ok(())
}

fn put(chunk: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = chunk.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn word(chunk: &[u8], at: usize) -> u64 {
    let bytes = chunk.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(ledger: &mut Ledger, offset: u64, disk: &[u8]) -> Vec<Fault> {
        let mut faults = Vec::new();
        let read = |to: &mut [u8]| {
            to.copy_from_slice(disk);
            disk.len()
        };
        ledger.check(offset, disk.len(), read, |_, fault| faults.push(fault));
        faults
    }

    #[test]
    fn every_kind_of_damage_is_seen() {
        let mut ledger = Ledger::new(4096, 8192, 512, 2048).unwrap();
        let old = ledger.fill(4096, 1024).to_vec();
        assert_eq!(faults(&mut ledger, 4096, &old), []);
        // What was not written is not checked.
        assert_eq!(faults(&mut ledger, 6144, &[7; 512]), []);
        let new = ledger.fill(4096, 512).to_vec();
        assert_eq!(faults(&mut ledger, 4096, &new), []);
        let stale = Fault::Generation { found: 1, expected: 2 };
        assert_eq!(faults(&mut ledger, 4096, &old), [stale]);
        assert_eq!(faults(&mut ledger, 4608, &new), [Fault::Offset(4096)]);
        let mut torn = new.clone();
        torn[500] ^= 1;
        assert_eq!(faults(&mut ledger, 4096, &torn), [Fault::Checksum]);
        assert_eq!(faults(&mut ledger, 4096, &[0; 512]), [Fault::NotWritten]);
    }
}
