//! The negotiation in xenstore: what the backend can do, the rings it is offered, the properties of the
//! disk, and its size when that changes.

use super::{Control, Opened, xenstore};
use crate::fabric::Fabric;
use crate::hw::Ring;
use crate::limits::Limits;
use crate::link::locked;
use crate::{Cause, Features, Geometry, Protocol, rings};
use ring_proto::RingLayout;
use ring_proto::abi::PAGE_SIZE;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use xenstore_glue::client;
use xenstore_glue::vbd::{Agreement, BackendOffer, DeviceProperties, FrontendRequest};
use xenstore_glue::xenbus::{FrontendEvent, XenbusState};

/// Rings that were offered to the backend.
pub(super) struct Offered {
    rings: Vec<Ring>,
    agreement: Agreement,
}

impl Control {
    fn refuse(&self, reason: impl ToString) -> Cause {
        Cause::Negotiation { backend: self.backend.clone(), reason: reason.to_string() }
    }

    /// Values of the backend's keys, read in one transaction.
    async fn read_backend(&self, keys: &[&str]) -> Result<HashMap<String, Vec<u8>>, Cause> {
        let values = self.client.transact(async |nodes: &client::Transaction| {
            let mut values = HashMap::new();
            for key in keys {
                let path = format!("{}/{key}", self.backend);
                if let Some(value) = nodes.read_optional(&path).await? {
                    values.insert((*key).to_owned(), value);
                }
            }
            Ok(values)
        });
        values.await.map_err(xenstore(format!("read the keys of {}", self.backend)))
    }

    pub(super) async fn offer(&mut self) -> Result<(), Cause> {
        let keys = self.read_backend(BackendOffer::KEYS).await?;
        let offer = BackendOffer::from_keys(&|key: &str| keys.get(key).cloned())
            .map_err(|refusal| self.refuse(refusal))?;
        let count = match &self.fabric {
            Some(fabric) => fabric.rings(),
            None => {
                let wanted = self.config.queues.unwrap_or(self.config.vcpus);
                let count = wanted.min(offer.max_queues.into());
                let fabric = Fabric::new(&self.config, count, self.control.clone())?;
                self.fabric = Some(fabric);
                count
            }
        };
        if count > offer.max_queues.into() {
            let max = offer.max_queues;
            let reason = format!("multi-queue-max-queues is {max} now, but {count} are in use");
            return Err(self.refuse(reason));
        }
        let layout = if self.config.split_ring && offer.split_ring {
            RingLayout::Split
        } else {
            RingLayout::Union(self.config.protocol.abi())
        };
        let order = self.config.ring_order.min(offer.max_ring_page_order);
        let (mut rings, mut queues) = (Vec::new(), Vec::new());
        for ring in 0..count {
            let (ring, keys) =
                rings::make(&*self.platform, self.backend_domain, ring, layout, order)?;
            rings.push(ring);
            queues.push(keys);
        }
        let request = FrontendRequest {
            layout,
            order,
            persistent: self.config.persistent,
            large_sector_size: true,
            queues,
        };
        self.write_request(&request).await?;
        let agreement = Agreement::new(&offer, request).map_err(|refusal| self.refuse(refusal))?;
        self.offered = Some(Offered { rings, agreement });
        Ok(())
    }

    /// Replaces the keys of an earlier connection and sets the state, in one transaction.
    async fn write_request(&self, request: &FrontendRequest) -> Result<(), Cause> {
        const STALE: [&str; 4] = ["queue-", "ring-ref", "response-ring-ref", "event-channel"];
        let frontend = &self.frontend;
        let mut nodes = request.to_keys();
        if self.config.protocol == Protocol::Unnamed {
            nodes.retain(|(key, _)| key != "protocol");
        }
        let reissue = if self.config.reissue { "1" } else { "0" };
        let written = self.client.transact(async |store: &client::Transaction| {
            if !self.is_ours(store).await? {
                return Ok(false);
            }
            for name in store.directory(frontend).await? {
                let stale = STALE.iter().any(|prefix| name.starts_with(prefix));
                if stale || FrontendRequest::KEYS.contains(&name.as_str()) {
                    store.rm(&format!("{frontend}/{name}")).await?;
                }
            }
            for (key, value) in &nodes {
                store.write(&format!("{frontend}/{key}"), value).await?;
            }
            store.write(&format!("{frontend}/{}", FrontendRequest::REISSUE_KEY), reissue).await?;
            let state = XenbusState::Initialised.value();
            store.write(&format!("{frontend}/state"), state).await?;
            Ok(true)
        });
        match written.await.map_err(xenstore(format!("write the rings of {frontend}")))? {
            true => Ok(()),
            false => Err(Cause::Removed { backend: self.backend.clone() }),
        }
    }

    pub(super) async fn connect(&mut self) -> Result<FrontendEvent, Cause> {
        let keys = [DeviceProperties::KEYS, &[BackendOffer::PERSISTENT_KEY]].concat();
        let keys = self.read_backend(&keys).await?;
        let device = DeviceProperties::from_keys(&|key: &str| keys.get(key).cloned())
            .map_err(|refusal| self.refuse(refusal))?;
        if device.sector_size as usize > PAGE_SIZE {
            // A segment addresses sectors within a page.
            return Err(self.refuse(format!("sectors of {} bytes", device.sector_size)));
        }
        let used = locked(&self.state).geometry.sector_size;
        if self.connection > 0 && device.sector_size > used {
            let reason =
                format!("sectors are of {} bytes now, but {used} are in use", device.sector_size);
            return Err(self.refuse(reason));
        }
        let (Some(fabric), Some(mut offered)) = (&self.fabric, self.offered.take()) else {
            return Ok(FrontendEvent::Failed);
        };
        let kept = keys.get(BackendOffer::PERSISTENT_KEY).is_some_and(|value| value == b"1");
        offered.agreement.persistent = kept && self.config.persistent;
        let limits = Limits::new(&self.config, &offered.agreement, &device);
        let features = Features::new(&limits, &offered.agreement, &device);
        let before = fabric.link.sectors.swap(device.sectors, Ordering::Relaxed);
        self.connection += 1;
        self.asked = false;
        self.changed_at = Some(tokio::time::Instant::now());
        self.complaint.clear();
        self.deadline = None;
        // Before any I/O on this connection, so that its users see the state that goes with it.
        {
            let mut state = locked(&self.state);
            state.connected = true;
            state.connections = self.connection.into();
            state.geometry = Geometry::new(&device);
            state.features = features;
            state.limits = limits;
        }
        fabric.connect(self.connection, limits, offered.rings);
        if self.connection > 1 && before != device.sectors {
            self.news.ring();
        }
        if self.connection > 1 {
            // At the level of the warning that it resolves.
            tracing::warn!(device = self.frontend, "connected again");
        } else {
            tracing::info!(device = self.frontend, backend = self.backend, "connected");
        }
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(Ok(Opened {
                fabric: fabric.clone(),
                backend_domain: self.backend_domain,
                state: self.state.clone(),
            }));
        }
        Ok(FrontendEvent::Connected)
    }

    pub(super) async fn resized(&mut self) -> Result<(), Cause> {
        let keys = self.read_backend(DeviceProperties::KEYS).await?;
        let device = match DeviceProperties::from_keys(&|key: &str| keys.get(key).cloned()) {
            Ok(device) => device,
            Err(refusal) => {
                // Not a warning: a backend can cause this as often as it likes.
                tracing::debug!(device = self.frontend, "resize ignored: {refusal}");
                return Ok(());
            }
        };
        let Some(fabric) = self.fabric.clone() else { return Ok(()) };
        if fabric.link.sectors.load(Ordering::Relaxed) != device.sectors {
            self.pace().await;
            self.changed_at = Some(tokio::time::Instant::now());
            fabric.link.sectors.store(device.sectors, Ordering::Relaxed);
            tracing::info!(device = self.frontend, "resized to {} bytes", device.bytes());
            let mut state = locked(&self.state);
            state.geometry.size = device.bytes();
            drop(state);
            self.news.ring();
        }
        Ok(())
    }
}
