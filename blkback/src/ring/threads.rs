//! The threads that serve rings: one a ring as long as there are CPUs for them. Where there are not,
//! several rings share a thread, which looks at each in turn: threads of their own would spin in each
//! other's way, and be given the CPU in turns thousands of times longer than a request takes.

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

/// A thread, as placing a ring sees it.
#[derive(Debug)]
struct Berth {
    inbox: Arc<Inbox>,
    rings: usize,
}

impl Threads {
    /// At most so many threads, at least one, which wait that way.
    pub fn new(most: usize, waiting: Waiting) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), waiting, crew: Mutex::default() })
    }

    /// Has a ring served by the thread that has the fewest. It stays there.
    ///
    /// # Errors
    /// When a thread cannot be started.
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

    /// A thread has nothing to do. Whether it may end: otherwise a ring is on its way to it.
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

/// The control plane's hand on a ring.
#[derive(Debug)]
pub struct RingControl {
    orders: Arc<Orders>,
    inbox: Arc<Inbox>,
}

impl RingControl {
    /// Lets it answer what is in flight and end.
    pub fn stop(&self) {
        self.orders.stop();
        self.inbox.ring_bell();
    }

    /// The device has a new size, in 512-byte sectors.
    pub fn resize(&self, sectors: u64) {
        self.orders.resize(sectors);
    }
}

/// Where a thread is told of new rings.
#[derive(Debug)]
pub(super) struct Inbox {
    /// Whether there are arrivals. Changed under their lock.
    posted: AtomicBool,
    arrivals: Mutex<Vec<Arrival>>,
    /// Rung when there is an arrival, or a ring is to stop: then everything is looked at.
    bell: EventFd,
}

/// A ring that a thread is to serve.
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
        // Only a full counter makes this fail, and then the thread is awake already.
        let _ = self.bell.write(1);
    }

    /// What arrived. Costs one look at memory when nothing did.
    pub(super) fn take(&self) -> Option<Vec<Arrival>> {
        if !self.posted.load(Ordering::Relaxed) {
            return None;
        }
        let mut arrivals = self.arrivals();
        self.posted.store(false, Ordering::Relaxed);
        Some(std::mem::take(&mut *arrivals))
    }

    /// Readable when the bell was rung.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Has it silent again. To be followed by a look at everything.
    pub(super) fn hush(&self) {
        // There is nothing to be read if it was not rung.
        let _ = self.bell.read();
    }

    fn arrivals(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
