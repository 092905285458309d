//! A hypervisor within this process: grants are entries of a map, event channels pairs of eventfds.

use nix::sys::eventfd::{EfdFlags, EventFd};
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, Port, SharedMemory, Window};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use xen_platform::{
    Access, Error, EventChannel, EventFile, GrantCopier, GrantedPages, LocalRegion, MappedGrants,
    Platform, Result,
};

#[derive(Debug, Default)]
struct Tables {
    next_ref: u32,
    grants: HashMap<u32, (Arc<LocalRegion>, usize)>,
    ports: HashMap<u32, [Arc<EventFd>; 2]>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Host {
    tables: Arc<Mutex<Tables>>,
}

impl Host {
    /// The region whose first page the grant is for.
    pub(super) fn region(&self, gref: GrantRef) -> Arc<dyn SharedMemory> {
        let (region, page) = self.tables.lock().unwrap().grants[&gref.0].clone();
        assert_eq!(page, 0);
        region
    }

    /// Part of a granted page; `None` once it is revoked.
    pub(super) fn window(&self, gref: GrantRef, offset: usize, len: usize) -> Option<Window> {
        let (region, page) = self.tables.lock().unwrap().grants.get(&gref.0)?.clone();
        Window::new(region, page * PAGE_SIZE + offset, len)
    }

    /// Pages that are granted now.
    pub(super) fn granted(&self) -> usize {
        self.tables.lock().unwrap().grants.len()
    }

    pub(super) fn bind(&self, port: Port) -> Channel {
        let [a, b] = self.tables.lock().unwrap().ports[&port.0].clone();
        Channel { port, sends: b, receives: a }
    }
}

impl Platform for Host {
    fn domid(&self) -> DomId {
        DomId(1)
    }

    fn claim(&self, _: u32) -> Result<Option<OwnedFd>> {
        Err(Error::io("claim", std::io::ErrorKind::Unsupported))
    }

    fn map(&self, _: DomId, _: &[GrantRef], _: Access) -> Result<Arc<dyn MappedGrants>> {
        Err(Error::io("map", std::io::ErrorKind::Unsupported))
    }

    fn may_pin(&self) -> bool {
        true
    }

    fn copier(&self, _: DomId) -> Result<Box<dyn GrantCopier>> {
        Err(Error::io("copy", std::io::ErrorKind::Unsupported))
    }

    fn grant(&self, _: DomId, pages: usize, _: Access) -> Result<Box<dyn GrantedPages>> {
        let region = Arc::new(LocalRegion::new(pages)?);
        let mut tables = self.tables.lock().unwrap();
        let mut refs = Vec::new();
        for page in 0..pages {
            tables.next_ref += 1;
            let gref = tables.next_ref;
            tables.grants.insert(gref, (region.clone(), page));
            refs.push(GrantRef(gref));
        }
        Ok(Box::new(Granted { host: self.clone(), region, refs }))
    }

    fn alloc_unbound(&self, _: DomId) -> Result<Box<dyn EventChannel>> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let fd = || EventFd::from_flags(flags).map(Arc::new).map_err(|e| Error::io("eventfd", e));
        let [a, b] = [fd()?, fd()?];
        let mut tables = self.tables.lock().unwrap();
        let port = Port(tables.ports.len() as u32 + 1);
        tables.ports.insert(port.0, [a.clone(), b.clone()]);
        Ok(Box::new(Channel { port, sends: a, receives: b }))
    }

    fn bind_interdomain(&self, _: DomId, port: Port) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(self.bind(port)))
    }
}

#[derive(Debug)]
struct Granted {
    host: Host,
    region: Arc<LocalRegion>,
    refs: Vec<GrantRef>,
}

impl GrantedPages for Granted {
    fn memory(&self) -> Arc<dyn SharedMemory> {
        self.region.clone()
    }

    fn refs(&self) -> &[GrantRef] {
        &self.refs
    }

    fn revoke(self: Box<Self>) -> std::result::Result<(), (Box<dyn GrantedPages>, Error)> {
        Ok(())
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        let mut tables = self.host.tables.lock().unwrap();
        for gref in &self.refs {
            tables.grants.remove(&gref.0);
        }
    }
}

#[derive(Debug)]
pub(super) struct Channel {
    port: Port,
    sends: Arc<EventFd>,
    receives: Arc<EventFd>,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.receives.as_fd()
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<()> {
        self.sends.write(1).map(drop).map_err(|e| Error::io("notify", e))
    }

    fn take(&mut self) -> Result<bool> {
        Ok(self.receives.read().is_ok())
    }

    fn file(&self) -> Result<EventFile> {
        let descriptor = self.receives.as_fd().try_clone_to_owned();
        let descriptor = descriptor.map_err(|e| Error::io("share", e))?;
        Ok(EventFile { descriptor, event_bytes: size_of::<u64>() as u32, unmask: false })
    }

    fn unmask(&mut self) -> Result<bool> {
        Ok(false)
    }
}
