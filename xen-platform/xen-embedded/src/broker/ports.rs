//! Event channel ports: Xen's common/event_channel.c.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use xen_platform::embedded::MAX_PORTS;
use xen_platform::embedded::protocol::Refusal;

/// The ports of a domain, by number.
#[derive(Debug, Default)]
pub(super) struct Ports(BTreeMap<u32, Port>);

/// An open port. A port that is not there is closed.
#[derive(Debug)]
pub(super) struct Port {
    /// The domain at the other end, or the one that may bind to it.
    remote: u16,
    /// Its port there, or `None` while ours is unbound.
    bound: Option<u32>,
    pair: Arc<[EventFd; 2]>,
    /// Which of the pair this end waits on; it notifies the other.
    end: usize,
}

impl Port {
    /// The descriptors that its holder waits on and notifies.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        let [a, b] = &*self.pair;
        if self.end == 0 { [a.as_fd(), b.as_fd()] } else { [b.as_fd(), a.as_fd()] }
    }
}

impl Ports {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn get(&self, port: u32) -> Option<&Port> {
        self.0.get(&port)
    }

    /// Opens the lowest free port.
    fn open(&mut self, port: Port) -> Result<u32, Refusal> {
        let last = u32::try_from(MAX_PORTS).unwrap_or(u32::MAX);
        let free = (1..last).find(|n| !self.0.contains_key(n)).ok_or(Refusal::NoMorePorts)?;
        self.0.insert(free, port);
        Ok(free)
    }

    /// `EVTCHNOP_alloc_unbound`: a port that `remote` may bind to.
    pub(super) fn alloc_unbound(&mut self, remote: u16) -> Result<u32, Refusal> {
        let pair = eventfd().and_then(|a| Ok([a, eventfd()?]));
        let pair = pair.map_err(|e| Refusal::Other(format!("create an eventfd: {e}")))?;
        self.open(Port { remote, bound: None, pair: Arc::new(pair), end: 0 })
    }

    /// The first step of `EVTCHNOP_bind_interdomain`, on the domain that holds `port`: the end that `binder`
    /// is to get.
    pub(super) fn offer(&self, port: u32, holder: u16, binder: u16) -> Result<Port, Refusal> {
        let offered = self.0.get(&port).ok_or(Refusal::NoPort)?;
        if offered.bound.is_some() {
            return Err(Refusal::NotUnbound);
        }
        if offered.remote != binder {
            return Err(Refusal::NotForUs);
        }
        let (pair, end) = (Arc::clone(&offered.pair), 1 - offered.end);
        Ok(Port { remote: holder, bound: Some(port), pair, end })
    }

    /// The second step, on the binder's domain.
    pub(super) fn accept(&mut self, end: Port) -> Result<u32, Refusal> {
        // Whoever was bound there before may have left events. And as in Xen, binding raises one event:
        // earlier notifications may have been lost.
        if let Some(waits) = end.pair.get(end.end) {
            let _ = waits.read();
            let _ = waits.write(1);
        }
        self.open(end)
    }

    /// The last step, on the domain that held the port first.
    pub(super) fn connect(&mut self, port: u32, to: u32) {
        if let Some(port) = self.0.get_mut(&port) {
            port.bound = Some(to);
        }
    }

    /// `EVTCHNOP_close`. Returns the domain and the port that were bound to it, if any.
    pub(super) fn close(&mut self, port: u32) -> Option<(u16, u32)> {
        let closed = self.0.remove(&port)?;
        Some((closed.remote, closed.bound?))
    }

    /// The other end was closed: its domain may bind again.
    pub(super) fn disconnect(&mut self, port: u32) {
        if let Some(port) = self.0.get_mut(&port) {
            port.bound = None;
        }
    }

    /// The number of some open port.
    pub(super) fn first(&self) -> Option<u32> {
        self.0.keys().next().copied()
    }
}

fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}
