//! A domain's connection to the broker. While it lives, the process is the domain.

use super::locked;
use super::protocol::{self, Refusal, Reply, Request, VERSION};
use crate::{Error, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use ring_proto::{DomId, Port};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

/// Held by everything that the broker would take away with the connection: mapped and granted
/// pages, event channels.
#[derive(Debug)]
pub(super) struct Connection {
    /// Locked for a request and its reply.
    socket: Mutex<OwnedFd>,
    domid: DomId,
}

impl Connection {
    /// Becomes the domain whose `hypervisor.sock` this is. Also returns its memory and grant table.
    pub(super) fn attach(path: &Path, domid: DomId) -> Result<(Self, [OwnedFd; 2])> {
        let doing = || format!("attach to {domid} at {}", path.display());
        let failed = |e| Error::io(doing(), e);
        let address = UnixAddr::new(path).map_err(failed)?;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(failed)?;
        connect(socket.as_raw_fd(), &address).map_err(failed)?;
        let connection = Self { socket: Mutex::new(socket), domid };
        match connection.call(doing, &Request::Attach { version: VERSION.to_owned() })? {
            (Reply::Attached { domid: told }, fds) if told == domid.0 => {
                let fds = fds.try_into().map_err(|_| unexpected(doing()))?;
                Ok((connection, fds))
            }
            (Reply::Refused(Refusal::Other(reason)), _) => {
                Err(Error::Refused { doing: doing(), reason })
            }
            _ => Err(unexpected(doing())),
        }
    }

    pub(super) fn domid(&self) -> DomId {
        self.domid
    }

    /// A peer's memory, grant table and active table, or `None` if nobody is there.
    pub(super) fn peer(&self, peer: DomId) -> Result<Option<[OwnedFd; 3]>> {
        let doing = || format!("look up {peer}");
        match self.call(doing, &Request::Peer { domid: peer.0 })? {
            (Reply::Peer, fds) => fds.try_into().map(Some).map_err(|_| unexpected(doing())),
            (Reply::Refused(_), _) => Ok(None),
            _ => Err(unexpected(doing())),
        }
    }

    /// A new port with the descriptors to wait on and to notify.
    pub(super) fn open_port(
        &self,
        peer: DomId,
        remote: Option<Port>,
    ) -> Result<(Port, [OwnedFd; 2])> {
        let (request, port) = match remote {
            None => (Request::AllocUnbound { peer: peer.0 }, Port(0)),
            Some(port) => (Request::BindInterdomain { peer: peer.0, port: port.0 }, port),
        };
        let doing = || format!("open an event channel to {peer}");
        match self.call(doing, &request)? {
            (Reply::Port { port }, fds) => {
                Ok((Port(port), fds.try_into().map_err(|_| unexpected(doing()))?))
            }
            (Reply::Refused(Refusal::NoMorePorts), _) => {
                Err(Error::Exhausted { what: "event channel ports", limit: super::MAX_PORTS })
            }
            (Reply::Refused(refusal), _) => {
                Err(Error::Port { peer, port, reason: refusal.reason() })
            }
            _ => Err(unexpected(doing())),
        }
    }

    pub(super) fn close_port(&self, port: Port) -> Result<()> {
        self.call(|| format!("close {port}"), &Request::Close { port: port.0 }).map(drop)
    }

    fn call(&self, doing: impl Fn() -> String, request: &Request) -> Result<(Reply, Vec<OwnedFd>)> {
        let gone = || Error::BrokerGone { doing: doing(), domid: self.domid };
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => gone(),
            _ => Error::io(doing(), e),
        };
        let socket = locked(&self.socket);
        protocol::send(socket.as_fd(), request, &[]).map_err(failed)?;
        loop {
            match protocol::receive(socket.as_fd()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(e)),
                Ok(None) => return Err(gone()),
                Ok(Some(reply)) => return Ok(reply),
            }
        }
    }
}

fn unexpected(doing: String) -> Error {
    Error::Refused {
        doing,
        reason: "unexpected reply: is the broker of the same version as this program?".to_owned(),
    }
}
