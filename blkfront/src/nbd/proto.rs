//! What goes over the wire, from the NBD protocol's `doc/proto.md`. All integers are big-endian.

use crate::{Geometry, IoBuffer, IoError, Refusal};

/// `NBDMAGIC`, the first words of a server.
pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before every option, and the newstyle mark in the greeting.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

const TRANSMIT_HAS_FLAGS: u16 = 1;
const TRANSMIT_READ_ONLY: u16 = 1 << 1;
const TRANSMIT_SEND_FLUSH: u16 = 1 << 2;
const TRANSMIT_SEND_FUA: u16 = 1 << 3;
const TRANSMIT_SEND_TRIM: u16 = 1 << 5;
const TRANSMIT_SEND_WRITE_ZEROES: u16 = 1 << 6;
const TRANSMIT_SEND_DF: u16 = 1 << 7;
const TRANSMIT_CAN_MULTI_CONN: u16 = 1 << 8;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;

const CMD_FLAG_FUA: u16 = 1;
const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
const CMD_FLAG_DF: u16 = 1 << 2;

const REPLY_FLAG_DONE: u16 = 1;
const REPLY_TYPE_OFFSET_DATA: u16 = 1;
const REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

/// The export as it is announced to a new client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Export {
    /// Bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) trim: bool,
    /// Bytes that offsets and lengths are a multiple of.
    pub(super) min_block: u32,
    /// Bytes.
    pub(super) preferred_block: u32,
    /// Bytes of the longest read or write.
    pub(super) max_payload: u32,
}

impl Export {
    pub(super) fn new(
        geometry: &Geometry,
        discard: bool,
        read_only: bool,
        max_payload: u32,
    ) -> Self {
        /// The block size that clients are told to prefer, unless sectors are larger: a page.
        const PREFERRED_BLOCK: u32 = 4096;
        let read_only = read_only || geometry.read_only;
        Self {
            size: geometry.size,
            read_only,
            trim: discard && !read_only,
            min_block: geometry.sector_size,
            preferred_block: geometry.sector_size.max(PREFERRED_BLOCK),
            max_payload,
        }
    }

    /// The transmission flags. Every connection sees the same disk, and a flush covers all that was
    /// completed on any of them, so `CAN_MULTI_CONN` holds. There is no fast way to zero.
    pub(super) fn flags(&self, structured: bool) -> u16 {
        let mut flags =
            TRANSMIT_HAS_FLAGS | TRANSMIT_SEND_FLUSH | TRANSMIT_SEND_FUA | TRANSMIT_CAN_MULTI_CONN;
        if self.read_only {
            flags |= TRANSMIT_READ_ONLY;
        } else {
            flags |= TRANSMIT_SEND_WRITE_ZEROES;
        }
        if self.trim {
            flags |= TRANSMIT_SEND_TRIM;
        }
        if structured {
            flags |= TRANSMIT_SEND_DF;
        }
        flags
    }
}

/// An error as clients know it: Linux's number on every system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Errno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    NotSup = 95,
    Shutdown = 108,
}

impl From<IoError> for Errno {
    fn from(error: IoError) -> Self {
        match error {
            IoError::Backend => Self::Io,
            IoError::NotSupported => Self::NotSup,
            IoError::Gone => Self::Shutdown,
        }
    }
}

impl From<Refusal> for Errno {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::WouldBlock => Self::NoMem,
            Refusal::PastEnd { .. } => Self::NoSpc,
            Refusal::Misaligned { .. } | Refusal::ForeignBuffer => Self::Inval,
            Refusal::ReadOnly => Self::Perm,
            Refusal::NotSupported => Self::NotSup,
            Refusal::Gone => Self::Shutdown,
        }
    }
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Command {
    Read,
    Write { fua: bool },
    Disconnect,
    Flush,
    Trim { fua: bool },
    WriteZeroes { fua: bool },
}

/// A request's header, whose command was not checked yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    flags: u16,
    command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// Bytes of a [`Header`].
pub(super) const HEADER_BYTES: usize = 28;

impl Header {
    /// `None` when it does not start with the magic: the stream is out of sync for good.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut reader = Reader(bytes);
        if reader.u32()? != REQUEST_MAGIC {
            return None;
        }
        let (flags, command) = (reader.u16()?, reader.u16()?);
        let (cookie, offset, len) = (reader.u64()?, reader.u64()?, reader.u32()?);
        Some(Self { flags, command, cookie, offset, len })
    }

    /// The command, unless we do not know it or one of its flags.
    pub(super) fn command(&self) -> Result<Command, Errno> {
        let fua = self.flags & CMD_FLAG_FUA != 0;
        let (command, flags) = match self.command {
            CMD_READ => (Command::Read, CMD_FLAG_FUA | CMD_FLAG_DF),
            CMD_WRITE => (Command::Write { fua }, CMD_FLAG_FUA),
            CMD_DISC => (Command::Disconnect, CMD_FLAG_FUA),
            CMD_FLUSH => (Command::Flush, CMD_FLAG_FUA),
            CMD_TRIM => (Command::Trim { fua }, CMD_FLAG_FUA),
            CMD_WRITE_ZEROES => (Command::WriteZeroes { fua }, CMD_FLAG_FUA | CMD_FLAG_NO_HOLE),
            _ => return Err(Errno::Inval),
        };
        if self.flags & !flags == 0 { Ok(command) } else { Err(Errno::Inval) }
    }

    /// Whether this is a read, valid or not: only replies to reads may have to be structured.
    pub(super) fn is_read(&self) -> bool {
        self.command == CMD_READ
    }

    /// Bytes of data that follow the header, whether its other fields make sense or not.
    pub(super) fn payload(&self) -> u32 {
        if self.command == CMD_WRITE { self.len } else { 0 }
    }
}

/// A reply to be sent: a head, perhaps followed by data.
#[derive(Debug)]
pub(super) struct Reply {
    head: [u8; Self::MAX_HEAD],
    head_len: usize,
    pub(super) data: Option<IoBuffer>,
}

impl Reply {
    /// Bytes of the head of a chunk of data with its offset.
    const MAX_HEAD: usize = 28;

    /// A reply without data to anything but a read.
    pub(super) fn simple(cookie: u64, result: Result<(), Errno>) -> Self {
        let error = result.map_or_else(|errno| errno as u32, |()| 0);
        let mut reply = Self { head: [0; Self::MAX_HEAD], head_len: 0, data: None };
        reply.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        reply.put(&error.to_be_bytes());
        reply.put(&cookie.to_be_bytes());
        reply
    }

    /// A reply to a read at `offset`: all of it in one chunk, which is what `DF` asks for.
    pub(super) fn read(
        structured: bool,
        cookie: u64,
        offset: u64,
        result: Result<IoBuffer, Errno>,
    ) -> Self {
        if !structured {
            let (result, data) = match result {
                Ok(data) => (Ok(()), Some(data)),
                Err(errno) => (Err(errno), None),
            };
            return Self { data, ..Self::simple(cookie, result) };
        }
        let mut reply = Self { head: [0; Self::MAX_HEAD], head_len: 0, data: None };
        reply.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        reply.put(&REPLY_FLAG_DONE.to_be_bytes());
        match result {
            Ok(data) => {
                reply.put(&REPLY_TYPE_OFFSET_DATA.to_be_bytes());
                reply.put(&cookie.to_be_bytes());
                // The payload is never larger than a request may be: this fits.
                reply.put(&(data.len() as u32 + 8).to_be_bytes());
                reply.put(&offset.to_be_bytes());
                reply.data = Some(data);
            }
            Err(errno) => {
                reply.put(&REPLY_TYPE_ERROR.to_be_bytes());
                reply.put(&cookie.to_be_bytes());
                // The error, and the length of a message, which is left out.
                reply.put(&6u32.to_be_bytes());
                reply.put(&(errno as u32).to_be_bytes());
                reply.put(&0u16.to_be_bytes());
            }
        }
        reply
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = self.head_len + bytes.len();
        if let Some(to) = self.head.get_mut(self.head_len..end) {
            to.copy_from_slice(bytes);
            self.head_len = end;
        }
    }

    pub(super) fn head(&self) -> &[u8] {
        self.head.get(..self.head_len).unwrap_or_default()
    }

    /// Its length on the wire.
    pub(super) fn len(&self) -> usize {
        self.head_len + self.data.as_ref().map_or(0, IoBuffer::len)
    }
}

/// Takes integers off the front of a slice.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}
