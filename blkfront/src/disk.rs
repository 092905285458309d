//! A disk: one frontend, its rings and its vCPUs.

use crate::config::{MAX_DEPTH, MAX_POOL_BYTES, MAX_TIMEOUT, MAX_VCPUS};
use crate::control::{self, Opened, Start};
use crate::fabric::Fabric;
use crate::limits::Limits;
use crate::link::{Bell, Command, locked};
use crate::{
    Cause, Config, Error, Features, Geometry, Info, InvalidOption, Queue, Result, RingInfo,
};
use ring_proto::DomId;
use ring_proto::abi::{MAX_INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER, PAGE_SIZE};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use tokio::sync::mpsc::UnboundedSender;
use xen_platform::Platform;
use xenstore_glue::client::Endpoint;
use xenstore_glue::vbd::VirtualDevice;

/// What the control thread finds out.
#[derive(Clone, Debug)]
pub(crate) struct State {
    devid: u32,
    frontend: String,
    backend: String,
    trusted: bool,
    pub(crate) connected: bool,
    /// It will not be connected again.
    pub(crate) gone: bool,
    /// Times it was connected.
    pub(crate) connections: u64,
    pub(crate) geometry: Geometry,
    pub(crate) features: Features,
    pub(crate) limits: Limits,
}

impl State {
    pub(crate) fn new(devid: u32, frontend: String, backend: String, trusted: bool) -> Self {
        Self {
            devid,
            frontend,
            backend,
            trusted,
            connected: false,
            gone: false,
            connections: 0,
            geometry: Geometry::default(),
            features: Features::default(),
            limits: Limits::default(),
        }
    }
}

/// A connected disk. Dropping it closes it.
#[derive(Debug)]
pub struct Disk {
    platform: Arc<dyn Platform>,
    device: String,
    config: Config,
    fabric: Arc<Fabric>,
    backend_domain: DomId,
    state: Arc<Mutex<State>>,
    news: Arc<Bell>,
    control: UnboundedSender<Command>,
    thread: Option<JoinHandle<Result<(), Cause>>>,
}

impl Disk {
    /// Connects to the backend of `device`, a name like `xvda` or a number like `51712`, of the platform's
    /// domain. Blocks until the disk can be used. A `state` left behind by a frontend that died is closed
    /// first.
    ///
    /// # Errors
    /// When there is no such device, or it could not be connected within
    /// [`Config::connect_timeout`].
    pub fn open(
        platform: Arc<dyn Platform>,
        xenstore: Endpoint,
        device: &str,
        config: Config,
    ) -> Result<Self> {
        let domain = platform.domid();
        let failed = |cause| Error { domain, device: device.to_owned(), cause };
        check(&config).map_err(|invalid| failed(invalid.into()))?;
        let doing = "make an eventfd";
        let news = Bell::new().map_err(|source| failed(Cause::System { doing, source }))?;
        let news = Arc::new(news);
        let (control, commands) = tokio::sync::mpsc::unbounded_channel();
        let (ready, opened) = std::sync::mpsc::channel();
        let start = Start {
            platform: platform.clone(),
            endpoint: xenstore,
            device: device.to_owned(),
            config: config.clone(),
            commands,
            control: control.clone(),
            news: news.clone(),
            ready,
        };
        let doing = "start the control thread";
        let thread = std::thread::Builder::new()
            .name(format!("blkfront-{device}"))
            .spawn(move || control::run(start))
            .map_err(|source| failed(Cause::System { doing, source }))?;
        let ended = || Cause::System { doing, source: std::io::ErrorKind::BrokenPipe.into() };
        let opened = opened.recv().unwrap_or_else(|_| Err(ended()));
        let Opened { fabric, backend_domain, state } = opened.map_err(failed)?;
        Ok(Self {
            platform,
            device: device.to_owned(),
            config,
            fabric,
            backend_domain,
            state,
            news,
            control,
            thread: Some(thread),
        })
    }

    /// The queue of a vCPU. Each can be taken once, and is owned by one thread at a time.
    ///
    /// # Errors
    /// When it was taken before, there is no such vCPU, or its pages could not be granted.
    pub fn queue(&self, vcpu: u32) -> Result<Queue> {
        let limits = self.state().limits;
        let platform = &*self.platform;
        match self.fabric.queue(vcpu, platform, self.backend_domain, &self.config, limits) {
            Ok(Some(queue)) => Ok(queue),
            Ok(None) => Err(self.error(Cause::NoQueue { vcpu, vcpus: self.vcpus() })),
            Err(cause) => Err(self.error(cause)),
        }
    }

    /// How many queues there are.
    pub fn vcpus(&self) -> u32 {
        self.config.vcpus
    }

    /// How many rings there are.
    pub fn rings(&self) -> u32 {
        self.fabric.rings()
    }

    /// Size and shape now; the size changes when the backend resizes the disk.
    pub fn geometry(&self) -> Geometry {
        self.state().geometry
    }

    /// Readable when the size has changed or the disk is gone, until [`Disk::take_news`].
    pub fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// Clears [`Disk::news`] and returns whether the disk can still be used. If not, all its I/O fails;
    /// [`Disk::close`] tells why.
    pub fn take_news(&self) -> bool {
        self.news.silence();
        !self.state().gone
    }

    /// Fails what is in flight and all I/O to come: nobody waits for the backend any more.
    pub(crate) fn give_up(&self) {
        self.fabric.link.post_gone();
    }

    /// The features agreed with the backend; its successor may have others.
    pub fn features(&self) -> Features {
        self.state().features
    }

    /// All there is to know.
    pub fn info(&self) -> Info {
        let state = self.state().clone();
        let Features { ring_order, split_ring, .. } = state.features;
        let layout = if split_ring {
            ring_proto::RingLayout::Split
        } else {
            ring_proto::RingLayout::Union(ring_proto::Abi::NATIVE)
        };
        let vcpus = |ring| {
            let uses = (0u32..).zip(&self.fabric.map).filter(move |(_, r)| **r == ring);
            uses.map(|(vcpu, _)| vcpu).collect()
        };
        let ring = |ring| RingInfo {
            ring,
            slots: layout.slots(ring_order),
            vcpus: vcpus(ring),
            stats: self.fabric.stats(ring),
        };
        let name = VirtualDevice::from_number(state.devid);
        Info {
            domain: self.platform.domid().0,
            backend_domain: self.backend_domain.0,
            device: name.map_or_else(|| state.devid.to_string(), |name| name.to_string()),
            devid: state.devid,
            frontend: state.frontend,
            backend: state.backend,
            trusted: state.trusted,
            connected: state.connected,
            reconnects: state.connections.saturating_sub(1),
            geometry: state.geometry,
            features: state.features,
            rings: (0..self.rings()).map(ring).collect(),
        }
    }

    /// Closes the disk: what is in flight fails with [`crate::IoError::Gone`], and the backend is walked to
    /// Closed. Dropping the disk does the same, but reports no error.
    ///
    /// # Errors
    /// Why the disk could not be used any more, or the backend did not let go within
    /// [`Config::connect_timeout`].
    pub fn close(mut self) -> Result<()> {
        self.shut().map_err(|cause| self.error(cause))
    }

    fn shut(&mut self) -> Result<(), Cause> {
        // Fails only if the control thread has ended.
        let _ = self.control.send(Command::Close);
        let ended = self.thread.take().map(JoinHandle::join);
        self.fabric.stop();
        // A panic of the control thread was printed already.
        ended.and_then(|joined| joined.ok()).unwrap_or(Ok(()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn error(&self, cause: Cause) -> Error {
        Error { domain: self.platform.domid(), device: self.device.clone(), cause }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ = self.shut();
        }
    }
}

fn check(config: &Config) -> Result<(), InvalidOption> {
    let within = |field, value, range: RangeInclusive<usize>| {
        let rule = || format!("within {} to {}", range.start(), range.end());
        InvalidOption::unless(range.contains(&value), field, value, rule)
    };
    let vcpus = 1..=MAX_VCPUS as usize;
    within("vcpus", config.vcpus as usize, vcpus.clone())?;
    within("queues", config.queues.unwrap_or(1) as usize, vcpus)?;
    within("ring_order", config.ring_order.into(), 0..=MAX_RING_PAGE_ORDER.into())?;
    let indirect = config.max_indirect_segments.into();
    within("max_indirect_segments", indirect, 0..=MAX_INDIRECT_SEGMENTS)?;
    within("depth", config.depth, 1..=MAX_DEPTH)?;
    let seconds = 0..=MAX_TIMEOUT.as_secs() as usize;
    within("connect_timeout", config.connect_timeout.as_secs() as usize, seconds.clone())?;
    let reconnect_timeout = config.reconnect_timeout.unwrap_or_default().as_secs();
    within("reconnect_timeout", reconnect_timeout as usize, seconds)?;
    within("pool_bytes", config.pool_bytes, PAGE_SIZE..=MAX_POOL_BYTES)
}
