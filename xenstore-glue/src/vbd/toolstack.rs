//! What libxl writes when it attaches a disk (`device_disk_add` in libxl_disk.c).

use super::{BackendKind, DevicePaths, Nodes, node};
use crate::disk::{BackendType, DiskSpec, Format, Specification};
use crate::xenbus::XenbusState;
use ring_proto::DomId;

/// A directory to create with all its nodes, in one transaction with its counterpart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Directory {
    /// Absolute path.
    pub path: String,
    /// The domain that owns it and may do everything; others may do nothing, except `reader`.
    pub owner: DomId,
    /// The domain that may read it.
    pub reader: DomId,
    /// Its nodes.
    pub nodes: Nodes,
}

/// A disk cannot be attached.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttachError {
    /// `backendtype=standalone` and `specification=virtio` use another protocol.
    #[error(
        "{0} is served by virtio backends; this is a Xen PV one: leave it out or use tap, phy or qdisk"
    )]
    Virtio(&'static str),
    /// `phy` has no place for a format.
    #[error("backendtype=phy takes only format=raw, not {0}")]
    NotRaw(Format),
}

/// The backend's and the frontend's directory for a disk to attach.
///
/// `kind` is used if the disk has no `backendtype`. Differs from libxl in one respect: `script` is
/// written only if the disk names one, because nobody here would run a default one.
///
/// # Errors
/// Disks that libxl, too, would refuse, or would attach by virtio.
pub fn attach_nodes(
    disk: &DiskSpec,
    kind: BackendKind,
    backend_domain: DomId,
    frontend_domain: DomId,
) -> Result<(Directory, Directory), AttachError> {
    let kind = match disk.backend_type {
        None => kind,
        Some(BackendType::Phy) => BackendKind::Vbd,
        Some(BackendType::Tap) => BackendKind::Vbd3,
        Some(BackendType::Qdisk) => BackendKind::Qdisk,
        Some(BackendType::Standalone) => return Err(AttachError::Virtio("backendtype=standalone")),
    };
    if disk.specification == Specification::Virtio {
        return Err(AttachError::Virtio("specification=virtio"));
    }
    if kind == BackendKind::Vbd && !matches!(disk.format, Format::Raw | Format::Empty) {
        return Err(AttachError::NotRaw(disk.format));
    }
    let paths = DevicePaths { backend_domain, kind, frontend_domain, device: disk.vdev.number() };
    let device_type = if disk.cdrom { "cdrom" } else { "disk" };
    let state = XenbusState::Initialising.value();

    let mut back = vec![node("frontend", paths.frontend()), node("params", params(disk, kind))];
    if let Some(script) = &disk.script {
        back.push(node("script", script));
    }
    back.extend([
        node("frontend-id", frontend_domain.0),
        node("online", 1),
        node("removable", u8::from(disk.cdrom)),
        node("bootable", 1),
        node("state", &state),
        node("dev", disk.vdev),
        node("type", if kind == BackendKind::Qdisk { "qdisk" } else { "phy" }),
        node("mode", if disk.read_only { "r" } else { "w" }),
        node("device-type", device_type),
    ]);
    if disk.direct_io_safe {
        back.push(node("direct-io-safe", 1));
    }
    let discard = disk.discard.unwrap_or(!disk.read_only);
    back.extend([
        node("discard-enable", u8::from(discard)),
        node("specification", Specification::Xen),
    ]);

    let front = vec![
        node("backend", paths.backend()),
        node("backend-id", backend_domain.0),
        node("state", &state),
        node("virtual-device", disk.vdev.number()),
        node("device-type", device_type),
        node("trusted", u8::from(disk.trusted)),
    ];
    Ok((
        Directory {
            path: paths.backend(),
            owner: backend_domain,
            reader: frontend_domain,
            nodes: back,
        },
        Directory {
            path: paths.frontend(),
            owner: frontend_domain,
            reader: backend_domain,
            nodes: front,
        },
    ))
}

/// `phy` gets the target verbatim; the others get it after the name of its format, where raw is called
/// aio (`libxl__device_disk_string_of_format`).
fn params(disk: &DiskSpec, kind: BackendKind) -> String {
    let format = match disk.format {
        _ if kind == BackendKind::Vbd => return disk.target.clone(),
        Format::Raw | Format::Empty => "aio",
        other => other.as_str(),
    };
    format!("{format}:{}", disk.target)
}
