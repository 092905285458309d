use super::transaction::View;
use super::tree::Node;
use super::watch::Change;
use super::{DOM0, INTRODUCE_DOMAIN, Output, RELEASE_DOMAIN, Store};
use crate::wire::{Access, Errno, Path, Perm, Reply, Request};

/// An introduced domain.
#[derive(Debug, Default)]
pub(super) struct Domain {
    /// The domain whose rights it has in addition to its own (`SET_TARGET`).
    pub(super) target: Option<u16>,
}

/// The requester.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who {
    pub(super) domid: u16,
    pub(super) target: Option<u16>,
}

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    Read,
    Write,
    /// Change its permissions.
    Own,
}

impl Who {
    pub(super) fn is_privileged(self) -> bool {
        self.domid == 0
    }

    pub(super) fn may(self, node: &Node, right: Right) -> bool {
        self.allowed(node.first, &node.others, right)
    }

    /// The same, by a permission list, whose first entry is the owner's.
    pub(super) fn may_by(self, perms: &[Perm], right: Right) -> bool {
        perms.split_first().is_some_and(|(first, others)| self.allowed(*first, others, right))
    }

    fn allowed(self, first: Perm, others: &[Perm], right: Right) -> bool {
        let is_me = |perm: &&Perm| perm.domid == self.domid || Some(perm.domid) == self.target;
        if self.is_privileged() || is_me(&&first) {
            return true;
        }
        let access = others.iter().find(is_me).unwrap_or(&first).access;
        match right {
            Right::Read => access.reads(),
            Right::Write => access.writes(),
            Right::Own => false,
        }
    }

    /// The absolute form of a path.
    pub(super) fn path(self, path: &Path) -> Result<Path, Errno> {
        path.resolve(self.domid).map_err(|_| Errno::Einval)
    }
}

/// Whether only dom0 may ask for this.
pub(super) fn is_privileged(request: &Request) -> bool {
    matches!(
        request,
        Request::Control(_)
            | Request::Introduce { .. }
            | Request::Release(_)
            | Request::IsDomainIntroduced(_)
            | Request::Resume(_)
            | Request::SetTarget { .. }
    )
}

/// Whether [`Store::manage`] handles this.
pub(super) fn is_about_domains(request: &Request) -> bool {
    matches!(
        request,
        Request::Introduce { .. }
            | Request::Release(_)
            | Request::GetDomainPath(_)
            | Request::IsDomainIntroduced(_)
            | Request::Resume(_)
            | Request::SetTarget { .. }
    )
}

impl Store {
    pub(super) fn manage(&mut self, request: &Request) -> Result<Reply, Errno> {
        match *request {
            // There are no event channels here, but xenstored insists on one.
            Request::Introduce { port: 0, .. } => return Err(Errno::Einval),
            Request::Introduce { domid, .. } => self.introduce(domid)?,
            Request::Release(domid) => self.release(domid)?,
            Request::GetDomainPath(domid) => {
                let path = Path::new(&format!("/local/domain/{domid}"));
                return path.map(Reply::GetDomainPath).map_err(|_| Errno::Einval);
            }
            Request::IsDomainIntroduced(domid) => {
                return Ok(Reply::IsDomainIntroduced(self.domains.contains_key(&domid)));
            }
            Request::Resume(domid) => drop(self.domains.get(&domid).ok_or(Errno::Enoent)?),
            Request::SetTarget { domid, target } => {
                if !self.domains.contains_key(&target) {
                    return Err(Errno::Enoent);
                }
                self.domains.get_mut(&domid).ok_or(Errno::Enoent)?.target = Some(target);
            }
            _ => return Err(Errno::Enosys),
        }
        Ok(Reply::Ok(request.kind()))
    }

    /// Makes a domain known, so that it may connect, and fires `@introduceDomain`. A domain that is
    /// known already loses its watches and transactions, as if its kernel had restarted.
    ///
    /// # Errors
    /// `EINVAL` for dom0.
    pub fn introduce(&mut self, domid: u16) -> Result<(), Errno> {
        if domid == 0 {
            return Err(Errno::Einval);
        }
        if self.domains.insert(domid, Domain::default()).is_none() {
            self.fire(&[Change::within(INTRODUCE_DOMAIN)]);
        }
        let connections = self.connections.values_mut();
        connections.filter(|connection| connection.domid == domid).for_each(|c| c.reset());
        Ok(())
    }

    /// Forgets a domain: closes its connections, removes the nodes it owns with all below them,
    /// removes it from all permission lists, lest a later domain of the same number inherit its
    /// rights (XSA-322), and fires `@releaseDomain`.
    ///
    /// # Errors
    /// `EINVAL` for dom0, `ENOENT` for a domain that is not introduced.
    pub fn release(&mut self, domid: u16) -> Result<(), Errno> {
        if domid == 0 {
            return Err(Errno::Einval);
        }
        self.domains.remove(&domid).ok_or(Errno::Enoent)?;
        for domain in self.domains.values_mut() {
            domain.target = domain.target.filter(|target| *target != domid);
        }
        self.connections.retain(|id, connection| {
            let stays = connection.domid != domid;
            if !stays {
                self.outputs.push(Output::Close(*id));
            }
            stays
        });

        let mut view = View::direct(&mut self.tree, DOM0);
        for path in view.find(|node| node.first.domid == domid) {
            match &*path {
                "/" | INTRODUCE_DOMAIN | RELEASE_DOMAIN => {
                    view.update(&path, |node| node.first = Perm::new(0, Access::None))?;
                }
                path if view.get(path)?.is_some() => view.remove(path)?,
                _ => {}
            }
        }
        for path in view.find(|node| node.others.iter().any(|perm| perm.domid == domid)) {
            view.update(&path, |node| node.others.retain(|perm| perm.domid != domid))?;
        }
        let mut changes = view.into_changes();
        changes.push(Change::within(RELEASE_DOMAIN));
        self.fire(&changes);
        Ok(())
    }
}
