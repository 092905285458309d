//! One device, from the toolstack's nodes to its rings, until it is removed.
//!
//! The xenbus state machine decides; this task reads xenstore for it and carries out its actions.

mod connect;
mod hotplug;
mod kernel;
mod link;
mod nodes;
mod throttle;

use crate::records::Records;
use crate::registry::{DeviceView, Registry};
use crate::ring::{Exit, Threads};
use crate::sizes::Sizes;
use crate::storage::Storage;
use crate::tuning::Tuning;
use connect::{ConnectError, reissues};
use hotplug::Script;
use link::{Link, RingEnded};
use nodes::{Description, DescriptionError};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use throttle::Throttle;
use tokio::sync::{Notify, watch};
use tracing::{Instrument, debug, info, info_span, warn};
use xen_platform::Platform;
use xenstore_glue::client::{self, Client, Nodes, Watch};
use xenstore_glue::vbd::{BackendKind, BackendOffer, DevicePaths, QueueKeys, VirtualDevice};
use xenstore_glue::wire::Errno;
use xenstore_glue::xenbus::{BackendAction, BackendEvent, BackendMachine, StalePeer, XenbusState};

/// The pause between giving up a device and trying again: whatever is wrong with it, retries must not
/// keep the daemon busy.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The same when a quota is used up, which takes an administrator. libxl waits 10 s for a disk to detach.
const QUOTA_PAUSE: Duration = Duration::from_secs(5);

/// The pause after a frontend has rewritten the state it had: it may do so as often as it likes, and
/// each time can cost us a hundred reads of xenstore.
const SAME_STATE_PAUSE: Duration = Duration::from_millis(20);

/// Shared by all devices of a daemon.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) tuning: Arc<Tuning>,
    pub(crate) registry: Arc<Registry>,
    /// Where rings are recorded for a successor, if that is possible.
    pub(crate) records: Option<Arc<Records>>,
    pub(crate) sizes: Sizes,
    /// The threads that serve the rings.
    pub(crate) threads: Arc<Threads>,
    /// The daemon is about to exit.
    pub(crate) shutdown: watch::Receiver<bool>,
}

/// Serves a device until it is gone or the daemon exits. `changed` signals a change in its
/// directory.
pub(crate) async fn serve(context: Context, paths: DevicePaths, changed: Arc<Notify>) {
    let name = VirtualDevice::from_number(paths.device)
        .map_or_else(|| paths.device.to_string(), |device| device.to_string());
    let span = info_span!("vbd", dom = %paths.frontend_domain, dev = name);
    async {
        let path = paths.backend();
        let mut said = String::new();
        loop {
            let outcome = run(context.clone(), paths, &changed).await;
            match outcome {
                Ok(End::Stopped) => return,
                Ok(End::Gone) => {
                    context.registry.remove(&path);
                    return forget(&context, &path).await;
                }
                // A partial directory, so not the toolstack's, which writes all of it in one transaction.
                Err(error @ Abandoned::Description(_)) => {
                    context.registry.remove(&path);
                    debug!(%error, "not a device (yet)");
                    unless_stopped(&context.shutdown, tokio::time::sleep(RETRY_PAUSE)).await;
                    let look = context.client.exists(&path);
                    // It may have been given up earlier, and detached since then.
                    if let Some(Ok(false)) = unless_stopped(&context.shutdown, look).await {
                        forget(&context, &path).await;
                    }
                    return;
                }
                // Retried here and not where devices are found: it may be detached meanwhile.
                Err(error) => {
                    let says = error.to_string();
                    context.registry.update(&path, |view| view.error = Some(says.clone()));
                    if said != says {
                        warn!(%error, "device given up for now");
                        said = says;
                    }
                    unless_stopped(&context.shutdown, tokio::time::sleep(error.pause())).await;
                }
            }
        }
    }
    .instrument(span)
    .await;
}

/// Removes the records and error nodes of a device that is gone.
async fn forget(context: &Context, path: &str) {
    if let Some(records) = &context.records {
        records.forget(path);
    }
    let errors = error_dir(path);
    let removed = nodes::remove_with_parent(&context.client, &errors);
    if let Some(Err(error)) = unless_stopped(&context.shutdown, removed).await {
        warn!(%error, "cannot remove what was said of the device");
    }
}

/// Errors that end a device's task. All others are reported to the frontend and the toolstack.
#[derive(Debug, thiserror::Error)]
enum Abandoned {
    #[error("xenstore: {0}")]
    Store(client::Error),
    #[error(
        "{0}: a quota that xenstored sets this domain is used up: raise it (deployment.md, Limits) or detach disks"
    )]
    Quota(client::Error),
    #[error(transparent)]
    Description(DescriptionError),
    /// A guest uses the disk through a predecessor: it waits rather than lose the disk.
    #[error("a disk in use cannot be served yet: {0}")]
    InUse(String),
}

impl From<client::Error> for Abandoned {
    fn from(error: client::Error) -> Self {
        if error.is_quota() { Self::Quota(error) } else { Self::Store(error) }
    }
}

impl Abandoned {
    /// How long to wait before another try.
    fn pause(&self) -> Duration {
        if matches!(self, Self::Quota(_)) { QUOTA_PAUSE } else { RETRY_PAUSE }
    }
}

/// How a device's task ended.
enum End {
    /// Nobody wants the device any more.
    Gone,
    /// The daemon exits; its successor takes over the device.
    Stopped,
}

/// Where a backend reports errors (`error_path` in Linux's xenbus_client.c).
fn error_dir(backend: &str) -> String {
    backend.replacen("/backend/", "/error/backend/", 1)
}

fn error_node(backend: &str) -> String {
    format!("{}/error", error_dir(backend))
}

/// Reads one of the frontend's nodes. One that we may not read counts as missing, because the frontend
/// sets its permissions.
async fn read_frontend(client: &Client, path: &str) -> Result<Option<Vec<u8>>, client::Error> {
    match client.read_optional(path).await {
        Err(error) if error.errno() == Some(Errno::Eacces) => Ok(None),
        other => other,
    }
}

/// Whether a frontend uses its disk. When detached, it does so until it is closed.
fn uses(frontend: Option<XenbusState>) -> bool {
    matches!(frontend, Some(XenbusState::Connected | XenbusState::Closing))
}

async fn run(context: Context, paths: DevicePaths, changed: &Notify) -> Result<End, Abandoned> {
    let shutdown = context.shutdown.clone();
    if paths.kind == BackendKind::Vbd {
        let path = paths.backend();
        match unless_stopped(&shutdown, kernel::wait_until_gone(&context.client, &path)).await {
            Some(Ok(true)) => {}
            Some(Ok(false)) => return Ok(End::Gone),
            Some(Err(error)) => return Err(error.into()),
            None => return Ok(End::Stopped),
        }
    }
    let (mut device, frontend) = match unless_stopped(&shutdown, Device::find(context, paths)).await
    {
        Some(found) => found?,
        None => return Ok(End::Stopped),
    };
    let outcome = unless_stopped(&shutdown, device.attend(frontend, changed)).await;
    // Answer what is in flight, and leave `state` for a successor to find.
    device.disconnect().await;
    device.close_storage().await;
    match outcome {
        Some(done) => done.map(|()| End::Gone),
        None => Ok(End::Stopped),
    }
}

/// Does `work`, but drops it at once when the daemon is about to exit: xenstore may be away, and leave
/// requests unanswered for a long time.
pub(crate) async fn unless_stopped<T>(
    shutdown: &watch::Receiver<bool>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut shutdown = shutdown.clone();
    tokio::select! {
        biased;
        // Also if the sender is gone.
        _ = shutdown.wait_for(|&now| now) => None,
        done = work => Some(done),
    }
}

/// Waits for a change of the watched node itself; nodes that a frontend creates below it do not matter.
async fn next(frontend: &mut Watch) -> Result<(), client::Error> {
    while frontend.next().await? != frontend.path() {}
    Ok(())
}

async fn ring_ended(link: &mut Option<Link>) -> RingEnded {
    match link {
        Some(link) => link.ended().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(when: Option<tokio::time::Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

struct Device {
    machine: BackendMachine,
    context: Context,
    paths: DevicePaths,
    /// The backend directory.
    dir: String,
    /// The frontend's `state`.
    state_node: String,
    description: Description,
    /// The offer in the directory, by which the frontend makes its rings. At first it is a
    /// predecessor's: what was agreed under it must be kept, whatever we would offer now.
    offer: BackendOffer,
    storage: Option<Arc<dyn Storage>>,
    /// The storage's size has changed.
    resized: Arc<Notify>,
    /// Opening the storage has been tried.
    opened: bool,
    link: Option<Link>,
    /// The frontend's keys that `link` was made from.
    connected: Option<Vec<QueueKeys>>,
    script: Script,
    /// The state that we last wrote.
    told: Option<XenbusState>,
    /// The frontend's state as last read.
    seen: Option<XenbusState>,
    /// For messages that the frontend can cause as often as it likes.
    log: Throttle,
}

impl Device {
    /// Reads what the toolstack wrote, and watches the frontend's state.
    async fn find(context: Context, paths: DevicePaths) -> Result<(Self, Watch), Abandoned> {
        let dir = paths.backend();
        let description = match Description::read(&context.client, &paths).await {
            Ok(description) => description,
            Err(DescriptionError::Store(error)) => return Err(error.into()),
            Err(error) => return Err(Abandoned::Description(error)),
        };
        let state_node = format!("{}/state", paths.frontend());
        let frontend = context.client.watch(&state_node).await?;
        let stale = if reissues(&context.client, &paths.frontend()).await? {
            StalePeer::Restart
        } else {
            StalePeer::Attach
        };
        context.registry.insert(DeviceView {
            paths,
            name: description.name.clone(),
            target: description.target(),
            state: XenbusState::Initialising,
            sectors: 0,
            read_only: description.read_only,
            strategy: None,
            layout: None,
            rings: Vec::new(),
            error: None,
        });
        let standing = connect::read_keys(&context.client, &dir, BackendOffer::KEYS).await?;
        let offer = BackendOffer::from_keys(&|key: &str| standing.get(key).cloned());
        let offer = offer.unwrap_or_else(|_| context.tuning.offer());
        let device = Self {
            machine: BackendMachine::new(stale),
            context,
            paths,
            dir,
            state_node,
            description,
            offer,
            storage: None,
            resized: Arc::new(Notify::new()),
            opened: false,
            link: None,
            connected: None,
            script: Script::None,
            told: None,
            seen: None,
            log: Throttle::new(),
        };
        Ok((device, frontend))
    }

    /// Serves until nobody wants the device any more. May be dropped at any point.
    async fn attend(&mut self, mut frontend: Watch, changed: &Notify) -> Result<(), Abandoned> {
        let resized = self.resized.clone();
        self.observe().await?;
        while !self.machine.has_ended() {
            let script = self.script.deadline();
            tokio::select! {
                moved = next(&mut frontend) => {
                    moved?;
                    let before = self.seen;
                    self.observe().await?;
                    if self.seen == before {
                        tokio::time::sleep(SAME_STATE_PAUSE).await;
                    }
                }
                () = changed.notified() => self.observe().await?,
                () = resized.notified() => self.resize().await?,
                ended = ring_ended(&mut self.link) => self.ring_ended(ended).await?,
                () = sleep_until(script) => {
                    info!("nobody runs the hotplug script here: going on without");
                    self.connectable(Script::None).await?;
                }
            }
        }
        Ok(())
    }

    /// Gives up the disk if the frontend broke its ring, or a bug of ours might strike again. A failure of
    /// something on this host is retried later if the disk is in use.
    async fn ring_ended(&mut self, RingEnded { ring, why }: RingEnded) -> Result<(), Abandoned> {
        let says = format!("ring {ring}: {why}");
        if matches!(why, Exit::Queue(_) | Exit::Platform(_)) && uses(self.frontend_state().await?) {
            return Err(Abandoned::InUse(says));
        }
        self.fail(&says).await?;
        self.feed(BackendEvent::GiveUp).await
    }

    fn node(&self, key: &str) -> String {
        format!("{}/{key}", self.dir)
    }

    /// Reports an error in the log and where the toolstack looks for it (`xenbus_dev_error` in Linux).
    async fn fail(&self, what: &str) -> Result<(), Abandoned> {
        let admitted = self.log.admits();
        if admitted {
            warn!("{what}");
        }
        self.context.registry.update(&self.dir, |view| view.error = Some(what.to_owned()));
        match self.context.client.write(&error_node(&self.dir), what).await {
            // A quota, most likely. The device works even if its error cannot be reported.
            Err(error) if error.errno().is_some() => {
                if admitted {
                    warn!(%error, "cannot tell the toolstack");
                }
            }
            other => other?,
        }
        Ok(())
    }

    /// Reads what the machine needs to know and feeds it in.
    async fn observe(&mut self) -> Result<(), Abandoned> {
        let client = self.context.client.clone();
        if !client.exists(&self.dir).await? || self.is_anew(&client).await? {
            return self.feed(BackendEvent::DirectoryRemoved).await;
        }
        let mut state = self.frontend_state().await?;
        if self.is_wanted(state).await? && !std::mem::replace(&mut self.opened, true) {
            self.open_storage().await?;
            // That took a while.
            state = self.frontend_state().await?;
        }
        self.seen = state;
        let online = self.is_online().await?;
        self.look_for_script().await?;
        let served = self.machine.is_connected();
        self.feed(BackendEvent::Online(online)).await?;
        self.feed(BackendEvent::Frontend(state)).await?;
        // A watch may miss states in between: a frontend that has started over and is connected again
        // is recognized by its keys.
        let settled = matches!(state, Some(XenbusState::Initialised | XenbusState::Connected));
        if settled && served && self.machine.is_connected() {
            match self.frontend_request().await {
                Ok(request) if self.connected.as_ref() == Some(&request.queues) => {}
                Err(ConnectError::Store(error)) => return Err(error.into()),
                Ok(_) | Err(_) => self.feed(BackendEvent::Rekeyed).await?,
            }
        }
        Ok(())
    }

    async fn is_online(&self) -> Result<bool, client::Error> {
        let online = self.context.client.read_optional(&self.node("online")).await?;
        Ok(online.as_deref() == Some(b"1"))
    }

    /// Whether the toolstack wants the disk to be there, or its frontend uses it.
    async fn is_wanted(&self, frontend: Option<XenbusState>) -> Result<bool, client::Error> {
        Ok(uses(frontend) || self.is_online().await?)
    }

    async fn frontend_state(&self) -> Result<Option<XenbusState>, client::Error> {
        let state = read_frontend(&self.context.client, &self.state_node).await?;
        Ok(state.as_deref().and_then(XenbusState::parse))
    }

    /// Whether our `state` is as the toolstack created it: no backend ever writes `Initialising`.
    async fn is_untouched(&self, nodes: &Nodes) -> Result<bool, client::Error> {
        let state = nodes.read_optional(&self.node("state")).await?;
        Ok(state.as_deref().and_then(XenbusState::parse) == Some(XenbusState::Initialising))
    }

    /// Whether the directory was removed and recreated since we wrote to it.
    async fn is_anew(&self, nodes: &Nodes) -> Result<bool, client::Error> {
        Ok(self.told.is_some() && self.is_untouched(nodes).await?)
    }

    /// Whether the frontend uses the disk through a predecessor.
    async fn is_in_use(&self) -> Result<bool, client::Error> {
        let used = self.told.is_none() && uses(self.frontend_state().await?);
        Ok(used && !self.is_untouched(&self.context.client).await?)
    }

    /// Whether the directory no longer describes the disk that we know.
    async fn is_another(&self) -> Result<bool, Abandoned> {
        match Description::read(&self.context.client, &self.paths).await {
            Ok(now) => Ok(now != self.description),
            Err(DescriptionError::Store(error)) => Err(error.into()),
            Err(_) => Ok(true),
        }
    }

    /// Tells the rings and the frontend the disk's size, if it has changed.
    async fn resize(&mut self) -> Result<(), Abandoned> {
        // Connecting reads the size itself.
        let (Some(storage), Some(link)) = (&self.storage, &mut self.link) else { return Ok(()) };
        let now = storage.geometry().sectors;
        let before = link.resize(now);
        if now == before {
            return Ok(());
        }
        info!(mib = now >> 11, before = before >> 11, "resized");
        self.feed(BackendEvent::Resized).await
    }

    /// Feeds the machine and carries out its actions, to the end.
    async fn feed(&mut self, event: BackendEvent) -> Result<(), Abandoned> {
        let mut actions: VecDeque<_> = self.machine.handle(event).into();
        while let Some(action) = actions.pop_front() {
            debug!(?event, ?action);
            if action != BackendAction::Connect {
                self.perform(action).await?;
                continue;
            }
            let outcome = match self.connect().await {
                Ok(()) => BackendEvent::Connected,
                Err(ConnectError::Store(error)) => return Err(error.into()),
                Err(error) if self.machine.takes_over() && error.may_pass() => {
                    return Err(Abandoned::InUse(error.to_string()));
                }
                Err(error) => {
                    self.disconnect().await;
                    self.fail(&error.to_string()).await?;
                    BackendEvent::ConnectFailed
                }
            };
            actions.extend(self.machine.handle(outcome));
        }
        Ok(())
    }

    async fn perform(&mut self, action: BackendAction) -> Result<(), Abandoned> {
        match action {
            BackendAction::Advertise => {
                self.offer = self.context.tuning.offer();
                self.publish(self.offer.to_keys(), XenbusState::InitWait).await
            }
            BackendAction::Publish(state) => self.publish(Vec::new(), state).await,
            BackendAction::Resize => match self.properties() {
                Some(properties) => {
                    self.context
                        .registry
                        .update(&self.dir, |view| view.sectors = properties.sectors);
                    self.publish(properties.resize_keys(), XenbusState::Connected).await
                }
                None => Ok(()),
            },
            BackendAction::Disconnect => {
                self.disconnect().await;
                if let Some(records) = &self.context.records {
                    records.forget(&self.dir);
                }
                Ok(())
            }
            BackendAction::Retire => self.retire().await,
            BackendAction::Forget | BackendAction::Connect => Ok(()),
        }
    }

    /// Writes nodes of the backend directory together; `false` if it is gone.
    async fn write(&self, nodes: &[(String, String)]) -> Result<bool, client::Error> {
        let (client, dir) = (&self.context.client, &self.dir);
        client
            .transact(async |transaction| {
                // Writing would recreate a directory that the toolstack has removed, or land in a new
                // one that it has created since.
                if !transaction.exists(dir).await? || self.is_anew(transaction).await? {
                    return Ok(false);
                }
                for (key, value) in nodes {
                    transaction.write(&format!("{dir}/{key}"), value).await?;
                }
                Ok(true)
            })
            .await
    }

    /// Writes `nodes` and then `state`, together.
    async fn publish(
        &mut self,
        mut nodes: Vec<(String, String)>,
        state: XenbusState,
    ) -> Result<(), Abandoned> {
        nodes.push(("state".to_owned(), state.value()));
        let written = self.write(&nodes).await?;
        // The same state is written again if the toolstack has overwritten it.
        if written && self.told.replace(state) != Some(state) && self.log.admits() {
            info!(%state);
        }
        if state == XenbusState::InitWait {
            self.script.start(self.context.platform.domid(), self.context.tuning.script_timeout());
        }
        self.context.registry.update(&self.dir, |view| view.state = state);
        Ok(())
    }
}
