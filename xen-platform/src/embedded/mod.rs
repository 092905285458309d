//! A domain on a stand-in for a Xen host, which runs on any Linux machine, for development, tests and
//! user-space guests.
//!
//! The host itself is a broker, `xen-embedded serve`, in a crate of its own. It owns the domains. A domain's
//! memory and grant table (Xen's v1 entries) are memory files; an event channel is a pair of eventfds;
//! xenstore is one unix socket per domain. A process that attaches to a domain ([`EmbeddedPlatform::attach`])
//! is that domain until it ends.
//!
//! What both must agree on is defined here: [`control`] and [`protocol`] are the messages to the broker,
//! [`table`] is the layout of shared tables.
//!
//! Grants are checked as Xen checks them: every map and every copy reads the entry, sets the in-use bits that
//! make a revocation fail, and clears them afterwards. What a domain writes into its memory or grant table
//! cannot harm another.
//!
//! Its limits: the checks run in the grantee's process, so they do not stop a process that bypasses this
//! library; and nothing here costs what a hypercall, an interrupt or a TLB flush costs.

mod connection;
pub mod control;
mod event;
mod frames;
mod grantee;
mod granting;
mod memory;
pub mod protocol;
pub mod table;

use crate::claim::claim;
use crate::{
    Access, Error, EventChannel, GrantCopier, GrantedPages, MappedGrants, Platform, Result,
};
use connection::Connection;
use grantee::{Copier, Peer};
use granting::OwnDomain;
use protocol::{HYPERVISOR_SOCKET, XENSTORE_SOCKET, domain_dir};
use ring_proto::{DomId, GrantRef, Port, SharedMemory};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Event channel ports of a domain: Xen's `EVTCHN_2L_NR_CHANNELS`, the limit of the two-level ABI
/// on 64 bits. Ports start at 1.
pub const MAX_PORTS: usize = 4096;

/// A domain of the embedded platform, seen from the process that is attached to it.
///
/// The process stops being the domain when this value and everything made from it are dropped.
#[derive(Debug)]
pub struct EmbeddedPlatform {
    dir: PathBuf,
    connection: Arc<Connection>,
    own: Arc<OwnDomain>,
    /// Kept alive by the maps and copiers made from them: each holds the memory of its domain.
    peers: Mutex<HashMap<DomId, Weak<Peer>>>,
}

impl EmbeddedPlatform {
    /// Becomes `domain`, a name or a number, of the broker in `dir`.
    ///
    /// # Errors
    /// When there is no broker or no such domain, or another process is attached to it.
    pub fn attach(dir: &Path, domain: &str) -> Result<Arc<Self>> {
        let domid = match domain.parse() {
            Ok(domid) => DomId(domid),
            Err(_) => control::find_domain(dir, domain)?,
        };
        let dir = domain_dir(dir, domid);
        let (connection, [memory, grants]) =
            Connection::attach(&dir.join(HYPERVISOR_SOCKET), domid)?;
        let connection = Arc::new(connection);
        let own = Arc::new(OwnDomain::new(Arc::clone(&connection), memory, &grants)?);
        Ok(Arc::new(Self { dir, connection, own, peers: Mutex::default() }))
    }

    /// The socket on which xenstore serves this domain, with its rights.
    pub fn xenstore_socket(&self) -> PathBuf {
        self.dir.join(XENSTORE_SOCKET)
    }

    /// This domain's grant table as it lies in memory, an array of `grant_entry_v1`, which a guest
    /// on Xen may write as it likes. For tests that do.
    pub fn grant_table(&self) -> Arc<dyn SharedMemory> {
        self.own.grant_table().memory()
    }

    fn peer(&self, domid: DomId) -> Result<Option<Arc<Peer>>> {
        let mut peers = locked(&self.peers);
        peers.retain(|_, peer| peer.upgrade().is_some_and(|peer| !peer.is_gone()));
        if let Some(peer) = peers.get(&domid).and_then(Weak::upgrade) {
            return Ok(Some(peer));
        }
        let peer = Peer::connect(Arc::clone(&self.connection), domid)?.map(Arc::new);
        if let Some(peer) = &peer {
            peers.insert(domid, Arc::downgrade(peer));
        }
        Ok(peer)
    }
}

impl Platform for EmbeddedPlatform {
    fn domid(&self) -> DomId {
        self.connection.domid()
    }

    fn claim(&self, device: u32) -> Result<Option<OwnedFd>> {
        // The broker ensures that the domain is one process: only that could claim a device twice.
        claim(self.own.open_memory()?, device)
    }

    fn map(&self, peer: DomId, refs: &[GrantRef], access: Access) -> Result<Arc<dyn MappedGrants>> {
        let found = self.peer(peer)?.ok_or_else(|| no_domain(peer, refs))?;
        Ok(Arc::new(grantee::map(found, refs, access)?))
    }

    fn may_pin(&self) -> bool {
        // They are pages of a memfd, accounted like any file's.
        true
    }

    fn copier(&self, peer: DomId) -> Result<Box<dyn GrantCopier>> {
        let found = self.peer(peer)?.ok_or_else(|| no_domain(peer, &[]))?;
        Ok(Box::new(Copier(found)))
    }

    fn grant(&self, peer: DomId, pages: usize, access: Access) -> Result<Box<dyn GrantedPages>> {
        Ok(Box::new(self.own.grant(peer, pages, access)?))
    }

    fn alloc_unbound(&self, peer: DomId) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(event::Channel::open(Arc::clone(&self.connection), peer, None)?))
    }

    fn bind_interdomain(&self, peer: DomId, port: Port) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(event::Channel::open(Arc::clone(&self.connection), peer, Some(port))?))
    }
}

fn no_domain(peer: DomId, refs: &[GrantRef]) -> Error {
    let gref = refs.first().copied().unwrap_or_default();
    Error::Grant { peer, gref, status: crate::GrantStatus::BadDomain }
}

/// Locks, even after a panic under the lock: no invariant here spans a call that could panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
