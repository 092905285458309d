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

/// Wakes a thread that sleeps, and costs nothing while it is awake: the ring's own protocol, with a
/// flag in the place of the event index.
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

    /// To be called after work was put where the sleeper looks. Says whether it had to be woken.
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
        // Fails only at 2^64 - 2 rings that nobody has answered, and then it is readable anyway.
        let _ = self.fd.write(1);
    }

    /// To be followed by one more look for work, and only then by sleep.
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
    /// It is (back) there, for the `connection`th time. Whoever owns a ring gets a new one.
    Up { connection: u32, limits: Limits, ring: Option<Box<Ring>> },
    /// It is about to go, but still answers: nothing new is to be issued.
    Hold,
    /// It will not come back.
    Gone,
}

/// Where the control thread leaves news for a thread that does I/O, which looks at one number to know
/// whether there is any. Only the latest is kept: a thread that never looks holds one ring at most.
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
        // A ring that nobody took: revoking it takes time, and no lock is held any more.
        drop(replaced);
        self.bell.ring();
    }

    /// Whether there is news since `taken` notices.
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

/// Locks, also after a thread has panicked in there: nothing is left half done where one could.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all threads of a disk share.
#[derive(Debug)]
pub(crate) struct Link {
    /// Size in 512-byte sectors.
    pub(crate) sectors: AtomicU64,
    /// Everybody who gets news.
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

    /// A ring cannot go on: the device is stopped, all of it. As in Linux's frontend, a backend that
    /// lied once is not asked again.
    pub(crate) fn fail(&self, ring: u32, failure: Failure) {
        let cause = match failure {
            Failure::Violation(violation) => Cause::Violation { ring, violation },
            Failure::Platform(source) => Cause::Platform { ring, source },
        };
        tracing::error!(ring, "the device is stopped: {cause}");
        self.post_gone();
        // Nobody listens any more when the disk is being closed.
        let _ = self.control.send(Command::Failed(cause));
    }
}
