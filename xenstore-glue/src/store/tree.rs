use std::collections::{BTreeSet, HashMap};

use super::quota;
use crate::wire::Perm;

/// A node. Its path is its key in the [`Tree`].
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) value: Vec<u8>,
    /// The owner, and the rights of domains not listed.
    pub(super) first: Perm,
    /// The rights of listed domains.
    pub(super) others: Vec<Perm>,
    pub(super) children: BTreeSet<Box<str>>,
    /// Different after every change to the node, its list of children included.
    pub(super) generation: u64,
}

impl Node {
    /// A node without value and children, and with the permissions given.
    pub(super) fn new(first: Perm, others: Vec<Perm>) -> Self {
        Self { value: Vec::new(), first, others, children: BTreeSet::new(), generation: 0 }
    }

    pub(super) fn perms(&self) -> Vec<Perm> {
        std::iter::once(self.first).chain(self.others.iter().copied()).collect()
    }

    /// Bytes, as [`quota::NODE_BYTES`] counts them.
    pub(super) fn bytes(&self) -> usize {
        let names: usize = self.children.iter().map(|name| name.len() + 1).sum();
        self.value.len() + names + (1 + self.others.len()) * quota::PERM_BYTES
    }
}

/// All nodes by absolute path. A node's parent is there too; the special watches stand alone.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: HashMap<Box<str>, Node>,
    /// How many nodes a domain owns.
    owned: HashMap<u16, usize>,
    generation: u64,
}

impl Tree {
    pub(super) fn new(roots: &[&str], perm: Perm) -> Self {
        let mut tree = Self { nodes: HashMap::new(), owned: HashMap::new(), generation: 0 };
        for root in roots {
            tree.put(root, Some(Node::new(perm, Vec::new())));
        }
        tree
    }

    pub(super) fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// Replaces or removes a node, and nothing else: the caller updates its parent's list of children.
    pub(super) fn put(&mut self, path: &str, node: Option<Node>) {
        let owner = node.as_ref().map(|node| node.first.domid);
        let generation = self.next_generation();
        let old = match node {
            Some(node) => self.nodes.insert(path.into(), Node { generation, ..node }),
            None => self.nodes.remove(path),
        };
        self.count(old.map(|node| node.first.domid), owner);
    }

    /// Changes a node in place, if it exists.
    pub(super) fn update(&mut self, path: &str, change: impl FnOnce(&mut Node)) {
        let generation = self.next_generation();
        if let Some(node) = self.nodes.get_mut(path) {
            let owner = node.first.domid;
            change(node);
            node.generation = generation;
            let new_owner = node.first.domid;
            self.count(Some(owner), Some(new_owner));
        }
    }

    pub(super) fn owned(&self, domid: u16) -> usize {
        self.owned.get(&domid).copied().unwrap_or(0)
    }

    pub(super) fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// Paths of the nodes for which `is_wanted` holds.
    pub(super) fn find(&self, is_wanted: impl Fn(&Node) -> bool) -> Vec<Box<str>> {
        let wanted = self.nodes.iter().filter(|(_, node)| is_wanted(node));
        wanted.map(|(path, _)| path.clone()).collect()
    }

    fn count(&mut self, loses: Option<u16>, gains: Option<u16>) {
        if loses == gains {
            return;
        }
        if let Some(owner) = gains {
            *self.owned.entry(owner).or_default() += 1;
        }
        if let Some(owner) = loses {
            let count = self.owned.entry(owner).or_default();
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.owned.remove(&owner);
            }
        }
    }
}

/// The path of a node's parent; the root is its own parent.
pub(super) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(slash) => &path[..slash],
    }
}

/// The last part of a path.
pub(super) fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The path of a node's child.
pub(super) fn child(path: &str, name: &str) -> String {
    if path == "/" { format!("/{name}") } else { format!("{path}/{name}") }
}

/// Whether `path` is `root` or below it.
pub(super) fn is_within(path: &str, root: &str) -> bool {
    match path.strip_prefix(root) {
        Some(rest) => rest.is_empty() || rest.starts_with('/') || root == "/",
        None => false,
    }
}
