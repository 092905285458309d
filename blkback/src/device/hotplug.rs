//! Making a disk ready to be connected, and the toolstack's hotplug script, which may have a say.

use super::{Abandoned, Device};
use ring_proto::DomId;
use std::time::Duration;
use tokio::time::Instant;
use tracing::info;
use xenstore_glue::client;
use xenstore_glue::xenbus::BackendEvent;

/// Where nobody may be there to run hotplug scripts, a script is waited for this long from `InitWait` on.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(3);

/// Whether a hotplug script has still to say that the disk may be used.
///
/// The toolstack runs it when it has seen `InitWait`, and waits for no other state: a frontend that is
/// quick would make us go on to `Connected` before it looks, and hot-attach would fail. Nor is a disk
/// to be used that the script refuses, because another guest writes it, say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Script {
    NotAwaited,
    /// Until then, where it is not sure that it runs.
    Awaited(Option<Instant>),
}

impl Script {
    /// `InitWait` was published: the script runs now, if anybody runs it. In dom0 the toolstack does; in
    /// a driver domain `xl devd`, if it is there.
    pub(super) fn start(&mut self, own: DomId) {
        if let Self::Awaited(deadline) = self
            && own != DomId(0)
        {
            *deadline = Some(Instant::now() + SCRIPT_TIMEOUT);
        }
    }

    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Awaited(deadline) => deadline,
            Self::NotAwaited => None,
        }
    }
}

impl Device {
    /// Opens the disk, and says in xenstore what came of it unless a script is to say that.
    pub(super) async fn open_storage(&mut self) -> Result<(), Abandoned> {
        let (description, direct) = (self.description.clone(), self.context.tuning.direct());
        let opened = tokio::task::spawn_blocking(move || description.open(direct)).await;
        match opened {
            Ok(Ok(storage)) => {
                let geometry = storage.geometry();
                info!(
                    target = %self.description.params,
                    mib = geometry.sectors >> 11,
                    read_only = geometry.read_only,
                    "disk opened"
                );
                self.storage = Some(storage);
                // One that is there already is of a daemon before us, or of its script.
                if self.description.script && self.hotplug_status().await?.is_none() {
                    self.script = Script::Awaited(None);
                    return Ok(());
                }
                self.connectable().await
            }
            Ok(Err(error)) => self.refused(&error).await,
            Err(error) => self.refused(&error).await,
        }
    }

    async fn hotplug_status(&self) -> Result<Option<Vec<u8>>, client::Error> {
        self.context.client.read_optional(&self.node("hotplug-status")).await
    }

    /// The disk may be connected.
    pub(super) async fn connectable(&mut self) -> Result<(), Abandoned> {
        self.script = Script::NotAwaited;
        self.context.client.write(&self.node("hotplug-status"), "connected").await?;
        self.feed(BackendEvent::StorageReady).await
    }

    async fn refused(&mut self, error: &(dyn std::error::Error + Sync)) -> Result<(), Abandoned> {
        self.fail(&error.to_string()).await?;
        self.context.client.write(&self.node("hotplug-error"), error.to_string()).await?;
        self.context.client.write(&self.node("hotplug-status"), "error").await?;
        self.feed(BackendEvent::StorageFailed).await
    }

    /// What the script says, if it has to.
    pub(super) async fn look_for_script(&mut self) -> Result<(), Abandoned> {
        if self.script == Script::NotAwaited {
            return Ok(());
        }
        match self.hotplug_status().await?.as_deref() {
            None => {}
            Some(b"connected") => self.connectable().await?,
            // The toolstack takes the device away.
            Some(_) => self.script = Script::Awaited(None),
        }
        Ok(())
    }
}
