use super::domain::{Right, Who};
use super::quota;
use super::transaction::View;
use super::tree::{Node, child, name, parent};
use super::watch::Change;
use crate::wire::{Errno, PAYLOAD_MAX, Path, Perm, Reply, Request};

/// The requests about nodes.
impl View<'_> {
    pub(super) fn handle(&mut self, request: Request) -> Result<Reply, Errno> {
        let kind = request.kind();
        match request {
            Request::Directory(path) => {
                let node = self.node(&self.who.node_path(&path)?, Right::Read)?;
                Ok(Reply::Directory(node.children.iter().map(|name| name.to_string()).collect()))
            }
            Request::DirectoryPart { path, offset } => {
                let node = self.node(&self.who.node_path(&path)?, Right::Read)?;
                Ok(directory_part(node, usize::try_from(offset).unwrap_or(usize::MAX)))
            }
            Request::Read(path) => {
                let node = self.node(&self.who.node_path(&path)?, Right::Read)?;
                Ok(Reply::Read(node.value.clone()))
            }
            Request::Write { path, value } => {
                self.write(&self.who.node_path(&path)?, Some(value))?;
                Ok(Reply::Ok(kind))
            }
            Request::Mkdir(path) => {
                self.write(&self.who.node_path(&path)?, None)?;
                Ok(Reply::Ok(kind))
            }
            Request::Rm(path) => {
                self.rm(&self.who.node_path(&path)?)?;
                Ok(Reply::Ok(kind))
            }
            Request::GetPerms(path) => {
                let node = self.node(&self.who.path(&path)?, Right::Read)?;
                Ok(Reply::GetPerms(node.perms()))
            }
            Request::SetPerms { path, perms } => {
                self.set_perms(&self.who.path(&path)?, &perms)?;
                Ok(Reply::Ok(kind))
            }
            // CONTROL; the rest never gets here.
            _ => Err(Errno::Enosys),
        }
    }

    /// A node that exists and to which `who` has this right.
    ///
    /// # Errors
    /// `EACCES`; `ENOENT` only if `who` has this right to the nearest existing parent.
    fn node(&mut self, path: &str, right: Right) -> Result<&Node, Errno> {
        let who = self.who;
        if !self.get(path)?.is_some_and(|node| who.may(node, right)) {
            return Err(self.why_not(path, right)?);
        }
        self.get(path)?.ok_or(Errno::Enoent)
    }

    fn why_not(&mut self, path: &str, right: Right) -> Result<Errno, Errno> {
        let who = self.who;
        let mut nearest = path;
        if self.get(path)?.is_some() {
            return Ok(Errno::Eacces);
        }
        while nearest != "/" {
            nearest = parent(nearest);
            if let Some(node) = self.get(nearest)? {
                let may_know = who.may(node, right);
                return Ok(if may_know { Errno::Enoent } else { Errno::Eacces });
            }
        }
        Ok(Errno::Eacces)
    }

    /// Writes a value; without one, only makes sure that the node exists.
    fn write(&mut self, path: &str, value: Option<Vec<u8>>) -> Result<(), Errno> {
        match (self.node(path, Right::Write), value) {
            (Ok(_), None) => return Ok(()),
            (Ok(node), Some(value)) => {
                let bytes = node.bytes() - node.value.len() + value.len();
                self.who.check_node_bytes(bytes)?;
                self.update(path, |node| node.value = value)?;
            }
            (Err(Errno::Enoent), value) => self.create(path, value.unwrap_or_default())?,
            (Err(errno), _) => return Err(errno),
        }
        self.changed(Change::within(path));
        Ok(())
    }

    /// Creates a node and its missing parents. All checks come first, so a refusal leaves nothing behind.
    fn create(&mut self, path: &str, value: Vec<u8>) -> Result<(), Errno> {
        let mut missing = vec![path];
        let mut top = parent(path);
        while self.get(top)?.is_none() {
            missing.push(top);
            top = parent(top);
        }
        let Some(ancestor) = self.get(top)? else { return Err(Errno::Eio) };
        let (mut first, others) = (ancestor.first, ancestor.others.clone());
        let ancestor_bytes = ancestor.bytes();
        let who = self.who;
        if !who.is_privileged() {
            first.domid = who.domid;
            if self.owned(who.domid) + missing.len() > quota::NODES {
                return Err(Errno::Enospc);
            }
        }
        let mut node = Node::new(first, others);
        who.check_node_bytes(node.bytes() + value.len())?;
        who.check_node_bytes(ancestor_bytes + missing.last().map_or(0, |top| name(top).len() + 1))?;
        for new in missing.into_iter().rev() {
            self.update(parent(new), |parent| {
                parent.children.insert(name(new).into());
            })?;
            self.put(new, Some(node.clone()))?;
        }
        node.value = value;
        self.put(path, Some(node))
    }

    fn rm(&mut self, path: &str) -> Result<(), Errno> {
        match self.node(path, Right::Write).map(|_| ()) {
            // Gone is fine, unless its parent is gone too.
            Err(Errno::Enoent) if self.get(parent(path))?.is_some() => Ok(()),
            Ok(()) if path == "/" => Err(Errno::Einval),
            Ok(()) => self.remove(path),
            Err(errno) => Err(errno),
        }
    }

    /// Removes a node (not the root) and all below it, without permission checks.
    pub(super) fn remove(&mut self, path: &str) -> Result<(), Errno> {
        // Parents before children; the reverse order removes children first.
        let mut all = vec![path.to_owned()];
        let mut next = 0;
        while let Some(path) = all.get(next).cloned() {
            let children = self.get(&path)?.map(|node| node.children.clone()).unwrap_or_default();
            all.extend(children.iter().map(|name| child(&path, name)));
            next += 1;
        }
        for gone in all.iter().rev() {
            let perms = self.get(gone)?.map(Node::perms);
            let parent_perms = self.get(parent(gone))?.map(Node::perms);
            let seen_by = perms.into_iter().chain(parent_perms).collect();
            self.put(gone, None)?;
            let in_subtree = gone == path;
            self.changed(Change { path: gone.as_str().into(), in_subtree, seen_by });
        }
        self.update(parent(path), |parent| {
            parent.children.remove(name(path));
        })
    }

    fn set_perms(&mut self, path: &str, perms: &[Perm]) -> Result<(), Errno> {
        let who = self.who;
        let (first, others) = perms.split_first().ok_or(Errno::Einval)?;
        if !who.is_privileged() && perms.len() > quota::PERMS {
            return Err(Errno::Enospc);
        }
        let node = self.node(path, Right::Own)?;
        if !who.is_privileged() && first.domid != node.first.domid {
            return Err(Errno::Eperm);
        }
        let old = node.perms();
        let bytes = node.bytes() + perms.len() * quota::PERM_BYTES;
        who.check_node_bytes(bytes - old.len() * quota::PERM_BYTES)?;
        self.update(path, |node| {
            node.first = *first;
            node.others = others.to_vec();
        })?;
        // Domains that could read the node until now are told, too.
        self.changed(Change { seen_by: vec![old], ..Change::within(path) });
        Ok(())
    }
}

/// The names from a byte offset on, as many as fit in a message.
fn directory_part(node: &Node, offset: usize) -> Reply {
    let generation = node.generation;
    // Besides the generation and its nul, the end of the list takes a byte.
    let room = PAYLOAD_MAX - generation.to_string().len() - 2;
    let (mut names, mut last) = (Vec::new(), true);
    let (mut position, mut used) = (0, 0);
    for name in &node.children {
        if position >= offset {
            used += name.len() + 1;
            if used > room {
                last = false;
                break;
            }
            names.push(name.to_string());
        }
        position += name.len() + 1;
    }
    Reply::DirectoryPart { generation, names, last }
}

impl Who {
    /// The absolute path of a node, which is its key in the tree.
    fn node_path(self, path: &Path) -> Result<Path, Errno> {
        if path.is_special() { Err(Errno::Einval) } else { self.path(path) }
    }

    fn check_node_bytes(self, bytes: usize) -> Result<(), Errno> {
        let fits = self.is_privileged() || bytes <= quota::NODE_BYTES;
        if fits { Ok(()) } else { Err(Errno::Enospc) }
    }
}
