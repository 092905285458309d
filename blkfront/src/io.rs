//! What a caller asks for and gets back.

use crate::{IoBuffer, IoError};

/// What an I/O does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// From the device into the buffer.
    Read,
    /// From the buffer to the device.
    Write {
        /// Complete only when the data is durable.
        fua: bool,
    },
    /// Make every write that was completed before durable.
    Flush,
    /// Discard a range; what it reads as afterwards is undefined.
    Discard {
        /// Bytes.
        len: u64,
        /// Make what was there unreadable, not just unused.
        secure: bool,
    },
}

/// An I/O. Offsets and lengths are in bytes, and multiples of [`crate::Geometry::sector_size`].
#[derive(Debug)]
pub struct Io {
    /// The caller's identifier, which comes back in [`Completed`].
    pub cookie: u64,
    /// What to do.
    pub op: Op,
    /// Where on the device, in bytes; ignored by a flush.
    pub offset: u64,
    /// The data of a read or write: [`IoBuffer::len`] bytes of it.
    pub buffer: Option<IoBuffer>,
}

impl Io {
    /// Reads `buffer.len()` bytes from `offset`.
    pub fn read(cookie: u64, offset: u64, buffer: IoBuffer) -> Self {
        Self { cookie, op: Op::Read, offset, buffer: Some(buffer) }
    }

    /// Writes `buffer.len()` bytes to `offset`.
    pub fn write(cookie: u64, offset: u64, buffer: IoBuffer) -> Self {
        Self { cookie, op: Op::Write { fua: false }, offset, buffer: Some(buffer) }
    }

    /// Writes `buffer.len()` bytes to `offset`, durably.
    pub fn write_fua(cookie: u64, offset: u64, buffer: IoBuffer) -> Self {
        Self { cookie, op: Op::Write { fua: true }, offset, buffer: Some(buffer) }
    }

    /// Makes every write that was completed before durable.
    pub fn flush(cookie: u64) -> Self {
        Self { cookie, op: Op::Flush, offset: 0, buffer: None }
    }

    /// Discards `len` bytes from `offset`.
    pub fn discard(cookie: u64, offset: u64, len: u64) -> Self {
        Self { cookie, op: Op::Discard { len, secure: false }, offset, buffer: None }
    }
}

/// A completed I/O.
#[derive(Debug)]
pub struct Completed {
    /// As submitted.
    pub cookie: u64,
    /// How it ended.
    pub result: Result<(), IoError>,
    /// As submitted, with what was read. Withheld with [`IoError::Gone`]: the backend may not know that the
    /// I/O is over.
    pub buffer: Option<IoBuffer>,
}
