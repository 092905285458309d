//! The nodes of a domain: libxl_create.c and libxl_domain.c.

use super::{
    BACKEND_TIMEOUT, CLOSED, Device, ask_to_close, devices, remove_with_parents, wait_for,
};
use tracing::warn;
use xen_platform::embedded::control::DomainInfo;
use xenstore_glue::client::{Client, Result};
use xenstore_glue::wire::{Access, Perm};

/// Writes what `libxl__domain_make` writes, and introduces the domain.
pub(crate) async fn create_domain(client: &Client, info: &DomainInfo) -> Result<()> {
    let domid = info.domid;
    let root = &format!("/local/domain/{domid}");
    let private = &[Perm::new(0, Access::None)];
    let readable = &[Perm::new(0, Access::None), Perm::new(domid, Access::Read)];
    let owned = &[Perm::new(domid, Access::None)];
    client
        .transact(async |nodes| {
            // The number may have been another domain's before.
            nodes.rm(root).await?;
            nodes.rm(&format!("/libxl/{domid}")).await?;
            for (paths, perms) in [
                (&READABLE[..], &readable[..]),
                // Where guests report their features, their state and errors.
                (&OWNED[..], &owned[..]),
            ] {
                for path in paths {
                    let path = format!("{root}{path}");
                    nodes.mkdir(&path).await?;
                    nodes.set_perms(&path, perms).await?;
                }
            }
            let libxl = format!("/libxl/{domid}/device");
            nodes.mkdir(&libxl).await?;
            nodes.set_perms(&libxl, private).await?;
            let kib = (info.memory / 1024).to_string();
            nodes.write(&format!("{root}/name"), &info.name).await?;
            nodes.write(&format!("{root}/domid"), domid.to_string()).await?;
            nodes.write(&format!("{root}/memory/static-max"), &kib).await?;
            nodes.write(&format!("{root}/memory/target"), &kib).await?;
            for cpu in 0..info.vcpus {
                let path = format!("{root}/cpu/{cpu}/availability");
                nodes.write(&path, "online").await?;
            }
            Ok(())
        })
        .await?;
    // Frame and port of a xenstore ring, which this domain's connection does not have.
    if domid != 0 {
        client.introduce(domid, 1, 1).await?;
    }
    Ok(())
}

/// Nodes that it may read, below the domain's directory, which comes first.
const READABLE: [&str; 5] = ["", "/cpu", "/memory", "/device", "/control"];
/// Nodes that it owns.
const OWNED: [&str; 7] = [
    "/control/shutdown",
    "/device/suspend/event-channel",
    "/data",
    "/drivers",
    "/feature",
    "/attr",
    "/error",
];

/// Removes a domain's directories, as `xl destroy` does: its frontends vanish, its backends are
/// asked to close. Returns the backends to [bury](bury_backends).
pub(crate) async fn destroy_domain(client: &Client, domid: u16) -> Result<Vec<Device>> {
    let removed = remove_nodes(client, domid).await;
    // Even if something is left over: the number may be another domain's next.
    match client.release(domid).await {
        // Done already, if xenstore restarted before it could say so.
        Err(error) if !error.is_not_found() => Err(error),
        _ => removed,
    }
}

async fn remove_nodes(client: &Client, domid: u16) -> Result<Vec<Device>> {
    let devices = devices(client, domid).await?;
    for Device { frontend, backend, .. } in &devices {
        // A driver domain that writes there all the time makes this fail, but only for its own disk.
        if let Err(error) = client.transact(async |nodes| ask_to_close(nodes, backend).await).await
        {
            warn!(backend, %error, "cannot ask the backend of a destroyed domain to close");
        }
        client.rm(frontend).await?;
    }
    // Not in a transaction, which the domain and those it lets write there could make fail.
    client.rm(&format!("/local/domain/{domid}")).await?;
    client.rm(&format!("/libxl/{domid}")).await?;
    Ok(devices)
}

/// Waits for backends to close and removes their directories. A driver domain removes its own, unless it is
/// too slow.
pub(crate) async fn bury_backends(client: &Client, devices: Vec<Device>) {
    for Device { backend, .. } in devices {
        let state = format!("{backend}/state");
        let closed = wait_for(client, &state, &[CLOSED], BACKEND_TIMEOUT).await;
        if !matches!(closed, Ok(true)) {
            warn!(backend, "the backend of a destroyed domain does not close; removed anyway");
        }
        let removed = client.transact(async |nodes| {
            // Otherwise it belongs to a new domain with the same number.
            let online = nodes.read_optional(&format!("{backend}/online")).await?;
            if online.as_deref() == Some(b"0") {
                remove_with_parents(nodes, &backend).await?;
            }
            Ok(())
        });
        if let Err(error) = removed.await {
            warn!(backend, %error, "cannot remove the backend of a destroyed domain");
        }
    }
}
