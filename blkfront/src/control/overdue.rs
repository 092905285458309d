//! A xenstore that does not answer.

use crate::Cause;
use crate::disk::State;
use crate::link::{Command, locked};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{sleep, timeout};

/// How much longer than a timeout a xenstore is waited for that does not answer: with one that does,
/// the timeout is for the backend, and the states are walked to their end.
pub(super) const XENSTORE_GRACE: Duration = Duration::from_secs(1);

/// Xenstore is away, or hangs.
pub(super) fn no_answer(waited: Duration) -> Cause {
    let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
    Cause::Xenstore { doing: format!("no answer in {} s", waited.as_secs()), source: source.into() }
}

/// Passes commands on. Ends when xenstore has kept the disk from being opened, or closed, for longer
/// than `limit` allows: whoever waits for that is not to wait for xenstore.
pub(super) async fn overdue(
    mut commands: UnboundedReceiver<Command>,
    control: UnboundedSender<Command>,
    state: Arc<Mutex<State>>,
    limit: Duration,
) {
    let patience = limit + XENSTORE_GRACE;
    // As long to find the disk as to connect it. One that is open by then was slow, no more.
    let never_opened = async {
        sleep(limit + patience).await;
        if locked(&state).connections > 0 {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        // The fabric's sender lives as long as the control thread: this does not end.
        Some(command) = commands.recv() => { let _ = control.send(command); }
        () = never_opened => return,
    }
    let pass_on = async {
        while let Some(command) = commands.recv().await {
            let _ = control.send(command);
        }
        std::future::pending::<()>().await;
    };
    let _ = timeout(patience, pass_on).await;
}
