//! The control thread: xenstore, the states of both ends, and a backend that comes and goes.

mod find;
mod negotiation;
mod overdue;

use crate::disk::State;
use crate::fabric::Fabric;
use crate::link::{Bell, Command, Notice, locked};
use crate::{Cause, Config};
use negotiation::Offered;
use overdue::{XENSTORE_GRACE, no_answer, overdue};
use ring_proto::DomId;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep, sleep_until};
use xen_platform::Platform;
use xenstore_glue::client::{self, Client, Endpoint, Nodes};
use xenstore_glue::vbd::FrontendRequest;
use xenstore_glue::wire::Errno;
use xenstore_glue::xenbus::{FrontendAction, FrontendEvent, FrontendMachine, XenbusState};

/// How long a closing backend may take to answer what is in flight: enough for a slow disk at its worst,
/// and less than the ten seconds that a toolstack allows it.
const DRAIN: Duration = Duration::from_secs(5);
/// How often to check for that.
const DRAIN_LOOK: Duration = Duration::from_millis(5);
/// Pause before asking a backend again that did not connect a disk in use: the reason may persist.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The consequence when a disk in use is not connected.
const WAITS: &str = "I/O waits";

/// What [`crate::Disk::open`] gets when the disk is connected.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) backend_domain: DomId,
    pub(crate) state: Arc<Mutex<State>>,
}

/// Tells that the disk is connected, or will not be.
pub(crate) type Ready = std::sync::mpsc::Sender<Result<Opened, Cause>>;

/// What the control thread starts from.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) endpoint: Endpoint,
    pub(crate) device: String,
    pub(crate) config: Config,
    pub(crate) commands: UnboundedReceiver<Command>,
    /// For the fabric, to send commands.
    pub(crate) control: UnboundedSender<Command>,
    /// Rung when the size has changed or the disk is gone.
    pub(crate) news: Arc<Bell>,
    pub(crate) ready: Ready,
}

/// Runs until the device is closed or gone; returns why, unless it was asked to close.
pub(crate) fn run(start: Start) -> Result<(), Cause> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let ready = start.ready.clone();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(start.run()),
        Err(source) => Err(Cause::System { doing: "start a tokio runtime", source }),
    };
    // An error goes to `Disk::open` while that waits, later to whoever joins the thread.
    match result {
        Err(cause) => ready.send(Err(cause)).map_or_else(|unsent| unsent.0.map(drop), |()| Ok(())),
        Ok(()) => Ok(()),
    }
}

fn xenstore(doing: impl Into<String>) -> impl FnOnce(client::Error) -> Cause {
    let doing = doing.into();
    move |e| Cause::Xenstore { doing, source: e.into() }
}

/// What is being waited for, and until when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Until {
    Connected(Instant),
    Back(Instant),
    Closed(Instant),
}

impl Until {
    fn instant(self) -> Instant {
        match self {
            Self::Connected(at) | Self::Back(at) | Self::Closed(at) => at,
        }
    }
}

struct Control {
    machine: FrontendMachine,
    client: Client,
    platform: Arc<dyn Platform>,
    config: Config,
    /// `Some` until the first connection.
    ready: Option<Ready>,
    control: UnboundedSender<Command>,
    news: Arc<Bell>,
    frontend: String,
    backend: String,
    backend_domain: DomId,
    /// The last one seen.
    backend_state: Option<XenbusState>,
    fabric: Option<Arc<Fabric>>,
    offered: Option<Offered>,
    /// An offer was made since the last connection, and has not led to another one yet.
    asked: bool,
    /// When the disk was last connected or resized.
    changed_at: Option<Instant>,
    /// The last complaint in the log, so as not to repeat it.
    complaint: String,
    connection: u32,
    state: Arc<Mutex<State>>,
    /// Why the device is being closed.
    cause: Option<Cause>,
    deadline: Option<Until>,
    /// Keeps other frontends of this domain from the device.
    _claim: OwnedFd,
}

impl Control {
    async fn run(mut self, commands: UnboundedReceiver<Command>) -> Result<(), Cause> {
        let limit = self.config.connect_timeout;
        let (control, passed_on) = unbounded_channel();
        let overdue = overdue(commands, control, self.state.clone(), limit);
        let ended = tokio::select! {
            ended = self.attend(passed_on) => ended,
            () = overdue => {
                self.start_closing();
                self.disconnect();
                self.cause.get_or_insert(no_answer(limit + XENSTORE_GRACE));
                Ok(())
            }
        };
        if ended.is_err() {
            // From now on nobody would tell the queues when the backend goes away.
            self.start_closing();
            self.disconnect();
        }
        match self.cause.take() {
            Some(cause) => Err(cause),
            None => ended,
        }
    }

    /// Runs until the state machine ends. May be dropped at any point.
    async fn attend(&mut self, mut commands: UnboundedReceiver<Command>) -> Result<(), Cause> {
        let watch = async |client: &Client, path: String| {
            client.watch(&path).await.map_err(xenstore(format!("watch {path}")))
        };
        // A watch also fires when a node above is removed.
        let mut theirs = watch(&self.client, format!("{}/state", self.backend)).await?;
        let mut ours = watch(&self.client, format!("{}/backend", self.frontend)).await?;
        let limit = self.config.connect_timeout;
        self.deadline = Some(Until::Connected(Instant::now() + limit));
        while !self.machine.has_ended() {
            let deadline = self.deadline.map(Until::instant);
            let timer = async {
                match deadline {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                changed = theirs.next() => {
                    changed.map_err(xenstore(format!("watch {}/state", self.backend)))?;
                    self.look_at_backend().await
                }
                changed = ours.next() => {
                    changed.map_err(xenstore(format!("watch {}/backend", self.frontend)))?;
                    let ours = self.is_ours(&self.client).await;
                    matches!(ours, Ok(false)).then(|| self.removed(FrontendEvent::DirectoryRemoved))
                }
                Some(command) = commands.recv() => Some(self.command(command)),
                () = timer => Some(self.expired().await),
            };
            if let Some(event) = event {
                self.handle(event).await;
            }
        }
        if self.cause.is_none() && self.ready.is_some() {
            return Err(self.refused().await);
        }
        Ok(())
    }

    async fn look_at_backend(&mut self) -> Option<FrontendEvent> {
        match self.client.read_optional(&format!("{}/state", self.backend)).await {
            Ok(value) => match value.and_then(|value| XenbusState::parse(&value)) {
                None => Some(self.removed(FrontendEvent::Backend(None))),
                state => {
                    self.backend_state = state;
                    Some(FrontendEvent::Backend(state))
                }
            },
            // Gone with its domain: what is left above the node is not ours to read.
            Err(e) if e.errno() == Some(Errno::Eacces) => {
                Some(self.removed(FrontendEvent::Backend(None)))
            }
            Err(e) => {
                tracing::warn!("{}: {e}", self.backend);
                None
            }
        }
    }

    /// Whether the backend has said that it closes the device.
    fn is_closed(&self) -> bool {
        matches!(self.backend_state, Some(XenbusState::Closing | XenbusState::Closed))
    }

    /// A device removed in good order was closed before.
    fn removed(&mut self, event: FrontendEvent) -> FrontendEvent {
        let ours = matches!(self.deadline, Some(Until::Closed(_)));
        if self.connection > 0 && !ours && !self.is_closed() {
            self.cause.get_or_insert(Cause::Removed { backend: self.backend.clone() });
        }
        event
    }

    fn command(&mut self, command: Command) -> FrontendEvent {
        if let Command::Failed(cause) = command {
            self.cause.get_or_insert(cause);
        }
        self.start_closing();
        FrontendEvent::Close
    }

    /// Ends the use of the disk: what is in flight fails, new I/O is refused.
    fn start_closing(&mut self) {
        self.deadline = Some(Until::Closed(Instant::now() + self.config.connect_timeout));
        self.gone();
    }

    fn gone(&self) {
        if let Some(fabric) = &self.fabric {
            fabric.post(|| Notice::Gone);
        }
        locked(&self.state).gone = true;
        self.news.ring();
    }

    async fn expired(&mut self) -> FrontendEvent {
        let (expected, limit) = match self.deadline.take() {
            Some(Until::Connected(_)) => ("Connected", self.config.connect_timeout),
            Some(Until::Back(_)) => {
                ("Connected again", self.config.reconnect_timeout.unwrap_or_default())
            }
            Some(Until::Closed(_)) | None => ("Closed", self.config.connect_timeout),
        };
        let closing = expected == "Closed";
        let state = self.backend_state;
        let state = state.map_or_else(|| "missing".to_owned(), |state| state.to_string());
        let state = state + &self.told().await;
        self.cause.get_or_insert(Cause::Timeout {
            backend: self.backend.clone(),
            state,
            expected,
            seconds: limit.as_secs(),
        });
        if closing {
            return FrontendEvent::GiveUp;
        }
        self.start_closing();
        FrontendEvent::Close
    }

    async fn handle(&mut self, event: FrontendEvent) {
        let mut actions = VecDeque::from(self.machine.handle(event));
        while let Some(action) = actions.pop_front() {
            tracing::debug!(device = self.frontend, "{action:?}");
            let outcome = match action {
                FrontendAction::Offer => {
                    self.pace().await;
                    self.asked = true;
                    self.offer().await.map(|()| None)
                }
                FrontendAction::Connect => self.connect().await.map(Some),
                FrontendAction::Publish(state) => {
                    if state == XenbusState::Initialising && self.asked {
                        self.pause().await;
                    }
                    self.publish(state).await.map(|()| None)
                }
                FrontendAction::Drain => {
                    self.drain().await;
                    Ok(None)
                }
                FrontendAction::Disconnect => {
                    self.disconnect();
                    Ok(None)
                }
                FrontendAction::Resized => {
                    if let Err(cause) = self.resized().await {
                        self.complain(&cause, "the size stays as it was");
                    }
                    Ok(None)
                }
                FrontendAction::Gone => {
                    self.gone();
                    Ok(None)
                }
            };
            match outcome {
                Ok(None) => {}
                Ok(Some(event)) => actions.extend(self.machine.handle(event)),
                Err(cause) if self.may_pass(action, &cause) => {
                    self.complain(&cause, WAITS);
                    actions.extend(self.machine.handle(FrontendEvent::Failed));
                }
                Err(cause @ Cause::Removed { .. }) => {
                    self.cause.get_or_insert(cause);
                    actions.extend(self.machine.handle(FrontendEvent::DirectoryRemoved));
                }
                Err(cause) => {
                    tracing::error!(device = self.frontend, "{cause}");
                    self.cause.get_or_insert(cause);
                    self.start_closing();
                    actions.extend(self.machine.handle(FrontendEvent::Close));
                }
            }
        }
    }

    /// Whether a disk in use may still be connected at a later attempt; I/O waits for that.
    fn may_pass(&self, action: FrontendAction, cause: &Cause) -> bool {
        let connects = matches!(action, FrontendAction::Offer | FrontendAction::Connect);
        let passes = match cause {
            // Quotas and conflicts depend on others in this domain, too.
            Cause::Xenstore { source, .. } => {
                source.downcast_ref().is_some_and(|e: &client::Error| {
                    e.is_quota() || matches!(e, client::Error::Conflict)
                })
            }
            Cause::Removed { .. } => false,
            _ => true,
        };
        connects && self.connection > 0 && passes
    }

    /// Logs, once, what is wrong with a disk in use, and the consequence.
    fn complain(&mut self, cause: &Cause, so: &str) {
        let complaint = cause.to_string();
        if self.complaint != complaint {
            tracing::warn!(device = self.frontend, "{complaint}; {so}");
            self.complaint = complaint;
        }
    }

    /// Whether the directory is still that of the disk in use, and not one that the toolstack has made in
    /// its place, for a disk with other data.
    async fn is_ours(&self, store: &client::Nodes) -> Result<bool, client::Error> {
        let frontend = &self.frontend;
        // We write the reissue key with every offer; the toolstack does not.
        Ok(store.exists(&format!("{frontend}/backend")).await?
            && (self.connection == 0
                || store.exists(&format!("{frontend}/{}", FrontendRequest::REISSUE_KEY)).await?))
    }

    /// Limits how often a backend can make us connect or resize the disk, and log that.
    async fn pace(&self) {
        if let Some(at) = self.changed_at {
            sleep_until(at + RETRY_PAUSE).await;
        }
    }

    /// Before a backend is asked again.
    async fn pause(&mut self) {
        if self.complaint.is_empty() {
            let refused = self.refused().await;
            self.complain(&refused, WAITS);
        }
        sleep(RETRY_PAUSE).await;
    }

    /// Writes our state, unless the toolstack has removed the directory: writing would bring it back.
    async fn publish(&self, state: XenbusState) -> Result<(), Cause> {
        let frontend = &self.frontend;
        let written = self.client.transact(async |store: &client::Transaction| {
            if self.is_ours(store).await? {
                store.write(&format!("{frontend}/state"), state.value()).await?;
            }
            Ok(())
        });
        written.await.map_err(xenstore(format!("write {frontend}/state")))
    }

    async fn drain(&mut self) {
        self.expect_return();
        let Some(fabric) = &self.fabric else { return };
        fabric.post(|| Notice::Hold);
        let end = Instant::now() + DRAIN;
        while fabric.on_rings() > 0 && Instant::now() < end {
            sleep(DRAIN_LOOK).await;
        }
    }

    fn disconnect(&mut self) {
        self.offered = None;
        let Some(fabric) = &self.fabric else { return };
        fabric.post(|| Notice::Down);
        let mut state = locked(&self.state);
        // Unless we close it ourselves.
        let closes = matches!(self.deadline, Some(Until::Closed(_)));
        if std::mem::take(&mut state.connected) && !closes {
            drop(state);
            if self.is_closed() {
                tracing::info!(device = self.frontend, "closed by the backend");
            } else {
                tracing::warn!(device = self.frontend, "the backend went away");
            }
            self.expect_return();
        }
    }

    /// I/O is held from now on, for no longer than the reconnect timeout.
    fn expect_return(&mut self) {
        if self.deadline.is_none() {
            self.deadline =
                self.config.reconnect_timeout.map(|limit| Until::Back(Instant::now() + limit));
        }
    }

    /// The backend closed a device that it should have connected.
    async fn refused(&self) -> Cause {
        Cause::Closed { backend: self.backend.clone(), error: self.told().await }
    }

    /// The error that the backend reports, after a colon, or nothing.
    async fn told(&self) -> String {
        let domain = format!("/local/domain/{}", self.backend_domain.0);
        let below = self.backend.strip_prefix(&domain).unwrap_or_default();
        let mut error = String::new();
        for path in
            [format!("{}/hotplug-error", self.backend), format!("{domain}/error{below}/error")]
        {
            if let Ok(text) = Nodes::read_string(&self.client, &path).await {
                error = format!(": {}", text.escape_debug());
            }
        }
        error
    }
}
