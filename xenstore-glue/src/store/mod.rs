//! An embedded xenstore: the protocol of [`wire`](crate::wire) and the rules of Xen's C
//! xenstored, for hosts without Xen and for tests.
//!
//! [`Store`] is the tree with its owners, permissions, transactions, watches and quotas; it does
//! no I/O. [`Server`] puts it on unix sockets. Each socket speaks for one domain, so anyone who
//! may open a socket may act as that domain: restrict each by file permissions.
//!
//! ```
//! # async fn example() -> std::io::Result<()> {
//! use xenstore_glue::store::Server;
//!
//! let server = Server::new();
//! server.listen("/run/demo/xenstored", 0)?;
//! server.with_store(|store| {
//!     store.introduce(1)?;
//!     store.write("/local/domain/1/name", b"guest")
//! }).expect("dom0 may do anything");
//! server.listen("/run/demo/domain-1", 1)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Where it differs from xenstored
//! Children are listed in the order of their names. Events follow the reply of the request that
//! caused them. `CONTROL` is not supported (`ENOSYS`). There is no quota on total memory; the
//! other quotas bound it. Any domain number may be given permissions, since there is no
//! hypervisor to ask whether it exists.

mod domain;
mod host;
mod nodes;
mod outbox;
pub mod quota;
mod server;
mod transaction;
mod tree;
mod watch;

use std::collections::BTreeMap;

use crate::wire::{Access, Errno, MessageType, Perm, Reply, Request};
use domain::{Domain, Who};
pub use server::Server;
use transaction::{Transaction, View};
use tree::Tree;
use watch::Watch;

/// Dom0, the identity of all requests made in process.
const DOM0: Who = Who { domid: 0, target: None };
/// The special watches, which are nodes too: a domain that may read one gets its events.
const INTRODUCE_DOMAIN: &str = "@introduceDomain";
const RELEASE_DOMAIN: &str = "@releaseDomain";

/// A connection to a [`Store`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(u64);

/// What a [`Store`] wants its host to do, in order, after a request or any other call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this watch event.
    Event(ConnectionId, Reply),
    /// Close this connection, which the store has forgotten: its domain was released.
    Close(ConnectionId),
}

/// The store, without I/O: requests in, replies and [`Output`] out.
///
/// A host in the same process reads and writes as dom0, with the methods named after the
/// requests; see [`Server::with_store`].
#[derive(Debug)]
pub struct Store {
    tree: Tree,
    /// Introduced domains, always including dom0.
    domains: BTreeMap<u16, Domain>,
    connections: BTreeMap<ConnectionId, Connection>,
    next_connection: u64,
    outputs: Vec<Output>,
}

#[derive(Debug)]
struct Connection {
    domid: u16,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    next_transaction: u32,
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// A store with only the root and the special watches in it, all accessible to dom0 alone.
    pub fn new() -> Self {
        let roots = ["/", INTRODUCE_DOMAIN, RELEASE_DOMAIN];
        Self {
            tree: Tree::new(&roots, Perm::new(0, Access::None)),
            domains: BTreeMap::from([(0, Domain::default())]),
            connections: BTreeMap::new(),
            next_connection: 0,
            outputs: Vec::new(),
        }
    }

    /// Opens a connection for a domain; `None` if the domain is not introduced or has
    /// [`quota::CONNECTIONS`] already.
    pub fn connect(&mut self, domid: u16) -> Option<ConnectionId> {
        let full = domid != 0 && self.of_domain(domid).count() >= quota::CONNECTIONS;
        if full || !self.domains.contains_key(&domid) {
            return None;
        }
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        let (watches, transactions) = (Vec::new(), BTreeMap::new());
        let connection = Connection { domid, watches, transactions, next_transaction: 1 };
        self.connections.insert(id, connection);
        Some(id)
    }

    /// Forgets a connection with its watches and transactions.
    pub fn disconnect(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
    }

    /// The domain that a connection speaks for.
    pub fn domain_of(&self, id: ConnectionId) -> Option<u16> {
        self.connections.get(&id).map(|connection| connection.domid)
    }

    /// Carries out a request of a connection. Collect [`take_outputs`](Self::take_outputs)
    /// afterwards; they come after the reply.
    ///
    /// The reply to `DIRECTORY` may be too long for a message; the host must turn it into `E2BIG`.
    pub fn handle(&mut self, id: ConnectionId, tx_id: u32, request: Request) -> Reply {
        self.try_handle(id, tx_id, request).unwrap_or_else(Reply::Error)
    }

    /// The events to send and connections to close since the last call.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    fn try_handle(
        &mut self,
        id: ConnectionId,
        tx_id: u32,
        request: Request,
    ) -> Result<Reply, Errno> {
        // The host may still hold requests of a connection that was closed.
        let connection = self.connections.get_mut(&id).ok_or(Errno::Eio)?;
        let domid = connection.domid;
        let target = self.domains.get(&domid).and_then(|domain| domain.target);
        let who = Who { domid, target };
        if domain::is_privileged(&request) && !who.is_privileged() {
            return Err(Errno::Eacces);
        }
        match request {
            Request::Watch { path, token } => self.watch(id, who, &path, token),
            Request::Unwatch { path, token } => self.unwatch(id, who, &path, &token),
            Request::TransactionStart if tx_id != 0 => Err(Errno::Ebusy),
            Request::TransactionStart => self.start_transaction(id, who),
            Request::TransactionEnd { commit } => self.end_transaction(id, who, tx_id, commit),
            Request::ResetWatches => {
                connection.reset();
                Ok(Reply::Ok(MessageType::ResetWatches))
            }
            request if domain::is_about_domains(&request) => self.manage(&request),
            request if tx_id == 0 => self.apply(who, request),
            request => {
                let transaction = connection.transactions.get_mut(&tx_id).ok_or(Errno::Enoent)?;
                View::within(&mut self.tree, who, transaction).handle(request)
            }
        }
    }

    /// A request about nodes, outside of transactions.
    fn apply(&mut self, who: Who, request: Request) -> Result<Reply, Errno> {
        let mut view = View::direct(&mut self.tree, who);
        let reply = view.handle(request);
        let changes = view.into_changes();
        self.fire(&changes);
        reply
    }

    fn start_transaction(&mut self, id: ConnectionId, who: Who) -> Result<Reply, Errno> {
        let open: usize = self.of_domain(who.domid).map(|other| other.transactions.len()).sum();
        if !who.is_privileged() && open >= quota::TRANSACTIONS {
            return Err(Errno::Enospc);
        }
        let connection = self.connections.get_mut(&id).ok_or(Errno::Eio)?;
        let mut number = connection.next_transaction;
        while number == 0 || connection.transactions.contains_key(&number) {
            number = number.wrapping_add(1);
        }
        connection.next_transaction = number.wrapping_add(1);
        connection.transactions.insert(number, Transaction::default());
        Ok(Reply::TransactionStart(number))
    }

    fn end_transaction(
        &mut self,
        id: ConnectionId,
        who: Who,
        tx_id: u32,
        commit: bool,
    ) -> Result<Reply, Errno> {
        let connection = self.connections.get_mut(&id).ok_or(Errno::Eio)?;
        let transaction = connection.transactions.remove(&tx_id).ok_or(Errno::Enoent)?;
        if commit {
            let changes = transaction.commit(&mut self.tree, who)?;
            self.fire(&changes);
        }
        Ok(Reply::Ok(MessageType::TransactionEnd))
    }

    /// The connections of a domain: quotas are a domain's, however many connections it has.
    fn of_domain(&self, domid: u16) -> impl Iterator<Item = &Connection> {
        self.connections.values().filter(move |connection| connection.domid == domid)
    }
}

impl Connection {
    fn reset(&mut self) {
        self.watches.clear();
        self.transactions.clear();
    }
}

#[cfg(test)]
mod tests;
