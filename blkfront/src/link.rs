//! What connects the threads of a disk: bells to wake them, and mailboxes for news of the backend.

use crate::Cause;
use crate::hw::{Failure, Ring};
use crate::limits::Limits;
use crate::stats::Counters;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use tokio::sync::mpsc::UnboundedSender;

/// Wakes a sleeping thread, and costs next to nothing while it is awake: the ring's own protocol, with a
/// flag instead of the event index.
#[derive(Debug)]
pub(crate) struct Bell {
    asleep: AtomicBool,
    fd: EventFd,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { asleep: AtomicBool::new(false), fd })
    }

    /// To be called after putting work where the sleeper looks. Returns whether it had to be woken.
    pub(crate) fn ring_if_asleep(&self) -> bool {
        // Either we see that it is about to sleep, or it sees our work when it looks once more.
        fence(Ordering::SeqCst);
        let asleep =
            self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed);
        if asleep {
            self.ring();
        }
        asleep
    }

    pub(crate) fn ring(&self) {
        // Fails only when the count has reached 2^64 - 2, and then the descriptor is readable anyway.
        let _ = self.fd.write(1);
    }

    /// To be followed by one more look for work before sleeping.
    pub(crate) fn about_to_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// After sleep, or instead of it.
    pub(crate) fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Stops it ringing.
    pub(crate) fn silence(&self) {
        let _ = self.fd.read();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// News of the backend.
#[derive(Debug)]
pub(crate) enum Notice {
    /// The backend is gone: what is on the ring will not be answered.
    Down,
    /// The backend is connected, for the `connection`th time. Each owner of a ring gets a new one.
    Up { connection: u32, limits: Limits, ring: Option<Box<Ring>> },
    /// The backend is about to go, but still answers: issue nothing new.
    Hold,
    /// The backend will not come back.
    Gone,
}

/// Where the control thread leaves notices for an I/O thread, which reads one number to see whether there
/// are any. Only the latest is kept, so a thread that never looks holds on to one ring at most.
#[derive(Debug)]
pub(crate) struct Mailbox {
    /// Notices ever posted.
    posted: AtomicU32,
    latest: Mutex<Option<Notice>>,
    pub(crate) bell: Bell,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { posted: AtomicU32::new(0), latest: Mutex::new(None), bell: Bell::new()? })
    }

    pub(crate) fn post(&self, notice: Notice) {
        let replaced = {
            let mut latest = locked(&self.latest);
            if matches!(*latest, Some(Notice::Gone)) {
                return;
            }
            self.posted.fetch_add(1, Ordering::Release);
            latest.replace(notice)
        };
        // It may have a ring that nobody took; revoking that takes time, so not under the lock.
        drop(replaced);
        self.bell.ring();
    }

    /// Whether anything was posted after `taken` notices.
    pub(crate) fn has_news(&self, taken: u32) -> bool {
        self.posted.load(Ordering::Acquire) != taken
    }

    pub(crate) fn take(&self, taken: &mut u32, counters: &Counters) -> Option<Notice> {
        if !self.has_news(*taken) {
            return None;
        }
        let mut latest = match self.latest.try_lock() {
            Ok(latest) => latest,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                counters.contended.add(1);
                locked(&self.latest)
            }
        };
        *taken = self.posted.load(Ordering::Relaxed);
        latest.take()
    }
}

/// Locks, ignoring poison: no panic under a lock can leave anything half done.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all threads of a disk share.
#[derive(Debug)]
pub(crate) struct Link {
    /// Size in 512-byte sectors.
    pub(crate) sectors: AtomicU64,
    /// The latest connection's number. Set before anybody gets a notice of it.
    pub(crate) connection: AtomicU32,
    /// Of all threads that get notices.
    pub(crate) mailboxes: Vec<Arc<Mailbox>>,
    /// To the control thread.
    pub(crate) control: UnboundedSender<Command>,
}

/// What the control thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// The device cannot be used any more.
    Failed(Cause),
    /// The user is done.
    Close,
}

impl Link {
    pub(crate) fn post_gone(&self) {
        for mailbox in &self.mailboxes {
            mailbox.post(Notice::Gone);
        }
    }

    /// Stops the whole device, as a ring cannot go on. As in Linux's frontend, a backend that broke the
    /// protocol gets no second chance.
    pub(crate) fn fail(&self, ring: u32, failure: Failure) {
        let cause = match failure {
            Failure::Violation(violation) => Cause::Violation { ring, violation },
            Failure::Platform(source) => Cause::Platform { ring, source },
        };
        tracing::error!(ring, "the device is stopped: {cause}");
        self.post_gone();
        // Fails if the disk is being closed: nobody listens any more.
        let _ = self.control.send(Command::Failed(cause));
    }
}
