//! What libxl does in xenstore: the nodes of a domain and of its disks.

mod disk;
mod domain;

pub use disk::{AttachedDisk, Disk, attach_disk, detach_disk, list_disks, wait_for_backend};
pub(crate) use domain::{bury_backends, create_domain, destroy_domain};

use ring_proto::DomId;
use std::time::Duration;
use xenstore_glue::client::{self, Client, Nodes};
use xenstore_glue::vbd::AttachError;

/// Why the toolstack could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Xenstore failed.
    #[error(transparent)]
    Xenstore(#[from] client::Error),
    /// The disk cannot be attached to anybody.
    #[error(transparent)]
    Disk(#[from] AttachError),
    /// The guest already has it.
    #[error("{guest} already has device {devid}: detach it first, or choose another vdev")]
    Exists {
        /// The guest.
        guest: DomId,
        /// The device number.
        devid: u32,
    },
    /// The guest does not have it.
    #[error("{guest} has no device {devid}: `xen-embedded list` shows those it has")]
    NotAttached {
        /// The guest.
        guest: DomId,
        /// The device number.
        devid: u32,
    },
    /// The backend said that it cannot serve the disk.
    #[error("the backend refuses the disk: {reason} ({backend}); detach it before another try")]
    Backend {
        /// Its directory.
        backend: String,
        /// Its own words.
        reason: String,
    },
    /// The backend did not answer.
    #[error(
        "the backend did not react within {} s ({backend}): does one run in its domain and serve \
         this kind? `detach --force` removes the disk all the same",
        BACKEND_TIMEOUT.as_secs()
    )]
    Timeout {
        /// Its directory.
        backend: String,
    },
    /// The driver domain left the directory behind.
    #[error(
        "the driver domain did not remove {backend} within {} s; remove it with xenstore-rm",
        BACKEND_TIMEOUT.as_secs()
    )]
    NotRemoved {
        /// The backend's directory.
        backend: String,
    },
}

/// What the functions here return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How long a backend may take to appear or to close: libxl's `LIBXL_INIT_TIMEOUT` and
/// `LIBXL_DESTROY_TIMEOUT`.
pub const BACKEND_TIMEOUT: Duration = Duration::from_secs(10);

/// `XenbusStateClosing`, io/xenbus.h.
const CLOSING: &str = "5";
/// `XenbusStateClosed`.
const CLOSED: &str = "6";

/// A device as the toolstack remembers it, below `/libxl`, where no guest can change it.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    /// `/libxl/<domid>/device/<kind>/<devid>`
    libxl: String,
    frontend: String,
    backend: String,
}

impl Device {
    /// The backend's domain, from `/local/domain/<domid>/backend/...`.
    fn backend_domid(&self) -> Option<u16> {
        self.backend.strip_prefix("/local/domain/")?.split('/').next()?.parse().ok()
    }
}

/// The devices of a domain.
async fn devices(nodes: &Nodes, domid: u16) -> client::Result<Vec<Device>> {
    let root = format!("/libxl/{domid}/device");
    let mut devices = Vec::new();
    for kind in children(nodes, &root).await? {
        for devid in children(nodes, &format!("{root}/{kind}")).await? {
            let libxl = format!("{root}/{kind}/{devid}");
            let backend = read(nodes, &format!("{libxl}/backend")).await?;
            let frontend = read(nodes, &format!("{libxl}/frontend")).await?;
            if let (Some(backend), Some(frontend)) = (backend, frontend) {
                devices.push(Device { libxl, frontend, backend });
            }
        }
    }
    Ok(devices)
}

/// The children of a node, none if there is no such node.
async fn children(nodes: &Nodes, path: &str) -> client::Result<Vec<String>> {
    match nodes.directory(path).await {
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

/// A value as text, whatever a peer wrote there.
async fn read(nodes: &Nodes, path: &str) -> client::Result<Option<String>> {
    let value = nodes.read_optional(path).await?;
    Ok(value.map(|v| String::from_utf8_lossy(&v).into_owned()))
}

/// Asks a backend to close for good, as `libxl__initiate_device_generic_remove` does. Returns whether there
/// is one.
async fn ask_to_close(nodes: &Nodes, backend: &str) -> client::Result<bool> {
    let state = format!("{backend}/state");
    let Some(now) = read(nodes, &state).await? else { return Ok(false) };
    nodes.write(&format!("{backend}/online"), "0").await?;
    if now != CLOSED {
        nodes.write(&state, CLOSING).await?;
    }
    Ok(true)
}

/// Waits until a node is gone or has one of `values`. Returns whether that happened in time.
async fn wait_for(
    client: &Client,
    path: &str,
    values: &[&str],
    limit: Duration,
) -> client::Result<bool> {
    let wait = async {
        let mut watch = client.watch(path).await?;
        loop {
            watch.next().await?;
            match read(client, path).await? {
                Some(value) if !values.contains(&value.as_str()) => {}
                _ => return Ok(()),
            }
        }
    };
    match tokio::time::timeout(limit, wait).await {
        Ok(done) => done.map(|()| true),
        Err(_) => Ok(false),
    }
}

/// Removes a node and the parents that this leaves without children, like `libxl__xs_path_cleanup`.
async fn remove_with_parents(nodes: &Nodes, path: &str) -> client::Result<()> {
    nodes.rm(path).await?;
    let mut path = path;
    while let Some((parent, _)) = path.rsplit_once('/').filter(|(parent, _)| !parent.is_empty()) {
        if !children(nodes, parent).await?.is_empty() {
            break;
        }
        nodes.rm(parent).await?;
        path = parent;
    }
    Ok(())
}
