//! A xenstore client on tokio.
//!
//! ```no_run
//! # async fn example() -> Result<(), xenstore_glue::client::Error> {
//! use xenstore_glue::client::{Client, Endpoint};
//!
//! let client = Client::connect(Endpoint::from_env()).await?;
//! let name = client.read_string("/local/domain/1/name").await?;
//!
//! let mut watch = client.watch("backend/vbd").await?;
//! loop {
//!     let changed = watch.next().await?;
//!     println!("{changed} changed, and {name} may care");
//! }
//! # }
//! ```
//!
//! One task owns the connection; [`Client`]s are handles to it, cheap to clone. Replies are
//! matched to requests by their id, and watch events are put aside for their [`Watch`], so
//! neither ever waits for the other, however slowly events are taken (XSA-349).
//!
//! # When the connection is lost
//! The task connects again, with growing pauses. Requests wait for that, however long it takes:
//! those that were not answered are sent again, for whether they were carried out is unknown and
//! doing them twice is the same as once. [`Client::transact`] starts over. Whoever cannot wait
//! drops the future. Every watch is registered again, upon which xenstore fires each one once:
//! whoever owns a watch reads anew what it covers, as on its first event.

mod connection;
mod nodes;
mod transaction;
mod transport;
mod watch;

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use tokio::sync::{Semaphore, mpsc};

use crate::wire::{BadPath, Errno, MessageType, Path, Request, WireError};
use connection::{Command, Connection};
pub use nodes::Nodes;
pub use transaction::{Commit, Transaction};
pub use watch::Watch;

/// The most requests that wait for a reply at a time; more wait their turn here. xenstored stops
/// reading from an unprivileged domain beyond 20 (its quota "outstanding"). Over the kernel's device it is one.
pub const MAX_OUTSTANDING: usize = 20;
/// The most different paths that a [`Watch`] keeps while nobody takes them. Beyond, it forgets
/// them all for one event on the watched path itself, which means "read everything again".
pub const MAX_UNDRAINED_PATHS: usize = 1024;
/// How often [`Client::transact`] tries before it gives up with [`Error::Conflict`]. libxl has no
/// bound; a conflict that lasts this long is a fight that should be seen.
pub const TRANSACTION_ATTEMPTS: u32 = 32;
/// Before another try where the domain has all transactions open that it may have: as long as one takes.
const TRANSACTION_PAUSE: Duration = Duration::from_millis(50);
/// Transactions of [`Client::transact`] that are open at a time; more of them wait. xenstored lets a
/// domain have ten (`quota_max_transaction`), and there may be others in it, `xl devd` for one.
pub const MOST_TRANSACTIONS: usize = 5;

/// Where xenstore is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// xenstored's unix socket, in the domain that it runs in, or an embedded store's.
    Unix(PathBuf),
    /// The kernel's xenbus device, in every other domain: `/dev/xen/xenbus`.
    Device(PathBuf),
}

impl Endpoint {
    /// What libxenstore takes: the socket `$XENSTORED_PATH`, else xenstored's own socket if it
    /// exists, else the xenbus device.
    pub fn from_env() -> Self {
        if let Some(path) = std::env::var_os("XENSTORED_PATH") {
            return Self::Unix(path.into());
        }
        let socket = PathBuf::from("/run/xenstored/socket");
        if socket.exists() { Self::Unix(socket) } else { Self::Device("/dev/xen/xenbus".into()) }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) | Self::Device(path) => path.display().fmt(f),
        }
    }
}

/// Why something could not be had from xenstore.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There was no connection to begin with.
    #[error("cannot reach xenstore at {endpoint}: {source}; is xenstored running?")]
    Connect {
        /// Where it was looked for.
        endpoint: Endpoint,
        /// What the system said.
        source: io::Error,
    },
    /// Xenstore refused the request.
    #[error("xenstore refused {request:?} of {subject}: {errno}")]
    Refused {
        /// What was asked.
        request: MessageType,
        /// About which path or domain.
        subject: String,
        /// Why not.
        errno: Errno,
    },
    /// The connection on which a [`Transaction`] was started is gone, and the transaction with
    /// it; or the tokio runtime that held the connection is gone, and everything with it.
    #[error("the connection to xenstore was lost")]
    ConnectionLost,
    /// The kernel did not take the request.
    #[error("the xenbus device refused {request:?} of {subject}: {source}")]
    Device {
        /// What was asked.
        request: MessageType,
        /// About which path or domain.
        subject: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A path is not one.
    #[error(transparent)]
    Path(#[from] BadPath),
    /// A request is too long to send, or a reply makes no sense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A value that should be text is not UTF-8.
    #[error("the value of {path} is not UTF-8")]
    NotText {
        /// The node.
        path: String,
    },
    /// A transaction met conflicting changes, or lost its connection, as often as it was tried.
    #[error("a xenstore transaction met other changes or was cut off {TRANSACTION_ATTEMPTS} times")]
    Conflict,
}

impl Error {
    /// Xenstore's own error, if it is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether this domain has used up a quota of xenstored's: nodes, watches, transactions.
    pub fn is_quota(&self) -> bool {
        match self {
            // One watch too many: of a watch there is nothing long to answer. Linux's device makes a system
            // call's error of it, and `EINVAL` of those it does not know, such as oxenstored's `EQUOTA`.
            Self::Refused { request: MessageType::Watch, errno: Errno::E2big, .. } => true,
            Self::Device { request: MessageType::Watch, source, .. } => matches!(
                source.kind(),
                io::ErrorKind::ArgumentListTooLong
                    | io::ErrorKind::StorageFull
                    | io::ErrorKind::InvalidInput
            ),
            _ => matches!(self.errno(), Some(Errno::Enospc | Errno::Equota)),
        }
    }

    /// Whether the node does not exist.
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(Errno::Enoent)
    }
}

/// What the methods here return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A handle to a connection to xenstore; it ends with the last handle, watch and transaction.
///
/// Reads and writes are in [`Nodes`], which this dereferences to, as [`Transaction`] does:
/// what takes a `&Nodes` works in and out of transactions.
#[derive(Clone, Debug)]
pub struct Client {
    nodes: Nodes,
    /// Of those that may be open.
    transactions: Arc<Semaphore>,
}

impl Deref for Client {
    type Target = Nodes;

    fn deref(&self) -> &Nodes {
        &self.nodes
    }
}

impl Client {
    /// Connects. Must be called in a tokio runtime, which then runs the connection's task.
    ///
    /// # Errors
    /// [`Error::Connect`], when xenstore cannot be reached for half a second. Only the first
    /// connection fails; later ones are tried until they succeed.
    pub async fn connect(endpoint: Endpoint) -> Result<Self> {
        let (commands, queue) = mpsc::unbounded_channel();
        let nodes = Nodes::new(commands, &endpoint);
        Connection::start(endpoint, queue, nodes.commands().downgrade()).await?;
        Ok(Self { nodes, transactions: Arc::new(Semaphore::new(MOST_TRANSACTIONS)) })
    }

    /// Watches a node, which need not exist, and all below it, or a special watch
    /// (`@introduceDomain`, `@releaseDomain`). The first event is on `path` itself and comes at
    /// once.
    ///
    /// # Errors
    /// [`Error::Refused`] (`ENOSPC`: too many watches; told by [`Watch::next`] if the connection
    /// was lost meanwhile), [`Error::Path`].
    pub async fn watch(&self, path: &str) -> Result<Watch> {
        Watch::register(self.nodes.commands(), Path::new(path)?).await
    }

    /// Starts a transaction.
    ///
    /// # Errors
    /// [`Error::Refused`] (`ENOSPC`: too many transactions).
    pub async fn transaction(&self) -> Result<Transaction> {
        let guard = self.nodes.ask(|reply| Command::Begin { reply }).await??;
        Ok(Transaction::new(&self.nodes, guard))
    }

    /// Runs `body` in a transaction and commits it; all of it again, up to
    /// [`TRANSACTION_ATTEMPTS`] times, when that meets a conflict or the connection is lost.
    /// `body` must have no effect but through the transaction.
    ///
    /// xenstored takes a node into a transaction when it is first touched. One that will meet a conflict may
    /// therefore see half of a change, and be refused something for that. So what xenstore refuses to `body`
    /// is its answer only when it is refused again.
    ///
    /// A connection may be lost when xenstore has committed and not yet said so: then `body`
    /// sees its own writes, and [`Transaction::may_be_done`] says that it may.
    ///
    /// # Errors
    /// What `body` returned, the transaction being dropped, but the first [`Error::Refused`]; what
    /// [`transaction`](Self::transaction) and [`Transaction::commit`] return;
    /// [`Error::Conflict`].
    pub async fn transact<T>(&self, body: impl AsyncFn(&Transaction) -> Result<T>) -> Result<T> {
        // It is never closed.
        let _permit = self.transactions.acquire().await;
        let (mut may_be_done, mut refused) = (false, false);
        for attempt in 1..=TRANSACTION_ATTEMPTS {
            let mut transaction = match self.transaction().await {
                // The domain has as many open as it may, of other programs too.
                Err(error) if error.is_quota() && attempt < TRANSACTION_ATTEMPTS => {
                    tokio::time::sleep(TRANSACTION_PAUSE).await;
                    continue;
                }
                begun => begun?,
            };
            transaction.may_be_done = may_be_done;
            let value = match body(&transaction).await {
                Err(Error::ConnectionLost) if !self.nodes.is_orphan() => continue,
                Err(Error::Refused { .. }) if !refused => {
                    refused = true;
                    continue;
                }
                done => done?,
            };
            match transaction.commit().await {
                Ok(Commit::Committed) => return Ok(value),
                Ok(Commit::Conflict) => {}
                Err(Error::ConnectionLost) if !self.nodes.is_orphan() => may_be_done = true,
                Err(error) => return Err(error),
            }
        }
        Err(Error::Conflict)
    }

    /// Makes a domain known to xenstore, by the frame of its ring page and its event channel.
    /// Privileged.
    ///
    /// # Errors
    /// As [`Nodes::read`].
    pub async fn introduce(&self, domid: u16, gfn: u64, port: u32) -> Result<()> {
        self.nodes.acknowledged(Request::Introduce { domid, gfn, port }).await
    }

    /// Makes xenstore forget a domain. Privileged.
    ///
    /// # Errors
    /// As [`Nodes::read`]; `ENOENT` is also what a release gets that had to be sent again.
    pub async fn release(&self, domid: u16) -> Result<()> {
        self.nodes.acknowledged(Request::Release(domid)).await
    }
}
