//! The sizes of disks, which may change under us (online resize). Nothing announces that, so a thread
//! checks all of them together: a daemon with many idle disks wakes up once for all.

use crate::storage::Storage;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tracing::{Span, warn};

/// A handle to the thread, which ends with the last one. It is not the control plane's thread because
/// a check takes as long as the slowest file system.
#[derive(Clone)]
pub(crate) struct Sizes(Sender<Message>);

enum Message {
    Watch(Disk),
    Look,
}

struct Disk {
    /// Gone when the device is.
    storage: Weak<dyn Storage>,
    resized: Arc<Notify>,
    /// In 512-byte sectors, as last reported. The storage may have been looked at by others meanwhile.
    sectors: u64,
    /// The device's span, for the log.
    span: Span,
    /// The last check failed, and was logged.
    failed: bool,
}

impl Sizes {
    /// Checks every `interval`, or only on request.
    pub(crate) fn start(interval: Option<Duration>) -> Self {
        let (sender, messages) = channel();
        let thread = std::thread::Builder::new().name("sizes".into());
        if let Err(error) = thread.spawn(move || run(&messages, interval)) {
            warn!(%error, "the sizes of disks are not looked at");
        }
        Self(sender)
    }

    /// From now on checks `storage` as long as it lives, and notifies `resized` when its size changes.
    pub(crate) fn watch(&self, storage: &Arc<dyn Storage>, resized: &Arc<Notify>) {
        let sectors = storage.geometry().sectors;
        let (storage, resized) = (Arc::downgrade(storage), resized.clone());
        let (span, failed) = (Span::current(), false);
        self.send(Message::Watch(Disk { storage, resized, sectors, span, failed }));
    }

    /// Checks now.
    pub(crate) fn look(&self) {
        self.send(Message::Look);
    }

    fn send(&self, message: Message) {
        // Fails only if the thread could not be started, which was logged.
        let _ = self.0.send(message);
    }
}

fn run(messages: &Receiver<Message>, interval: Option<Duration>) {
    let mut disks: Vec<Disk> = Vec::new();
    let mut looked = Instant::now();
    loop {
        let message = match interval {
            Some(interval) if !disks.is_empty() => {
                messages.recv_timeout(interval.saturating_sub(looked.elapsed()))
            }
            _ => messages.recv().map_err(RecvTimeoutError::from),
        };
        match message {
            Ok(Message::Watch(disk)) => {
                disks.retain(|disk| disk.storage.strong_count() > 0);
                disks.push(disk);
            }
            Ok(Message::Look) | Err(RecvTimeoutError::Timeout) => {
                disks.retain_mut(Disk::look);
                looked = Instant::now();
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Disk {
    /// Checks the size; `false` once the storage is gone.
    fn look(&mut self) -> bool {
        let Some(storage) = self.storage.upgrade() else { return false };
        let outcome = storage.refresh();
        let failed = outcome.is_err();
        match outcome {
            Ok(now) if now.sectors != self.sectors => {
                self.sectors = now.sectors;
                self.resized.notify_one();
            }
            Err(error) if !self.failed => {
                self.span.in_scope(|| warn!(%error, "cannot look at the size of the disk"));
            }
            _ => {}
        }
        self.failed = failed;
        true
    }
}
