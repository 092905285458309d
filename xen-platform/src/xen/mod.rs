//! Xen itself, through Linux's devices for user space in `/dev/xen`.
//!
//! | device | module | for |
//! |---|---|---|
//! | `gntdev` | xen-gntdev | mapping and copying what a peer granted: backends |
//! | `gntalloc` | xen-gntalloc | granting: frontends |
//! | `evtchn` | xen-evtchn | event channels |
//! | `xenbus` | a part of the kernel | xenstore, where xenstored is in another domain |
//!
//! Works in dom0 and in any other domain, PV or with hardware support.

mod abi;
mod device;
mod domid;
mod evtchn;
mod gntalloc;
mod gntdev;

use crate::claim::claim;
use crate::{
    Access, Error, EventChannel, GrantCopier, GrantedPages, MappedGrants, Platform, Result,
};
use ring_proto::{DomId, GrantRef, Port};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use xenstore_glue::client::Endpoint;

pub use device::Device;
pub use domid::own_domid;

/// Whether this machine runs on Xen, as the kernel sees it.
pub fn is_xen() -> bool {
    // The first is there if the kernel is configured so; the second is where xenfs is mounted, and made
    // only by kernels on Xen.
    match std::fs::read_to_string("/sys/hypervisor/type") {
        Ok(hypervisor) => hypervisor.trim() == "xen",
        Err(_) => Path::new("/proc/xen").exists(),
    }
}

/// Whether Xen knows this domain's page tables, and maps grants into them itself. Assumed where the kernel
/// does not tell.
fn is_pv() -> bool {
    let kind = std::fs::read_to_string("/sys/hypervisor/guest_type");
    kind.map_or(true, |kind| kind.trim() == "PV")
}

/// The domain that this process runs in.
#[derive(Debug)]
pub struct XenPlatform {
    domid: DomId,
    may_pin: bool,
    /// Open only in a process that grants.
    gntalloc: Option<Arc<File>>,
    /// Keeps other backends of this domain away.
    _claim: Option<OwnedFd>,
}

/// How long a predecessor may take to end.
const LET_GO: Duration = Duration::from_secs(10);
/// How often to check for that.
const LET_GO_LOOK: Duration = Duration::from_millis(50);

impl XenPlatform {
    /// For a process that uses what others grant; a domain can have one at a time. Two would take over each
    /// other's disks, so this waits up to ten seconds for another to end.
    ///
    /// # Errors
    /// When a device that this takes is missing or not ours to use; when xenstore at `endpoint` does not
    /// tell which domain this is; when another backend keeps running.
    pub fn for_backend(endpoint: &Endpoint) -> Result<Arc<Self>> {
        // It is opened when needed, but whatever is wrong with it should be reported now.
        Device::Evtchn.open()?;
        let since = Instant::now();
        let claimed = loop {
            match claim(Device::Gntdev.open()?, 0)? {
                None if since.elapsed() < LET_GO => std::thread::sleep(LET_GO_LOOK),
                claimed => break claimed,
            }
        };
        if claimed.is_none() {
            return Err(Error::Refused {
                doing: "become the backend of this domain".to_owned(),
                reason: "another daemon is: stop it first".to_owned(),
            });
        }
        let (domid, may_pin) = (own_domid(endpoint)?, !is_pv());
        Ok(Arc::new(Self { domid, may_pin, gntalloc: None, _claim: claimed }))
    }

    /// For a process that grants, and uses what others grant.
    ///
    /// # Errors
    /// As [`XenPlatform::for_backend`].
    pub fn for_frontend(endpoint: &Endpoint) -> Result<Arc<Self>> {
        Device::Evtchn.open()?;
        let gntalloc = Some(Arc::new(Device::Gntalloc.open()?));
        let (domid, may_pin) = (own_domid(endpoint)?, !is_pv());
        Ok(Arc::new(Self { domid, may_pin, gntalloc, _claim: None }))
    }
}

impl Platform for XenPlatform {
    fn domid(&self) -> DomId {
        self.domid
    }

    fn claim(&self, device: u32) -> Result<Option<OwnedFd>> {
        let driver = format!("/sys/bus/xen/devices/vbd-{device}/driver");
        if Path::new(&driver).exists() {
            // The kernel's own frontend has it.
            return Ok(None);
        }
        claim(Device::Gntalloc.open()?, device)
    }

    fn map(&self, peer: DomId, refs: &[GrantRef], access: Access) -> Result<Arc<dyn MappedGrants>> {
        Ok(Arc::new(gntdev::map(peer, refs, access)?))
    }

    fn may_pin(&self) -> bool {
        self.may_pin
    }

    fn copier(&self, peer: DomId) -> Result<Box<dyn GrantCopier>> {
        Ok(Box::new(gntdev::Copier::new(peer)?))
    }

    fn grant(&self, peer: DomId, pages: usize, access: Access) -> Result<Box<dyn GrantedPages>> {
        let file = match &self.gntalloc {
            Some(file) => Arc::clone(file),
            None => Arc::new(Device::Gntalloc.open()?),
        };
        Ok(Box::new(gntalloc::Granted::new(file, peer, pages, access)?))
    }

    fn alloc_unbound(&self, peer: DomId) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(evtchn::Channel::alloc_unbound(peer)?))
    }

    fn bind_interdomain(&self, peer: DomId, port: Port) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(evtchn::Channel::bind_interdomain(peer, port)?))
    }
}
