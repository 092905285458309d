use super::{DOM0, Store};
use crate::wire::{Errno, Path, Perm, Reply, Request};

/// The host process's access to the store, as dom0 and outside of transactions.
///
/// All of these fail with `EINVAL` for a bad path, and otherwise as their requests do.
impl Store {
    /// Reads a value.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        match self.apply(DOM0, Request::Read(checked(path)?))? {
            Reply::Read(value) => Ok(value),
            _ => Err(Errno::Eio),
        }
    }

    /// Writes a value, creating the node and its parents.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Errno> {
        let value = value.to_vec();
        self.apply(DOM0, Request::Write { path: checked(path)?, value }).map(drop)
    }

    /// Creates a node and its parents, if missing.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn mkdir(&mut self, path: &str) -> Result<(), Errno> {
        self.apply(DOM0, Request::Mkdir(checked(path)?)).map(drop)
    }

    /// Removes a node and all below it. A missing node is no error.
    ///
    /// # Errors
    /// `EINVAL` for the root.
    pub fn rm(&mut self, path: &str) -> Result<(), Errno> {
        match self.apply(DOM0, Request::Rm(checked(path)?)) {
            Err(Errno::Enoent) => Ok(()),
            other => other.map(drop),
        }
    }

    /// The names of a node's children, however many.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn directory(&mut self, path: &str) -> Result<Vec<String>, Errno> {
        match self.apply(DOM0, Request::Directory(checked(path)?))? {
            Reply::Directory(names) => Ok(names),
            _ => Err(Errno::Eio),
        }
    }

    /// Reads a permission list; the first entry is the owner's.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn get_perms(&mut self, path: &str) -> Result<Vec<Perm>, Errno> {
        match self.apply(DOM0, Request::GetPerms(checked(path)?))? {
            Reply::GetPerms(perms) => Ok(perms),
            _ => Err(Errno::Eio),
        }
    }

    /// Replaces the permission list of a node or a special watch; the first entry is the owner's.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` for an empty list.
    pub fn set_perms(&mut self, path: &str, perms: &[Perm]) -> Result<(), Errno> {
        let perms = perms.to_vec();
        self.apply(DOM0, Request::SetPerms { path: checked(path)?, perms }).map(drop)
    }
}

fn checked(path: &str) -> Result<Path, Errno> {
    Path::new(path).map_err(|_| Errno::Einval)
}
