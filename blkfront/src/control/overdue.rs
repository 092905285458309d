//! A xenstore that does not answer.

use crate::Cause;
use crate::disk::State;
use crate::link::{Command, locked};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{sleep, timeout};

/// How long beyond a timeout to wait for a xenstore that does not answer. If it does answer, the timeout is
/// for the backend, and the state machine runs to its end.
pub(super) const XENSTORE_GRACE: Duration = Duration::from_secs(1);

/// Xenstore is away, or hangs.
pub(super) fn no_answer(waited: Duration) -> Cause {
    let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
    Cause::Xenstore { doing: format!("no answer in {} s", waited.as_secs()), source: source.into() }
}

/// Passes commands on. Returns when xenstore has kept the disk from being opened, or closed, for longer
/// than `limit` allows: nobody should have to wait for xenstore.
pub(super) async fn overdue(
    mut commands: UnboundedReceiver<Command>,
    control: UnboundedSender<Command>,
    state: Arc<Mutex<State>>,
    limit: Duration,
) {
    let patience = limit + XENSTORE_GRACE;
    // Finding the disk may take as long as connecting it. If it is open by then, it was just slow.
    let never_opened = async {
        sleep(limit + patience).await;
        if locked(&state).connections > 0 {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        // The fabric's sender lives as long as the control thread: `recv` never yields `None`.
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
