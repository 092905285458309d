//! What the toolstack wrote about a device.

use crate::storage::{self, Direct, OpenError, Storage};
use ring_proto::DomId;
use std::sync::Arc;
use xenstore_glue::client::{self, Client, Nodes};
use xenstore_glue::disk::{Store, Target, TargetError};
use xenstore_glue::vbd::DevicePaths;

/// The hotplug script that says what we have said of a disk.
const OWN_SCRIPT: &str = "block-blkback";
/// Scripts that leave a target as it is: ours, and Xen's for devices and for tapdisk. What another one makes of a
/// target, that finds out by itself (xl-disk-configuration(5), script=).
const PLAIN_SCRIPTS: [&str; 3] = [OWN_SCRIPT, "block", "blktap"];

/// A device's backend directory, as libxl fills it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Description {
    /// The frontend's directory.
    pub(super) frontend: String,
    pub(super) frontend_id: DomId,
    /// The target, in the words of the disk line.
    pub(super) params: String,
    /// `xvda` and the like.
    pub(super) name: String,
    pub(super) read_only: bool,
    /// `mode` is `w!`: the image may be in use elsewhere.
    pub(super) shared: bool,
    pub(super) cdrom: bool,
    pub(super) removable: bool,
    pub(super) discard: bool,
    /// The toolstack means to run a hotplug script.
    pub(super) script: bool,
    /// It is [`OWN_SCRIPT`].
    pub(super) own_script: bool,
    /// It is none of [`PLAIN_SCRIPTS`].
    pub(super) finds_disk: bool,
}

/// Why a device is refused before its frontend was even looked at.
#[derive(Debug, thiserror::Error)]
pub(super) enum DescriptionError {
    #[error("cannot read the device's directory: {0}")]
    Store(#[from] client::Error),
    #[error("{0} is missing from the device's directory")]
    Missing(&'static str),
    #[error("{key} = {value:?} does not belong to {path}")]
    Mismatch { key: &'static str, value: String, path: String },
    #[error("target {params:?}: {source}")]
    Target { params: String, source: TargetError },
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl Description {
    pub(super) async fn read(
        client: &Client,
        paths: &DevicePaths,
    ) -> Result<Self, DescriptionError> {
        let dir = paths.backend();
        let text = async |key: &'static str| -> Result<Option<String>, client::Error> {
            let value = client.read_optional(&format!("{dir}/{key}")).await?;
            Ok(value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
        };
        let is = |value: Option<String>, what: &str| value.as_deref() == Some(what);
        let frontend = text("frontend").await?.ok_or(DescriptionError::Missing("frontend"))?;
        // Whoever may write this directory is the toolstack, or we ourselves. A frontend path that is
        // not the one this directory belongs to is a mistake we must not act on.
        if frontend != paths.frontend() {
            let path = paths.backend();
            return Err(DescriptionError::Mismatch { key: "frontend", value: frontend, path });
        }
        let frontend_id =
            text("frontend-id").await?.ok_or(DescriptionError::Missing("frontend-id"))?;
        if frontend_id.parse() != Ok(paths.frontend_domain.0) {
            let path = paths.backend();
            return Err(DescriptionError::Mismatch {
                key: "frontend-id",
                value: frontend_id,
                path,
            });
        }
        let mode = text("mode").await?.unwrap_or_default();
        let script = text("script").await?.unwrap_or_default();
        let name = script.rsplit('/').next().unwrap_or_default();
        Ok(Self {
            frontend,
            frontend_id: paths.frontend_domain,
            params: text("params").await?.ok_or(DescriptionError::Missing("params"))?,
            name: text("dev").await?.unwrap_or_else(|| format!("vbd-{}", paths.device)),
            read_only: !mode.starts_with('w'),
            shared: mode.ends_with('!'),
            cdrom: is(text("device-type").await?, "cdrom"),
            removable: is(text("removable").await?, "1"),
            discard: !is(text("discard-enable").await?, "0"),
            own_script: name == OWN_SCRIPT,
            finds_disk: !name.is_empty() && !PLAIN_SCRIPTS.contains(&name),
            script: !script.is_empty(),
        })
    }

    /// The target as its line has it: libxl writes `aio:` in front of it for `backendtype=tap`.
    pub(super) fn target(&self) -> String {
        let target = self.params.parse().map(|target: Target| target.to_string());
        target.unwrap_or_else(|_| self.params.clone())
    }

    /// Opens the disk: that at the path which a script has found, or as its line has it. Blocks as long as
    /// the device does.
    pub(super) fn open(
        &self,
        found: Option<String>,
        direct: Direct,
    ) -> Result<Arc<dyn Storage>, DescriptionError> {
        let params = found.map_or_else(|| self.params.clone(), |path| format!("file:{path}"));
        let target: Target =
            params.parse().map_err(|source| DescriptionError::Target { params, source })?;
        let options = storage::Options {
            read_only: self.read_only,
            direct,
            discard: self.discard,
            shared: self.shared,
        };
        Ok(storage::open(&target, options)?)
    }

    /// Whether the size is another's to say: that of a file or a block device.
    pub(super) fn can_resize(&self) -> bool {
        self.params.parse().is_ok_and(|target: Target| matches!(target.store, Store::Path(_)))
    }
}

/// Removes a device's directory, and that of its frontend's domain if nothing is left in it: each
/// domain that comes and goes would leave a node to this one's quota.
pub(super) async fn remove_with_parent(nodes: &Nodes, dir: &str) -> Result<(), client::Error> {
    nodes.rm(dir).await?;
    let Some((parent, _)) = dir.rsplit_once('/') else { return Ok(()) };
    match nodes.directory(parent).await {
        Ok(names) if names.is_empty() => {}
        Err(error) if error.errno().is_none() => return Err(error),
        _ => return Ok(()),
    }
    match nodes.rm(parent).await {
        // The toolstack's own, which it cleans up itself.
        Err(error) if error.errno().is_some() => Ok(()),
        other => other,
    }
}
