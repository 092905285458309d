//! Processes that attach to a domain.

use super::{Broker, accept, pidfd};
use crate::locked;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen as start_listening, socket,
};
use ring_proto::DomId;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tracing::{debug, warn};
use xen_platform::embedded::protocol::{self, MAX_MESSAGE, Refusal, Reply, Request};
use xen_platform::{Error, Result};

/// Waits for processes that want to be `domid`.
pub(super) fn listen(broker: Arc<Broker>, path: &Path, domid: DomId) -> Result<JoinHandle<()>> {
    let failed = |e: io::Error| Error::io(format!("listen on {}", path.display()), e);
    let listener = seqpacket_listener(path).map_err(failed)?;
    let serve = move |stream| serve(Arc::clone(&broker), domid.0, stream);
    Ok(accept(listener, format!("{domid}"), serve))
}

/// Tokio does not know `SOCK_SEQPACKET`, but accepts and reads such a socket like a stream: each read gives
/// one packet, or nothing at the end.
fn seqpacket_listener(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    start_listening(&socket, Backlog::new(16)?)?;
    UnixListener::from_std(socket.into())
}

async fn serve(broker: Arc<Broker>, domid: u16, mut stream: UnixStream) {
    let pid = stream.peer_cred().ok().and_then(|c| c.pid()).unwrap_or(0);
    let pidfd = match pidfd::of_peer(&stream, pid) {
        Ok(pidfd) => Arc::new(pidfd),
        Err(error) => {
            warn!(domid, pid, %error, "cannot tell whose connection it is");
            return;
        }
    };
    let mut packet = [0; MAX_MESSAGE];
    let mut attached = false;
    // Any error ends the connection, and with it the process's part in the domain. The kernel drops
    // descriptors that it sends, as nothing here reads them.
    while let Ok(len @ 1..) = stream.read(&mut packet).await {
        let request = packet.get(..len).unwrap_or_default();
        let request: Request = match serde_json::from_slice(request) {
            Ok(request) => request,
            Err(error) => {
                warn!(domid, pid, %error, "bad request");
                break;
            }
        };
        if !attached {
            let_go(&broker, domid).await;
        }
        // A process waits for each reply, so there is room for it unless the process misbehaves.
        let mut send =
            |reply: &Reply, fds: &[BorrowedFd<'_>]| protocol::send(stream.as_fd(), reply, fds);
        let mut host = locked(&broker.host);
        let done = if attached {
            host.handle(domid, &request, &mut send)
        } else {
            match host.attach(domid, (pid, Arc::clone(&pidfd)), &request, &mut send) {
                Ok(()) => {
                    debug!(domid, pid, "process attached");
                    attached = true;
                    Ok(())
                }
                Err(reason) => send(&Reply::Refused(Refusal::Other(reason)), &[]),
            }
        };
        if let Err(error) = done {
            warn!(domid, pid, %error, "cannot answer");
            break;
        }
    }
    if attached {
        broker.process_ended(domid, pid).await;
    }
}

/// How long the end of a process may take to be seen here.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(1);

/// Waits a little for the process that is the domain to go: a process that replaces one that died may get
/// here before the old one's end of file.
async fn let_go(broker: &Broker, domid: u16) {
    let ended = {
        let host = locked(&broker.host);
        let attached = host.get(domid).is_some_and(|d| d.process.is_some());
        host.end_of_process(domid).filter(|_| attached)
    };
    if let Some(ended) = ended {
        // Nothing else runs between the check above and the first poll of this.
        let _ = tokio::time::timeout(LET_GO_TIMEOUT, ended.notified()).await;
    }
}
