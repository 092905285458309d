//! Attaching, detaching and listing disks: libxl_disk.c and libxl_device.c.

use super::{
    BACKEND_TIMEOUT, CLOSED, Device, Error, Result, ask_to_close, children, devices, read,
    remove_with_parents, wait_for,
};
use ring_proto::DomId;
use tracing::warn;
use xenstore_glue::client::{self, Client, Nodes};
use xenstore_glue::disk::{DiskSpec, Format};
use xenstore_glue::vbd::{BackendKind, Directory, attach_nodes};
use xenstore_glue::wire::{Access, Perm};

/// Most characters shown of a value that a peer wrote.
const MAX_SHOWN: usize = 64;

/// A disk that has been attached.
#[derive(Clone, Debug)]
pub struct AttachedDisk {
    /// The `virtual-device`, which is also the directory's name.
    pub devid: u32,
    /// The backend's directory.
    pub backend: String,
    /// The frontend's directory.
    pub frontend: String,
}

/// Writes what libxl writes for a disk of `guest`, served by `backend`, in one transaction. Without
/// a `backendtype` the disk is `phy` if its format is raw, as in libxl, otherwise `tap`.
///
/// # Errors
/// When the disk cannot be a PV disk, or the guest already has one of that name.
pub async fn attach_disk(
    client: &Client,
    guest: DomId,
    backend: DomId,
    disk: &DiskSpec,
) -> Result<AttachedDisk> {
    let kind = match disk.format {
        Format::Raw | Format::Empty => BackendKind::Vbd,
        _ => BackendKind::Vbd3,
    };
    let (back, front) = attach_nodes(disk, kind, backend, guest)?;
    let devid = disk.vdev.number();
    let libxl = &libxl_path(guest, devid);
    let new = client
        .transact(async |nodes| {
            if nodes.exists(libxl).await? {
                return Ok(nodes.may_be_done());
            }
            // Kept where neither end can change it, for detaching the disk.
            nodes.write(&format!("{libxl}/frontend"), &front.path).await?;
            nodes.write(&format!("{libxl}/backend"), &back.path).await?;
            for (key, value) in &back.nodes {
                nodes.write(&format!("{libxl}/{key}"), value).await?;
            }
            make(nodes, &front).await?;
            make(nodes, &back).await?;
            Ok(true)
        })
        .await?;
    if !new {
        return Err(Error::Exists { guest, devid });
    }
    Ok(AttachedDisk { devid, backend: back.path, frontend: front.path })
}

async fn make(nodes: &Nodes, directory: &Directory) -> client::Result<()> {
    let Directory { path, owner, reader, nodes: entries } = directory;
    nodes.rm(path).await?;
    nodes.mkdir(path).await?;
    // Before the entries, which inherit them.
    let perms = [Perm::new(owner.0, Access::None), Perm::new(reader.0, Access::Read)];
    nodes.set_perms(path, &perms).await?;
    for (key, value) in entries {
        nodes.write(&format!("{path}/{key}"), value).await?;
    }
    Ok(())
}

/// Waits up to [`BACKEND_TIMEOUT`] for the backend to have opened the disk.
///
/// libxl waits for the state to be exactly 2. A quick frontend may have taken the backend further before
/// anybody looked, so 3 and 4 will do here.
///
/// # Errors
/// When the backend does not open the disk in time, or refuses: in its own words, if it says why.
pub async fn wait_for_backend(client: &Client, backend: &str) -> Result<()> {
    let wait = async {
        let mut watch = client.watch(backend).await?;
        loop {
            watch.next().await?;
            let state = read(client, &format!("{backend}/state")).await?;
            let status = read(client, &format!("{backend}/hotplug-status")).await?;
            let state = state.as_deref().unwrap_or_default();
            if status.as_deref() == Some("error") || !["1", "2", "3", "4"].contains(&state) {
                return Err(refused(client, backend).await?);
            }
            if state != "1" {
                return Ok(());
            }
        }
    };
    match tokio::time::timeout(BACKEND_TIMEOUT, wait).await {
        Ok(done) => done,
        Err(_) => Err(Error::Timeout { backend: backend.to_owned() }),
    }
}

/// The error of a backend that refuses a disk, with the reason it gave.
async fn refused(client: &Client, backend: &str) -> Result<Error> {
    let mut reason = read(client, &format!("{backend}/hotplug-error")).await?;
    if reason.is_none()
        && let Some((domain, rest)) = backend.split_once("/backend/")
    {
        reason = read(client, &format!("{domain}/error/backend/{rest}/error")).await?;
    }
    let reason = reason.unwrap_or_else(|| "it does not say why; see its log".to_owned());
    Ok(Error::Backend { backend: backend.to_owned(), reason: shown(&reason, usize::MAX) })
}

/// Detaches a disk: asks the backend to close, waits for it, and removes the directories. A backend in a
/// driver domain removes its own.
///
/// With `force`, the frontend's directory is removed first, and everything in the end, whether or not the
/// backend closes.
///
/// # Errors
/// When there is no such disk, or the backend does not close in time: then nothing is removed.
pub async fn detach_disk(client: &Client, guest: DomId, devid: u32, force: bool) -> Result<()> {
    let libxl = libxl_path(guest, devid);
    let found = devices(client, guest.0).await?.into_iter().find(|d| d.libxl == libxl);
    let device = found.ok_or(Error::NotAttached { guest, devid })?;
    let asked = client.transact(async |nodes| ask_to_close(nodes, &device.backend).await).await;
    match asked {
        // A driver domain can make this fail by writing there all the time.
        Err(error) if force => warn!(backend = device.backend, %error, "cannot ask it to close"),
        asked => drop(asked?),
    }
    if force {
        client.rm(&device.frontend).await?;
    }
    let state = format!("{}/state", device.backend);
    let closed = wait_for(client, &state, &[CLOSED], BACKEND_TIMEOUT).await?;
    if !closed && !force {
        return Err(Error::Timeout { backend: device.backend });
    }
    remove(client, &device, force).await
}

async fn remove(client: &Client, device: &Device, force: bool) -> Result<()> {
    let ours = force || device.backend_domid() == Some(0);
    // Not in the transaction, which either end could make fail by writing to its directory.
    client.rm(&device.frontend).await?;
    if ours {
        client.rm(&device.backend).await?;
    }
    client
        .transact(async |nodes| {
            remove_with_parents(nodes, &device.frontend).await?;
            remove_with_parents(nodes, &device.libxl).await?;
            if ours {
                remove_with_parents(nodes, &device.backend).await?;
            }
            Ok(())
        })
        .await?;
    // Without values, this waits until the directory is gone.
    if ours || wait_for(client, &device.backend, &[], BACKEND_TIMEOUT).await? {
        return Ok(());
    }
    Err(Error::NotRemoved { backend: device.backend.clone() })
}

/// A line of `xl block-list`. What the guest wrote is shown without control characters, and shortened.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The device number.
    pub devid: u32,
    /// The domain that serves it.
    pub backend_domid: Option<u16>,
    /// The frontend's `state`.
    pub state: String,
    /// The event channel of each queue.
    pub event_channels: Vec<String>,
    /// The ring references of each queue.
    pub ring_refs: Vec<String>,
    /// The backend's directory.
    pub backend: String,
    /// What the backend says is wrong with it.
    pub error: Option<String>,
}

/// The disks of `guest`, by number.
///
/// # Errors
/// Those of xenstore.
pub async fn list_disks(client: &Client, guest: DomId) -> Result<Vec<Disk>> {
    let mut disks = Vec::new();
    for device in devices(client, guest.0).await? {
        let Some(devid) = device.libxl.rsplit('/').next().and_then(|id| id.parse().ok()) else {
            continue;
        };
        let mut disk = Disk {
            devid,
            backend_domid: device.backend_domid(),
            state: peers(client, &device.frontend, "state").await?.unwrap_or_default(),
            event_channels: Vec::new(),
            ring_refs: Vec::new(),
            error: peers(client, &device.backend, "hotplug-error").await?,
            backend: device.backend,
        };
        let names = children(client, &device.frontend).await?;
        let mut queues: Vec<_> = names.iter().filter(|n| n.starts_with("queue-")).collect();
        queues.sort_by_key(|n| (n.len(), n.as_str()));
        let queues = queues.into_iter().map(|n| format!("{}/{n}", device.frontend));
        for queue in std::iter::once(device.frontend.clone()).chain(queues) {
            disk.event_channels.extend(peers(client, &queue, "event-channel").await?);
            let single = peers(client, &queue, "ring-ref").await?;
            disk.ring_refs.extend(match single {
                Some(single) => Some(single),
                None => peers(client, &queue, "ring-ref0").await?,
            });
        }
        disks.push(disk);
    }
    disks.sort_by_key(|d| d.devid);
    Ok(disks)
}

async fn peers(nodes: &Nodes, directory: &str, key: &str) -> client::Result<Option<String>> {
    let value = read(nodes, &format!("{directory}/{key}")).await?;
    Ok(value.map(|v| shown(&v, MAX_SHOWN)))
}

/// A peer's words, without characters that would disturb a terminal.
fn shown(value: &str, max: usize) -> String {
    value.chars().filter(|c| !c.is_control()).take(max).collect()
}

fn libxl_path(guest: DomId, devid: u32) -> String {
    format!("/libxl/{}/device/vbd/{devid}", guest.0)
}
