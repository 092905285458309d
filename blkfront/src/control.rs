//! The control thread: xenstore, the states of both ends, and a backend that comes and goes.

use crate::disk::{Features, Geometry, State};
use crate::fabric::Fabric;
use crate::flight::{FlushMode, Limits};
use crate::hw::Ring;
use crate::link::{Bell, Command, Notice};
use crate::{Cause, Config, Protocol, rings};
use ring_proto::{DomId, RingLayout};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use xen_platform::Platform;
use xenstore_glue::client::{self, Client, Endpoint, Nodes};
use xenstore_glue::vbd::{
    Agreement, BackendOffer, DevicePaths, DeviceProperties, FrontendRequest, VirtualDevice,
};
use xenstore_glue::xenbus::{FrontendAction, FrontendEvent, FrontendMachine, XenbusState};

/// How long a backend that is closing is given to answer what is in flight: a slow disk's worst
/// seconds, and less than the ten that a toolstack gives it.
const DRAIN: Duration = Duration::from_secs(5);
/// How often it is looked at meanwhile.
const DRAIN_LOOK: Duration = Duration::from_millis(5);
/// How much longer than a timeout a xenstore is waited for that does not answer: with one that does,
/// the timeout is for the backend, and the states are walked to their end.
const XENSTORE_GRACE: Duration = Duration::from_secs(1);

/// How long a frontend that was killed may take to be gone: its successor may come first.
const LET_GO: Duration = Duration::from_secs(1);
/// How often that is looked at.
const CLAIM_LOOK: Duration = Duration::from_millis(10);

/// What [`crate::Disk::open`] gets when the disk is connected.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) backend_domain: DomId,
    pub(crate) state: Arc<Mutex<State>>,
}

/// Where to tell that the disk is connected, or will not be.
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

/// Runs until the device is closed or gone; says why, if not because it was asked to.
pub(crate) fn run(start: Start) -> Result<(), Cause> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let ready = start.ready.clone();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(start.run()),
        Err(source) => Err(Cause::System { doing: "start a tokio runtime", source }),
    };
    // Whoever waits for the disk is told once: of this, or of the disk before.
    match result {
        Err(cause) => ready.send(Err(cause)).map_or_else(|unsent| unsent.0.map(drop), |()| Ok(())),
        Ok(()) => Ok(()),
    }
}

fn xenstore(doing: impl Into<String>) -> impl FnOnce(client::Error) -> Cause {
    let doing = doing.into();
    move |e| Cause::Xenstore { doing, source: e.into() }
}

/// Xenstore is away, or hangs.
fn no_answer(waited: Duration) -> Cause {
    let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
    Cause::Xenstore { doing: format!("no answer in {} s", waited.as_secs()), source: source.into() }
}

/// Passes commands on. Ends when xenstore has kept the disk from being opened, or closed, for longer
/// than `limit` allows: whoever waits for that is not to wait for xenstore.
async fn overdue(
    mut commands: UnboundedReceiver<Command>,
    control: UnboundedSender<Command>,
    state: Arc<Mutex<State>>,
    limit: Duration,
) {
    let patience = limit + XENSTORE_GRACE;
    // As long to find the disk as to connect it. One that is open by then was slow, no more.
    let never_opened = async {
        sleep(limit + patience).await;
        if state.lock().unwrap_or_else(PoisonError::into_inner).connections > 0 {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        // The fabric's sender lives as long as the control thread: this does not end.
        Some(command) = commands.recv() => { let _ = control.send(command); }
        () = never_opened => return,
    }
    let pass_on = async {
        while let Some(command) = commands.recv().await {
            let _ = control.send(command);
        }
        std::future::pending::<()>().await;
    };
    let _ = timeout(patience, pass_on).await;
}

impl Start {
    async fn run(self) -> Result<(), Cause> {
        let limit = self.config.connect_timeout;
        let found = timeout(limit, self.prepare()).await;
        let (control, commands) = found.unwrap_or_else(|_| Err(no_answer(limit)))?;
        control.run(commands).await
    }

    async fn prepare(self) -> Result<(Control, UnboundedReceiver<Command>), Cause> {
        let client = Client::connect(self.endpoint.clone()).await;
        let client = client.map_err(xenstore(format!("connect to {}", self.endpoint)))?;
        let (devid, frontend) = self.find(&client).await?;
        let claim = self.claim(devid, &frontend).await?;
        let text = async |key: &str| {
            let path = format!("{frontend}/{key}");
            client.read_string(&path).await.map_err(xenstore(format!("read {path}")))
        };
        let backend = text("backend").await?;
        let backend_id = text("backend-id").await?;
        let paths = DevicePaths::parse_backend(&backend)
            .ok()
            .filter(|paths| paths.frontend_domain == self.platform.domid())
            .filter(|paths| paths.backend_domain.0.to_string() == backend_id);
        let Some(paths) = paths else {
            let reason = format!("{frontend}/backend and backend-id ({backend_id}) do not agree");
            return Err(Cause::Negotiation { backend, reason });
        };
        let optional = async |key: &str| {
            let path = format!("{frontend}/{key}");
            client.read_optional(&path).await.map_err(xenstore(format!("read {path}")))
        };
        let own = optional("state").await?.and_then(|value| XenbusState::parse(&value));
        // Toolstacks before Xen 4.17 do not say.
        let trusted = optional("trusted").await?.is_none_or(|value| value != b"0");
        let state = State::new(devid, frontend.clone(), backend.clone(), trusted);
        let control = Control {
            machine: FrontendMachine::new(own),
            client,
            platform: self.platform,
            config: self.config,
            ready: Some(self.ready),
            control: self.control,
            news: self.news,
            frontend,
            backend,
            backend_domain: paths.backend_domain,
            backend_state: None,
            fabric: None,
            offered: None,
            connection: 0,
            state: Arc::new(Mutex::new(state)),
            cause: None,
            deadline: None,
            _claim: claim,
        };
        Ok((control, self.commands))
    }

    /// Takes the device for us alone, before anything of a frontend that lives is touched.
    async fn claim(&self, devid: u32, frontend: &str) -> Result<OwnedFd, Cause> {
        let end = Instant::now() + LET_GO;
        loop {
            match self.platform.claim(devid) {
                Ok(Some(claim)) => return Ok(claim),
                Ok(None) if Instant::now() < end => sleep(CLAIM_LOOK).await,
                Ok(None) => return Err(Cause::InUse { frontend: frontend.to_owned() }),
                Err(error) => return Err(Cause::Claim(error)),
            }
        }
    }

    /// The device's number and its frontend directory.
    async fn find(&self, client: &Client) -> Result<(u32, String), Cause> {
        let directory = format!("/local/domain/{}/device/vbd", self.platform.domid().0);
        let present = match client.directory(&directory).await {
            Ok(present) => present,
            Err(e) if e.is_not_found() => Vec::new(),
            Err(e) => return Err(xenstore(format!("list {directory}"))(e)),
        };
        if let Ok(device) = self.device.parse::<VirtualDevice>() {
            let number = device.number().to_string();
            if present.contains(&number) {
                return Ok((device.number(), format!("{directory}/{number}")));
            }
        }
        let name = |number: &String| {
            let device = number.parse().ok().and_then(VirtualDevice::from_number);
            device.map_or_else(|| number.clone(), |device| format!("{device}"))
        };
        let present: Vec<String> = present.iter().map(name).collect();
        let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
        Err(Cause::NoDevice { directory, present })
    }
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

/// Rings that were offered to the backend.
struct Offered {
    rings: Vec<Ring>,
    agreement: Agreement,
}

struct Control {
    machine: FrontendMachine,
    client: Client,
    platform: Arc<dyn Platform>,
    config: Config,
    /// Until it is connected for the first time.
    ready: Option<Ready>,
    control: UnboundedSender<Command>,
    news: Arc<Bell>,
    frontend: String,
    backend: String,
    backend_domain: DomId,
    /// When it was last looked at.
    backend_state: Option<XenbusState>,
    fabric: Option<Arc<Fabric>>,
    offered: Option<Offered>,
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
        match self.cause.take() {
            Some(cause) => Err(cause),
            None => ended,
        }
    }

    /// Until the machine ends. May be dropped at any point.
    async fn attend(&mut self, mut commands: UnboundedReceiver<Command>) -> Result<(), Cause> {
        let watch = async |client: &Client, path: String| {
            client.watch(&path).await.map_err(xenstore(format!("watch {path}")))
        };
        // A node that is removed with all above it fires, too.
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
                    let there = self.client.exists(&format!("{}/backend", self.frontend)).await;
                    matches!(there, Ok(false)).then_some(FrontendEvent::DirectoryRemoved)
                }
                Some(command) = commands.recv() => Some(self.command(command)),
                () = timer => Some(self.expired()),
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
            Ok(value) => {
                self.backend_state = value.and_then(|value| XenbusState::parse(&value));
                Some(FrontendEvent::Backend(self.backend_state))
            }
            Err(e) => {
                tracing::warn!("{}: {e}", self.backend);
                None
            }
        }
    }

    fn command(&mut self, command: Command) -> FrontendEvent {
        if let Command::Failed(cause) = command {
            self.cause.get_or_insert(cause);
        }
        self.start_closing();
        FrontendEvent::Close
    }

    /// Nothing is in use any more: what is in flight fails, what comes is refused.
    fn start_closing(&mut self) {
        self.deadline = Some(Until::Closed(Instant::now() + self.config.connect_timeout));
        self.gone();
    }

    fn gone(&self) {
        if let Some(fabric) = &self.fabric {
            fabric.post(|| Notice::Gone);
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner).gone = true;
        self.news.ring();
    }

    fn expired(&mut self) -> FrontendEvent {
        let (expected, limit) = match self.deadline.take() {
            Some(Until::Connected(_)) => ("Connected", self.config.connect_timeout),
            Some(Until::Back(_)) => {
                ("Connected again", self.config.reconnect_timeout.unwrap_or_default())
            }
            Some(Until::Closed(_)) | None => ("Closed", self.config.connect_timeout),
        };
        let closing = expected == "Closed";
        let state = self.backend_state;
        self.cause.get_or_insert(Cause::Timeout {
            backend: self.backend.clone(),
            state: state.map_or_else(|| "missing".to_owned(), |state| state.to_string()),
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
                FrontendAction::Offer => self.offer().await.map(|()| None),
                FrontendAction::Connect => self.connect().await.map(Some),
                FrontendAction::Publish(state) => self.publish(state).await.map(|()| None),
                FrontendAction::Drain => {
                    self.drain().await;
                    Ok(None)
                }
                FrontendAction::Disconnect => {
                    self.disconnect();
                    Ok(None)
                }
                FrontendAction::Resized => self.resized().await.map(|()| None),
                FrontendAction::Gone => {
                    self.gone();
                    Ok(None)
                }
            };
            match outcome {
                Ok(None) => {}
                Ok(Some(event)) => actions.extend(self.machine.handle(event)),
                Err(cause) => {
                    tracing::error!(device = self.frontend, "{cause}");
                    self.cause.get_or_insert(cause);
                    self.start_closing();
                    actions.extend(self.machine.handle(FrontendEvent::Failed));
                }
            }
        }
    }

    fn refuse(&self, reason: impl ToString) -> Cause {
        Cause::Negotiation { backend: self.backend.clone(), reason: reason.to_string() }
    }

    /// Values of the backend's keys, as they are together at one moment.
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

    async fn offer(&mut self) -> Result<(), Cause> {
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

    /// Replaces the keys of an earlier connection, and says that they are there, at one stroke.
    async fn write_request(&self, request: &FrontendRequest) -> Result<(), Cause> {
        const STALE: [&str; 4] = ["queue-", "ring-ref", "response-ring-ref", "event-channel"];
        let frontend = &self.frontend;
        let mut nodes = request.to_keys();
        if self.config.protocol == Protocol::Unnamed {
            nodes.retain(|(key, _)| key != "protocol");
        }
        let reissue = if self.config.reissue { "1" } else { "0" };
        let written = self.client.transact(async |store: &client::Transaction| {
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
            store.write(&format!("{frontend}/state"), state).await
        });
        written.await.map_err(xenstore(format!("write the rings of {frontend}")))
    }

    async fn connect(&mut self) -> Result<FrontendEvent, Cause> {
        let keys = [DeviceProperties::KEYS, &[BackendOffer::PERSISTENT_KEY]].concat();
        let keys = self.read_backend(&keys).await?;
        let device = DeviceProperties::from_keys(&|key: &str| keys.get(key).cloned())
            .map_err(|refusal| self.refuse(refusal))?;
        let (Some(fabric), Some(mut offered)) = (&self.fabric, self.offered.take()) else {
            return Ok(FrontendEvent::Failed);
        };
        let kept = keys.get(BackendOffer::PERSISTENT_KEY).is_some_and(|value| value == b"1");
        offered.agreement.persistent = kept && self.config.persistent;
        let (limits, features) = limits(&self.config, &offered.agreement, &device);
        fabric.link.sectors.store(device.sectors, Ordering::Relaxed);
        self.connection += 1;
        fabric.connect(self.connection, limits, offered.rings);
        self.deadline = None;
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.connected = true;
            state.connections = self.connection.into();
            state.geometry = geometry(&device);
            state.features = features;
            state.limits = limits;
        }
        tracing::info!(device = self.frontend, backend = self.backend, "connected");
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(Ok(Opened {
                fabric: fabric.clone(),
                backend_domain: self.backend_domain,
                state: self.state.clone(),
            }));
        }
        Ok(FrontendEvent::Connected)
    }

    /// Writes our state, unless the toolstack has removed the directory: writing would bring it back.
    async fn publish(&self, state: XenbusState) -> Result<(), Cause> {
        let frontend = &self.frontend;
        let written = self.client.transact(async |store: &client::Transaction| {
            if store.exists(&format!("{frontend}/backend")).await? {
                store.write(&format!("{frontend}/state"), state.value()).await?;
            }
            Ok(())
        });
        written.await.map_err(xenstore(format!("write {frontend}/state")))
    }

    async fn drain(&self) {
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
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut state.connected) && self.deadline.is_none() {
            tracing::warn!(device = self.frontend, "the backend went away");
            self.deadline =
                self.config.reconnect_timeout.map(|limit| Until::Back(Instant::now() + limit));
        }
    }

    async fn resized(&self) -> Result<(), Cause> {
        let keys = self.read_backend(DeviceProperties::KEYS).await?;
        let device = match DeviceProperties::from_keys(&|key: &str| keys.get(key).cloned()) {
            Ok(device) => device,
            Err(refusal) => {
                tracing::warn!(device = self.frontend, "resize ignored: {refusal}");
                return Ok(());
            }
        };
        let Some(fabric) = &self.fabric else { return Ok(()) };
        let before = fabric.link.sectors.swap(device.sectors, Ordering::Relaxed);
        if before != device.sectors {
            tracing::info!(device = self.frontend, "resized to {} bytes", device.bytes());
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.geometry.size = device.bytes();
            drop(state);
            self.news.ring();
        }
        Ok(())
    }

    /// The backend closed a device that was never connected: what it says about that.
    async fn refused(&self) -> Cause {
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
        Cause::Closed { backend: self.backend.clone(), error }
    }
}

fn geometry(device: &DeviceProperties) -> Geometry {
    Geometry {
        size: device.bytes(),
        sector_size: device.sector_size,
        physical_sector_size: device.physical_sector_size,
        read_only: device.read_only,
        removable: device.removable,
        cdrom: device.cdrom,
    }
}

fn limits(config: &Config, agreed: &Agreement, device: &DeviceProperties) -> (Limits, Features) {
    let direct = agreed.layout.max_direct_segments() as u16;
    let indirect = config.max_indirect_segments.min(agreed.max_indirect_segments);
    let limits = Limits {
        direct,
        indirect,
        flush: match (device.flush, device.barrier) {
            (true, _) => FlushMode::Cache,
            (false, true) => FlushMode::Barrier,
            (false, false) => FlushMode::None,
        },
        discard: device.discard.is_some(),
        secure_discard: device.discard.is_some_and(|discard| discard.secure),
        read_only: device.read_only,
        sector_size: device.sector_size,
    };
    let features = Features {
        flush: limits.flush != FlushMode::None,
        barrier: limits.flush == FlushMode::Barrier,
        discard: limits.discard,
        secure_discard: limits.secure_discard,
        discard_granularity: device.discard.map_or(device.sector_size, |d| d.granularity),
        discard_alignment: device.discard.map_or(0, |d| d.alignment),
        persistent: agreed.persistent,
        max_indirect_segments: indirect,
        max_direct_segments: direct,
        ring_order: agreed.order,
        split_ring: agreed.layout == RingLayout::Split,
    };
    (limits, features)
}
