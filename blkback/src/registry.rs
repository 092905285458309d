//! The devices that the daemon serves, for statistics.

use crate::stats::RingStats;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use xenstore_glue::vbd::DevicePaths;
use xenstore_glue::xenbus::XenbusState;

/// A device as it is now.
#[derive(Clone, Debug)]
pub struct DeviceView {
    /// Where it is in xenstore.
    pub paths: DevicePaths,
    /// `xvda` and the like.
    pub name: String,
    /// What backs it: the `target=` of its disk line.
    pub target: String,
    /// This end's xenbus state.
    pub state: XenbusState,
    /// Size in 512-byte sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// How data is reached, once connected.
    pub strategy: Option<&'static str>,
    /// How the rings are laid out, once connected.
    pub layout: Option<String>,
    /// One per ring; empty while not connected.
    pub rings: Vec<Arc<RingStats>>,
    /// The last error.
    pub error: Option<String>,
}

/// All devices. Shared by the control plane and the readers of statistics; ring threads never use it.
#[derive(Debug, Default)]
pub struct Registry(Mutex<BTreeMap<String, DeviceView>>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, DeviceView>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inserts or replaces a device, and keeps its last error.
    pub(crate) fn insert(&self, mut view: DeviceView) {
        let mut devices = self.lock();
        let path = view.paths.backend();
        if let Some(before) = devices.remove(&path) {
            view.error = view.error.or(before.error);
        }
        devices.insert(path, view);
    }

    pub(crate) fn update(&self, path: &str, change: impl FnOnce(&mut DeviceView)) {
        if let Some(view) = self.lock().get_mut(path) {
            change(view);
        }
    }

    pub(crate) fn remove(&self, path: &str) {
        self.lock().remove(path);
    }

    /// Every device, by domain and number.
    pub fn devices(&self) -> Vec<DeviceView> {
        let mut devices: Vec<_> = self.lock().values().cloned().collect();
        devices.sort_by_key(|view| (view.paths.frontend_domain.0, view.paths.device));
        devices
    }
}
