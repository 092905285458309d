//! Makes a disk ready to be connected, together with the toolstack's hotplug script, if there is one.

use super::{Abandoned, Device, error_node, nodes};
use ring_proto::DomId;
use std::time::Duration;
use tokio::time::Instant;
use tracing::info;
use xenstore_glue::client;
use xenstore_glue::xenbus::BackendEvent;

/// After `Closed`, `xl devd` runs the script once more and then removes the directory. We wait this
/// long for that: a script that finds its directory gone writes an error there, and so recreates it.
/// libxl in dom0 waits 10 s for the directory to go.
const SCRIPT_GRACE: Duration = Duration::from_secs(8);
/// The pause between `Closed` and the removal of the directory if no script runs: libxl waits for the
/// value of `state`, and takes a missing node for a failure.
const RETIRE_GRACE: Duration = Duration::from_secs(1);

/// How often to check whether a disk is still wanted while it is being opened.
pub(super) const OPEN_LOOK: Duration = Duration::from_secs(1);

/// The state of a disk's hotplug script.
///
/// The toolstack runs the script once it has seen `InitWait`, and accepts no other state: a quick
/// frontend would make us go on to `Connected` before it looks, and hot-attach would fail. Nor must a
/// disk be used that the script refuses, say because another guest writes to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Script {
    /// No script is named, or nobody runs it.
    None,
    /// It has yet to say that the disk may be used. With a deadline if it is not certain to run.
    Awaited(Option<Instant>),
    /// It has said no: the toolstack removes the device.
    Refused,
    /// It has said so.
    Ran,
}

impl Script {
    /// `InitWait` was published, so the script runs now, if at all: in dom0 the toolstack runs it, in a
    /// driver domain `xl devd`, if present.
    pub(super) fn start(&mut self, own: DomId, timeout: Duration) {
        if let Self::Awaited(deadline) = self
            && own != DomId(0)
        {
            *deadline = Some(Instant::now() + timeout);
        }
    }

    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Awaited(deadline) => deadline,
            Self::None | Self::Refused | Self::Ran => None,
        }
    }

    /// How long to leave the directory of a closed device for others to remove.
    fn grace(self) -> Duration {
        match self {
            Self::Refused | Self::Ran => SCRIPT_GRACE,
            Self::None | Self::Awaited(_) => RETIRE_GRACE,
        }
    }
}

impl Device {
    /// Opens the disk, and reports the outcome in xenstore, unless a script will report it.
    pub(super) async fn open_storage(&mut self) -> Result<(), Abandoned> {
        let script = self.description.script;
        if self.description.finds_disk && self.hotplug_status().await?.is_none() {
            self.script = Script::Awaited(None);
            return Ok(());
        }
        self.open().await?;
        if self.storage.is_none() {
            return Ok(());
        }
        if script && !self.has_consent().await? {
            self.script = Script::Awaited(None);
            return Ok(());
        }
        self.connectable(if script { Script::Ran } else { Script::None }).await
    }

    /// The path of the disk that a script has set up.
    async fn found(&self) -> Result<Option<String>, client::Error> {
        if !self.description.finds_disk {
            return Ok(None);
        }
        let read = async |key: &str| -> Result<Option<String>, client::Error> {
            let value = self.context.client.read_optional(&self.node(key)).await?;
            Ok(value.and_then(|value| String::from_utf8(value).ok()))
        };
        if let Some(path) = read("physical-device-path").await? {
            return Ok(Some(path));
        }
        // Hexadecimal, as stat(1) prints it.
        let device = read("physical-device").await?;
        let numbers = device.as_deref().and_then(|device| device.split_once(':'));
        let number = |text| u32::from_str_radix(text, 16).ok();
        let numbers = numbers.and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
        Ok(numbers.map(|(major, minor)| format!("/dev/block/{major}:{minor}")))
    }

    /// Opens the disk, or reports why it cannot be opened.
    async fn open(&mut self) -> Result<(), Abandoned> {
        let (description, direct) = (self.description.clone(), self.context.tuning.direct);
        let found = self.found().await?;
        let was_found = found.is_some();
        let mut open = tokio::task::spawn_blocking(move || description.open(found, direct));
        let opened = loop {
            // That may take long, or for ever: hanging storage must not block another disk in this place.
            let opened = tokio::time::timeout(OPEN_LOOK, &mut open).await;
            if self.is_another().await? {
                return self.feed(BackendEvent::DirectoryRemoved).await;
            }
            if let Ok(opened) = opened {
                break opened;
            }
            // It is being detached before we know whether it can be used.
            if !self.is_wanted(self.frontend_state().await?).await? {
                return Ok(());
            }
        };
        match opened {
            Ok(Ok(storage)) => {
                let geometry = storage.geometry();
                info!(
                    target = %self.description.params,
                    mib = geometry.sectors >> 11,
                    read_only = geometry.read_only,
                    "disk opened"
                );
                // What a script has found is a file or a device, whatever its target is called.
                if was_found || self.description.can_resize() {
                    self.context.sizes.watch(&storage, &self.resized);
                }
                self.storage = Some(storage);
                Ok(())
            }
            Ok(Err(error)) => self.refused(&error).await,
            Err(error) => self.refused(&error).await,
        }
    }

    /// Whether the script told a predecessor that the disk may be used, or only the predecessor itself
    /// refused it.
    async fn has_consent(&self) -> Result<bool, client::Error> {
        let client = &self.context.client;
        Ok(match self.hotplug_status().await?.as_deref() {
            None => false,
            Some(b"connected") => true,
            Some(_) => {
                let said = client.read_optional(&self.node("hotplug-error")).await?;
                said.is_some() && said == client.read_optional(&error_node(&self.dir)).await?
            }
        })
    }

    async fn hotplug_status(&self) -> Result<Option<Vec<u8>>, client::Error> {
        self.context.client.read_optional(&self.node("hotplug-status")).await
    }

    /// No script stands in the way of connecting the disk (any more).
    pub(super) async fn connectable(&mut self, script: Script) -> Result<(), Abandoned> {
        self.script = script;
        if self.storage.is_none() {
            if !self.description.finds_disk {
                return self.feed(BackendEvent::StorageFailed).await;
            }
            self.open().await?;
            if self.storage.is_none() {
                return Ok(());
            }
        }
        self.write(&[("hotplug-status".to_owned(), "connected".to_owned())]).await?;
        self.feed(BackendEvent::StorageReady).await
    }

    async fn refused(&mut self, error: &(dyn std::error::Error + Sync)) -> Result<(), Abandoned> {
        if self.is_in_use().await? {
            return Err(Abandoned::InUse(error.to_string()));
        }
        self.fail(&error.to_string()).await?;
        // A status already there is a predecessor's: a script will not tell anybody any more.
        let is_new = self.hotplug_status().await?.is_none();
        let status = ("hotplug-status".to_owned(), "error".to_owned());
        self.write(&[("hotplug-error".to_owned(), error.to_string()), status]).await?;
        // libxl waits for `InitWait` and nothing else, then looks at the script's result. Without the
        // former it waits in vain and cannot say why. Our script reports the error; others do not know us.
        if is_new && self.description.own_script && self.context.platform.domid() == DomId(0) {
            self.script = Script::Awaited(None);
            return Ok(());
        }
        self.feed(BackendEvent::StorageFailed).await
    }

    /// Reads the script's result, if one is awaited.
    pub(super) async fn look_for_script(&mut self) -> Result<(), Abandoned> {
        if !matches!(self.script, Script::Awaited(_) | Script::Refused) {
            return Ok(());
        }
        match self.hotplug_status().await?.as_deref() {
            None => {}
            Some(b"connected") => self.connectable(Script::Ran).await?,
            Some(_) => self.script = Script::Refused,
        }
        Ok(())
    }

    /// Closes the disk on another thread, because that may take long, or hang.
    pub(super) async fn close_storage(&mut self) {
        if let Some(storage) = self.storage.take() {
            let close = tokio::task::spawn_blocking(move || drop(storage));
            let _ = tokio::time::timeout(OPEN_LOOK, close).await;
        }
    }

    /// The toolstack wants the device removed, and it is closed. In dom0 the toolstack removes its
    /// directory; elsewhere `xl devd` does, or we do if there is none.
    pub(super) async fn retire(&mut self) -> Result<(), Abandoned> {
        info!("device removed");
        self.close_storage().await;
        if self.context.platform.domid() == DomId(0) {
            return Ok(());
        }
        let (client, dir) = (&self.context.client, &self.dir);
        let online = format!("{dir}/online");
        let until = Instant::now() + self.script.grace();
        loop {
            tokio::time::sleep(RETIRE_GRACE).await;
            match client.read_optional(&online).await?.as_deref() {
                Some(b"0") if Instant::now() < until => {}
                Some(b"0") => break,
                // Removed, or attached again.
                _ => return Ok(()),
            }
        }
        client
            .transact(async |transaction| {
                let online = transaction.read_optional(&online).await?;
                if online.as_deref() == Some(b"0") {
                    nodes::remove_with_parent(transaction, dir).await?;
                }
                Ok(())
            })
            .await?;
        Ok(())
    }
}
