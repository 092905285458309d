//! From a frontend's keys to its rings, and back.

use super::hotplug::OPEN_LOOK;
use super::link::{Link, LinkError, LinkSetup};
use super::{Device, read_frontend};
use crate::storage::Geometry;
use std::collections::HashMap;
use tracing::info;
use xenstore_glue::client::{self, Client};
use xenstore_glue::vbd::{Agreement, DeviceProperties, FrontendRequest, Refusal};

/// Why a connect failed; the frontend is told.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("the frontend's keys: {0}")]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("xenstore: {0}")]
    Store(#[from] client::Error),
    #[error("the disk could not be looked at: {0}")]
    Disk(#[from] std::io::Error),
    #[error("there is no disk")]
    NoDisk,
    #[error("the disk has {now}-byte sectors now, and the frontend knows it by those of {told}")]
    Sectors { now: u32, told: u32 },
}

impl ConnectError {
    /// Whether the cause is on this host and may be gone at the next try.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Link(LinkError::Platform { source, .. }) => {
                !matches!(source, xen_platform::Error::Grant { .. })
            }
            Self::Link(LinkError::Thread { .. }) | Self::Disk(_) | Self::Sectors { .. } => true,
            _ => false,
        }
    }
}

/// Whether a frontend reissues its requests on new rings when its backend has died.
pub(super) async fn reissues(client: &Client, frontend: &str) -> Result<bool, client::Error> {
    let key = format!("{frontend}/{}", FrontendRequest::REISSUE_KEY);
    Ok(read_frontend(client, &key).await?.as_deref() == Some(b"1"))
}

/// Reads those of `keys` that exist in a directory.
pub(super) async fn read_keys(
    client: &Client,
    dir: &str,
    keys: &[&str],
) -> Result<HashMap<String, Vec<u8>>, client::Error> {
    let mut values = HashMap::new();
    for key in keys {
        if let Some(value) = client.read_optional(&format!("{dir}/{key}")).await? {
            values.insert((*key).to_owned(), value);
        }
    }
    Ok(values)
}

impl Device {
    /// Reads the frontend's keys, maps its rings, binds its event channels and starts.
    pub(super) async fn connect(&mut self) -> Result<(), ConnectError> {
        let storage = self.storage.clone().ok_or(ConnectError::NoDisk)?;
        let request = self.frontend_request().await?;
        let agreement = Agreement::new(&self.offer, request)?;
        let reissues = reissues(&self.context.client, &self.description.frontend).await?;
        let looked = storage.clone();
        let look = tokio::task::spawn_blocking(move || looked.refresh());
        let geometry = match tokio::time::timeout(OPEN_LOOK, look).await {
            Ok(refreshed) => refreshed.map_err(std::io::Error::other)??,
            // The disk hangs, and the toolstack may want the device back meanwhile.
            Err(_) => storage.geometry(),
        };
        if self.machine.takes_over() {
            self.check_sectors(geometry.sector_size).await?;
        }
        let setup = LinkSetup {
            platform: &self.context.platform,
            threads: &self.context.threads,
            peer: self.description.frontend_id,
            name: &self.description.name,
            agreement: &agreement,
            storage: &storage,
            geometry: &geometry,
            tuning: &self.context.tuning,
            backend: &self.dir,
            // A frontend that reissues needs no record, which would cost time for nothing.
            records: self.context.records.as_deref().filter(|_| !reissues),
            live: self.machine.takes_over(),
        };
        let link = Link::start(&mut self.link, &setup).await?;
        if self.log.admits() {
            info!(
                rings = agreement.queues.len(),
                slots = agreement.slots(),
                layout = %agreement.layout,
                data = link.strategy(),
                "rings attached"
            );
        }
        self.context.registry.update(&self.dir, |view| {
            view.sectors = geometry.sectors;
            view.strategy = Some(link.strategy());
            view.layout = Some(agreement.layout.to_string());
            view.rings = link.stats();
            view.error = None;
        });
        self.connected = Some(agreement.queues);
        if let Some(properties) = self.properties() {
            // If the directory is gone, the next read of the frontend's state tells.
            self.write(&properties.to_keys()).await?;
        }
        Ok(())
    }

    /// A connected frontend is not told of larger sectors: its reads and writes would be refused.
    async fn check_sectors(&self, now: u32) -> Result<(), ConnectError> {
        let keys = DeviceProperties::KEYS;
        let told = read_keys(&self.context.client, &self.dir, keys).await?;
        match DeviceProperties::from_keys(&|key: &str| told.get(key).cloned()) {
            Ok(told) if now > told.sector_size => {
                Err(ConnectError::Sectors { now, told: told.sector_size })
            }
            // Without valid keys the frontend was told nothing.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Reads the frontend's keys.
    pub(super) async fn frontend_request(&self) -> Result<FrontendRequest, ConnectError> {
        let mut values: HashMap<String, Vec<u8>> = HashMap::new();
        let names = FrontendRequest::KEYS.iter().map(|&key| key.to_owned()).collect();
        self.fetch(names, &mut values).await?;
        let rings = FrontendRequest::ring_keys(&self.offer, &|key: &str| values.get(key).cloned())?;
        self.fetch(rings, &mut values).await?;
        Ok(FrontendRequest::from_keys(&self.offer, &|key: &str| values.get(key).cloned())?)
    }

    async fn fetch(
        &self,
        names: Vec<String>,
        values: &mut HashMap<String, Vec<u8>>,
    ) -> Result<(), client::Error> {
        for name in names {
            let path = format!("{}/{name}", self.description.frontend);
            if let Some(value) = read_frontend(&self.context.client, &path).await? {
                values.insert(name, value);
            }
        }
        Ok(())
    }

    /// What to tell the frontend about the disk, if there is one.
    pub(super) fn properties(&self) -> Option<DeviceProperties> {
        let Geometry {
            sectors, sector_size, physical_sector_size, read_only, discard, flush, ..
        } = self.storage.as_ref()?.geometry();
        Some(DeviceProperties {
            sectors,
            sector_size,
            physical_sector_size,
            read_only,
            cdrom: self.description.cdrom,
            removable: self.description.removable,
            flush,
            barrier: flush,
            discard,
        })
    }

    /// Lets go of the rings, once all requests in flight are answered.
    pub(super) async fn disconnect(&mut self) {
        if let Some(link) = &mut self.link {
            link.stop().await;
            self.link = None;
            if self.log.admits() {
                info!("rings detached");
            }
        }
        self.context.registry.update(&self.dir, |view| {
            view.rings.clear();
            view.strategy = None;
            view.layout = None;
        });
    }
}
