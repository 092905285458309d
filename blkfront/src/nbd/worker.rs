//! A vCPU's thread: it serves the connections that are pinned to the vCPU, from socket to ring and back.

use super::connection::Connection;
use super::proto::Export;
use super::requests::{Finished, Requests};
use crate::Completed;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// How long clients have to take their last answers when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The epoll data of the bell and the queue; that of connections is their place.
const BELL: u64 = u64::MAX;
const QUEUE: u64 = u64::MAX - 1;

/// A client that the listener let in.
#[derive(Debug)]
pub(super) struct Newcomer {
    pub(super) socket: UnixStream,
    pub(super) export: Export,
    /// There is no handshake: it knows the export already.
    pub(super) negotiated: bool,
}

/// What the listener and a worker share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Connections the worker has, or will find in its inbox.
    pub(super) connections: AtomicUsize,
    /// Rung for newcomers and for the end.
    pub(super) bell: EventFd,
    pub(super) stop: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) requests: Requests,
    pub(super) inbox: Receiver<Newcomer>,
    pub(super) shared: Arc<Shared>,
    /// The export's.
    pub(super) name: Arc<str>,
    /// Pages of buffers a connection may take.
    pub(super) max_pages: usize,
    /// The connections, found by place.
    pub(super) connections: Vec<Option<Connection>>,
    /// Requests that all connections together may have.
    pub(super) depth: usize,
}

impl Worker {
    /// Serves until told to stop.
    ///
    /// # Errors
    /// When epoll fails.
    pub(super) fn run(mut self) -> io::Result<()> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&self.shared.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        epoll.add(self.requests.queue(), EpollEvent::new(EpollFlags::EPOLLIN, QUEUE))?;
        let mut done = Vec::with_capacity(self.depth);
        let mut events = vec![EpollEvent::empty(); self.connections.len() + 2];
        let mut deadline = None;
        loop {
            self.turn(&mut done);
            if self.shared.stop.load(Ordering::Relaxed) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + STOP_TIMEOUT);
                self.connections.iter_mut().flatten().for_each(Connection::drain);
                self.bury();
                if self.is_idle() || Instant::now() >= deadline {
                    return Ok(());
                }
            }
            let runnable = self.connections.iter().flatten().any(Connection::is_runnable);
            let queue = self.requests.queue();
            // With a timeout of zero, this spins as the disk was configured to, but does not sleep.
            if !runnable && queue.wait(&mut done, Some(Duration::ZERO)) > 0 {
                continue;
            }
            let timeout = if runnable || !queue.arm() {
                EpollTimeout::ZERO
            } else {
                deadline.map_or(EpollTimeout::NONE, until)
            };
            let count = match epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => 0,
                Err(e) => return Err(e.into()),
            };
            for event in events.iter().take(count) {
                match event.data() {
                    BELL => self.welcome(&epoll)?,
                    QUEUE => {}
                    place => {
                        let connection = self.connections.get_mut(place as usize);
                        if let Some(connection) = connection.and_then(Option::as_mut) {
                            connection.note(event.events());
                        }
                    }
                }
            }
        }
    }

    /// Answers what is done, then takes new requests and sends them to the backend in one go.
    fn turn(&mut self, done: &mut Vec<Completed>) {
        self.requests.queue().poll(done);
        for completed in done.drain(..) {
            if let Some(finished) = self.requests.complete(completed) {
                self.finish(finished);
            }
        }
        self.requests.queue().plug();
        for connection in self.connections.iter_mut().flatten() {
            connection.send();
            connection.receive(&mut self.requests, &self.name);
        }
        while let Some(finished) = self.requests.write_zeroes() {
            self.finish(finished);
        }
        self.requests.queue().unplug();
        self.bury();
    }

    fn finish(&mut self, finished: Finished) {
        let connection = self.connections.get_mut(finished.origin.connection);
        if let Some(connection) = connection.and_then(Option::as_mut) {
            connection.finish(finished);
        }
    }

    fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.connections.iter().all(Option::is_none)
    }

    /// Lets the newcomers in.
    fn welcome(&mut self, epoll: &Epoll) -> io::Result<()> {
        // Does not block: epoll reported it readable, and nobody else reads it.
        self.shared.bell.read()?;
        while let Ok(Newcomer { socket, export, negotiated }) = self.inbox.try_recv() {
            let mut places = self.connections.iter_mut().enumerate();
            let Some((place, free)) = places.find(|(_, connection)| connection.is_none()) else {
                // The listener lets in no more than there are places for.
                continue;
            };
            let edges = EpollFlags::EPOLLET | EpollFlags::EPOLLRDHUP;
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | edges;
            epoll.add(&socket, EpollEvent::new(flags, place as u64))?;
            *free = Some(Connection::new(socket, place, export, negotiated, self.max_pages));
        }
        Ok(())
    }

    /// Frees the places of connections that are over.
    fn bury(&mut self) {
        for (place, slot) in self.connections.iter_mut().enumerate() {
            let Some(connection) = slot else { continue };
            if connection.is_over() {
                tracing::debug!(place, "NBD connection closed");
                *slot = None;
                self.shared.connections.fetch_sub(1, Ordering::Release);
            } else if connection.is_closed() {
                self.requests.abandon(place);
            }
        }
    }
}

fn until(deadline: Instant) -> EpollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    // Rounded up, or the last millisecond would be a busy loop.
    EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::ZERO)
}
