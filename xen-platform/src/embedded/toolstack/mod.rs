//! What libxl does in xenstore: the nodes of a domain and of its disks.

mod domain;

pub(super) use domain::{bury_backends, create_domain, destroy_domain};

use std::time::Duration;
use xenstore_glue::client::{Client, Nodes, Result};

/// How long a backend may take to appear or to close: libxl's `LIBXL_INIT_TIMEOUT` and
/// `LIBXL_DESTROY_TIMEOUT`.
pub const BACKEND_TIMEOUT: Duration = Duration::from_secs(10);

/// `XenbusStateClosing`, io/xenbus.h.
const CLOSING: &str = "5";
/// `XenbusStateClosed`.
const CLOSED: &str = "6";

/// A device as the toolstack remembers it, below `/libxl`, where no guest can change it.
#[derive(Clone, Debug)]
pub(super) struct Device {
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
async fn devices(nodes: &Nodes, domid: u16) -> Result<Vec<Device>> {
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
async fn children(nodes: &Nodes, path: &str) -> Result<Vec<String>> {
    match nodes.directory(path).await {
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

/// A value as text, whatever a peer wrote there.
async fn read(nodes: &Nodes, path: &str) -> Result<Option<String>> {
    let value = nodes.read_optional(path).await?;
    Ok(value.map(|v| String::from_utf8_lossy(&v).into_owned()))
}

/// Asks a backend to close for good, as `libxl__initiate_device_generic_remove` does. Whether there
/// is a backend to ask.
async fn ask_to_close(nodes: &Nodes, backend: &str) -> Result<bool> {
    let state = format!("{backend}/state");
    let Some(now) = read(nodes, &state).await? else { return Ok(false) };
    nodes.write(&format!("{backend}/online"), "0").await?;
    if now != CLOSED {
        nodes.write(&state, CLOSING).await?;
    }
    Ok(true)
}

/// Waits until a node is gone or has one of `values`: whether that came about in time.
async fn wait_for(client: &Client, path: &str, values: &[&str], limit: Duration) -> Result<bool> {
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

/// Removes a node and the parents that it leaves without children, as `libxl__xs_path_cleanup`.
async fn remove_with_parents(nodes: &Nodes, path: &str) -> Result<()> {
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
