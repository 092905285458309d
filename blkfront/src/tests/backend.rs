//! A backend on a thread: serves rings from memory, well or badly.

use super::host::{Channel, Host};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ring_proto::abi::{Segment, op};
use ring_proto::{
    Body, Limits, Request, RequestConsumer, Response, ResponseProducer, RingLayout, RingPages,
    Status, Transfer, decode_segments,
};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use xen_platform::EventChannel;
use xenstore_glue::vbd::QueueKeys;

/// What a backend does other than serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Conduct {
    Good,
    /// Answers that many requests, then takes more but never answers.
    FallsSilent(u32),
    /// Publishes its responses at the end, without an event.
    AnswersLast,
    /// Answers with an id that was never there.
    UnknownId,
    /// Answers with the id of a tag beyond the ring.
    TagBeyondRing,
    /// Answers a request twice.
    Twice,
    /// Answers as if another operation had been asked for.
    OtherOperation,
    /// Claims more responses than there were requests.
    Overrun,
    /// Fails every request.
    Fails,
    /// Knows reads and writes only, whatever it offered.
    Narrow,
}

/// The disk's content, and every request in the order of arrival (operation, sectors).
#[derive(Debug, Default)]
pub(super) struct Storage {
    pub(super) data: Vec<u8>,
    pub(super) log: Vec<(u8, u64)>,
}

pub(super) struct Backend {
    stop: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.bell.write(1).unwrap();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

struct Served {
    host: Host,
    requests: RequestConsumer,
    responses: ResponseProducer,
    channel: Channel,
    limits: Limits,
    storage: Arc<Mutex<Storage>>,
    conduct: Conduct,
    answered: u32,
    page: ring_proto::Window,
}

impl Backend {
    pub(super) fn start(
        host: &Host,
        queues: &[QueueKeys],
        layout: RingLayout,
        order: u8,
        max_indirect_segments: u16,
        conduct: Conduct,
        storage: &Arc<Mutex<Storage>>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        // Never read: once it was rung, nobody sleeps any more.
        let bell = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let serve = |keys: &QueueKeys| {
            let first = host.region(keys.request_refs[0]);
            let pages = match layout {
                RingLayout::Union(_) => RingPages::Union(first),
                RingLayout::Split => RingPages::Split(first, host.region(keys.response_refs[0])),
            };
            let (requests, responses) = ring_proto::back::attach(pages, layout, order).unwrap();
            let limits = Limits {
                sectors: storage.lock().unwrap().data.len() as u64 / 512,
                granule: 1,
                max_indirect_segments,
                read_only: false,
                discard: true,
            };
            let mut served = Served {
                host: host.clone(),
                requests,
                responses,
                channel: host.bind(keys.port),
                limits,
                storage: storage.clone(),
                conduct,
                answered: 0,
                page: host.window(keys.request_refs[0], 8, 4).unwrap(),
            };
            let (stop, bell) = (stop.clone(), bell.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    served.turn();
                    if !served.requests.final_check().unwrap() {
                        let mut fds = [bell.as_fd(), served.channel.as_fd()]
                            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                        let _ = poll(&mut fds, nix::poll::PollTimeout::NONE);
                        served.channel.take().unwrap();
                    }
                }
                let _ = served.responses.publish();
            })
        };
        let threads = queues.iter().map(serve).collect();
        Self { stop, bell, threads }
    }
}

impl Served {
    fn turn(&mut self) {
        while self.requests.poll().unwrap() > 0 {
            while let Some(raw) = self.requests.pop() {
                let request = raw.validate(&self.limits).expect("our own frontend sent this");
                let status = self.serve(&request);
                let (id, operation) = (request.id, request.response_operation());
                self.answer(Response { id, operation, status });
            }
            if self.conduct != Conduct::AnswersLast && self.responses.publish() {
                self.channel.notify().unwrap();
            }
        }
    }

    fn answer(&mut self, honest: Response) {
        let mut response = honest;
        match self.conduct {
            Conduct::FallsSilent(after) if self.answered >= after => return,
            Conduct::UnknownId => response.id ^= 0x40_0000,
            Conduct::TagBeyondRing => response.id |= 0xffff,
            Conduct::OtherOperation => response.operation ^= 1,
            Conduct::Fails => response.status = Status::Error,
            Conduct::Narrow if response.operation > op::WRITE => {
                response.status = Status::NotSupported;
            }
            _ => {}
        }
        self.responses.push(&response).unwrap();
        self.answered += 1;
        match self.conduct {
            // Instead of a response to the next request.
            Conduct::Twice => {
                while self.requests.poll().unwrap() == 0 {
                    std::hint::spin_loop();
                }
                self.requests.pop().unwrap();
                self.responses.push(&response).unwrap();
            }
            Conduct::Overrun => {
                let _ = self.responses.publish();
                self.page.write(&1000u32.to_le_bytes());
                self.channel.notify().unwrap();
            }
            _ => {}
        }
    }

    fn serve(&mut self, request: &Request<&[Segment]>) -> Status {
        let mut storage = self.storage.lock().unwrap();
        let operation = request.response_operation();
        let (transfer, sector, segments) = match &request.body {
            Body::Direct { transfer, sector, segments } => (transfer, sector, segments.to_vec()),
            Body::Indirect { transfer, sector, nr_segments, pages } => {
                let mut list = vec![0; usize::from(*nr_segments) * 8];
                self.host.window(pages[0], 0, list.len()).unwrap().read(&mut list);
                let segments: Vec<Segment> = decode_segments(&list).collect();
                self.limits.check_segments(*sector, &segments).unwrap();
                (transfer, sector, segments)
            }
            Body::Flush { .. } => {
                storage.log.push((operation, 0));
                return Status::Okay;
            }
            Body::Discard { sector, sectors, .. } => {
                storage.log.push((operation, *sectors));
                let at = *sector as usize * 512;
                storage.data[at..at + *sectors as usize * 512].fill(0);
                return Status::Okay;
            }
        };
        if self.conduct == Conduct::Narrow && operation > op::WRITE {
            return Status::NotSupported;
        }
        let sectors = segments.iter().map(|s| u64::from(s.sectors())).sum();
        storage.log.push((operation, sectors));
        let mut at = *sector as usize * 512;
        for segment in segments {
            let window = self.host.window(segment.gref, segment.offset(), segment.bytes()).unwrap();
            let place = &mut storage.data[at..at + segment.bytes()];
            match transfer {
                Transfer::Read => window.write(place),
                _ => window.read(place),
            }
            at += segment.bytes();
        }
        Status::Okay
    }
}
