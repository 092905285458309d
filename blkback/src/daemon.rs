//! The daemon: finds devices and gives each a task.

use crate::device::{self, Context};
use crate::records::Records;
use crate::registry::Registry;
use crate::ring::Threads;
use crate::sizes::Sizes;
use crate::tuning::Tuning;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::{Id, JoinSet, LocalSet};
use tracing::{info, warn};
use xen_platform::Platform;
use xenstore_glue::client::{self, Client, Watch};
use xenstore_glue::vbd::{BackendKind, DevicePaths};

/// What a daemon serves, and how.
pub struct Daemon {
    /// Xenstore, as this domain sees it.
    pub client: Client,
    /// The hypervisor.
    pub platform: Arc<dyn Platform>,
    /// Directories to watch.
    pub kinds: Vec<BackendKind>,
    /// Offers and strategies.
    pub tuning: Tuning,
    /// Where devices are shown.
    pub registry: Arc<Registry>,
    /// Where rings are recorded for a successor; `None` if that is not possible.
    pub records: Option<Records>,
    /// How often to check the sizes of disks; `None` for only when asked.
    pub resize_interval: Option<Duration>,
}

struct Task {
    paths: DevicePaths,
    /// Something in the backend directory changed.
    changed: Arc<Notify>,
}

impl Daemon {
    /// Serves until `stop` becomes true, then answers what is in flight and returns.
    ///
    /// `rescan` requests a check of the sizes of all disks.
    ///
    /// # Errors
    /// If xenstore refuses a watch. Xenstore may go away and come back at any time.
    pub async fn serve(
        self,
        stop: watch::Receiver<bool>,
        rescan: watch::Receiver<()>,
    ) -> Result<(), client::Error> {
        // The whole control plane is one thread, so its tasks need no locks between them.
        LocalSet::new().run_until(self.serve_here(stop, rescan)).await
    }

    async fn serve_here(
        self,
        stop: watch::Receiver<bool>,
        rescan: watch::Receiver<()>,
    ) -> Result<(), client::Error> {
        let roots: Vec<_> =
            self.kinds.iter().map(|kind| kind.root(self.platform.domid())).collect();
        let context = Context {
            client: self.client.clone(),
            platform: self.platform.clone(),
            threads: Threads::new(self.tuning.threads(), self.tuning.waiting()),
            tuning: Arc::new(self.tuning),
            registry: self.registry,
            records: self.records.map(Arc::new),
            sizes: Sizes::start(self.resize_interval),
            shutdown: stop.clone(),
        };
        let mut devices = Devices { context, tasks: HashMap::new(), running: JoinSet::new() };
        let found = device::unless_stopped(&stop, devices.find(&roots, rescan)).await;
        match found {
            Some(Err(error)) => return Err(error),
            Some(Ok(never)) => match never {},
            None => {}
        }
        info!(devices = devices.running.len(), "draining");
        while devices.running.join_next().await.is_some() {}
        Ok(())
    }
}

/// Forwards the events of one watch, one at a time. Events that nobody has taken stay with the
/// watch, which keeps one per path (XSA-349).
async fn forward(
    mut watch: Watch,
    events: tokio::sync::mpsc::Sender<Result<String, client::Error>>,
) {
    loop {
        let event = watch.next().await;
        let last = event.is_err();
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

struct Devices {
    context: Context,
    tasks: HashMap<Id, Task>,
    running: JoinSet<()>,
}

impl Devices {
    /// Finds devices in the directories `roots` and gives each a task, until it fails.
    async fn find(
        &mut self,
        roots: &[String],
        mut rescan: watch::Receiver<()>,
    ) -> Result<Infallible, client::Error> {
        self.forget_the_gone(roots).await?;
        let (events, mut changed) = tokio::sync::mpsc::channel(1);
        let mut watchers = JoinSet::new();
        for root in roots {
            let watch = self.context.client.watch(root).await?;
            watchers.spawn(forward(watch, events.clone()));
        }
        loop {
            let looked = tokio::select! {
                // `events` is alive, so this channel never closes.
                Some(path) = changed.recv() => self.changed(&path?).await,
                Some(ended) = self.running.join_next_with_id() => {
                    let id = match ended {
                        Ok((id, ())) => id,
                        Err(error) => {
                            warn!(%error, "a device's task failed");
                            error.id()
                        }
                    };
                    self.ended(id).await
                }
                Ok(()) = rescan.changed() => { self.context.sizes.look(); Ok(()) }
            };
            // A device that cannot be examined must not harm the others.
            if let Err(error) = looked {
                warn!(%error, "cannot look for devices");
            }
        }
    }

    /// Removes the records of devices that were detached while no daemon ran.
    async fn forget_the_gone(&self, roots: &[String]) -> Result<(), client::Error> {
        let Some(records) = &self.context.records else { return Ok(()) };
        for device in records.devices() {
            let ours = roots.iter().any(|root| device.starts_with(&format!("{root}/")));
            if ours && !self.context.client.exists(&device).await? {
                records.forget(&device);
            }
        }
        Ok(())
    }

    /// Something changed at or below `path`.
    async fn changed(&mut self, path: &str) -> Result<(), client::Error> {
        if let Some((paths, _)) = DevicePaths::parse_below(path) {
            return self.look(paths).await;
        }
        for paths in self.list(path).await? {
            self.look(paths).await?;
        }
        // A device that is gone from the tree is noticed by its own task.
        for task in self.tasks.values() {
            task.changed.notify_one();
        }
        Ok(())
    }

    /// The devices in a directory of a kind of backend, or of one frontend domain in it.
    async fn list(&self, path: &str) -> Result<Vec<DevicePaths>, client::Error> {
        let client = &self.context.client;
        let below = async |dir: &str| -> Result<Vec<String>, client::Error> {
            match client.directory(dir).await {
                Ok(names) => Ok(names.into_iter().map(|name| format!("{dir}/{name}")).collect()),
                Err(error) if error.is_not_found() => Ok(Vec::new()),
                Err(error) => Err(error),
            }
        };
        let mut found = Vec::new();
        for child in below(path).await? {
            if let Ok(paths) = DevicePaths::parse_backend(&child) {
                found.push(paths);
                continue;
            }
            for grandchild in below(&child).await? {
                found.extend(DevicePaths::parse_backend(&grandchild));
            }
        }
        Ok(found)
    }

    async fn look(&mut self, paths: DevicePaths) -> Result<(), client::Error> {
        if let Some(task) = self.tasks.values().find(|task| task.paths == paths) {
            task.changed.notify_one();
            return Ok(());
        }
        // `frontend` appears with the toolstack's transaction, and goes with the directory.
        if !self.context.client.exists(&format!("{}/frontend", paths.backend())).await? {
            return Ok(());
        }
        let changed = Arc::new(Notify::new());
        let task = device::serve(self.context.clone(), paths, changed.clone());
        let id = self.running.spawn_local(task).id();
        self.tasks.insert(id, Task { paths, changed });
        Ok(())
    }

    /// A device's task has ended. The toolstack may have attached the device again meanwhile.
    async fn ended(&mut self, id: Id) -> Result<(), client::Error> {
        let Some(task) = self.tasks.remove(&id) else { return Ok(()) };
        let online = format!("{}/online", task.paths.backend());
        let online = self.context.client.read_optional(&online).await?;
        if online.as_deref() == Some(b"1") { self.look(task.paths).await } else { Ok(()) }
    }
}
