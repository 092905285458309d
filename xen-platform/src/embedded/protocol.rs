//! What a domain's process and the broker say to each other: one JSON message a packet of a
//! `SOCK_SEQPACKET` socket, with descriptors beside it.
//!
//! Only for setting up and taking down; grants and events do not pass here.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Both ends must be of the same build: the layout of shared tables has no other version.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Longest message, in bytes. Names are bounded by [`super::control::MAX_NAME`].
pub(super) const MAX_MESSAGE: usize = 1024;

/// A peer's memory, grant table and active table.
const MAX_FDS: usize = 3;

/// From a domain's process.
#[derive(Serialize, Deserialize, Debug)]
pub(super) enum Request {
    /// Makes this process the domain. Answered by [`Reply::Attached`].
    Attach { version: String },
    /// Asks for what it takes to use grants of `domid`. Answered by [`Reply::Peer`].
    Peer { domid: u16 },
    /// `EVTCHNOP_alloc_unbound`. Answered by [`Reply::Port`].
    AllocUnbound { peer: u16 },
    /// `EVTCHNOP_bind_interdomain`. Answered by [`Reply::Port`].
    BindInterdomain { peer: u16, port: u32 },
    /// `EVTCHNOP_close`. Answered by [`Reply::Closed`].
    Close { port: u32 },
}

/// From the broker. What is said of descriptors is their order.
#[derive(Serialize, Deserialize, Debug)]
pub(super) enum Reply {
    /// With the domain's memory and its grant table.
    Attached {
        domid: u16,
    },
    /// With the peer's memory, grant table and active table.
    Peer,
    /// With the descriptor to wait on and the one to notify.
    Port {
        port: u32,
    },
    Closed,
    Refused(Refusal),
}

/// Why the broker refused.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    NoDomain,
    NoBackend,
    NoPort,
    NotUnbound,
    NotForUs,
    NoMorePorts,
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
pub(super) fn send(
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
