//! The client of [`super::Server`].

use super::STATS_PATH;
use super::address::Address;
use super::snapshot::Snapshot;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// The longest answer, in bytes: some ten thousand rings.
const MAX_ANSWER: usize = 64 << 20;
/// For the whole exchange. The daemon answers within milliseconds.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Why fetching failed.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Nobody listens there.
    #[error("connect to {0}")]
    Connect(Address, #[source] io::Error),
    /// Something listens there that does not speak proper HTTP.
    #[error("ask {0} for statistics")]
    Http(Address, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// Something else listens there.
    #[error("{0} answered {1}: is it a blkback daemon?")]
    Status(Address, StatusCode),
    /// No answer.
    #[error("{0} did not answer in {FETCH_TIMEOUT:?}")]
    Timeout(Address),
    /// The answer is not a [`Snapshot`].
    #[error("{0} answered something else than statistics of this version")]
    Schema(Address, #[source] serde_json::Error),
    /// The schema's version is another.
    #[error("{0} answered version {1} of the statistics: this program knows {ours}", ours = Snapshot::VERSION)]
    Version(Address, u32),
}

/// Asks the daemon at `address`.
///
/// # Errors
/// [`FetchError`]
pub async fn fetch(address: &Address) -> Result<Snapshot, FetchError> {
    let answered = timeout(FETCH_TIMEOUT, get(address)).await;
    let body = answered.map_err(|_| FetchError::Timeout(address.clone()))??;
    let snapshot: Snapshot =
        serde_json::from_slice(&body).map_err(|e| FetchError::Schema(address.clone(), e))?;
    if snapshot.version != Snapshot::VERSION {
        return Err(FetchError::Version(address.clone(), snapshot.version));
    }
    Ok(snapshot)
}

async fn get(address: &Address) -> Result<Bytes, FetchError> {
    let connect = |error| FetchError::Connect(address.clone(), error);
    match address {
        Address::Unix(path) => {
            exchange(address, UnixStream::connect(path).await.map_err(connect)?).await
        }
        Address::Loopback(to) => {
            exchange(address, TcpStream::connect(to).await.map_err(connect)?).await
        }
    }
}

async fn exchange<S>(address: &Address, stream: S) -> Result<Bytes, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|e| http(address, e))?;
    let answer = async {
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = hyper::Uri::from_static(STATS_PATH);
        request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("localhost"));
        let answer = sender.send_request(request).await.map_err(|e| http(address, e))?;
        if answer.status() != StatusCode::OK {
            return Err(FetchError::Status(address.clone(), answer.status()));
        }
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        Ok(body.map_err(|e| FetchError::Http(address.clone(), e))?.to_bytes())
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // The connection ends as soon as it has delivered the last of the answer.
        ended = connection => {
            ended.map_err(|e| http(address, e))?;
            answer.await
        }
    }
}

fn http(address: &Address, error: hyper::Error) -> FetchError {
    FetchError::Http(address.clone(), error.into())
}
