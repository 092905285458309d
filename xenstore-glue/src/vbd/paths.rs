//! Where a device is in xenstore.

use ring_proto::DomId;
use std::fmt;
use std::str::FromStr;

/// The kind of backend: a directory below `backend`, which decides who serves the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum BackendKind {
    /// `vbd`, for `backendtype=phy`; Linux's kernel backend takes these wherever it is loaded.
    Vbd,
    /// `vbd3`, for `backendtype=tap` since Xen 4.19; neither a kernel backend nor QEMU takes these.
    Vbd3,
    /// `qdisk`, served by QEMU where libxl or `xl devd` starts one.
    Qdisk,
}

impl BackendKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Vbd, Self::Vbd3, Self::Qdisk];

    /// The directory's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vbd => "vbd",
            Self::Vbd3 => "vbd3",
            Self::Qdisk => "qdisk",
        }
    }

    /// `/local/domain/B/backend/KIND`, the directory that a backend watches.
    pub fn root(self, backend: DomId) -> String {
        format!("/local/domain/{}/backend/{self}", backend.0)
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for BackendKind {
    type Err = PathError;

    fn from_str(name: &str) -> Result<Self, PathError> {
        let kind = Self::ALL.into_iter().find(|kind| kind.as_str() == name);
        kind.ok_or_else(|| PathError::Kind(name.to_owned()))
    }
}

/// A string is not the path of a block device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PathError {
    /// Not one of [`BackendKind::ALL`].
    #[error("unknown kind of backend {0:?}, known are vbd, vbd3 and qdisk")]
    Kind(String),
    /// Not of the form `/local/domain/B/backend/KIND/D/DEVID`.
    #[error("{0:?} is not /local/domain/B/backend/KIND/D/DEVID")]
    Backend(String),
    /// Not of the form `/local/domain/D/device/vbd/DEVID`.
    #[error("{0:?} is not /local/domain/D/device/vbd/DEVID")]
    Frontend(String),
}

/// The two directories of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct DevicePaths {
    /// The domain that serves the device.
    pub backend_domain: DomId,
    /// The kind of backend.
    pub kind: BackendKind,
    /// The domain that uses the device.
    pub frontend_domain: DomId,
    /// The device, as [`super::VirtualDevice`] encodes it; a peer's value may be invalid.
    pub device: u32,
}

impl DevicePaths {
    /// `/local/domain/B/backend/KIND/D/DEVID`.
    pub fn backend(&self) -> String {
        let root = self.kind.root(self.backend_domain);
        format!("{root}/{}/{}", self.frontend_domain.0, self.device)
    }

    /// `/local/domain/D/device/vbd/DEVID`, whatever the kind of backend.
    pub fn frontend(&self) -> String {
        frontend(self.frontend_domain, self.device)
    }

    /// Reads the path of a backend directory itself, not of anything below or above it.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse_backend(path: &str) -> Result<Self, PathError> {
        Self::parse_below(path)
            .and_then(|(paths, below)| below.is_empty().then_some(paths))
            .ok_or_else(|| PathError::Backend(path.to_owned()))
    }

    /// Splits the path of a node in a backend directory (as a watch event names it) into the device
    /// and the path relative to the directory, empty for the directory itself.
    pub fn parse_below(path: &str) -> Option<(Self, &str)> {
        let mut parts = path.strip_prefix("/local/domain/")?.splitn(6, '/');
        let backend_domain = domain(parts.next()?)?;
        if parts.next()? != "backend" {
            return None;
        }
        let kind = parts.next()?.parse().ok()?;
        let frontend_domain = domain(parts.next()?)?;
        let device = canonical(parts.next()?)?;
        let paths = Self { backend_domain, kind, frontend_domain, device };
        Some((paths, parts.next().unwrap_or_default()))
    }

    /// Reads the path of a frontend directory.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse_frontend(path: &str) -> Result<(DomId, u32), PathError> {
        let parse = || {
            let (id, device) = path.strip_prefix("/local/domain/")?.split_once("/device/vbd/")?;
            Some((domain(id)?, canonical(device)?))
        };
        parse().ok_or_else(|| PathError::Frontend(path.to_owned()))
    }
}

fn frontend(domain: DomId, device: u32) -> String {
    format!("/local/domain/{}/device/vbd/{device}", domain.0)
}

fn domain(text: &str) -> Option<DomId> {
    let id = u16::try_from(canonical(text)?).ok()?;
    (id < DomId::FIRST_RESERVED).then_some(DomId(id))
}

/// A decimal number in its one canonical spelling, so that paths can be compared.
fn canonical(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}
