use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, oneshot};

use super::connection::Command;
use super::{Error, MAX_UNDRAINED_PATHS, Result};
use crate::wire::{Errno, MessageType, Path};

/// A watch on a path. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    state: Arc<WatchState>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Watch {
    pub(super) async fn register(
        commands: &mpsc::UnboundedSender<Command>,
        path: Path,
    ) -> Result<Self> {
        let state = Arc::new(WatchState::new(path));
        // Made before it is registered, so that dropping this future unregisters it.
        let watch = Self { state: Arc::clone(&state), commands: commands.clone() };
        let (reply, answer) = oneshot::channel();
        commands.send(Command::Watch { watch: state, reply }).map_err(|_| Error::ConnectionLost)?;
        match answer.await {
            Ok(registered) => registered?,
            Err(_) if commands.is_closed() => return Err(Error::ConnectionLost),
            // The connection was lost; the next one registers this watch with all others.
            Err(_) => {}
        }
        Ok(watch)
    }

    /// The watched path, as it was given.
    pub fn path(&self) -> &str {
        &self.state.path
    }

    /// Waits for the next change. Returns the path that changed, the watched one or one below it;
    /// it is relative if the watched path is.
    ///
    /// An event on the watched path itself means "read again all that the watch covers". It comes
    /// at the start, after every reconnection, and when more than [`MAX_UNDRAINED_PATHS`]
    /// different paths changed before they were taken here. Several changes of one path may
    /// arrive as one event. Dropping the returned future loses nothing.
    ///
    /// # Errors
    /// After a reconnection, xenstore may refuse the watch ([`Error::Refused`]); it is then
    /// dead. [`Error::ConnectionLost`] if the tokio runtime that held the connection is gone.
    pub async fn next(&mut self) -> Result<String> {
        loop {
            let changed = self.state.changed.notified();
            {
                let mut events = self.state.lock();
                if let Some(path) = events.take() {
                    return Ok(path.to_string());
                }
                if let Some(errno) = events.refused {
                    let subject = self.path().to_owned();
                    return Err(Error::Refused { request: MessageType::Watch, subject, errno });
                }
                if events.orphaned {
                    return Err(Error::ConnectionLost);
                }
            }
            changed.await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Unwatch { token: self.state.token });
    }
}

/// State shared by the owner of a watch and the connection's task.
#[derive(Debug)]
pub(super) struct WatchState {
    pub(super) path: Path,
    pub(super) token: u64,
    changed: Notify,
    events: Mutex<Events>,
}

#[derive(Debug, Default)]
struct Events {
    queue: VecDeque<Arc<str>>,
    /// What is in `queue`.
    queued: HashSet<Arc<str>>,
    refused: Option<Errno>,
    orphaned: bool,
}

impl Events {
    fn take(&mut self) -> Option<Arc<str>> {
        let path = self.queue.pop_front()?;
        self.queued.remove(&path);
        Some(path)
    }
}

impl WatchState {
    fn new(path: Path) -> Self {
        static NEXT_TOKEN: AtomicU64 = AtomicU64::new(1);
        let token = NEXT_TOKEN.fetch_add(1, Ordering::Relaxed);
        Self { path, token, changed: Notify::new(), events: Mutex::default() }
    }

    pub(super) fn push(&self, path: &str) {
        let mut events = self.lock();
        if events.queued.contains(path) {
            return;
        }
        let mut path: Arc<str> = path.into();
        if events.queue.len() >= MAX_UNDRAINED_PATHS {
            events.queue.clear();
            events.queued.clear();
            path = self.path.as_str().into();
        }
        events.queue.push_back(Arc::clone(&path));
        events.queued.insert(path);
        drop(events);
        self.changed.notify_one();
    }

    /// Xenstore refused to register the watch again after a reconnection.
    pub(super) fn refuse(&self, errno: Errno) {
        self.lock().refused = Some(errno);
        self.changed.notify_one();
    }

    /// No task is left to deliver events.
    pub(super) fn orphan(&self) {
        self.lock().orphaned = true;
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Events> {
        // No code that holds it can panic.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
