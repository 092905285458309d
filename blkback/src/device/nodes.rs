//! What the toolstack wrote about a device.

use crate::storage::{self, Direct, OpenError, Storage};
use ring_proto::DomId;
use std::sync::Arc;
use xenstore_glue::client::{self, Client, Nodes};
use xenstore_glue::disk::{Store, Target, TargetError};
use xenstore_glue::vbd::DevicePaths;

/// Our hotplug script, which passes on what we report about a disk.
const OWN_SCRIPT: &str = "block-blkback";
/// Scripts that leave a target as it is: ours, Xen's for devices, and that for tapdisks of long ago. Any other
/// script, `block-tap` of today too, turns the target into a disk by itself (xl-disk-configuration(5), script=).
const PLAIN_SCRIPTS: [&str; 3] = [OWN_SCRIPT, "block", "blktap"];

/// A device's backend directory, as libxl fills it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Description {
    /// The frontend's directory.
    pub(super) frontend: String,
    pub(super) frontend_id: DomId,
    /// The target, as in the disk line.
    pub(super) params: String,
    /// `xvda` and the like.
    pub(super) name: String,
    pub(super) read_only: bool,
    /// The image may be in use elsewhere: `mode` is `w!`, or the frontend is a guest's stub domain.
    pub(super) shared: bool,
    pub(super) cdrom: bool,
    pub(super) removable: bool,
    pub(super) discard: bool,
    /// The toolstack will run a hotplug script.
    pub(super) script: bool,
    /// The script is [`OWN_SCRIPT`].
    pub(super) own_script: bool,
    /// The script is none of [`PLAIN_SCRIPTS`].
    pub(super) finds_disk: bool,
}

/// Why a device is refused even before its frontend is examined.
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
        // Only the toolstack and we ourselves may write this directory. A frontend path that does not
        // match it is a mistake that we must not act on.
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
        // Written by the toolstack for a stub domain: the guest that it emulates devices for, whose disks
        // it has as well. So Xen's scripts let it use what that guest uses (`same_vm`).
        let emulates = format!("/local/domain/{}/target", paths.frontend_domain.0);
        let is_stub = super::read_frontend(client, &emulates).await?.is_some();
        let script = text("script").await?.unwrap_or_default();
        let name = script.rsplit('/').next().unwrap_or_default();
        Ok(Self {
            frontend,
            frontend_id: paths.frontend_domain,
            params: text("params").await?.ok_or(DescriptionError::Missing("params"))?,
            name: text("dev").await?.unwrap_or_else(|| format!("vbd-{}", paths.device)),
            read_only: !mode.starts_with('w'),
            shared: mode.ends_with('!') || is_stub,
            cdrom: is(text("device-type").await?, "cdrom"),
            removable: is(text("removable").await?, "1"),
            discard: !is(text("discard-enable").await?, "0"),
            own_script: name == OWN_SCRIPT,
            finds_disk: !name.is_empty() && !PLAIN_SCRIPTS.contains(&name),
            script: !script.is_empty(),
        })
    }

    /// The target as in the disk line: libxl prepends `aio:` for `backendtype=tap`.
    pub(super) fn target(&self) -> String {
        let target = self.params.parse().map(|target: Target| target.to_string());
        target.unwrap_or_else(|_| self.params.clone())
    }

    /// Opens the disk at the path that a script has found, or else the one named in its disk line. Blocks
    /// as long as the device does.
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

    /// Whether the target's size may change under us, as that of a file or a block device may.
    pub(super) fn can_resize(&self) -> bool {
        self.params.parse().is_ok_and(|target: Target| matches!(target.store, Store::Path(_)))
    }
}

/// Removes a device's directory, and that of its frontend's domain if it is empty then: a node left by
/// every domain that comes and goes would use up our quota.
pub(super) async fn remove_with_parent(nodes: &Nodes, dir: &str) -> Result<(), client::Error> {
    nodes.rm(dir).await?;
    let Some((parent, _)) = dir.rsplit_once('/') else { return Ok(()) };
    match nodes.directory(parent).await {
        Ok(names) if names.is_empty() => {}
        Err(error) if error.errno().is_none() => return Err(error),
        _ => return Ok(()),
    }
    match nodes.rm(parent).await {
        // It is the toolstack's, which cleans it up itself.
        Err(error) if error.errno().is_some() => Ok(()),
        other => other,
    }
}
