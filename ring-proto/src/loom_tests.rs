//! Memory ordering, explored by loom: `RUSTFLAGS="--cfg loom" cargo test -p ring-proto --release --lib loom`.
//!
//! The words of a slot are cells on which loom allows no race ([`crate::shared`]), and loom reports a
//! thread that sleeps for ever as a deadlock. So each test fails when a fence or an ordering that it
//! covers is removed.

use crate::shared::SharedRing;
use crate::{
    Abi, Body, GrantRef, Limits, Request, RequestConsumer, RequestProducer, Response,
    ResponseConsumer, ResponseProducer, RingLayout, Segment, Segments, Status, Transfer, back,
    front,
};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

const UNION: RingLayout = RingLayout::Union(Abi::X86_64);

const LIMITS: Limits = Limits {
    sectors: 1 << 20,
    granule: 1,
    max_indirect_segments: 0,
    read_only: false,
    discard: false,
};

/// Both ends' handles to one ring.
struct Ring {
    requests: RequestProducer,
    responses: ResponseConsumer,
    taker: RequestConsumer,
    answerer: ResponseProducer,
}

/// Two pairs of handles. Under loom the ends share words, where two processes would share pages.
fn ring(layout: RingLayout, slots: u32) -> Ring {
    let ring = crate::sync::Arc::new(SharedRing::model(layout, slots));
    let (requests, responses) = front::halves(ring.clone(), 0);
    let (taker, answerer) = back::halves(ring, 0);
    Ring { requests, responses, taker, answerer }
}

/// An event channel: an event stays pending until it is waited for.
#[derive(Default)]
struct Event(Mutex<bool>, Condvar);

impl Event {
    fn notify(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_one();
    }

    fn wait(&self) {
        let mut pending = self.0.lock().unwrap();
        while !*pending {
            pending = self.1.wait(pending).unwrap();
        }
        *pending = false;
    }
}

fn request(id: u64) -> Request {
    let mut segments = Segments::EMPTY;
    segments.push(Segment::new(GrantRef(id as u32), 0, 7));
    Request { id, body: Body::Direct { transfer: Transfer::Read, sector: id, segments } }
}

fn response(id: u64) -> Response {
    Response { id, operation: 0, status: Status::Okay }
}

fn model(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    // Every fault that these tests look for takes at most two preemptions; a bound of three keeps the
    // run short.
    builder.preemption_bound = Some(3);
    builder.check(test);
}

/// Takes requests `ids`, sleeping whenever the final check allows it.
fn take_all(taker: &mut RequestConsumer, ids: core::ops::Range<u64>, event: &Event) {
    let mut next = ids.start;
    // Something else came up when it was about to sleep, or woke it.
    if !taker.final_check().unwrap() {
        taker.withdraw();
    }
    while next < ids.end {
        taker.poll().unwrap();
        while let Some(raw) = taker.pop() {
            assert_eq!(raw.validate(&LIMITS).map(|r| r.to_owned()), Ok(request(next)));
            next += 1;
        }
        if next < ids.end && !taker.final_check().unwrap() {
            event.wait();
        }
    }
}

#[test]
fn loom_a_backend_that_sleeps_is_woken() {
    model(|| {
        let Ring { mut requests, mut taker, .. } = ring(UNION, 2);
        let event = Arc::new(Event::default());
        let bell = event.clone();
        let frontend = thread::spawn(move || {
            for id in 0..2 {
                requests.push(&request(id)).unwrap();
                if requests.publish() {
                    bell.notify();
                }
            }
        });
        take_all(&mut taker, 0..2, &event);
        frontend.join().unwrap();
    });
}

#[test]
fn loom_a_frontend_that_sleeps_is_woken() {
    model(|| {
        let Ring { mut requests, mut responses, mut taker, mut answerer } = ring(UNION, 2);
        for id in 0..2 {
            requests.push(&request(id)).unwrap();
        }
        let _ = requests.publish();
        take_all(&mut taker, 0..2, &Event::default());
        let event = Arc::new(Event::default());
        let bell = event.clone();
        let backend = thread::spawn(move || {
            for id in 0..2 {
                answerer.push(&response(id)).unwrap();
                if answerer.publish() {
                    bell.notify();
                }
            }
        });
        let mut next = 0;
        while next < 2 {
            responses.poll().unwrap();
            while let Some(got) = responses.pop() {
                assert_eq!(got, response(next));
                next += 1;
            }
            if next < 2 && !responses.final_check().unwrap() {
                event.wait();
            }
        }
        backend.join().unwrap();
    });
}

/// How often each half tries its step on a ring of one slot, where every success reuses the same slot.
/// A try may fail: the schedules that matter are those in which all succeed, and loom explores them
/// without anyone having to spin.
const TRIES: u64 = 3;

fn push_requests(mut requests: RequestProducer) {
    let mut next = 0;
    for _ in 0..TRIES {
        if requests.push(&request(next)).is_ok() {
            next += 1;
            let _ = requests.publish();
        }
    }
}

fn take_responses(mut responses: ResponseConsumer) {
    let mut next = 0;
    for _ in 0..TRIES {
        responses.poll().unwrap();
        if let Some(got) = responses.pop() {
            assert_eq!(got, response(next));
            next += 1;
        }
    }
}

fn take_requests(mut taker: RequestConsumer) {
    let mut next = 0;
    for _ in 0..TRIES {
        taker.poll().unwrap();
        if let Some(raw) = taker.pop() {
            assert_eq!(raw.validate(&LIMITS).map(|r| r.to_owned()), Ok(request(next)));
            next += 1;
        }
    }
}

/// This half learns only from the ring that a request was taken.
fn push_responses(mut answerer: ResponseProducer) {
    let mut next = 0;
    for _ in 0..TRIES {
        if answerer.push(&response(next)).is_ok() {
            next += 1;
            let _ = answerer.publish();
        }
    }
}

/// Each half of the frontend on its own thread, the backend on a third.
fn frontend_apart(layout: RingLayout) {
    model(move || {
        let Ring { requests, responses, mut taker, mut answerer } = ring(layout, 1);
        let pusher = thread::spawn(move || push_requests(requests));
        let popper = thread::spawn(move || take_responses(responses));
        let mut next = 0;
        for _ in 0..TRIES {
            taker.poll().unwrap();
            if taker.pop().is_some() {
                answerer.push(&response(next)).unwrap();
                let _ = answerer.publish();
                next += 1;
            }
        }
        pusher.join().unwrap();
        popper.join().unwrap();
    });
}

/// Each half of the backend on its own thread, the frontend on a third.
fn backend_apart(layout: RingLayout) {
    model(move || {
        let Ring { mut requests, mut responses, taker, answerer } = ring(layout, 1);
        let taking = thread::spawn(move || take_requests(taker));
        let answering = thread::spawn(move || push_responses(answerer));
        let mut next = 0;
        for _ in 0..TRIES {
            if requests.push(&request(next)).is_ok() {
                next += 1;
                let _ = requests.publish();
            }
            responses.poll().unwrap();
            let _ = responses.pop();
        }
        taking.join().unwrap();
        answering.join().unwrap();
    });
}

#[test]
fn loom_frontend_halves_apart_union() {
    frontend_apart(UNION);
}

#[test]
fn loom_frontend_halves_apart_split() {
    frontend_apart(RingLayout::Split);
}

#[test]
fn loom_backend_halves_apart_union() {
    backend_apart(UNION);
}

#[test]
fn loom_backend_halves_apart_split() {
    backend_apart(RingLayout::Split);
}
