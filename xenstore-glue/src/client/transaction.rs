use std::ops::Deref;

use tokio::sync::mpsc;

use super::connection::{Command, TransactionId};
use super::{Nodes, Result};
use crate::wire::{Errno, Request};

/// A transaction: reads see each node as it is when the transaction first touches it, writes are seen by nobody
/// else until [`commit`](Self::commit), which fails as a whole if anything that was read or written
/// here was changed by others meanwhile.
///
/// Dropping it drops its writes. It does not survive a lost connection.
#[derive(Debug)]
pub struct Transaction {
    nodes: Nodes,
    guard: Guard,
    pub(super) may_be_done: bool,
}

/// How a commit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "after a conflict nothing was written"]
pub enum Commit {
    /// All writes are in the store.
    Committed,
    /// No writes are: others changed something that the transaction used. Start again.
    Conflict,
}

impl Deref for Transaction {
    type Target = Nodes;

    fn deref(&self) -> &Nodes {
        &self.nodes
    }
}

impl Transaction {
    pub(super) fn new(nodes: &Nodes, guard: Guard) -> Self {
        Self { nodes: nodes.within(guard.id), guard, may_be_done: false }
    }

    /// Whether an earlier attempt of the same [`Client::transact`](super::Client::transact) may
    /// have been committed: its connection was lost before xenstore answered.
    pub fn may_be_done(&self) -> bool {
        self.may_be_done
    }

    /// Ends the transaction and keeps its writes.
    ///
    /// # Errors
    /// [`Error::Refused`](super::Error::Refused): `ENOSPC` or `ENOMEM`, a quota is exceeded.
    /// [`Error::ConnectionLost`](super::Error::ConnectionLost): whether it was committed is
    /// unknown.
    pub async fn commit(mut self) -> Result<Commit> {
        let ended = self.nodes.acknowledged(Request::TransactionEnd { commit: true }).await;
        // Only now is the id spent. If this future is dropped earlier, the request may never be sent, and
        // the abort then ends the transaction. If it was sent, the abort finds nothing left to end.
        self.guard.armed = false;
        match ended {
            Ok(()) => Ok(Commit::Committed),
            Err(error) if error.errno() == Some(Errno::Eagain) => Ok(Commit::Conflict),
            Err(error) => Err(error),
        }
    }
}

/// Ends the transaction in xenstore when it is dropped, wherever that happens: with the
/// [`Transaction`], or on its way to a caller that has gone.
#[derive(Debug)]
pub(super) struct Guard {
    id: TransactionId,
    commands: mpsc::UnboundedSender<Command>,
    armed: bool,
}

impl Guard {
    pub(super) fn new(id: TransactionId, commands: mpsc::UnboundedSender<Command>) -> Self {
        Self { id, commands, armed: true }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.armed {
            let _ = self.commands.send(Command::Abort(self.id));
        }
    }
}
