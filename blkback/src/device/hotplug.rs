//! Making a disk ready to be connected, and the toolstack's hotplug script, which may have a say.

use super::{Abandoned, Device, error_node, nodes};
use ring_proto::DomId;
use std::time::Duration;
use tokio::time::Instant;
use tracing::info;
use xenstore_glue::client;
use xenstore_glue::xenbus::BackendEvent;

/// After `Closed`, `xl devd` runs the script once more and then removes the directory. It is left this
/// long for that: a script that finds its directory gone writes its complaint there, and so brings it
/// back. libxl in dom0 waits 10 s for the directory to go.
const SCRIPT_GRACE: Duration = Duration::from_secs(8);
/// Where no script runs, between `Closed` and the removal of the directory: libxl waits for the value
/// of `state`, and takes a missing node for a failure.
const RETIRE_GRACE: Duration = Duration::from_secs(1);

/// While a disk is being opened: how often it is looked whether it is still wanted.
pub(super) const OPEN_LOOK: Duration = Duration::from_secs(1);

/// What a hotplug script has to do with the disk.
///
/// The toolstack runs it when it has seen `InitWait`, and waits for no other state: a frontend that is
/// quick would make us go on to `Connected` before it looks, and hot-attach would fail. Nor is a disk
/// to be used that the script refuses, because another guest writes it, say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Script {
    /// None is named, or nobody runs it.
    None,
    /// It has still to say that the disk may be used; until then, where it is not sure that it runs.
    Awaited(Option<Instant>),
    /// It has said so.
    Ran,
}

impl Script {
    /// `InitWait` was published: the script runs now, if anybody runs it. In dom0 the toolstack does; in
    /// a driver domain `xl devd`, if it is there.
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
            Self::None | Self::Ran => None,
        }
    }

    /// How long the directory of a closed device is left for others to remove.
    fn grace(self) -> Duration {
        match self {
            Self::Ran => SCRIPT_GRACE,
            Self::None | Self::Awaited(_) => RETIRE_GRACE,
        }
    }
}

impl Device {
    /// Opens the disk, and says in xenstore what came of it unless a script is to say that.
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

    /// The path of the disk that a script has made.
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
        // Hexadecimal, as stat(1) has it.
        let device = read("physical-device").await?;
        let numbers = device.as_deref().and_then(|device| device.split_once(':'));
        let number = |text| u32::from_str_radix(text, 16).ok();
        let numbers = numbers.and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
        Ok(numbers.map(|(major, minor)| format!("/dev/block/{major}:{minor}")))
    }

    /// Opens the disk, or says why that cannot be done.
    async fn open(&mut self) -> Result<(), Abandoned> {
        let (description, direct) = (self.description.clone(), self.context.tuning.direct);
        let found = self.found().await?;
        let mut open = tokio::task::spawn_blocking(move || description.open(found, direct));
        let opened = loop {
            // That may take long, or for ever: storage that hangs keeps no other disk from this one's place.
            let opened = tokio::time::timeout(OPEN_LOOK, &mut open).await;
            if self.is_another().await? {
                return self.feed(BackendEvent::DirectoryRemoved).await;
            }
            if let Ok(opened) = opened {
                break opened;
            }
            // It is being detached, and nobody knows yet whether it can be used.
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
                if self.description.can_resize() {
                    self.context.sizes.watch(&storage, &self.resized);
                }
                self.storage = Some(storage);
                Ok(())
            }
            Ok(Err(error)) => self.refused(&error).await,
            Err(error) => self.refused(&error).await,
        }
    }

    /// Whether a daemon before us was told by the script that the disk may be used, or refused it by
    /// itself and nobody else did.
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

    /// The disk may be connected, as far as a script is concerned.
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
        // One that is there already is of a daemon before us: nobody is told by a script any more.
        let is_new = self.hotplug_status().await?.is_none();
        let status = ("hotplug-status".to_owned(), "error".to_owned());
        self.write(&[("hotplug-error".to_owned(), error.to_string()), status]).await?;
        // libxl looks for `InitWait` and nothing else, then at what the script says: without the former
        // it would wait in vain and not say why. Our script tells it; others know nothing of us.
        if is_new && self.description.own_script && self.context.platform.domid() == DomId(0) {
            self.script = Script::Awaited(None);
            return Ok(());
        }
        self.feed(BackendEvent::StorageFailed).await
    }

    /// What the script says, if it has to.
    pub(super) async fn look_for_script(&mut self) -> Result<(), Abandoned> {
        if !matches!(self.script, Script::Awaited(_)) {
            return Ok(());
        }
        match self.hotplug_status().await?.as_deref() {
            None => {}
            Some(b"connected") => self.connectable(Script::Ran).await?,
            // The toolstack takes the device away.
            Some(_) => self.script = Script::Awaited(None),
        }
        Ok(())
    }

    /// Lets go of the disk, elsewhere: that may take long, or hang.
    pub(super) async fn close_storage(&mut self) {
        if let Some(storage) = self.storage.take() {
            let close = tokio::task::spawn_blocking(move || drop(storage));
            let _ = tokio::time::timeout(OPEN_LOOK, close).await;
        }
    }

    /// The toolstack has asked for the device to go, and it is closed. In dom0 the toolstack removes its
    /// directory; elsewhere `xl devd` does, or if there is none, we do.
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
                // Removed, or attached anew.
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
