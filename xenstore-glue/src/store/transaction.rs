use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::domain::Who;
use super::quota;
use super::tree::{Node, Tree};
use super::watch::Change;
use crate::wire::Errno;

/// The nodes that a transaction has read or written, as it sees them.
///
/// As in xenstored, a node is copied when it is first touched. A commit succeeds only if all of
/// these nodes still have the generation they were copied at. So all reads were of one state of
/// the store, and nobody's change is lost.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    touched: HashMap<Box<str>, Touched>,
    /// To be fired by the commit, one per path.
    changes: Vec<Change>,
    /// It touched more nodes than it may.
    failed: bool,
}

#[derive(Debug)]
struct Touched {
    /// The generation of the store's node when it was copied; `None` if there was none.
    generation: Option<u64>,
    node: Option<Node>,
    modified: bool,
}

impl Transaction {
    fn touch(&mut self, tree: &Tree, who: Who, path: &str) -> Result<&mut Touched, Errno> {
        let full = !who.is_privileged() && self.touched.len() >= quota::TRANSACTION_NODES;
        match self.touched.entry(path.into()) {
            Entry::Occupied(touched) => Ok(touched.into_mut()),
            Entry::Vacant(_) if full => {
                self.failed = true;
                Err(Errno::Enospc)
            }
            Entry::Vacant(vacant) => {
                let node = tree.get(path);
                Ok(vacant.insert(Touched {
                    generation: node.map(|node| node.generation),
                    node: node.cloned(),
                    modified: false,
                }))
            }
        }
    }

    /// How many nodes a domain would own after a commit.
    fn owned(&self, tree: &Tree, domid: u16) -> usize {
        let owns = |node: Option<&Node>| node.is_some_and(|node| node.first.domid == domid);
        let mut owned = tree.owned(domid);
        for (path, touched) in self.touched.iter().filter(|(_, touched)| touched.modified) {
            match (owns(tree.get(path)), owns(touched.node.as_ref())) {
                (false, true) => owned += 1,
                (true, false) => owned = owned.saturating_sub(1),
                _ => {}
            }
        }
        owned
    }

    /// Applies the changes to the store, and returns them.
    ///
    /// # Errors
    /// `EAGAIN` after a conflict; `ENOSPC`, `ENOMEM` for a quota. In either case nothing is changed.
    pub(super) fn commit(self, tree: &mut Tree, who: Who) -> Result<Vec<Change>, Errno> {
        if self.failed {
            return Err(Errno::Enomem);
        }
        let owned = self.owned(tree, who.domid);
        if !who.is_privileged() && owned > quota::NODES && owned > tree.owned(who.domid) {
            return Err(Errno::Enospc);
        }
        let generation = |path: &str| tree.get(path).map(|node| node.generation);
        if self.touched.iter().any(|(path, touched)| touched.generation != generation(path)) {
            return Err(Errno::Eagain);
        }
        for (path, touched) in self.touched {
            if touched.modified {
                tree.put(&path, touched.node);
            }
        }
        Ok(self.changes)
    }
}

/// The tree as one domain sees and changes it, in a transaction or directly.
pub(super) struct View<'a> {
    tree: &'a mut Tree,
    pub(super) who: Who,
    transaction: Option<&'a mut Transaction>,
    /// Changes made directly.
    changes: Vec<Change>,
}

impl<'a> View<'a> {
    pub(super) fn direct(tree: &'a mut Tree, who: Who) -> Self {
        Self { tree, who, transaction: None, changes: Vec::new() }
    }

    pub(super) fn within(tree: &'a mut Tree, who: Who, transaction: &'a mut Transaction) -> Self {
        Self { tree, who, transaction: Some(transaction), changes: Vec::new() }
    }

    /// The changes to fire, if this view is direct.
    pub(super) fn into_changes(self) -> Vec<Change> {
        self.changes
    }

    pub(super) fn get(&mut self, path: &str) -> Result<Option<&Node>, Errno> {
        match &mut self.transaction {
            None => Ok(self.tree.get(path)),
            Some(transaction) => Ok(transaction.touch(self.tree, self.who, path)?.node.as_ref()),
        }
    }

    pub(super) fn put(&mut self, path: &str, node: Option<Node>) -> Result<(), Errno> {
        match &mut self.transaction {
            None => self.tree.put(path, node),
            Some(transaction) => {
                let generation = self.tree.next_generation();
                let touched = transaction.touch(self.tree, self.who, path)?;
                touched.node = node.map(|node| Node { generation, ..node });
                touched.modified = true;
            }
        }
        Ok(())
    }

    /// Changes a node in place, if it exists.
    pub(super) fn update(
        &mut self,
        path: &str,
        change: impl FnOnce(&mut Node),
    ) -> Result<(), Errno> {
        match &mut self.transaction {
            None => self.tree.update(path, change),
            Some(transaction) => {
                let generation = self.tree.next_generation();
                let touched = transaction.touch(self.tree, self.who, path)?;
                if let Some(node) = &mut touched.node {
                    change(node);
                    node.generation = generation;
                    touched.modified = true;
                }
            }
        }
        Ok(())
    }

    /// Paths of the matching nodes in the store itself.
    pub(super) fn find(&self, is_wanted: impl Fn(&Node) -> bool) -> Vec<Box<str>> {
        self.tree.find(is_wanted)
    }

    pub(super) fn owned(&self, domid: u16) -> usize {
        match &self.transaction {
            None => self.tree.owned(domid),
            Some(transaction) => transaction.owned(self.tree, domid),
        }
    }

    /// Records a change for watches, to be fired at once or by the commit.
    pub(super) fn changed(&mut self, change: Change) {
        let Some(transaction) = &mut self.transaction else { return self.changes.push(change) };
        match transaction.changes.iter_mut().find(|known| known.path == change.path) {
            Some(known) => known.merge(change),
            None => transaction.changes.push(change),
        }
    }
}
