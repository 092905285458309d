//! One device, from the toolstack's nodes to its rings and back to nothing.
//!
//! The xenbus machine decides; this task reads xenstore for it and does what it says.

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

/// Between giving a device up and looking at it again: whatever is wrong with it, looking must not
/// keep the daemon busy.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The same where a quota is used up: it takes an administrator. libxl waits 10 s for a disk that it detaches.
const QUOTA_PAUSE: Duration = Duration::from_secs(5);

/// After a look at a frontend that wrote the state it had: it may do so as often as it likes, and a look can be
/// a hundred reads of xenstore.
const SAME_STATE_PAUSE: Duration = Duration::from_millis(20);

/// What every device of a daemon shares.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) tuning: Arc<Tuning>,
    pub(crate) registry: Arc<Registry>,
    /// Where rings are recorded for a successor, if that is possible.
    pub(crate) records: Option<Arc<Records>>,
    pub(crate) sizes: Sizes,
    /// What serves the rings.
    pub(crate) threads: Arc<Threads>,
    /// The daemon is about to exit.
    pub(crate) shutdown: watch::Receiver<bool>,
}

/// Serves a device until it is gone or the daemon exits. `changed` says that something in its
/// directory has.
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
                // Half a directory: the toolstack writes it in one transaction, so this is none of its.
                Err(error @ Abandoned::Description(_)) => {
                    context.registry.remove(&path);
                    debug!(%error, "not a device (yet)");
                    unless_stopped(&context.shutdown, tokio::time::sleep(RETRY_PAUSE)).await;
                    let look = context.client.exists(&path);
                    // It may have been given up before, and detached since then.
                    if let Some(Ok(false)) = unless_stopped(&context.shutdown, look).await {
                        forget(&context, &path).await;
                    }
                    return;
                }
                // Tried again here, and not by who finds devices: it may be detached meanwhile.
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

/// Removes what was kept and said of a device that is gone.
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

/// What a device's task cannot go on after. Everything else is told to the frontend and the toolstack.
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
    /// A guest uses the disk, through a daemon before us: it waits rather than lose it.
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
    /// The daemon exits; its successor takes the device up.
    Stopped,
}

/// Where errors of a backend are told (`error_path` in Linux's xenbus_client.c).
fn error_dir(backend: &str) -> String {
    backend.replacen("/backend/", "/error/backend/", 1)
}

fn error_node(backend: &str) -> String {
    format!("{}/error", error_dir(backend))
}

/// Reads a node of the frontend's. One that we may not read is as good as missing: its permissions
/// are the frontend's to set.
async fn read_frontend(client: &Client, path: &str) -> Result<Option<Vec<u8>>, client::Error> {
    match client.read_optional(path).await {
        Err(error) if error.errno() == Some(Errno::Eacces) => Ok(None),
        other => other,
    }
}

/// Whether a frontend uses its disk: one that is being detached does so until it is closed.
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

/// Does `work`, unless the daemon is about to exit, and then at once: xenstore may be away, and what
/// is asked of it not be answered for a long time.
pub(crate) async fn unless_stopped<T>(
    shutdown: &watch::Receiver<bool>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut shutdown = shutdown.clone();
    tokio::select! {
        biased;
        // A sender that is gone will not say it any more.
        _ = shutdown.wait_for(|&now| now) => None,
        done = work => Some(done),
    }
}

/// Waits for a change of the watched node itself: what a frontend makes below it is nothing to us.
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
    /// What the frontend makes its rings by, as it stands in the directory. At first that is a
    /// predecessor's: what was agreed under it is to be kept, whatever we would offer now.
    offer: BackendOffer,
    storage: Option<Arc<dyn Storage>>,
    /// The storage has another size.
    resized: Arc<Notify>,
    /// It was tried to open the storage.
    opened: bool,
    link: Option<Link>,
    /// The frontend's keys that `link` was made from.
    connected: Option<Vec<QueueKeys>>,
    script: Script,
    /// The state that the log has last.
    told: Option<XenbusState>,
    /// The frontend's state when it was last looked at.
    seen: Option<XenbusState>,
    /// For all that the frontend can make happen as often as it likes.
    log: Throttle,
}

impl Device {
    /// What the toolstack wrote, and the watch on what the frontend does.
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

    /// Gives the disk up where the frontend broke its ring, or a bug of ours may do so again. What failed for
    /// something of this host may be had another time.
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

    /// Says what went wrong, in the log and where the toolstack looks (`xenbus_dev_error` in Linux).
    async fn fail(&self, what: &str) -> Result<(), Abandoned> {
        let admitted = self.log.admits();
        if admitted {
            warn!("{what}");
        }
        self.context.registry.update(&self.dir, |view| view.error = Some(what.to_owned()));
        match self.context.client.write(&error_node(&self.dir), what).await {
            // A quota, most likely: the device does not suffer from what cannot be said about it.
            Err(error) if error.errno().is_some() => {
                if admitted {
                    warn!(%error, "cannot tell the toolstack");
                }
            }
            other => other?,
        }
        Ok(())
    }

    /// Reads what the machine needs to know and feeds it.
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
        // A watch does not show the states in between: a frontend that started over and is connected
        // again is told by its keys.
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

    /// Whether the toolstack means the disk to be there, or its frontend uses it.
    async fn is_wanted(&self, frontend: Option<XenbusState>) -> Result<bool, client::Error> {
        Ok(uses(frontend) || self.is_online().await?)
    }

    async fn frontend_state(&self) -> Result<Option<XenbusState>, client::Error> {
        let state = read_frontend(&self.context.client, &self.state_node).await?;
        Ok(state.as_deref().and_then(XenbusState::parse))
    }

    /// Whether our `state` is as the toolstack has made it: no backend writes that it is at its beginning.
    async fn is_untouched(&self, nodes: &Nodes) -> Result<bool, client::Error> {
        let state = nodes.read_optional(&self.node("state")).await?;
        Ok(state.as_deref().and_then(XenbusState::parse) == Some(XenbusState::Initialising))
    }

    /// Whether the directory was removed and made anew since we wrote to it.
    async fn is_anew(&self, nodes: &Nodes) -> Result<bool, client::Error> {
        Ok(self.told.is_some() && self.is_untouched(nodes).await?)
    }

    /// Whether the frontend uses the disk through a daemon before us.
    async fn is_in_use(&self) -> Result<bool, client::Error> {
        let used = self.told.is_none() && uses(self.frontend_state().await?);
        Ok(used && !self.is_untouched(&self.context.client).await?)
    }

    /// Whether the directory is not that of the disk that we know any more.
    async fn is_another(&self) -> Result<bool, Abandoned> {
        match Description::read(&self.context.client, &self.paths).await {
            Ok(now) => Ok(now != self.description),
            Err(DescriptionError::Store(error)) => Err(error.into()),
            Err(_) => Ok(true),
        }
    }

    /// Tells the rings and the frontend of the disk's size, where that is not what they were told.
    async fn resize(&mut self) -> Result<(), Abandoned> {
        // Whoever connects looks at the size itself.
        let (Some(storage), Some(link)) = (&self.storage, &mut self.link) else { return Ok(()) };
        let now = storage.geometry().sectors;
        let before = link.resize(now);
        if now == before {
            return Ok(());
        }
        info!(mib = now >> 11, before = before >> 11, "resized");
        self.feed(BackendEvent::Resized).await
    }

    /// Feeds the machine and does what it says, to the end.
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

    /// Writes nodes of the backend directory, together; `false` if that is gone.
    async fn write(&self, nodes: &[(String, String)]) -> Result<bool, client::Error> {
        let (client, dir) = (&self.context.client, &self.dir);
        client
            .transact(async |transaction| {
                // Writing would bring a directory back that the toolstack has removed, or be taken for
                // another's that it has made since then.
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
        // The same one is written again where the toolstack has written over it.
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
