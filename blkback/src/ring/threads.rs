//! The threads that serve rings: one per ring as long as there are CPUs for them. Beyond that, several
//! rings share a thread, which polls each in turn. With threads of their own they would spin in each
//! other's way, and get the CPU in time slices thousands of times longer than a request takes.

use super::setup::{Orders, RingSetup, Tenant};
use super::thread::Thread;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use xen_platform::Waiting;

/// The threads of a daemon's rings.
#[derive(Debug)]
pub struct Threads {
    most: usize,
    waiting: Waiting,
    crew: Mutex<Vec<Berth>>,
}

/// A thread, as seen when placing a ring.
#[derive(Debug)]
struct Berth {
    inbox: Arc<Inbox>,
    rings: usize,
}

impl Threads {
    /// At most `most` threads, but at least one, which wait as `waiting` says.
    pub fn new(most: usize, waiting: Waiting) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), waiting, crew: Mutex::default() })
    }

    /// Has a ring served by the thread with the fewest rings. It stays there.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn serve(self: &Arc<Self>, setup: RingSetup, tenant: Tenant) -> io::Result<RingControl> {
        let orders = Arc::new(Orders::new(setup.limits.sectors));
        let mut crew = self.crew();
        let place = match crew.iter().enumerate().min_by_key(|(_, berth)| berth.rings) {
            Some((place, berth)) if berth.rings == 0 || crew.len() >= self.most => place,
            _ => {
                let inbox = Arc::new(Inbox::new()?);
                Thread::start(self.clone(), inbox.clone(), self.waiting)?;
                crew.push(Berth { inbox, rings: 0 });
                crew.len() - 1
            }
        };
        let Berth { inbox, rings } = &mut crew[place];
        *rings += 1;
        inbox.post(Arrival { setup, tenant, orders: orders.clone() });
        Ok(RingControl { orders, inbox: inbox.clone() })
    }

    /// A thread has let go of a ring.
    pub(super) fn left(&self, inbox: &Arc<Inbox>) {
        for berth in self.crew().iter_mut().filter(|berth| Arc::ptr_eq(&berth.inbox, inbox)) {
            berth.rings -= 1;
        }
    }

    /// Asks whether a thread without rings may end; if not, a ring is on its way to it.
    pub(super) fn retire(&self, inbox: &Arc<Inbox>) -> bool {
        let mut crew = self.crew();
        let before = crew.len();
        crew.retain(|berth| berth.rings > 0 || !Arc::ptr_eq(&berth.inbox, inbox));
        crew.len() < before
    }

    fn crew(&self) -> MutexGuard<'_, Vec<Berth>> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The control plane's handle to a ring.
#[derive(Debug)]
pub struct RingControl {
    orders: Arc<Orders>,
    inbox: Arc<Inbox>,
}

impl RingControl {
    /// Tells it to answer the requests in flight and end.
    pub fn stop(&self) {
        self.orders.stop();
        self.inbox.ring_bell();
    }

    /// The device has a new size, in 512-byte sectors.
    pub fn resize(&self, sectors: u64) {
        self.orders.resize(sectors);
    }
}

/// Where a thread receives new rings.
#[derive(Debug)]
pub(super) struct Inbox {
    /// Whether there are arrivals. Changed under their lock.
    posted: AtomicBool,
    arrivals: Mutex<Vec<Arrival>>,
    /// Rung when there is an arrival or a ring must stop; the thread then checks everything.
    bell: EventFd,
}

/// A ring for a thread to serve.
pub(super) struct Arrival {
    pub(super) setup: RingSetup,
    pub(super) tenant: Tenant,
    pub(super) orders: Arc<Orders>,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.tenant.name)
    }
}

impl Inbox {
    fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_value_and_flags(0, flags)?;
        Ok(Self { posted: AtomicBool::new(false), arrivals: Mutex::default(), bell })
    }

    fn post(&self, arrival: Arrival) {
        let mut arrivals = self.arrivals();
        arrivals.push(arrival);
        self.posted.store(true, Ordering::Relaxed);
        drop(arrivals);
        self.ring_bell();
    }

    fn ring_bell(&self) {
        // Fails only if the counter is full, and then the thread is being woken anyway.
        let _ = self.bell.write(1);
    }

    /// The rings that arrived. Costs one load if there are none.
    pub(super) fn take(&self) -> Option<Vec<Arrival>> {
        if !self.posted.load(Ordering::Relaxed) {
            return None;
        }
        let mut arrivals = self.arrivals();
        self.posted.store(false, Ordering::Relaxed);
        Some(std::mem::take(&mut *arrivals))
    }

    /// Readable once the bell was rung.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Silences the bell. The caller must then check everything.
    pub(super) fn hush(&self) {
        // Fails if it was not rung.
        let _ = self.bell.read();
    }

    fn arrivals(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
