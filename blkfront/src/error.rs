//! What can go wrong with a disk, and with one I/O.

use crate::Io;
use ring_proto::DomId;
use std::io;

/// What this crate's operations on a disk return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A disk could not be opened, used or closed.
#[derive(Debug, thiserror::Error)]
#[error("{domain}: disk {device}: {cause}")]
pub struct Error {
    /// The frontend's domain.
    pub domain: DomId,
    /// As given to [`crate::Disk::open`].
    pub device: String,
    /// What failed.
    #[source]
    pub cause: Cause,
}

/// A field of [`crate::Config`], [`crate::nbd::Options`] or `ublk::Options` is out of range.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field} is {value}, but must be {rule}")]
pub struct InvalidOption {
    /// The field.
    pub field: &'static str,
    /// What it is.
    pub value: usize,
    /// What it may be.
    pub rule: String,
}

impl InvalidOption {
    pub(crate) fn unless(
        holds: bool,
        field: &'static str,
        value: usize,
        rule: impl FnOnce() -> String,
    ) -> Result<(), Self> {
        if holds { Ok(()) } else { Err(Self { field, value, rule: rule() }) }
    }
}

/// What failed about a disk.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Of [`crate::Config`].
    #[error(transparent)]
    Config(#[from] InvalidOption),
    /// No frontend directory in xenstore has this device.
    #[error(
        "there is no such device in {directory} (it has {present}): attach it first, or use one of those"
    )]
    NoDevice {
        /// The domain's directory of devices.
        directory: String,
        /// The devices there.
        present: String,
    },
    /// Another program of this domain, or its kernel, has the device.
    #[error("{frontend} is in use in this domain: end the other program, or unload xen-blkfront")]
    InUse {
        /// The device's directory.
        frontend: String,
    },
    /// Could not find out whether the device is in use.
    #[error(transparent)]
    Claim(xen_platform::Error),
    /// Xenstore refused something, or cannot be reached.
    #[error("xenstore: {doing}: {source}")]
    Xenstore {
        /// What was being done, with the path.
        doing: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What the backend wrote makes no sense, or negotiation failed.
    #[error("{backend}: {reason}")]
    Negotiation {
        /// The backend's directory.
        backend: String,
        /// What is wrong, with the key.
        reason: String,
    },
    /// The backend did not get to the state it had to reach.
    #[error("{backend}: not {expected} after {seconds} s, but {state}; see the backend's log")]
    Timeout {
        /// The backend's directory.
        backend: String,
        /// Its state, and what it wrote about why.
        state: String,
        /// What it should be.
        expected: &'static str,
        /// How long it was given.
        seconds: u64,
    },
    /// The backend closed the device.
    #[error("{backend}: the backend closed the device{error}")]
    Closed {
        /// The backend's directory.
        backend: String,
        /// What it wrote about why, or nothing.
        error: String,
    },
    /// The device, or its backend's domain, was removed without having been closed.
    #[error("{backend}: the device was removed while it was in use")]
    Removed {
        /// The backend's directory.
        backend: String,
    },
    /// Pages could not be granted, or an event channel could not be made.
    #[error("ring {ring}: {source}")]
    Platform {
        /// The ring, or the vCPU whose pool it is.
        ring: u32,
        /// Why.
        #[source]
        source: xen_platform::Error,
    },
    /// A ring could not be laid out.
    #[error("ring {ring}: {source}")]
    Ring {
        /// The ring.
        ring: u32,
        /// Why.
        #[source]
        source: ring_proto::SetupError,
    },
    /// The backend broke the protocol; the device is stopped (XSA-396, XSA-403).
    #[error("ring {ring}: the backend broke the protocol: {violation}")]
    Violation {
        /// The ring.
        ring: u32,
        /// How.
        #[source]
        violation: Violation,
    },
    /// The queue of this vCPU was taken before, or there is no such vCPU.
    #[error("the queue of vCPU {vcpu} is taken, or beyond the {vcpus} there are")]
    NoQueue {
        /// As asked.
        vcpu: u32,
        /// How many there are.
        vcpus: u32,
    },
    /// A thread or descriptor could not be made.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// How a backend broke the ring protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// An impossible ring index.
    #[error(transparent)]
    Ring(#[from] ring_proto::RingError),
    /// A response to nothing that is in flight: out of range, answered before, or made up.
    #[error("response id {id:#x} is not in flight")]
    Id {
        /// As the backend wrote it.
        id: u64,
    },
    /// A response whose operation is not the request's.
    #[error("response id {id:#x} is to operation {operation}, not {expected}")]
    Operation {
        /// The request.
        id: u64,
        /// As the backend wrote it.
        operation: u8,
        /// As we asked.
        expected: u8,
    },
}

/// How an I/O failed.
// 32 bits wide, so that [`crate::Completed`] is moved about in whole words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u32)]
pub enum IoError {
    /// The backend said so (`BLKIF_RSP_ERROR`).
    #[error("the backend reported an I/O error")]
    Backend,
    /// The backend cannot do that (`BLKIF_RSP_EOPNOTSUPP`).
    #[error("the backend does not support this operation")]
    NotSupported,
    /// The device was stopped, closed, or its backend did not come back in time.
    #[error("the device is gone")]
    Gone,
}

impl IoError {
    /// The matching `errno`.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Backend | Self::Gone => libc::EIO,
            Self::NotSupported => libc::EOPNOTSUPP,
        }
    }
}

impl From<IoError> for io::Error {
    fn from(error: IoError) -> Self {
        Self::new(Self::from_raw_os_error(error.errno()).kind(), error)
    }
}

/// Why an I/O was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// [`crate::Config::depth`] I/Os are in the queue already: take completions, then submit again.
    #[error("the queue is full")]
    WouldBlock,
    /// The range is not within the device.
    #[error("{len} bytes from {offset} leave the device of {size} bytes")]
    PastEnd {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// In bytes.
        size: u64,
    },
    /// The offset or length is no multiple of the logical sector size, or the length is 0.
    #[error("{len} bytes from {offset} are not whole sectors of {sector_size} bytes")]
    Misaligned {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// In bytes.
        sector_size: u32,
    },
    /// A write or discard on a read-only device.
    #[error("the device is read-only")]
    ReadOnly,
    /// The backend does not offer this operation.
    #[error("the backend does not offer this operation")]
    NotSupported,
    /// The buffer is missing, or of another queue's pool.
    #[error("the buffer is not from this queue's pool")]
    ForeignBuffer,
    /// The device was stopped or closed.
    #[error("the device is gone")]
    Gone,
}

impl Refusal {
    /// The matching `errno`.
    pub const fn errno(self) -> i32 {
        match self {
            Self::WouldBlock => libc::EAGAIN,
            Self::PastEnd { .. } | Self::Misaligned { .. } | Self::ForeignBuffer => libc::EINVAL,
            Self::ReadOnly => libc::EROFS,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::Gone => libc::EIO,
        }
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        Self::new(Self::from_raw_os_error(refusal.errno()).kind(), refusal)
    }
}

/// A refused I/O, given back with its buffer.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// Why.
    pub reason: Refusal,
    /// As submitted.
    pub io: Io,
}
