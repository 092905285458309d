//! Messages between a domain's process and the broker: one in JSON per packet of a `SOCK_SEQPACKET` socket,
//! with descriptors attached.
//!
//! Only for setup and teardown; grants and events do not pass here.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use ring_proto::DomId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// In a domain's directory: where a process attaches to the domain.
pub const HYPERVISOR_SOCKET: &str = "hypervisor.sock";
/// In a domain's directory: xenstore with its rights.
pub const XENSTORE_SOCKET: &str = "xenstore.sock";

/// A domain's directory within the broker's.
pub fn domain_dir(dir: &Path, domid: DomId) -> PathBuf {
    dir.join(format!("dom{}", domid.0))
}

/// Both ends must be of the same build: the layout of shared tables has no other version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Longest message, in bytes. Names are bounded by [`super::control::MAX_NAME`].
pub const MAX_MESSAGE: usize = 1024;

/// A peer's memory, grant table and active table.
const MAX_FDS: usize = 3;

/// From a domain's process.
#[derive(Serialize, Deserialize, Debug)]
pub enum Request {
    /// Makes this process the domain. Answered by [`Reply::Attached`].
    Attach {
        /// [`VERSION`].
        version: String,
    },
    /// Asks for what it takes to use a domain's grants. Answered by [`Reply::Peer`].
    Peer {
        /// That domain.
        domid: u16,
    },
    /// `EVTCHNOP_alloc_unbound`. Answered by [`Reply::Port`].
    AllocUnbound {
        /// Who may bind to it.
        peer: u16,
    },
    /// `EVTCHNOP_bind_interdomain`. Answered by [`Reply::Port`].
    BindInterdomain {
        /// Whose port.
        peer: u16,
        /// Its number there.
        port: u32,
    },
    /// `EVTCHNOP_close`. Answered by [`Reply::Closed`].
    Close {
        /// One of ours.
        port: u32,
    },
}

/// From the broker. Descriptors come in the order in which they are listed here.
#[derive(Serialize, Deserialize, Debug)]
pub enum Reply {
    /// With the domain's memory and its grant table.
    Attached {
        /// The domain that the process is now.
        domid: u16,
    },
    /// With the peer's memory, grant table and active table.
    Peer,
    /// With the descriptor to wait on and the one to notify.
    Port {
        /// Its number.
        port: u32,
    },
    /// The port is closed, if it was open.
    Closed,
    /// Nothing was done.
    Refused(Refusal),
}

/// Why the broker refused.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such domain, or no process is attached to it.
    NoDomain,
    /// The asking domain is not a driver domain.
    NoBackend,
    /// There is no such port.
    NoPort,
    /// The port is bound.
    NotUnbound,
    /// The port was offered to another domain.
    NotForUs,
    /// All ports of the domain are open.
    NoMorePorts,
    /// In words for a person.
    Other(String),
}

impl Refusal {
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::NoDomain => "no such domain, or no process attached to it",
            Self::NoBackend => "only a driver domain uses what another grants",
            Self::NoPort => "no such port",
            Self::NotUnbound => "the port is already bound",
            Self::NotForUs => "the port was offered to another domain",
            Self::NoMorePorts => "the domain has no free port",
            Self::Other(_) => "refused by the broker",
        }
    }
}

/// Sends one message.
///
/// # Errors
/// When the other end is gone or, on a non-blocking socket, has no room for it.
pub fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None)?;
    Ok(())
}

/// Receives one message, or `None` when the other end closed the connection.
pub(super) fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut control = cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let packet = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for message in packet.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel just made these descriptors for us, and nobody else knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let len = packet.bytes;
    match bytes.get(..len) {
        None | Some([]) => Ok(None),
        Some(bytes) => Ok(Some((serde_json::from_slice(bytes)?, fds))),
    }
}
