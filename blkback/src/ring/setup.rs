//! What it takes to serve a ring, how its thread gets orders, and how it ends.

use super::data::Strategy;
use super::inflight::Inflight;
use crate::stats::RingStats;
use crate::storage::Storage;
use ring_proto::{DomId, Limits, RequestConsumer, ResponseProducer, RingError};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use xen_platform::{EventChannel, Platform};

/// Everything needed to serve a ring.
pub struct RingSetup {
    /// The hypervisor.
    pub platform: Arc<dyn Platform>,
    /// The frontend's domain.
    pub peer: DomId,
    /// The half that takes requests.
    pub requests: RequestConsumer,
    /// The half that pushes responses.
    pub responses: ResponseProducer,
    /// The requests already taken, and room for more.
    pub inflight: Inflight,
    /// The ring's event channel.
    pub channel: Box<dyn EventChannel>,
    /// The disk.
    pub storage: Arc<dyn Storage>,
    /// What the device accepts, initially.
    pub limits: Limits,
    /// How data is accessed.
    pub strategy: Strategy,
    /// Counters.
    pub stats: Arc<RingStats>,
}

/// The owner of a ring being served.
pub struct Tenant {
    /// The name of its thread while that serves no other ring.
    pub name: String,
    /// Called with the reason if the ring ends by itself.
    pub ended: Box<dyn FnOnce(Exit) + Send>,
    /// Dropped when no resources of the frontend are held any more.
    pub alive: Arc<dyn Send + Sync>,
}

/// Orders to a ring's thread while it serves the ring.
#[derive(Debug)]
pub(super) struct Orders {
    stop: AtomicBool,
    sectors: AtomicU64,
}

impl Orders {
    pub(super) fn new(sectors: u64) -> Self {
        Self { stop: AtomicBool::new(false), sectors: AtomicU64::new(sectors) }
    }

    /// Tells it to answer the requests in flight and end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// The device has a new size, in 512-byte sectors.
    pub(super) fn resize(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Relaxed);
    }

    /// The thread's side: whether it must end.
    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The thread's side: the size of the device, in 512-byte sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }
}

/// Why a ring ended by itself.
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
    /// A bug of ours; the log has more about it.
    #[error("serving it panicked")]
    Panicked,
}
