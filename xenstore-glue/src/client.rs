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
//! matched to requests by id, and watch events are queued at their [`Watch`], so replies and
//! events never wait for each other, however slowly events are taken (XSA-349).
//!
//! # When the connection is lost
//! The task reconnects, with growing pauses. Requests wait for that, however long it takes.
//! Unanswered ones are sent again: nobody knows whether they were carried out, and doing them
//! twice is the same as once. [`Client::transact`] starts over. A caller that cannot wait drops
//! the future. Every watch is registered again, and xenstore then fires it once: its owner reads
//! again all that it covers, as on the first event.

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

/// The most requests that may await a reply at a time; more are queued here. xenstored stops
/// reading from an unprivileged domain beyond 20 (its quota "outstanding"). Over the kernel's
/// device the limit is one.
pub const MAX_OUTSTANDING: usize = 20;
/// The most different paths that a [`Watch`] keeps while nobody takes them. Beyond that, it replaces
/// them all with one event on the watched path itself, which means "read everything again".
pub const MAX_UNDRAINED_PATHS: usize = 1024;
/// How often [`Client::transact`] tries before it gives up with [`Error::Conflict`]. libxl has no
/// bound, but a conflict that lasts this long should be reported.
pub const TRANSACTION_ATTEMPTS: u32 = 32;
/// The pause before another try when the domain has used up its transactions: about as long as one takes.
const TRANSACTION_PAUSE: Duration = Duration::from_millis(50);
/// The most transactions of [`Client::transact`] that are open at a time; more of them wait. xenstored
/// allows a domain ten (`quota_max_transaction`), and other programs need some too, such as `xl devd`.
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
    /// What libxenstore uses: the socket `$XENSTORED_PATH`, else xenstored's own socket if it
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

/// Why a xenstore operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The first connection could not be made.
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
    /// it; or the tokio runtime that ran the connection is gone, and everything with it.
    #[error("the connection to xenstore was lost")]
    ConnectionLost,
    /// The kernel refused the request.
    #[error("the xenbus device refused {request:?} of {subject}: {source}")]
    Device {
        /// What was asked.
        request: MessageType,
        /// About which path or domain.
        subject: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A path is invalid.
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
    /// Every attempt at a transaction met a conflict or lost its connection.
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
            // `E2BIG` here means one watch too many, as the reply is never long. Linux's device turns it into
            // the system call's error, and names it does not know, such as `EQUOTA`, into `EINVAL`.
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

/// A handle to a connection to xenstore, which ends with its last handle, watch and transaction.
///
/// Reads and writes are in [`Nodes`], which this dereferences to, as [`Transaction`] does:
/// what takes a `&Nodes` works in and out of transactions.
#[derive(Clone, Debug)]
pub struct Client {
    nodes: Nodes,
    /// Permits for open transactions.
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
    /// [`Error::Refused`] (`ENOSPC`: too many watches; reported by [`Watch::next`] instead if the
    /// connection was lost meanwhile), [`Error::Path`].
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

    /// Runs `body` in a transaction and commits it. On a conflict or a lost connection, repeats all
    /// of it, up to [`TRANSACTION_ATTEMPTS`] times. `body` must have no effect except through the
    /// transaction.
    ///
    /// xenstored copies a node into a transaction when it is first touched. A transaction that will meet a
    /// conflict may therefore see half of a change, and a request in it may be refused because of that. So
    /// a refusal ends the attempts only the second time.
    ///
    /// The connection may be lost after xenstore has committed, but before it says so. `body` then
    /// sees its own writes, and [`Transaction::may_be_done`] returns `true`.
    ///
    /// # Errors
    /// What `body` returns (except the first [`Error::Refused`]), after the transaction is dropped; what
    /// [`transaction`](Self::transaction) and [`Transaction::commit`] return;
    /// [`Error::Conflict`].
    pub async fn transact<T>(&self, body: impl AsyncFn(&Transaction) -> Result<T>) -> Result<T> {
        // The semaphore is never closed.
        let _permit = self.transactions.acquire().await;
        let (mut may_be_done, mut refused) = (false, false);
        for attempt in 1..=TRANSACTION_ATTEMPTS {
            let mut transaction = match self.transaction().await {
                // The domain's quota is used up, perhaps by other programs.
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
    /// As [`Nodes::read`]; `ENOENT` also if the request had to be sent a second time.
    pub async fn release(&self, domid: u16) -> Result<()> {
        self.nodes.acknowledged(Request::Release(domid)).await
    }
}
