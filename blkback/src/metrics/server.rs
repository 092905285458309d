//! The HTTP server: small answers to a few local readers, which may be slow or hostile.

use super::address::Address;
use super::process::Clock;
use super::snapshot::Snapshot;
use super::{METRICS_PATH, STATS_PATH, prometheus};
use crate::registry::Registry;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

/// Connections at a time: a scraper and a few people. One more replaces the oldest, so that silent
/// clients cannot lock others out.
pub(super) const MAX_CONNECTIONS: usize = 16;
/// From accepting a connection to closing it. Each carries one request.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes of a request's head; the least that hyper supports.
const MAX_HEAD: usize = 8192;
/// The most headers of a request. Prometheus sends six.
const MAX_HEADERS: usize = 32;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 32;
/// The pause after a failure to accept, such as when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// Who may connect: the daemon's user.
const SOCKET_MODE: u32 = 0o600;

/// Why statistics cannot be served at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The kernel refused.
    #[error("listen on {address} for statistics")]
    Bind {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// Someone answers there.
    #[error("{0} is in use: is another daemon running? One serves all disks of a domain")]
    InUse(Address),
    /// The file is something else, and is left as it is.
    #[error("{0:?} is there and is no socket: remove it, or choose another path")]
    NotASocket(PathBuf),
}

/// Serves statistics.
pub struct Server {
    // Dropped before the listener: once nobody answers on it, the file may be a successor's.
    _file: Option<SocketFile>,
    listener: Listener,
    source: Source,
}

#[derive(Clone)]
struct Source {
    registry: Arc<Registry>,
    clock: Clock,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Server {
    /// Listens at `address`. A unix socket's file on which nobody answers any more is replaced, and
    /// its directory is created if only that is missing.
    ///
    /// # Errors
    /// [`ListenError`]
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O.
    pub async fn bind(
        address: &Address,
        registry: Arc<Registry>,
        clock: Clock,
    ) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Bind { address: address.clone(), source };
        let (listener, file) = match address {
            Address::Unix(path) => {
                make_room(address, path).await?;
                let (listener, file) = bind_unix(path).map_err(failed)?;
                (Listener::Unix(listener), Some(file))
            }
            Address::Loopback(at) => {
                (Listener::Tcp(TcpListener::bind(at).await.map_err(failed)?), None)
            }
        };
        Ok(Self { _file: file, listener, source: Source { registry, clock } })
    }

    /// Serves until it is dropped, which removes the socket.
    pub async fn run(self) -> Infallible {
        let mut connections = Connections::default();
        loop {
            let source = self.source.clone();
            let accepted = match &self.listener {
                Listener::Unix(listener) => {
                    let accepted = listener.accept().await;
                    accepted.map(|(stream, _)| connections.add(serve(stream, source)))
                }
                Listener::Tcp(listener) => {
                    let accepted = listener.accept().await;
                    accepted.map(|(stream, _)| connections.add(serve(stream, source)))
                }
            };
            if let Err(error) = accepted {
                warn!(%error, "cannot accept a reader of statistics");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }

    /// The port that was bound, after asking for port 0.
    #[cfg(test)]
    pub(super) fn port(&self) -> Option<u16> {
        match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Listener::Unix(_) => None,
        }
    }
}

#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    /// The oldest first.
    order: VecDeque<AbortHandle>,
}

impl Connections {
    fn add(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        self.order.retain(|task| !task.is_finished());
        if self.order.len() >= MAX_CONNECTIONS
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        self.order.push_back(self.tasks.spawn(connection));
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, source: Source) {
    let answer = service_fn(move |request| {
        std::future::ready(Ok::<_, Infallible>(answer(&request, &source)))
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a reader of statistics"),
        Err(_) => debug!("a reader of statistics was too slow"),
    }
}

fn answer(request: &Request<Incoming>, source: &Source) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if path != METRICS_PATH && path != STATS_PATH {
        let hint = format!("there are {METRICS_PATH} and {STATS_PATH}\n");
        return response(StatusCode::NOT_FOUND, "text/plain", hint);
    }
    if request.method() != Method::GET {
        let hint = "only GET\n".to_owned();
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, "text/plain", hint);
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return refusal;
    }
    let snapshot = Snapshot::take(&source.registry, &source.clock);
    if path == METRICS_PATH {
        let text = prometheus::render(&snapshot);
        return response(StatusCode::OK, prometheus::CONTENT_TYPE, text);
    }
    match serde_json::to_string(&snapshot) {
        Ok(json) => response(StatusCode::OK, "application/json", json),
        Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
    }
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Removes the socket file of a daemon that died.
async fn make_room(address: &Address, path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Bind { address: address.clone(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match tokio::net::UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // A full backlog refuses with EAGAIN: someone listens.
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(failed(error)),
        _ => Err(ListenError::InUse(address.clone())),
    }
}

fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    if let Some(dir) = path.parent()
        && let Err(error) = std::fs::create_dir(dir)
        && error.kind() != io::ErrorKind::AlreadyExists
        && !dir.as_os_str().is_empty()
    {
        return Err(error);
    }
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    let file = SocketFile(path.to_owned());
    // Nobody can connect before `listen`, and by then the mode is right.
    std::fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    Ok((socket.listen(BACKLOG)?, file))
}

/// Removed with its listener.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            debug!(%error, path = ?self.0, "the socket was gone already");
        }
    }
}
