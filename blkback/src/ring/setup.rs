//! What a ring's thread starts from, how it is told things, and how it ends.

use super::data::Strategy;
use super::inflight::Inflight;
use crate::stats::RingStats;
use crate::storage::Storage;
use nix::sys::eventfd::{EfdFlags, EventFd};
use ring_proto::{DomId, Limits, RequestConsumer, ResponseProducer, RingError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use xen_platform::{EventChannel, Platform, Waiting};

/// What a ring's thread needs.
pub struct RingSetup {
    /// The hypervisor.
    pub platform: Arc<dyn Platform>,
    /// The frontend's domain.
    pub peer: DomId,
    /// The half that takes requests.
    pub requests: RequestConsumer,
    /// The half that pushes responses.
    pub responses: ResponseProducer,
    /// What was taken of them before, and room for what will be.
    pub inflight: Inflight,
    /// The ring's event channel.
    pub channel: Box<dyn EventChannel>,
    /// The disk.
    pub storage: Arc<dyn Storage>,
    /// What the device takes; its size is read from the control block.
    pub limits: Limits,
    /// How data is reached.
    pub strategy: Strategy,
    /// How the thread waits.
    pub waiting: Waiting,
    /// Counters.
    pub stats: Arc<RingStats>,
    /// The control plane's hand on the thread.
    pub control: Arc<RingControl>,
}

/// What the control plane tells a ring's thread while it runs.
#[derive(Debug)]
pub struct RingControl {
    stop: AtomicBool,
    sectors: AtomicU64,
    wake: EventFd,
}

impl RingControl {
    /// For a device of so many 512-byte sectors.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(sectors: u64) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)?;
        Ok(Arc::new(Self { stop: AtomicBool::new(false), sectors: AtomicU64::new(sectors), wake }))
    }

    /// Lets the thread answer what is in flight and end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // Only a full counter makes this fail, and then the thread is awake already.
        let _ = self.wake.write(1);
    }

    /// The device has a new size, in 512-byte sectors.
    pub fn resize(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Relaxed);
    }

    /// The thread's side: whether it is to end.
    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The thread's side: the size of the device, in 512-byte sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// The thread's side: readable once it is to end.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Why a ring's thread ended on its own.
#[derive(Debug, thiserror::Error)]
pub enum Exit {
    /// The frontend broke the ring.
    #[error("the frontend broke the ring: {0}")]
    Ring(#[from] RingError),
    /// The storage queue failed as a whole.
    #[error("the storage queue failed: {0}")]
    Queue(#[from] io::Error),
    /// A grant or event channel operation failed as a whole.
    #[error("the hypervisor refused: {0}")]
    Platform(#[from] xen_platform::Error),
}
