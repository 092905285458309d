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

/// Of an epoll event: the bell. Rings are numbered from 1.
const BELL: u64 = 0;
/// Set where the event tells of a ring's event channel, and not of its disk.
const CHANNEL: u64 = 1 << 63;
/// Rings that one look at the epoll tells of; the next tells of others.
const EVENTS: usize = 64;

/// Serves rings, each in turn.
pub(super) struct Thread {
    threads: Arc<Threads>,
    inbox: Arc<Inbox>,
    rings: Vec<Ring>,
    /// The last ring's number.
    number: u64,
    /// How it waits for its disks...
    disks: Spin,
    /// ...and how for frontends. A disk takes as long as it takes to read, a frontend that was answered as
    /// long as it takes to wake: a history of both would say little of either.
    frontends: Spin,
    /// Where it sleeps while it has several rings.
    epoll: Epoll,
}

/// A ring and what is to become of it.
struct Ring {
    number: u64,
    worker: Worker,
    tenant: Tenant,
    /// Why it takes no more requests, if it was not told to stop. It answers what is in flight...
    failed: Option<Exit>,
    /// ...unless it cannot.
    lost: bool,
    /// Whether the epoll watches its disk, and its event channel.
    listed: bool,
    heard: bool,
}

impl Thread {
    /// Starts one that has rings on their way to its inbox.
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

    /// Serves rings as long as there are any. A frame of its own, for profiles to show.
    #[inline(never)]
    fn run(mut self) {
        loop {
            self.admit();
            if self.rings.is_empty() && self.threads.retire(&self.inbox) {
                return;
            }
            // Only then: who spins for a frontend would hold back what the disk could do meanwhile.
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

    /// Takes up the rings that have arrived.
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
            // It is gone from there with its file if this fails.
            let _ = ring.list(&self.epoll, false);
            let Ring { worker, tenant: Tenant { ended, alive, .. }, failed, .. } = ring;
            if let Some(exit) = failed {
                ended(exit);
            }
            // What becomes of a panic there is in the log.
            if let Ok(pages) = guarded(|| Ok(worker.close())) {
                unmap(pages, alive);
            }
            self.threads.left(&self.inbox);
        }
        self.regroup();
    }

    /// To be called when there are more or fewer rings.
    fn regroup(&mut self) {
        let several = self.rings.len() > 1;
        let epoll = &self.epoll;
        let outcome = self.rings.iter_mut().try_for_each(|ring| ring.list(epoll, several));
        // They had what they need while they were fewer: so it is the newest that goes.
        if let (Err(error), Some(newest)) = (outcome, self.rings.last_mut()) {
            newest.fail(error.into());
        }
        let name = match &self.rings[..] {
            [ring] => ring.tenant.name.clone(),
            rings => format!("{} rings", rings.len()),
        };
        // For people to read, who do without if it cannot be.
        let _ = CString::new(name).map(|name| nix::sys::prctl::set_name(&name));
    }

    /// Whether what is to come next is from a disk.
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
        // Many a device is threads of the kernel, too: a loop device, one that encrypts.
        spin.again(|| {
            let busy = self.rings.iter_mut().find(|ring| ring.worker.queue.in_flight() > 0);
            busy.map(|ring| ring.worker.sleep.calls += 1).is_some()
        })
    }

    /// Asks for events; whether there are requests after all.
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
            // Cannot be. The rings go on without sleep rather than not at all.
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

/// Waits at an epoll, which by itself counts in milliseconds.
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

/// Unmaps pages, and then drops `alive`, on a thread of its own: a thousand pages, with a system call for
/// each run of them, take milliseconds, which the rings that stay would wait for.
pub(super) fn unmap(pages: Vec<Arc<dyn MappedGrants>>, alive: impl Send + 'static) {
    if pages.is_empty() {
        return;
    }
    // Where there can be no thread it is done here.
    let unmap = move || drop((pages, alive));
    let _ = std::thread::Builder::new().name("unmapping".into()).spawn(unmap);
}

/// Does what must not take the thread, and with it the other rings, down.
fn guarded<T>(work: impl FnOnce() -> Result<T, Exit>) -> Result<T, Exit> {
    // The message was printed by the panic hook.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Exit::Panicked))
}

impl Ring {
    fn new(number: u64, worker: Worker, tenant: Tenant) -> Self {
        let (failed, lost, listed, heard) = (None, false, false, false);
        Self { number, worker, tenant, failed, lost, listed, heard }
    }

    /// Has the worker do something, or notes that it failed.
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

    /// Has the epoll watch it, or not; its event channel from the next [`Ring::arm`] on.
    fn list(&mut self, epoll: &Epoll, listed: bool) -> io::Result<()> {
        if self.listed == listed {
            return Ok(());
        }
        if !listed {
            self.hear(epoll, false)?;
        }
        // Edge-triggered, for nobody reads it. It is gone from the epoll once it is not shared.
        if let Some(device) = self.worker.share(listed)? {
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(device, EpollEvent::new(flags, self.number))?;
        }
        self.listed = listed;
        Ok(())
    }

    /// Before a sleep among others; `false` if the ring failed.
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

    /// Has the epoll watch its event channel, or not. Not edge-triggered: a channel that was unmasked
    /// with an event unread holds two, and Linux's (`evtchn_interrupt`) says nothing of further ones
    /// before both are read.
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
