//! The xenstore wire protocol, without I/O: `xs_wire.h` and `docs/misc/xenstore.txt` of Xen.
//!
//! A message is a 16-byte header of four native-endian `u32` (type, request id, transaction id,
//! payload length) and a payload of at most [`PAYLOAD_MAX`] bytes. [`Decoder`] cuts a byte stream
//! into [`Packet`]s; [`Request`] and [`Reply`] are their typed payloads. Both encode and decode, so
//! the client and the embedded store share one codec.
//!
//! Values are bytes. Paths are [`Path`]s, checked when they are made.

mod path;
mod perm;
mod reply;
mod request;

use std::fmt;

pub use path::{BadPath, Path};
pub use perm::{Access, Perm};
pub use reply::Reply;
pub use request::Request;

/// Bytes of a message header, `struct xsd_sockmsg`.
pub const HEADER_LEN: usize = 16;
/// The most bytes a payload may have (`XENSTORE_PAYLOAD_MAX`). xenstored drops the connection of a
/// client that sends more.
pub const PAYLOAD_MAX: usize = 4096;
/// The most bytes an absolute path may have (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// The most bytes a path relative to a domain's directory may have (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;

macro_rules! message_types {
    ($($variant:ident = $number:literal,)*) => {
        /// A message's type, `enum xsd_sockmsg_type`. The discriminant is the number on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[expect(missing_docs, reason = "the protocol's own names; xenstore.txt describes each")]
        pub enum MessageType {
            $($variant = $number,)*
        }

        impl MessageType {
            const ALL: &[Self] = &[$(Self::$variant),*];
        }
    };
}

message_types! {
    Control = 0,
    Directory = 1,
    Read = 2,
    GetPerms = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Introduce = 8,
    Release = 9,
    GetDomainPath = 10,
    Write = 11,
    Mkdir = 12,
    Rm = 13,
    SetPerms = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
    Resume = 18,
    SetTarget = 19,
    ResetWatches = 21,
    DirectoryPart = 22,
}

impl MessageType {
    /// The type with this number, if the protocol has one.
    pub fn from_raw(raw: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| *kind as u32 == raw)
    }
}

macro_rules! errnos {
    ($($variant:ident = $name:literal, $meaning:literal;)*) => {
        /// An error as xenstore names it (`xsd_errors` in `xs_wire.h`; and `EQUOTA`, which is oxenstored's).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Errno {
            $(#[doc = concat!("`", $name, "`: ", $meaning, ".")] $variant,)*
        }

        impl Errno {
            const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name on the wire, such as `ENOENT`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

errnos! {
    Einval = "EINVAL", "invalid argument";
    Eacces = "EACCES", "permission denied";
    Eexist = "EEXIST", "exists already";
    Eisdir = "EISDIR", "is a directory";
    Enoent = "ENOENT", "no such node, transaction or domain";
    Enomem = "ENOMEM", "out of memory, or the transaction has failed before";
    Enospc = "ENOSPC", "quota exceeded";
    Equota = "EQUOTA", "quota exceeded";
    Eio = "EIO", "input/output error";
    Enotempty = "ENOTEMPTY", "not empty";
    Enosys = "ENOSYS", "not supported by this xenstore";
    Erofs = "EROFS", "read-only";
    Ebusy = "EBUSY", "busy";
    Eagain = "EAGAIN", "the transaction conflicts with another change, try it again";
    Eisconn = "EISCONN", "connected already";
    E2big = "E2BIG", "the answer is too long for one message";
    Eperm = "EPERM", "not permitted";
}

impl Errno {
    /// The error of this name. A name that `xs_wire.h` does not list reads as `EINVAL`, as in
    /// libxenstore.
    pub fn from_name(name: &[u8]) -> Self {
        let known = Self::ALL.iter().find(|errno| errno.name().as_bytes() == name);
        known.copied().unwrap_or(Self::Einval)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.meaning())
    }
}

/// Why bytes are not a message, or a message cannot be bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The payload is longer than the protocol, or the transport, allows. From [`Decoder`] it means
    /// that the stream is out of step: drop the connection.
    #[error("xenstore payload of {len} bytes is longer than the {max} allowed")]
    TooLong {
        /// Bytes of payload.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The header names a type that is unknown, or that is not sent in this direction.
    #[error("xenstore message of unexpected type {0}")]
    UnexpectedType(u32),
    /// The payload does not follow the syntax of its type.
    #[error("malformed xenstore {0:?} message")]
    Malformed(MessageType),
    /// The payload holds a path that breaks the rules.
    #[error(transparent)]
    Path(#[from] BadPath),
}

impl WireError {
    /// What a server answers to a request that was refused for this reason.
    pub fn errno(&self) -> Errno {
        match self {
            Self::UnexpectedType(_) => Errno::Enosys,
            Self::TooLong { .. } => Errno::E2big,
            Self::Malformed(_) | Self::Path(_) => Errno::Einval,
        }
    }
}

/// One message: the header's fields and the payload, not yet decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The type's number; see [`MessageType::from_raw`].
    pub kind: u32,
    /// Chosen by the client, echoed in the reply; 0 in watch events.
    pub req_id: u32,
    /// The transaction that the request belongs to; 0 for none.
    pub tx_id: u32,
    /// At most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

impl Packet {
    /// Appends the message in wire format.
    pub fn encode(&self, out: &mut Vec<u8>) {
        // Requests and replies keep the payload within PAYLOAD_MAX.
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        for field in [self.kind, self.req_id, self.tx_id, len] {
            out.extend_from_slice(&field.to_ne_bytes());
        }
        out.extend_from_slice(&self.payload);
    }

    fn new(
        kind: MessageType,
        req_id: u32,
        tx_id: u32,
        payload: Vec<u8>,
    ) -> Result<Self, WireError> {
        if payload.len() > PAYLOAD_MAX {
            return Err(WireError::TooLong { len: payload.len(), max: PAYLOAD_MAX });
        }
        Ok(Self { kind: kind as u32, req_id, tx_id, payload })
    }
}

/// Cuts a byte stream, in whatever pieces it arrives, into packets.
///
/// Holds at most one unfinished message, so its memory is bounded whatever the peer sends.
#[derive(Debug, Default)]
pub struct Decoder {
    header: Option<Header>,
    /// The header or the payload so far.
    buf: Vec<u8>,
}

#[derive(Debug)]
struct Header {
    kind: u32,
    req_id: u32,
    tx_id: u32,
    len: usize,
}

impl Decoder {
    /// Takes bytes off the front of `input` until one message is complete. `None` means that
    /// `input` was used up. Call it again while `input` has bytes left.
    ///
    /// # Errors
    /// [`WireError::TooLong`], now and on every later call: nothing after such a header can be
    /// trusted to start a message.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Packet>, WireError> {
        loop {
            let want = self.header.as_ref().map_or(HEADER_LEN, |header| header.len);
            let (now, rest) = input.split_at(input.len().min(want.saturating_sub(self.buf.len())));
            self.buf.extend_from_slice(now);
            *input = rest;
            if self.buf.len() < want {
                return Ok(None);
            }
            if let Some(header) = self.header.take() {
                let Header { kind, req_id, tx_id, .. } = header;
                let payload = std::mem::take(&mut self.buf);
                return Ok(Some(Packet { kind, req_id, tx_id, payload }));
            }
            self.header = Some(Header::parse(&self.buf)?);
            self.buf.clear();
        }
    }
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = [0; 4];
        for (field, bytes) in fields.iter_mut().zip(bytes.chunks_exact(4)) {
            *field = bytes.try_into().map_or(0, u32::from_ne_bytes);
        }
        let [kind, req_id, tx_id, len] = fields;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > PAYLOAD_MAX {
            return Err(WireError::TooLong { len, max: PAYLOAD_MAX });
        }
        Ok(Self { kind, req_id, tx_id, len })
    }
}

/// The nul-terminated strings of a payload; `None` if the last one is not terminated.
fn strings(payload: &[u8]) -> Option<Vec<&[u8]>> {
    let Some(terminated) = payload.strip_suffix(b"\0") else {
        return payload.is_empty().then(Vec::new);
    };
    Some(terminated.split(|byte| *byte == 0).collect())
}

/// Joins strings, each with a nul after it.
fn terminated<'a>(strings: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for string in strings {
        out.extend_from_slice(string);
        out.push(0);
    }
    out
}

/// A decimal number, as all numbers in payloads are.
fn number<T: std::str::FromStr>(bytes: &[u8]) -> Option<T> {
    // FromStr accepts a plus sign, the protocol does not.
    if !bytes.first()?.is_ascii_digit() {
        return None;
    }
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

fn text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

#[cfg(test)]
mod tests;
