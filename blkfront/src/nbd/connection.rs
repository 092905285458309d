//! One client's connection.

use super::handshake::{self, Handshake, Next};
use super::proto::{Command, Errno, Export, HEADER_BYTES, Header, Reply};
use super::requests::{Finished, Origin, Requests};
use super::socket::{Receive, Send};
use crate::IoBuffer;
use nix::sys::epoll::EpollFlags;
use ring_proto::abi::PAGE_SIZE;
use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

/// The most unanswered requests of a client; with that many, no more are read from it. Twice what `nbdcopy`
/// or a Linux client use.
pub(super) const MAX_REQUESTS: usize = 128;
/// Bytes of requests to receive at once; also enough for the longest option.
const INPUT_BYTES: usize = 8192;
const _: () = assert!(INPUT_BYTES >= handshake::MAX_INPUT_BYTES);

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Transmission { structured: bool, max_payload: u32 },
}

/// What the next bytes from the client are.
#[derive(Debug)]
enum Input {
    /// An option or a request.
    Message,
    /// The data of a write, of which `filled` bytes have come.
    Payload { origin: Origin, command: Command, buffer: IoBuffer, filled: usize },
    /// Bytes to skip; `error`, if any, is answered after them.
    Unwanted { left: u64, error: Option<(u64, Errno)> },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    /// Takes no more input, and closes when everything is answered.
    Draining,
    Closed,
}

/// A client. What it can make us hold is bounded: [`MAX_REQUESTS`], its share of the pool's pages,
/// one buffer of input, and the replies to one option.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` once closed.
    socket: Option<UnixStream>,
    place: usize,
    state: State,
    phase: Phase,
    input: Input,
    bytes: Box<[u8; INPUT_BYTES]>,
    /// What was received in `bytes` and not processed yet.
    start: usize,
    end: usize,
    /// Output of the handshake that was not sent in full yet.
    greeting: Vec<u8>,
    replies: VecDeque<Reply>,
    /// Bytes sent of the greeting, or else of the first reply.
    sent: usize,
    /// Requests that were read and not answered yet.
    open: usize,
    /// Of these, how many are in the queue.
    inside: usize,
    /// Pages its buffers take, and may take at most.
    pages: usize,
    max_pages: usize,
    /// The last request was a write: more may follow, and their data should not end up in `bytes`.
    writes: bool,
    /// A request waits for others to be answered.
    blocked: bool,
    readable: bool,
    writable: bool,
    hung_up: bool,
}

impl Connection {
    /// One that starts with the handshake, unless it was `negotiated` elsewhere.
    pub(super) fn new(
        socket: UnixStream,
        place: usize,
        export: Export,
        negotiated: bool,
        max_pages: usize,
    ) -> Self {
        let mut greeting = Vec::new();
        let phase = if negotiated {
            Phase::Transmission { structured: false, max_payload: export.max_payload }
        } else {
            Phase::Handshake(Handshake::new(export, &mut greeting))
        };
        Self {
            socket: Some(socket),
            place,
            state: State::Open,
            phase,
            input: Input::Message,
            bytes: Box::new([0; INPUT_BYTES]),
            start: 0,
            end: 0,
            greeting,
            replies: VecDeque::with_capacity(MAX_REQUESTS),
            sent: 0,
            open: 0,
            inside: 0,
            pages: 0,
            max_pages,
            writes: false,
            blocked: false,
            readable: true,
            writable: true,
            hung_up: false,
        }
    }

    /// Notes what epoll reported.
    pub(super) fn note(&mut self, events: EpollFlags) {
        let hung_up = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        self.hung_up |= events.intersects(hung_up);
        self.readable |= self.hung_up || events.contains(EpollFlags::EPOLLIN);
        self.writable |= self.hung_up || events.contains(EpollFlags::EPOLLOUT);
    }

    /// Whether there is something to do without another event or completion.
    pub(super) fn is_runnable(&self) -> bool {
        let receives = self.state == State::Open && self.readable && !self.blocked;
        receives || (self.writable && self.has_output())
    }

    /// Whether it is closed; requests of it may still be in the queue.
    pub(super) fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether nothing of it is left anywhere.
    pub(super) fn is_over(&self) -> bool {
        self.state == State::Closed && self.inside == 0
    }

    fn has_output(&self) -> bool {
        self.state != State::Closed && !(self.greeting.is_empty() && self.replies.is_empty())
    }

    /// Takes no more requests, and closes when those it has are answered.
    pub(super) fn drain(&mut self) {
        if self.state == State::Open {
            self.state = State::Draining;
            // A request that has not come in whole gets no answer.
            match std::mem::replace(&mut self.input, Input::Message) {
                Input::Payload { buffer, .. } => {
                    self.free(Some(buffer));
                    self.open -= 1;
                }
                Input::Unwanted { error: Some(_), .. } => self.open -= 1,
                Input::Unwanted { error: None, .. } | Input::Message => {}
            }
        }
        if self.state == State::Draining && self.open == 0 && self.greeting.is_empty() {
            self.close();
        }
    }

    fn close(&mut self) {
        self.state = State::Closed;
        self.socket = None;
        self.input = Input::Message;
        self.greeting.clear();
        self.replies.clear();
    }

    /// Closes at once because of what the client did.
    fn fail(&mut self, reason: &dyn std::fmt::Display) {
        tracing::info!(connection = self.place, "NBD client dropped: {reason}");
        self.close();
    }

    /// Receives and starts requests.
    pub(super) fn receive(&mut self, requests: &mut Requests, name: &str) {
        // Something may have been answered since it was blocked.
        self.digest(requests, name);
        if self.state == State::Open && self.readable && !self.blocked {
            self.fill();
            self.digest(requests, name);
        }
    }

    /// Receives by one system call: into the buffer of the write that is coming in, and what follows into
    /// `bytes`.
    fn fill(&mut self) {
        let Some(socket) = &self.socket else { return };
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let writes = self.writes && !matches!(self.input, Input::Unwanted { .. });
        let mut receive = Receive::new();
        let mut payload = 0;
        let mut all = true;
        if let Input::Payload { buffer, filled, .. } = &mut self.input {
            all = receive.fill_buffer(buffer, *filled);
            payload = receive.len();
        }
        // A write is mostly followed by another one, whose data should not end up here.
        let room = if writes { HEADER_BYTES } else { INPUT_BYTES };
        if let Some(bytes) = self.bytes.get_mut(self.end..room.max(self.end)).filter(|_| all) {
            receive.fill_slice(bytes);
        }
        let asked = receive.len();
        match receive.run(socket) {
            Ok(0) => self.drain(),
            Ok(n) => {
                if let Input::Payload { filled, .. } = &mut self.input {
                    *filled += n.min(payload);
                }
                self.end += n.saturating_sub(payload);
                // Fewer bytes than asked for: there are no more, unless a hang-up is still to be read.
                self.readable = n == asked || self.hung_up;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => self.fail(&e),
        }
    }

    /// Processes what was received, as far as possible.
    fn digest(&mut self, requests: &mut Requests, name: &str) {
        self.blocked = false;
        while self.state == State::Open {
            let bytes = self.bytes.get(self.start..self.end).unwrap_or_default();
            match &mut self.input {
                Input::Payload { buffer, filled, .. } => {
                    let taken = buffer.write(*filled, bytes);
                    *filled += taken;
                    self.start += taken;
                    if *filled < buffer.len() {
                        return;
                    }
                    if let Input::Payload { origin, command, buffer, filled } =
                        std::mem::replace(&mut self.input, Input::Message)
                    {
                        self.start_request(requests, origin, command, filled as u32, Some(buffer));
                    }
                }
                Input::Unwanted { left, error } => {
                    let taken = (bytes.len() as u64).min(*left);
                    *left -= taken;
                    self.start += taken as usize;
                    if *left > 0 {
                        return;
                    }
                    if let Some((cookie, errno)) = *error {
                        self.replies.push_back(Reply::simple(cookie, Err(errno)));
                    }
                    self.input = Input::Message;
                }
                Input::Message => {
                    let more = match &mut self.phase {
                        Phase::Handshake(_) => self.haggle(name),
                        Phase::Transmission { .. } => self.take_request(requests),
                    };
                    if !more {
                        return;
                    }
                }
            }
        }
    }

    /// Processes one option; returns whether to go on.
    fn haggle(&mut self, name: &str) -> bool {
        if !self.greeting.is_empty() {
            // One answer at a time, so that a client that reads none makes us keep no more.
            self.blocked = true;
            return false;
        }
        let Phase::Handshake(handshake) = &mut self.phase else { return true };
        let bytes = self.bytes.get(self.start..self.end).unwrap_or_default();
        match handshake.step(name, bytes, &mut self.greeting) {
            Next::More => return false,
            Next::Consumed(n) => self.start += n,
            Next::Skip(left) => self.input = Input::Unwanted { left, error: None },
            Next::Transmit(n) => {
                self.start += n;
                let (structured, max_payload) = (handshake.structured(), handshake.max_payload());
                self.phase = Phase::Transmission { structured, max_payload };
            }
            Next::Close(reason) => {
                if let Some(reason) = reason {
                    tracing::info!(connection = self.place, "NBD client dropped: {reason}");
                }
                self.drain();
            }
        }
        true
    }

    /// Processes one request; returns whether to go on.
    fn take_request(&mut self, requests: &mut Requests) -> bool {
        let Phase::Transmission { max_payload, .. } = self.phase else { return true };
        let bytes = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return false };
        let Some(header) = Header::decode(header) else {
            self.fail(&"a request has the wrong magic");
            return false;
        };
        let Header { cookie, offset, len, .. } = header;
        let command = header.command().and_then(|command| {
            let data = matches!(command, Command::Read | Command::Write { .. });
            if data && len > max_payload {
                return Err(Errno::Inval);
            }
            requests.check(command, offset, len).map(|()| (command, data))
        });
        let pages = match command {
            Ok((_, true)) => (len as usize).div_ceil(PAGE_SIZE),
            _ => 0,
        };
        if self.open >= MAX_REQUESTS || self.pages + pages > self.max_pages {
            self.blocked = true;
            return false;
        }
        self.start += HEADER_BYTES;
        if let Ok((Command::Disconnect, _)) = command {
            self.drain();
            return false;
        }
        self.open += 1;
        self.writes = header.payload() > 0;
        let origin = Origin { connection: self.place, cookie, offset, read: header.is_read() };
        let admitted = command.and_then(|(command, data)| {
            // The pool has the pages: the connections' shares together are no larger.
            let buffer = data.then(|| requests.queue().alloc(len as usize).ok_or(Errno::NoMem));
            Ok((command, buffer.transpose()?))
        });
        if let Ok((_, Some(_))) = admitted {
            self.pages += pages;
        }
        match admitted {
            Ok((command, Some(buffer))) if self.writes => {
                self.input = Input::Payload { origin, command, buffer, filled: 0 };
            }
            Ok((command, buffer)) => self.start_request(requests, origin, command, len, buffer),
            Err(errno) if self.writes => {
                let error = Some((cookie, errno));
                self.input = Input::Unwanted { left: header.payload().into(), error };
            }
            Err(errno) => self.answer(origin, Err(errno), None),
        }
        true
    }

    fn start_request(
        &mut self,
        requests: &mut Requests,
        origin: Origin,
        command: Command,
        len: u32,
        buffer: Option<IoBuffer>,
    ) {
        self.inside += 1;
        if let Some(finished) = requests.start(origin, command, len, buffer) {
            self.finish(finished);
        }
    }

    /// A request of this connection is over.
    pub(super) fn finish(&mut self, finished: Finished) {
        self.inside -= 1;
        self.answer(finished.origin, finished.result, finished.buffer);
    }

    fn answer(&mut self, origin: Origin, result: Result<(), Errno>, buffer: Option<IoBuffer>) {
        if self.state == State::Closed {
            return;
        }
        let Origin { cookie, offset, read, .. } = origin;
        let structured = matches!(self.phase, Phase::Transmission { structured: true, .. });
        let reply = match (read, result, buffer) {
            (true, Ok(()), Some(buffer)) => Reply::read(structured, cookie, offset, Ok(buffer)),
            (true, result, buffer) => {
                self.free(buffer);
                let errno = result.err().unwrap_or(Errno::Io);
                Reply::read(structured, cookie, offset, Err(errno))
            }
            (false, result, buffer) => {
                self.free(buffer);
                Reply::simple(cookie, result)
            }
        };
        self.replies.push_back(reply);
    }

    fn free(&mut self, buffer: Option<IoBuffer>) {
        if let Some(buffer) = buffer {
            self.pages -= buffer.capacity() / PAGE_SIZE;
        }
    }

    /// Sends what there is, as much as one system call takes.
    pub(super) fn send(&mut self) {
        if self.writable && self.has_output() {
            self.flush();
        }
        if self.state == State::Draining {
            self.drain();
        }
    }

    fn flush(&mut self) {
        let Some(socket) = &self.socket else { return };
        let mut send = Send::new();
        let mut skip = self.sent;
        let mut room = send.slice(self.greeting.get(skip..).unwrap_or_default());
        skip = skip.saturating_sub(self.greeting.len());
        for reply in &self.replies {
            let head = reply.head();
            room = room && send.slice(head.get(skip..).unwrap_or_default());
            if let Some(data) = reply.data.as_ref().filter(|_| room) {
                room = send.buffer(data, skip.saturating_sub(head.len()));
            }
            skip = 0;
            if !room {
                break;
            }
        }
        let asked = send.len();
        match send.run(socket) {
            Ok(n) => {
                self.writable = n == asked;
                self.sent += n;
                self.forget_sent();
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => self.fail(&e),
        }
    }

    fn forget_sent(&mut self) {
        if !self.greeting.is_empty() {
            if self.sent < self.greeting.len() {
                return;
            }
            self.sent -= self.greeting.len();
            self.greeting.clear();
        }
        while let Some(reply) = self.replies.front().filter(|reply| reply.len() <= self.sent) {
            self.sent -= reply.len();
            self.open -= 1;
            let data = self.replies.pop_front().and_then(|reply| reply.data);
            self.free(data);
        }
    }
}
