//! The domains, as the hypervisor knows them.

use super::memory::memory_file;
use super::ports::Ports;
use ring_proto::DomId;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use tokio::sync::Notify;
use xen_platform::Result;
use xen_platform::embedded::control::{DomainInfo, MAX_MEMORY, MAX_NAME, MIN_MEMORY, NewDomain};
use xen_platform::embedded::protocol::{Refusal, Reply, Request, VERSION};
use xen_platform::embedded::table::{ActiveTable, GrantTable};

const PAGE: u64 = ring_proto::abi::PAGE_SIZE as u64;

/// Most vCPUs of a domain: `HVM_MAX_VCPUS` of Xen's arch-x86/hvm/hvm_info_table.h.
pub(super) const MAX_VCPUS: u32 = 128;

/// All domains.
#[derive(Debug)]
pub(super) struct Host {
    domains: BTreeMap<u16, Domain>,
    /// Numbers are not reused soon, as in Xen.
    next_domid: u16,
}

#[derive(Debug)]
struct Domain {
    created: NewDomain,
    ports: Ports,
    process: Option<Process>,
    /// Notified when the process ends.
    ended: Arc<Notify>,
}

/// What exists only while a process is attached.
#[derive(Debug)]
struct Process {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    memory: OwnedFd,
    grant_table: OwnedFd,
    active_table: OwnedFd,
    grants: GrantTable,
    active: ActiveTable,
    /// Domains whose grants it may use.
    peers: BTreeSet<u16>,
}

impl Process {
    fn new(pid: i32, pidfd: Arc<OwnedFd>, domain: &NewDomain) -> Result<Self> {
        let bytes = usize::try_from(domain.memory).unwrap_or(usize::MAX);
        let memory = memory_file(&domain.name, bytes)?;
        let grant_table = memory_file(&domain.name, GrantTable::BYTES)?;
        let active_table = memory_file(&domain.name, ActiveTable::BYTES)?;
        let grants = GrantTable::map(grant_table.as_fd())?;
        let active = ActiveTable::map(active_table.as_fd())?;
        let peers = BTreeSet::new();
        Ok(Self { pid, pidfd, memory, grant_table, active_table, grants, active, peers })
    }
}

/// Sends a reply with its descriptors.
pub(super) type Send<'a> = &'a mut dyn FnMut(&Reply, &[BorrowedFd<'_>]) -> io::Result<()>;

impl Host {
    pub(super) fn new() -> Self {
        Self { domains: BTreeMap::new(), next_domid: 0 }
    }

    /// Checks a new domain and gives it a number.
    pub(super) fn create(&mut self, mut new: NewDomain) -> Result<DomainInfo, String> {
        let name = &new.name;
        if name.is_empty() || name.len() > MAX_NAME || name.parse::<u64>().is_ok() {
            return Err(format!("the name must have 1 to {MAX_NAME} bytes and not be a number"));
        }
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+:".contains(c)) {
            return Err("the name may have letters, digits and -_.+: only".to_owned());
        }
        if let Some((domid, _)) = self.domains.iter().find(|(_, d)| d.created.name == *name) {
            return Err(format!("domain {domid} already has the name {name}"));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&new.memory) || !new.memory.is_multiple_of(PAGE) {
            return Err(format!(
                "memory must be whole pages, {MIN_MEMORY} to {MAX_MEMORY} bytes, not {}",
                new.memory
            ));
        }
        if !(1..=MAX_VCPUS).contains(&new.vcpus) {
            return Err(format!("vcpus must be 1 to {MAX_VCPUS}, not {}", new.vcpus));
        }
        let domid = match new.domid {
            Some(domid) if domid >= DomId::FIRST_RESERVED => {
                return Err(format!("domid must be below {}", DomId::FIRST_RESERVED));
            }
            Some(domid) if self.domains.contains_key(&domid) => {
                return Err(format!("domain {domid} exists"));
            }
            Some(domid) => domid,
            None => self.free_domid().ok_or("there are no more domain numbers")?,
        };
        new.domid = Some(domid);
        let domain = Domain {
            created: new,
            ports: Ports::default(),
            process: None,
            ended: Arc::new(Notify::new()),
        };
        let info = domain.info(domid);
        self.domains.insert(domid, domain);
        Ok(info)
    }

    fn free_domid(&mut self) -> Option<u16> {
        let (next, end) = (self.next_domid, DomId::FIRST_RESERVED);
        let found = (next..end).chain(1..next).find(|n| !self.domains.contains_key(n))?;
        self.next_domid = found + 1;
        Some(found)
    }

    pub(super) fn remove(&mut self, domid: u16) -> Option<DomainInfo> {
        self.ended(domid);
        self.domains.remove(&domid).map(|d| d.info(domid))
    }

    pub(super) fn list(&self) -> Vec<DomainInfo> {
        self.domains.iter().map(|(&domid, domain)| domain.info(domid)).collect()
    }

    pub(super) fn get(&self, domid: u16) -> Option<DomainInfo> {
        self.domains.get(&domid).map(|d| d.info(domid))
    }

    /// The domain's process, if there is one: its number and its pidfd.
    pub(super) fn process(&self, domid: u16) -> Option<(i32, Arc<OwnedFd>)> {
        let process = self.domains.get(&domid)?.process.as_ref()?;
        Some((process.pid, Arc::clone(&process.pidfd)))
    }

    /// Notified when the domain's process ends.
    pub(super) fn end_of_process(&self, domid: u16) -> Option<Arc<Notify>> {
        self.domains.get(&domid).map(|d| Arc::clone(&d.ended))
    }

    /// Makes the process `pid` the domain.
    pub(super) fn attach(
        &mut self,
        domid: u16,
        (pid, pidfd): (i32, Arc<OwnedFd>),
        request: &Request,
        send: Send<'_>,
    ) -> Result<(), String> {
        if !matches!(request, Request::Attach { version } if version == VERSION) {
            return Err(format!(
                "this broker is version {VERSION}: use the programs built with it"
            ));
        }
        let domain = self.domains.get_mut(&domid).ok_or("the domain is gone")?;
        if let Some(Process { pid, .. }) = &domain.process {
            return Err(format!("process {pid} is attached to the domain: stop it first"));
        }
        let process = Process::new(pid, pidfd, &domain.created).map_err(|e| e.to_string())?;
        send(&Reply::Attached { domid }, &[process.memory.as_fd(), process.grant_table.as_fd()])
            .map_err(|e| e.to_string())?;
        domain.process = Some(process);
        Ok(())
    }

    /// Does what the domain's process asks for.
    pub(super) fn handle(&mut self, me: u16, request: &Request, send: Send<'_>) -> io::Result<()> {
        let done = match *request {
            Request::Attach { .. } => Err(Refusal::Other("already attached".to_owned())),
            Request::Peer { domid } => return self.peer(me, domid, send),
            Request::AllocUnbound { peer } => self.ports(me).and_then(|p| p.alloc_unbound(peer)),
            Request::BindInterdomain { peer, port } => self.bind(me, peer, port),
            Request::Close { port } => {
                self.close(me, port);
                return send(&Reply::Closed, &[]);
            }
        };
        match done {
            Err(refusal) => send(&Reply::Refused(refusal), &[]),
            Ok(port) => {
                let domain = self.domains.get(&me);
                match domain.and_then(|d| d.ports.get(port)) {
                    Some(opened) => send(&Reply::Port { port }, &opened.fds()),
                    None => send(&Reply::Refused(Refusal::NoPort), &[]),
                }
            }
        }
    }

    /// Gives a backend what it needs of its frontend: all of its memory. Nobody else gets that, and no
    /// process gets its own active table.
    fn peer(&mut self, me: u16, domid: u16, send: Send<'_>) -> io::Result<()> {
        let serves = me != domid
            && (me == 0 || self.domains.get(&me).is_some_and(|d| d.created.driver_domain));
        if !serves {
            return send(&Reply::Refused(Refusal::NoBackend), &[]);
        }
        let Some(peer) = self.domains.get(&domid).and_then(|d| d.process.as_ref()) else {
            return send(&Reply::Refused(Refusal::NoDomain), &[]);
        };
        send(
            &Reply::Peer,
            &[peer.memory.as_fd(), peer.grant_table.as_fd(), peer.active_table.as_fd()],
        )?;
        if let Some(process) = self.domains.get_mut(&me).and_then(|d| d.process.as_mut()) {
            process.peers.insert(domid);
        }
        Ok(())
    }

    fn ports(&mut self, domid: u16) -> Result<&mut Ports, Refusal> {
        self.domains.get_mut(&domid).map(|d| &mut d.ports).ok_or(Refusal::NoDomain)
    }

    fn bind(&mut self, me: u16, peer: u16, port: u32) -> Result<u32, Refusal> {
        let end = self.ports(peer)?.offer(port, peer, me)?;
        let ours = self.ports(me)?.accept(end)?;
        self.ports(peer)?.connect(port, ours);
        Ok(ours)
    }

    fn close(&mut self, me: u16, port: u32) {
        let bound = self.ports(me).ok().and_then(|p| p.close(port));
        if let Some((peer, their_port)) = bound
            && let Ok(ports) = self.ports(peer)
        {
            ports.disconnect(their_port);
        }
    }

    /// Takes from the domain what its process held: event channels, uses of other domains' grants,
    /// and its own grants.
    pub(super) fn ended(&mut self, domid: u16) {
        while let Some(port) = self.domains.get(&domid).and_then(|d| d.ports.first()) {
            self.close(domid, port);
        }
        let Some(domain) = self.domains.get_mut(&domid) else { return };
        domain.ended.notify_waiters();
        let Some(process) = domain.process.take() else { return };
        process.active.close();
        process.grants.revoke_all();
        for peer in &process.peers {
            if let Some(peer) = self.domains.get(peer).and_then(|d| d.process.as_ref()) {
                peer.active.unpin_all(&peer.grants, DomId(domid));
            }
        }
    }
}

impl Domain {
    fn info(&self, domid: u16) -> DomainInfo {
        let NewDomain { name, memory, vcpus, driver_domain, on_crash, .. } = self.created.clone();
        let process = self.process.as_ref().map(|p| p.pid);
        let ports = self.ports.len();
        DomainInfo { domid, name, memory, vcpus, driver_domain, on_crash, process, ports }
    }
}
