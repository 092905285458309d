use super::domain::{Right, Who};
use super::tree::{is_within, parent};
use super::{ConnectionId, Output, Store, quota};
use crate::wire::{Errno, MessageType, Path, Perm, Reply};

/// A watch of a connection.
#[derive(Debug)]
pub(super) struct Watch {
    /// Absolute, or special.
    root: Path,
    /// As the watcher gave it: events spell it the same way.
    path: Path,
    token: Vec<u8>,
}

/// Something that watches may want to know.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) path: Box<str>,
    /// Whether watches on parents are told, too. Not so for nodes below a removed one: watches on
    /// their parents are told of the removed one itself.
    pub(super) in_subtree: bool,
    /// Permissions before the change; domains that could read then are told as well.
    pub(super) seen_by: Vec<Vec<Perm>>,
}

impl Change {
    /// A node was written or created.
    pub(super) fn within(path: &str) -> Self {
        Self { path: path.into(), in_subtree: true, seen_by: Vec::new() }
    }

    /// Adds a later change of the same path.
    pub(super) fn merge(&mut self, later: Self) {
        self.in_subtree |= later.in_subtree;
        // The first permissions are those that the watcher saw before the transaction.
        if self.seen_by.is_empty() {
            self.seen_by = later.seen_by;
        }
    }
}

impl Watch {
    fn event(&self, path: Path) -> Reply {
        Reply::WatchEvent { path, token: self.token.clone() }
    }

    /// The path of the event that this watch gets for a change, if any.
    fn matches(&self, change: &Change) -> Option<Path> {
        let root = self.root.as_str();
        let hit = &*change.path == root || (change.in_subtree && is_within(&change.path, root));
        if !hit {
            return None;
        }
        let event = if self.path.is_relative() {
            // The relative path, and the rest after the watched one.
            format!("{}{}", self.path, change.path.get(root.len()..)?)
        } else {
            change.path.to_string()
        };
        Path::new(&event).ok()
    }
}

impl Store {
    pub(super) fn watch(
        &mut self,
        id: ConnectionId,
        who: Who,
        path: &Path,
        token: Vec<u8>,
    ) -> Result<Reply, Errno> {
        let root = who.path(path)?;
        let of_domain: usize = self.of_domain(who.domid).map(|other| other.watches.len()).sum();
        let connection = self.connections.get_mut(&id).ok_or(Errno::Eio)?;
        if connection.watches.iter().any(|watch| watch.root == root && watch.token == token) {
            return Err(Errno::Eexist);
        }
        if !who.is_privileged() && of_domain >= quota::WATCHES {
            return Err(Errno::Enospc);
        }
        let watch = Watch { root, path: path.clone(), token };
        self.outputs.push(Output::Event(id, watch.event(path.clone())));
        connection.watches.push(watch);
        Ok(Reply::Ok(MessageType::Watch))
    }

    pub(super) fn unwatch(
        &mut self,
        id: ConnectionId,
        who: Who,
        path: &Path,
        token: &[u8],
    ) -> Result<Reply, Errno> {
        let root = who.path(path)?;
        let watches = &mut self.connections.get_mut(&id).ok_or(Errno::Eio)?.watches;
        let position = watches.iter().position(|watch| watch.root == root && watch.token == token);
        watches.remove(position.ok_or(Errno::Enoent)?);
        Ok(Reply::Ok(MessageType::Unwatch))
    }

    /// Queues an event for every watch that a change concerns, if the watcher may know of it: it can
    /// read the node or its parent, or could before. If that is more than a connection's outbox holds,
    /// all its watches are told to [look again](Self::look_again) instead.
    pub(super) fn fire(&mut self, changes: &[Change]) {
        for (id, connection) in &self.connections {
            let target = self.domains.get(&connection.domid).and_then(|domain| domain.target);
            let who = Who { domid: connection.domid, target };
            let (before, mut bytes) = (self.outputs.len(), 0);
            for change in changes {
                let watches = connection.watches.iter();
                let mut events =
                    watches.filter_map(|watch| Some((watch, watch.matches(change)?))).peekable();
                if events.peek().is_none() {
                    continue;
                }
                let readable =
                    |path| self.tree.get(path).is_some_and(|node| who.may(node, Right::Read));
                let was_readable =
                    || change.seen_by.iter().any(|perms| who.may_by(perms, Right::Read));
                if readable(&change.path) || readable(parent(&change.path)) || was_readable() {
                    for (watch, path) in events {
                        bytes += path.len() + watch.token.len();
                        self.outputs.push(Output::Event(*id, watch.event(path)));
                    }
                }
                if bytes > quota::OUTBOX_BYTES {
                    self.outputs.truncate(before);
                    let events = self.look_again(*id);
                    self.outputs.extend(events.into_iter().map(|event| Output::Event(*id, event)));
                    break;
                }
            }
        }
    }

    /// What a connection gets instead of more events than its outbox holds: one event for each watch, on
    /// its own path, as at registration. It means that anything below may have changed.
    pub(super) fn look_again(&self, id: ConnectionId) -> Vec<Reply> {
        let watches = self.connections.get(&id).map(|connection| &connection.watches);
        watches.into_iter().flatten().map(|watch| watch.event(watch.path.clone())).collect()
    }
}
