//! A thread and the rings that it serves.

use super::setup::{Exit, Tenant};
use super::threads::{Arrival, Inbox, Threads};
use super::worker::Worker;
use crate::storage::Woken;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xen_platform::{MappedGrants, Spin, Waiting};

/// The epoll data of the bell. Rings are numbered from 1.
const BELL: u64 = 0;
/// Set in the epoll data of a ring's event channel, as opposed to its disk.
const CHANNEL: u64 = 1 << 63;
/// Epoll events fetched at a time; the next call returns the others.
const EVENTS: usize = 64;

/// Serves rings, each in turn.
pub(super) struct Thread {
    threads: Arc<Threads>,
    inbox: Arc<Inbox>,
    rings: Vec<Ring>,
    /// The number of the latest ring.
    number: u64,
    /// How it waits for disks...
    disks: Spin,
    /// ...and for frontends. A disk takes as long as a read does, a frontend that was answered as long
    /// as it takes to wake up: one history of both would say little about either.
    frontends: Spin,
    /// Where it sleeps while it has several rings.
    epoll: Epoll,
}

/// A ring of a thread.
struct Ring {
    number: u64,
    worker: Worker,
    tenant: Tenant,
    /// Why it takes no more requests, if it was not told to stop. It answers those in flight...
    failed: Option<Exit>,
    /// ...unless it cannot.
    lost: bool,
    /// Whether the epoll watches its disk, and its event channel.
    listed: bool,
    heard: bool,
}

impl Thread {
    /// Starts a thread whose first rings are on their way to its inbox.
    pub(super) fn start(
        threads: Arc<Threads>,
        inbox: Arc<Inbox>,
        waiting: Waiting,
    ) -> io::Result<()> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(inbox.bell(), EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        let serve = move || {
            let (disks, frontends) = (Spin::new(waiting), Spin::new(waiting));
            let rings = Vec::new();
            Self { threads, inbox, rings, number: BELL, disks, frontends, epoll }.run();
        };
        std::thread::Builder::new().spawn(serve).map(drop)
    }

    /// Serves rings as long as there are any. Not inlined, so that profiles show it.
    #[inline(never)]
    fn run(mut self) {
        loop {
            self.admit();
            if self.rings.is_empty() && self.threads.retire(&self.inbox) {
                return;
            }
            // Only without spinning, which would hold back what the disk could do meanwhile.
            let sleeps_next =
                self.rings.len() == 1 && self.disks.is_off() && self.frontends.is_off();
            let (mut found, mut over) = (false, false);
            for ring in &mut self.rings {
                found |= ring.attempt(|worker| worker.round(sleeps_next)).unwrap_or(true);
                over |= ring.is_over();
            }
            if over {
                self.dismiss();
            } else if found {
                self.disks.found();
                self.frontends.found();
            } else if !self.spins() && !self.final_check() {
                self.sleep();
            }
        }
    }

    /// Starts to serve the rings that have arrived.
    fn admit(&mut self) {
        let Some(arrivals) = self.inbox.take() else { return };
        for Arrival { setup, tenant, orders } in arrivals {
            let alive = tenant.alive.clone();
            let new = || Worker::new(setup, orders, self.inbox.bell().try_clone_to_owned()?, alive);
            match guarded(new) {
                Ok(worker) => {
                    self.number += 1;
                    self.rings.push(Ring::new(self.number, worker, tenant));
                }
                Err(exit) => {
                    self.threads.left(&self.inbox);
                    (tenant.ended)(exit);
                }
            }
        }
        self.regroup();
    }

    /// Lets go of the rings that are over.
    fn dismiss(&mut self) {
        while let Some(place) = self.rings.iter().position(Ring::is_over) {
            let mut ring = self.rings.remove(place);
            // If this fails, closing the file removes it from the epoll.
            let _ = ring.list(&self.epoll, false);
            let Ring { worker, tenant: Tenant { ended, alive, .. }, failed, .. } = ring;
            if let Some(exit) = failed {
                ended(exit);
            }
            // A panic in there has been logged.
            if let Ok(pages) = guarded(|| Ok(worker.close())) {
                unmap(pages, alive);
            }
            self.threads.left(&self.inbox);
        }
        self.regroup();
    }

    /// Call when the number of rings has changed.
    fn regroup(&mut self) {
        let several = self.rings.len() > 1;
        let epoll = &self.epoll;
        let outcome = self.rings.iter_mut().try_for_each(|ring| ring.list(epoll, several));
        // The others had what they need before the newest came, so the newest must go.
        if let (Err(error), Some(newest)) = (outcome, self.rings.last_mut()) {
            newest.fail(error.into());
        }
        let name = match &self.rings[..] {
            [ring] => ring.tenant.name.clone(),
            rings => format!("{} rings", rings.len()),
        };
        // Only for people to read, so it may fail.
        let _ = CString::new(name).map(|name| nix::sys::prctl::set_name(&name));
    }

    /// Whether a disk is expected to be next.
    fn awaits_disk(&self) -> bool {
        self.rings.iter().any(|ring| ring.worker.awaits_disk)
    }

    /// Whether to look again rather than sleep.
    fn spins(&mut self) -> bool {
        let spin = if self.awaits_disk() { &mut self.disks } else { &mut self.frontends };
        let mut queues = self.rings.iter().map(|ring| &ring.worker.queue);
        if spin.may_sleep() && queues.any(|queue| queue.is_left_to_threads()) {
            return false;
        }
        // Many devices are served by kernel threads, too, such as loop devices and encrypted ones.
        spin.again(|| {
            let busy = self.rings.iter_mut().find(|ring| ring.worker.queue.in_flight() > 0);
            busy.map(|ring| ring.worker.sleep.calls += 1).is_some()
        })
    }

    /// Asks for events, and returns whether there are requests after all.
    fn final_check(&mut self) -> bool {
        let check = |worker: &mut Worker| Ok(worker.final_check()?);
        self.rings.iter_mut().any(|ring| ring.attempt(check).unwrap_or(true))
    }

    fn sleep(&mut self) {
        let woken = match &mut self.rings[..] {
            [ring] => ring.attempt(Worker::sleep).unwrap_or(Woken::Device),
            _ => self.sleep_among(),
        };
        match woken {
            Woken::Descriptor => self.inbox.hush(),
            _ if self.awaits_disk() => self.disks.woken(),
            Woken::Event | Woken::Device | Woken::Time => self.frontends.woken(),
        }
    }

    /// Sleeps until one of several rings, or the bell, has something.
    fn sleep_among(&mut self) -> Woken {
        let now = Instant::now();
        let mut due = None;
        for ring in &mut self.rings {
            if !ring.arm(now, &self.epoll) {
                return Woken::Device;
            }
            due = due.into_iter().chain(ring.worker.due(now)).min();
        }
        let left = due.map(|due: Instant| due.saturating_duration_since(now));
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match wait(&self.epoll, &mut events, left) {
            Ok(count) => count,
            // Cannot happen. Better to serve the rings without sleeping than not at all.
            Err(error) => {
                tracing::error!(%error, "cannot wait for events");
                0
            }
        };
        let mut woken = Woken::Time;
        for event in &events[..count] {
            let (number, at_channel) = (event.data() & !CHANNEL, event.data() & CHANNEL != 0);
            let outcome = match self.rings.iter_mut().find(|ring| ring.number == number) {
                Some(ring) => {
                    ring.attempt(|worker| worker.rouse(at_channel)).unwrap_or(Woken::Device)
                }
                None => {
                    self.inbox.hush();
                    Woken::Device
                }
            };
            if woken != Woken::Event {
                woken = outcome;
            }
        }
        woken
    }
}

/// Waits for an epoll, with a finer time-out than its own milliseconds.
fn wait(epoll: &Epoll, events: &mut [EpollEvent], left: Option<Duration>) -> io::Result<usize> {
    let mut timeout = EpollTimeout::NONE;
    if let Some(left) = left {
        let mut polled = [PollFd::new(epoll.0.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut polled, Some(TimeSpec::from(left)), None) {
            Ok(_) | Err(nix::Error::EINTR) => timeout = EpollTimeout::ZERO,
            Err(error) => return Err(error.into()),
        }
    }
    match epoll.wait(events, timeout) {
        Err(nix::Error::EINTR) => Ok(0),
        count => Ok(count?),
    }
}

/// Unmaps pages, and then drops `alive`, on a separate thread: a thousand pages, with a system call for
/// each run, take milliseconds, for which the remaining rings would have to wait.
pub(super) fn unmap(pages: Vec<Arc<dyn MappedGrants>>, alive: impl Send + 'static) {
    if pages.is_empty() {
        return;
    }
    // Without a thread it is done here.
    let unmap = move || drop((pages, alive));
    let _ = std::thread::Builder::new().name("unmapping".into()).spawn(unmap);
}

/// Runs `work`, whose panics must not take down the other rings.
fn guarded<T>(work: impl FnOnce() -> Result<T, Exit>) -> Result<T, Exit> {
    // The message was printed by the panic hook.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Exit::Panicked))
}

impl Ring {
    fn new(number: u64, worker: Worker, tenant: Tenant) -> Self {
        let (failed, lost, listed, heard) = (None, false, false, false);
        Self { number, worker, tenant, failed, lost, listed, heard }
    }

    /// Has the worker do something, and records a failure.
    fn attempt<T>(&mut self, work: impl FnOnce(&mut Worker) -> Result<T, Exit>) -> Option<T> {
        if self.lost {
            return None;
        }
        let worker = &mut self.worker;
        guarded(|| work(worker)).map_err(|exit| self.fail(exit)).ok()
    }

    fn fail(&mut self, exit: Exit) {
        let drains = matches!(exit, Exit::Ring(_) | Exit::Platform(_));
        self.lost = self.failed.is_some() || !drains;
        self.failed.get_or_insert(exit);
        self.worker.stop();
    }

    fn is_over(&self) -> bool {
        self.lost || self.worker.is_drained()
    }

    /// Adds it to the epoll, or removes it; its event channel is added by the next [`Ring::arm`].
    fn list(&mut self, epoll: &Epoll, listed: bool) -> io::Result<()> {
        if self.listed == listed {
            return Ok(());
        }
        if !listed {
            self.hear(epoll, false)?;
        }
        // Edge-triggered, since nobody reads it. When no longer shared, it leaves the epoll by itself.
        if let Some(device) = self.worker.share(listed)? {
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(device, EpollEvent::new(flags, self.number))?;
        }
        self.listed = listed;
        Ok(())
    }

    /// Prepares it for a sleep among others; `false` if the ring failed.
    fn arm(&mut self, now: Instant, epoll: &Epoll) -> bool {
        let Some(hears) = self.attempt(|worker| worker.arm(now)) else { return false };
        match self.hear(epoll, hears) {
            Ok(()) => true,
            Err(error) => {
                self.fail(error.into());
                false
            }
        }
    }

    /// Adds its event channel to the epoll, or removes it. Not edge-triggered: a channel unmasked with
    /// an event unread holds two, and Linux's (`evtchn_interrupt`) signals no further ones before both
    /// are read.
    fn hear(&mut self, epoll: &Epoll, heard: bool) -> io::Result<()> {
        if std::mem::replace(&mut self.heard, heard) == heard {
            return Ok(());
        }
        let channel = self.worker.channel.as_fd();
        if heard {
            epoll.add(channel, EpollEvent::new(EpollFlags::EPOLLIN, self.number | CHANNEL))?;
        } else {
            epoll.delete(channel)?;
        }
        Ok(())
    }
}
