//! The toolstack's commands.

use super::{Broker, accept};
use crate::locked;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tracing::warn;
use xen_platform::embedded::control::{Answer, Command};
use xen_platform::{Error, Result};

/// Longest command, in bytes: the longest names and numbers fit many times.
const MAX_COMMAND: u64 = 4096;

pub(super) fn listen(broker: Arc<Broker>, path: &Path) -> Result<JoinHandle<()>> {
    let listener = UnixListener::bind(path)
        .map_err(|e| Error::io(format!("listen on {}", path.display()), e))?;
    Ok(accept(listener, "commands".to_owned(), move |stream| serve(Arc::clone(&broker), stream)))
}

/// One connection, one command.
async fn serve(broker: Arc<Broker>, stream: UnixStream) {
    let asker = stream.peer_cred().ok().and_then(|c| c.pid());
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAX_COMMAND));
    if reader.read_line(&mut line).await.is_err() || line.is_empty() {
        return;
    }
    let answer = match serde_json::from_str(&line) {
        Ok(command) => carry_out(&broker, command, asker).await,
        Err(error) => Answer::Refused(format!("bad command: {error}")),
    };
    match serde_json::to_string(&answer) {
        // Whoever asked may be gone; the command was carried out all the same.
        Ok(answer) => drop(writer.write_all(format!("{answer}\n").as_bytes()).await),
        Err(error) => warn!(%error, "cannot write an answer"),
    }
}

async fn carry_out(broker: &Arc<Broker>, command: Command, asker: Option<i32>) -> Answer {
    let done = match command {
        Command::CreateDomain(new) => broker.create(new).await.map(Answer::Domain),
        Command::DestroyDomain { domid } => {
            broker.destroy(domid, asker).await.map(|()| Answer::Done)
        }
        Command::ListDomains => Ok(Answer::Domains(locked(&broker.host).list())),
        Command::RestartXenstore => broker.restart_xenstore().await.map(|()| Answer::Done),
    };
    done.unwrap_or_else(Answer::Refused)
}
