use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tokio::task::coop::consume_budget;
use tracing::{debug, warn};

use super::outbox::Outbox;
use super::{ConnectionId, Output, Store, quota};
use crate::wire::{Decoder, PAYLOAD_MAX, Packet, Reply, Request};

/// The pause after a connection could not be accepted, say for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A [`Store`] on unix sockets. Clones are handles to the same server.
///
/// Its tasks run in the tokio runtime that called [`listen`](Self::listen), until
/// [`shutdown`](Self::shutdown), even when all handles are gone.
#[derive(Clone, Debug, Default)]
pub struct Server {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    outboxes: HashMap<ConnectionId, Arc<Outbox>>,
    listeners: HashMap<PathBuf, Listener>,
}

impl Server {
    /// A server with an empty store, on no socket yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens on a unix socket whose clients speak for `domid`; 0 is privileged. Several
    /// sockets may speak for one domain. While the domain is not introduced, connections are
    /// closed at once. A socket file left behind by a dead server is replaced.
    ///
    /// # Errors
    /// Those of `bind`; `AddrInUse` if somebody is listening there.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn listen(&self, path: impl AsRef<Path>, domid: u16) -> io::Result<()> {
        let path = path.as_ref();
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        let task = tokio::spawn(self.clone().accept(listener, domid)).abort_handle();
        let path = path.to_owned();
        self.lock().listeners.insert(path.clone(), Listener { path, task });
        Ok(())
    }

    /// Stops listening on a socket and removes its file. Connections made there stay.
    pub fn unlisten(&self, path: impl AsRef<Path>) {
        self.lock().listeners.remove(path.as_ref());
    }

    /// Reads and changes the store in process, as dom0. No client sees intermediate states, and
    /// watch events are sent when `body` returns. `body` must not call this server.
    pub fn with_store<T>(&self, body: impl FnOnce(&mut Store) -> T) -> T {
        let mut state = self.lock();
        let result = body(&mut state.store);
        state.deliver();
        result
    }

    /// Closes all sockets and connections. The store keeps its contents, and
    /// [`listen`](Self::listen) may be called again.
    pub fn shutdown(&self) {
        let mut state = self.lock();
        state.listeners.clear();
        for outbox in state.outboxes.values() {
            outbox.close();
        }
    }

    async fn accept(self, listener: UnixListener, domid: u16) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.connect(stream, domid),
                Err(error) => {
                    warn!(domid, %error, "cannot accept a connection to xenstore");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn connect(&self, stream: UnixStream, domid: u16) {
        let mut state = self.lock();
        let Some(id) = state.store.connect(domid) else {
            debug!(domid, "refused a connection: domain not introduced, or too many");
            return;
        };
        let outbox = Arc::new(Outbox::default());
        state.outboxes.insert(id, Arc::clone(&outbox));
        drop(state);
        let server = self.clone();
        tokio::spawn(async move {
            if let Err(error) = server.serve(id, &stream, &outbox).await {
                debug!(domid, %error, "lost a connection to xenstore");
            }
            let mut state = server.lock();
            state.outboxes.remove(&id);
            state.store.disconnect(id);
        });
    }

    /// Serves until the client or the outbox is closed.
    async fn serve(
        &self,
        id: ConnectionId,
        stream: &UnixStream,
        outbox: &Outbox,
    ) -> io::Result<()> {
        let (mut decoder, mut buf) = (Decoder::default(), vec![0; PAYLOAD_MAX]);
        // Input not yet decoded, and output being written.
        let (mut unread, mut unsent) = (0..0, Vec::new());
        // Requests whose replies are not written yet, and those of them that are in `unsent`.
        let (mut outstanding, mut sending) = (0, 0);
        loop {
            // Otherwise a client that never stops talking would starve the others' tasks.
            consume_budget().await;
            let mut input = &buf[unread.clone()];
            while outstanding < quota::OUTSTANDING && !input.is_empty() {
                if let Some(packet) = decoder.feed(&mut input).map_err(io::Error::other)? {
                    self.handle(id, &packet, outbox);
                    outstanding += 1;
                }
            }
            unread.start = unread.end - input.len();
            if unsent.is_empty() {
                if !outbox.take(&mut unsent) {
                    return Ok(());
                }
                sending = outstanding;
            } else if outbox.is_closed() {
                return Ok(());
            }
            let may_read = unread.is_empty() && outstanding < quota::OUTSTANDING;
            tokio::select! {
                ready = stream.readable(), if may_read => {
                    ready?;
                    match stream.try_read(&mut buf) {
                        Ok(0) => return Ok(()),
                        Ok(len) => unread = 0..len,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
                ready = stream.writable(), if !unsent.is_empty() => {
                    ready?;
                    match stream.try_write(&unsent) {
                        Ok(len) => drop(unsent.drain(..len)),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                    if unsent.is_empty() {
                        outstanding -= sending;
                    }
                }
                () = outbox.changed.notified() => {}
            }
        }
    }

    fn handle(&self, id: ConnectionId, packet: &Packet, outbox: &Outbox) {
        let mut state = self.lock();
        let reply = match Request::from_packet(packet) {
            Ok(request) => state.store.handle(id, packet.tx_id, request),
            Err(error) => Reply::Error(error.errno()),
        };
        outbox.reply(packet.req_id, packet.tx_id, &reply);
        state.deliver();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only a panic in the body of `with_store` can poison it, and at that point every request
        // to the store is complete.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn deliver(&mut self) {
        for output in self.store.take_outputs() {
            match output {
                Output::Event(id, event) => {
                    let Some(outbox) = self.outboxes.get(&id) else { continue };
                    if outbox.event(&event) {
                        continue;
                    }
                    outbox.forget_events();
                    if !self.store.look_again(id).iter().all(|event| outbox.event(event)) {
                        outbox.close();
                        let domid = self.store.domain_of(id);
                        warn!(domid, "closed a connection that does not read its watch events");
                    }
                }
                Output::Close(id) => {
                    if let Some(outbox) = self.outboxes.remove(&id) {
                        outbox.close();
                    }
                }
            }
        }
    }
}

/// A socket that is listened on.
#[derive(Debug)]
struct Listener {
    path: PathBuf,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
        // It may have been removed along with its directory.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether nobody listens on a socket file.
fn is_dead(path: &Path) -> bool {
    StdUnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
