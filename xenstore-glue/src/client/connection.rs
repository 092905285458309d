use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::nodes::{Failure, refused};
use super::transaction::Guard;
use super::transport::Transport;
use super::watch::WatchState;
use super::{Endpoint, Error, Result};
use crate::wire::{Decoder, Errno, MessageType, PAYLOAD_MAX, Packet, Reply, Request, WireError};

/// The pause before the first attempt to reconnect, and the most it grows to: xenstored is back
/// within milliseconds of a live update, within seconds of a restart.
const RECONNECT_MIN: Duration = Duration::from_millis(10);
const RECONNECT_MAX: Duration = Duration::from_secs(2);
/// How long to try the first connection: long enough to find a xenstored that is restarting, short
/// enough to report soon that there is none.
const CONNECT_PATIENCE: Duration = Duration::from_millis(500);

/// A transaction's id on the connection that it was started on. Another connection may give the
/// same number to another transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransactionId {
    pub(super) number: u32,
    pub(super) epoch: u64,
}

type Answer = std::result::Result<Reply, Failure>;

/// What handles ask of the connection's task. A dropped reply channel means that the connection
/// was lost and the command must be sent again.
#[derive(Debug)]
pub(super) enum Command {
    /// `epoch` is that of the transaction that the packet belongs to.
    Request {
        packet: Packet,
        epoch: Option<u64>,
        reply: oneshot::Sender<Answer>,
    },
    /// Start a transaction.
    Begin {
        reply: oneshot::Sender<Result<Guard>>,
    },
    /// Drop a transaction.
    Abort(TransactionId),
    Watch {
        watch: Arc<WatchState>,
        reply: oneshot::Sender<Result<()>>,
    },
    Unwatch {
        token: u64,
    },
}

/// Who waits for a reply.
#[derive(Debug)]
enum Pending {
    Request(oneshot::Sender<Answer>),
    Begin(oneshot::Sender<Result<Guard>>),
    /// Without a channel for a watch that is registered again.
    Watch(Arc<WatchState>, Option<oneshot::Sender<Result<()>>>),
    Nobody,
}

/// The task that owns the current connection.
pub(super) struct Connection {
    endpoint: Endpoint,
    commands: mpsc::UnboundedReceiver<Command>,
    /// For guards to send their abort; weak, so that the task ends with the last handle.
    handle: mpsc::WeakUnboundedSender<Command>,
    /// By token.
    watches: HashMap<u64, Arc<WatchState>>,
    /// Number of the current connection.
    epoch: u64,
    pause: Duration,
}

/// What belongs to one connection and goes with it.
struct Link {
    transport: Transport,
    pending: HashMap<u32, Pending>,
    next_req_id: u32,
    /// The rest of the message that is being written, and its request id.
    unsent: Vec<u8>,
    sending: u32,
    /// Tokens of watches yet to be registered again.
    rewatch: VecDeque<u64>,
}

/// Why a link ended.
enum End {
    Lost(String),
    NoHandles,
}

impl Connection {
    pub(super) async fn start(
        endpoint: Endpoint,
        commands: mpsc::UnboundedReceiver<Command>,
        handle: mpsc::WeakUnboundedSender<Command>,
    ) -> Result<()> {
        let deadline = Instant::now() + CONNECT_PATIENCE;
        let transport = loop {
            match Transport::connect(&endpoint).await {
                Ok(transport) => break transport,
                Err(_) if Instant::now() < deadline => sleep(RECONNECT_MIN).await,
                Err(source) => return Err(Error::Connect { endpoint, source }),
            }
        };
        let (watches, pause) = (HashMap::new(), RECONNECT_MIN);
        let connection = Self { endpoint, commands, handle, watches, epoch: 0, pause };
        tokio::spawn(connection.run(transport));
        Ok(())
    }

    async fn run(mut self, mut transport: Transport) {
        loop {
            match self.serve(transport).await {
                End::NoHandles => return,
                End::Lost(reason) => {
                    warn!(endpoint = %self.endpoint, reason, "lost the connection to xenstore");
                }
            }
            let Some(next) = self.reconnect().await else { return };
            info!(endpoint = %self.endpoint, "connected to xenstore again");
            transport = next;
            self.epoch += 1;
        }
    }

    async fn serve(&mut self, transport: Transport) -> End {
        let mut link = Link::new(transport, self.watches.keys().copied().collect());
        let (mut decoder, mut buf) = (Decoder::default(), vec![0; PAYLOAD_MAX]);
        loop {
            // Reads consume none of it: a stream of events would monopolize this thread.
            consume_budget().await;
            while let Some(token) = link.next_rewatch() {
                if let Some(watch) = self.watches.get(&token) {
                    link.send_watch(Arc::clone(watch), None);
                }
            }
            tokio::select! {
                read = link.transport.read(&mut buf) => {
                    let mut input = match read {
                        Ok(0) => return End::Lost("xenstore closed it".into()),
                        Ok(len) => &buf[..len],
                        Err(error) => return End::Lost(error.to_string()),
                    };
                    loop {
                        match decoder.feed(&mut input) {
                            Ok(Some(packet)) => self.dispatch(&mut link, &packet),
                            Ok(None) => break,
                            Err(error) => return End::Lost(error.to_string()),
                        }
                    }
                }
                written = link.transport.write(&link.unsent), if !link.unsent.is_empty() => {
                    match written {
                        Ok(len) => drop(link.unsent.drain(..len)),
                        Err(error) if link.transport.refuses_single_requests() => {
                            link.fail_sending(error);
                        }
                        Err(error) => return End::Lost(error.to_string()),
                    }
                }
                command = self.commands.recv(), if link.is_ready() => match command {
                    Some(command) => self.carry_out(&mut link, command),
                    None => return End::NoHandles,
                }
            }
        }
    }

    /// Reconnects, while commands wait. `None` when there are no handles left.
    async fn reconnect(&mut self) -> Option<Transport> {
        while !self.commands.is_closed() {
            sleep(self.pause).await;
            self.pause = RECONNECT_MAX.min(self.pause * 2);
            match Transport::connect(&self.endpoint).await {
                Ok(transport) => return Some(transport),
                Err(error) => debug!(endpoint = %self.endpoint, %error, "cannot reach xenstore"),
            }
        }
        None
    }

    fn carry_out(&mut self, link: &mut Link, command: Command) {
        match command {
            Command::Request { packet, epoch, reply } => {
                // Not if the caller has given up, or the transaction belongs to an earlier connection.
                if !reply.is_closed() && epoch.is_none_or(|epoch| epoch == self.epoch) {
                    link.send(packet, Pending::Request(reply));
                }
            }
            Command::Begin { reply } => {
                link.send_request(&Request::TransactionStart, 0, Pending::Begin(reply));
            }
            Command::Abort(id) => {
                if id.epoch == self.epoch {
                    let end = Request::TransactionEnd { commit: false };
                    link.send_request(&end, id.number, Pending::Nobody);
                }
            }
            Command::Watch { watch, reply } => {
                self.watches.insert(watch.token, Arc::clone(&watch));
                link.send_watch(watch, Some(reply));
            }
            Command::Unwatch { token } => {
                if let Some(watch) = self.watches.remove(&token) {
                    let (path, token) = (watch.path.clone(), token.to_string().into_bytes());
                    link.send_request(&Request::Unwatch { path, token }, 0, Pending::Nobody);
                }
            }
        }
    }

    fn dispatch(&mut self, link: &mut Link, packet: &Packet) {
        self.pause = RECONNECT_MIN;
        let reply = Reply::from_packet(packet);
        if packet.kind == MessageType::WatchEvent as u32 {
            match reply {
                Ok(Reply::WatchEvent { path, token }) => self.fire(&path, &token),
                _ => warn!("xenstore sent a watch event that makes no sense"),
            }
            return;
        }
        match link.pending.remove(&packet.req_id) {
            Some(Pending::Request(waiting)) => drop(waiting.send(reply.map_err(Failure::Wire))),
            Some(Pending::Begin(waiting)) => {
                let begun = expect(reply, &Request::TransactionStart).and_then(|reply| {
                    let Reply::TransactionStart(number) = reply else {
                        return Err(WireError::UnexpectedType(packet.kind).into());
                    };
                    let commands = self.handle.upgrade().ok_or(Error::ConnectionLost)?;
                    Ok(Guard::new(TransactionId { number, epoch: self.epoch }, commands))
                });
                drop(waiting.send(begun));
            }
            Some(Pending::Watch(watch, waiting)) => {
                let errno = match reply {
                    Ok(Reply::Error(errno)) => Some(errno),
                    _ => None,
                };
                let request = watch_request(&watch);
                let registered = expect(reply, &request).map(|_| ());
                if let Some(errno) = errno {
                    self.watches.remove(&watch.token);
                    watch.refuse(errno);
                }
                if let Some(waiting) = waiting {
                    drop(waiting.send(registered));
                }
            }
            Some(Pending::Nobody) => {}
            None => warn!(req_id = packet.req_id, "xenstore answered a request not made"),
        }
    }

    fn fire(&self, path: &str, token: &[u8]) {
        let token = std::str::from_utf8(token).ok().and_then(|token| token.parse().ok());
        // Events of a watch that has just ended may still be in transit.
        if let Some(watch) = token.and_then(|token: u64| self.watches.get(&token)) {
            watch.push(path);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for watch in self.watches.values() {
            watch.orphan();
        }
    }
}

impl Link {
    fn new(transport: Transport, rewatch: VecDeque<u64>) -> Self {
        let (pending, unsent) = (HashMap::new(), Vec::new());
        Self { transport, pending, next_req_id: 1, unsent, sending: 0, rewatch }
    }

    /// Whether another request may be sent.
    fn is_ready(&self) -> bool {
        self.unsent.is_empty() && self.pending.len() < self.transport.max_outstanding()
    }

    fn next_rewatch(&mut self) -> Option<u64> {
        if self.is_ready() { self.rewatch.pop_front() } else { None }
    }

    fn send_watch(&mut self, watch: Arc<WatchState>, reply: Option<oneshot::Sender<Result<()>>>) {
        let request = watch_request(&watch);
        self.send_request(&request, 0, Pending::Watch(watch, reply));
    }

    fn send_request(&mut self, request: &Request, tx_id: u32, pending: Pending) {
        match request.to_packet(0, tx_id) {
            Ok(packet) => self.send(packet, pending),
            // Never happens: a path and a number always fit.
            Err(error) => warn!(%error, "cannot send a request to xenstore"),
        }
    }

    /// Call only while [`is_ready`](Self::is_ready).
    fn send(&mut self, mut packet: Packet, pending: Pending) {
        // There is always a free id; 0 is for watch events.
        while self.next_req_id == 0 || self.pending.contains_key(&self.next_req_id) {
            self.next_req_id = self.next_req_id.wrapping_add(1);
        }
        packet.req_id = self.next_req_id;
        self.next_req_id = self.next_req_id.wrapping_add(1);
        self.sending = packet.req_id;
        packet.encode(&mut self.unsent);
        self.pending.insert(packet.req_id, pending);
    }

    /// The kernel refused the message that was being written.
    fn fail_sending(&mut self, error: std::io::Error) {
        self.unsent.clear();
        match self.pending.remove(&self.sending) {
            Some(Pending::Request(waiting)) => drop(waiting.send(Err(Failure::Device(error)))),
            Some(Pending::Begin(waiting)) => {
                drop(waiting.send(Err(device_error(&Request::TransactionStart, error))));
            }
            Some(Pending::Watch(watch, Some(waiting))) => {
                drop(waiting.send(Err(device_error(&watch_request(&watch), error))));
            }
            // One from before the connection was lost: its user must not wait for events in vain.
            Some(Pending::Watch(watch, None)) => {
                warn!(%error, "the xenbus device refused a watch");
                watch.refuse(Errno::Einval);
            }
            // An unwatch or an abort that the kernel considers unnecessary.
            Some(Pending::Nobody) | None => {
                debug!(%error, "the xenbus device refused a request");
            }
        }
    }
}

fn watch_request(watch: &WatchState) -> Request {
    Request::Watch { path: watch.path.clone(), token: watch.token.to_string().into_bytes() }
}

fn device_error(request: &Request, source: std::io::Error) -> Error {
    Error::Device { request: request.kind(), subject: request.subject(), source }
}

fn expect(reply: std::result::Result<Reply, WireError>, request: &Request) -> Result<Reply> {
    match reply? {
        Reply::Error(errno) => Err(refused(request, errno)),
        reply => Ok(reply),
    }
}
