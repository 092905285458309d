//! A client of our own, which can say anything. The numbers are from nbd's `doc/proto.md`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const ABORT: u32 = 2;
pub(crate) const LIST: u32 = 3;
pub(crate) const INFO: u32 = 6;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;

pub(crate) const ACK: u32 = 1;
pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;

pub(crate) struct Raw(pub(crate) UnixStream);

impl Raw {
    /// Connects and checks the greeting.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        // Nothing here takes long: whatever does has hung.
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut raw = Self(stream);
        assert_eq!(raw.take(16).unwrap(), *b"NBDMAGICIHAVEOPT");
        assert_eq!(raw.take(2).unwrap(), [0, 3]);
        raw
    }

    /// Completes the handshake, with simple replies.
    pub(crate) fn ready(socket: &Path) -> Self {
        let mut raw = Self::connect(socket);
        raw.send(&3u32.to_be_bytes());
        raw.option(EXPORT_NAME, b"");
        raw.take(10).unwrap();
        raw
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn take(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).unwrap().try_into().unwrap())
    }

    /// Whether the server closed the connection, having said nothing more.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        let len = (data.len() as u32).to_be_bytes();
        self.send(&[b"IHAVEOPT", &option.to_be_bytes()[..], &len, data].concat());
    }

    /// The reply to an option: its kind and data.
    pub(crate) fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.take(8).unwrap(), 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(self.take_u32(), option);
        let (kind, len) = (self.take_u32(), self.take_u32());
        (kind, self.take(len as usize).unwrap())
    }

    pub(crate) fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.send(&request(command, flags, cookie, offset, len));
    }

    /// A simple reply: the request's cookie and the error.
    pub(crate) fn reply(&mut self) -> (u64, u32) {
        assert_eq!(self.take_u32(), 0x6744_6698);
        let error = self.take_u32();
        (u64::from_be_bytes(self.take(8).unwrap().try_into().unwrap()), error)
    }
}

pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}
