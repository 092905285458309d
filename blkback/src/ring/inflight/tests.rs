//! A backend that ends after any of its stores, and is followed by another on the same ring.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use ring_proto::{
    Abi, Body, GrantRef, Limits, Request, RequestProducer, Response, ResponseConsumer,
    ResponseProducer, RingPages, Segment, Segments, Status, Transfer, back, front,
};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

const LAYOUTS: [RingLayout; 3] =
    [RingLayout::Union(Abi::X86_64), RingLayout::Union(Abi::X86_32), RingLayout::Split];
const IDENTITY: &str = "a ring";
const LIMITS: Limits = Limits {
    sectors: 1 << 40,
    granule: 1,
    max_indirect_segments: 0,
    read_only: false,
    discard: false,
};

thread_local! {
    /// Stores until the thread is "killed".
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The payload of a panic that stands for a kill.
struct Killed;

pub(super) fn may_end_here() {
    match LEFT.get() {
        Some(0) => {
            LEFT.set(None);
            resume_unwind(Box::new(Killed));
        }
        left => LEFT.set(left.map(|left| left - 1)),
    }
}

/// Runs `work`; `None` if it was killed.
fn until_killed<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|why| why.downcast::<Killed>().unwrap()).ok()
}

#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Take(u8),
    /// Answers one of the started requests.
    Answer(u8),
    Publish,
    Collect,
    /// The backend ends after so many more stores...
    KillAfter(u8),
    /// ...or at once, between two of the above steps.
    Kill,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(
        prop_oneof![
            3 => (1..20u8).prop_map(Step::Push),
            3 => (1..20u8).prop_map(Step::Take),
            8 => any::<u8>().prop_map(Step::Answer),
            3 => Just(Step::Publish),
            2 => Just(Step::Collect),
            3 => (0..40u8).prop_map(Step::KillAfter),
            1 => Just(Step::Kill),
        ],
        1..150,
    )
}

/// Request number `id`; no two are alike.
fn request(id: u64) -> Request {
    let mut segments = Segments::EMPTY;
    for k in 0..=id % 6 {
        segments.push(Segment::new(GrantRef((id * 8 + k) as u32), 0, 7));
    }
    Request { id, body: Body::Direct { transfer: Transfer::Write, sector: id * 64, segments } }
}

/// What outlives a backend: the memory, and the frontend.
struct World {
    layout: RingLayout,
    pages: RingPages,
    record: Arc<LocalRegion>,
    requests: RequestProducer,
    responses: ResponseConsumer,
    next: u64,
    /// Requests that the frontend waits for.
    open: BTreeSet<u64>,
    pushed: u64,
}

/// A backend process.
struct Process {
    taker: RequestConsumer,
    answerer: ResponseProducer,
    inflight: Inflight,
    /// Started but not answered.
    begun: Vec<(u16, u64)>,
}

impl World {
    fn new(layout: RingLayout, start: u32) -> (Self, Process) {
        let region = |pages| Arc::new(LocalRegion::new(pages).unwrap());
        let (first, second) = layout.pages(0);
        let pages = match second {
            0 => RingPages::Union(region(first)),
            _ => RingPages::Split(region(first), region(second)),
        };
        let (requests, responses) = front::create_at(pages.clone(), layout, 0, start).unwrap();
        let record = region(Inflight::bytes(requests.slots()) / PAGE_SIZE);
        let (taker, answerer) = back::attach(pages.clone(), layout, 0).unwrap();
        let inflight = Inflight::create(record.clone(), &taker, IDENTITY);
        let open = BTreeSet::new();
        let world = Self { layout, pages, record, requests, responses, next: 0, open, pushed: 0 };
        (world, Process { taker, answerer, inflight, begun: Vec::new() })
    }

    fn push(&mut self, count: u8) {
        for _ in 0..count {
            if self.requests.push(&request(self.next)).is_err() {
                break;
            }
            self.open.insert(self.next);
            self.next += 1;
            self.pushed += 1;
        }
        let _ = self.requests.publish();
    }

    fn collect(&mut self) {
        self.responses.poll().unwrap();
        while let Some(response) = self.responses.pop() {
            assert!(self.open.remove(&response.id), "{} is answered once more", response.id);
        }
    }

    /// A backend takes over and carries out what its predecessor left open. It may be killed meanwhile.
    fn take_over(&mut self) -> Process {
        self.collect();
        loop {
            let recovered = until_killed(|| {
                let (mut taker, answerer) =
                    back::attach(self.pages.clone(), self.layout, 0).unwrap();
                let inflight =
                    Inflight::recover(self.record.clone(), &mut taker, IDENTITY).unwrap();
                let mut process = Process { taker, answerer, inflight, begun: Vec::new() };
                let mut last = None;
                let mut raw = RawRequest::default();
                while let Some(tag) = process.inflight.resume(&mut raw) {
                    let request = raw.validate(&LIMITS).unwrap();
                    let id = request.id;
                    assert_eq!(request.to_owned(), self::request(id));
                    assert!(self.open.contains(&id), "{id} was answered and is done once more");
                    assert!(last < Some(id), "{id} is not begun in its turn");
                    last = Some(id);
                    process.begun.push((tag, id));
                }
                process
            });
            if let Some(process) = recovered {
                return process;
            }
        }
    }
}

impl Process {
    fn take(&mut self, count: u8) {
        self.taker.poll().unwrap();
        let mut raw = RawRequest::default();
        for _ in 0..count {
            let Some(tag) = self.inflight.take(&mut self.taker, &mut raw) else { break };
            self.begun.push((tag, raw.validate(&LIMITS).unwrap().id));
        }
    }

    fn answer(&mut self, which: u8) {
        if self.begun.is_empty() {
            return;
        }
        let (tag, id) = self.begun.swap_remove(usize::from(which) % self.begun.len());
        self.inflight.answer(tag, self.answerer.index());
        let operation = ring_proto::abi::op::WRITE;
        self.answerer.push(&Response { id, operation, status: Status::Okay }).unwrap();
    }

    fn publish(&mut self) {
        let _ = self.answerer.publish();
        self.inflight.published();
    }
}

fn run(layout: RingLayout, start: u32, steps: Vec<Step>) {
    let (mut world, mut process) = World::new(layout, start);
    for step in steps {
        let mut alive = Some(());
        match step {
            Step::Push(count) => world.push(count),
            Step::Collect => world.collect(),
            Step::Take(count) => alive = until_killed(|| process.take(count)),
            Step::Answer(which) => alive = until_killed(|| process.answer(which)),
            Step::Publish => alive = until_killed(|| process.publish()),
            Step::KillAfter(stores) => LEFT.set(Some(stores.into())),
            Step::Kill => alive = None,
        }
        if alive.is_none() {
            process = world.take_over();
        }
    }
    LEFT.set(None);
    process = world.take_over();
    while !world.open.is_empty() {
        process.take(u8::MAX);
        while !process.begun.is_empty() {
            process.answer(0);
        }
        process.publish();
        let before = world.open.len();
        world.collect();
        assert!(world.open.len() < before, "requests are lost: {:?}", world.open);
    }
    assert_eq!(world.take_over().inflight.waiting(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_request_is_answered_once_however_often_the_backend_is_killed(
        layout in 0..LAYOUTS.len(),
        start in prop_oneof![Just(0), (0..300u32).prop_map(u32::wrapping_neg), any::<u32>()],
        steps in steps(),
    ) {
        run(LAYOUTS[layout], start, steps);
    }

    /// Whatever is in a record, either it is refused and the ring is left as it was, or it is used and
    /// every request in it can be started.
    #[test]
    fn damaged_records_do_no_harm(
        steps in steps(),
        damage in vec((0..296usize, prop_oneof![0..64u32, any::<u32>()]), 0..8),
        bits in vec((0..296usize, 0..32u32), 0..4),
    ) {
        let (mut world, mut process) = World::new(LAYOUTS[0], 0);
        for step in steps {
            match step {
                Step::Push(count) => world.push(count),
                Step::Take(count) => process.take(count),
                Step::Answer(which) => process.answer(which),
                Step::Publish => process.publish(),
                _ => {}
            }
        }
        // Most of the header is never used.
        let words = Words::new(world.record.clone());
        let place = |at: usize| if at < 40 { at } else { header::WORDS + (at - 40) * 4 };
        for (at, value) in damage {
            words[place(at)].store(value, Relaxed);
        }
        for (at, bit) in bits {
            words[place(at)].fetch_xor(1 << bit, Relaxed);
        }
        let (mut taker, _answerer) = back::attach(world.pages.clone(), world.layout, 0).unwrap();
        let before = taker.index();
        match Inflight::recover(world.record.clone(), &mut taker, IDENTITY) {
            Err(_) => prop_assert_eq!(taker.index(), before),
            Ok(mut inflight) => {
                let open = inflight.waiting();
                prop_assert_eq!(taker.index().wrapping_sub(before) as usize, open);
                let mut raw = RawRequest::default();
                while inflight.resume(&mut raw).is_some() {
                    let _ = raw.validate(&LIMITS);
                }
                while inflight.take(&mut taker, &mut raw).is_some() {}
            }
        }
    }
}

#[test]
fn a_record_is_used_for_its_ring_alone() {
    let (mut world, mut process) = World::new(LAYOUTS[0], 7);
    world.push(4);
    process.take(3);
    let recover = |memory: Arc<LocalRegion>, identity: &str| {
        let (mut taker, _) = back::attach(world.pages.clone(), world.layout, 0).unwrap();
        Inflight::recover(memory, &mut taker, identity).map(|inflight| inflight.waiting())
    };
    assert_eq!(recover(world.record.clone(), IDENTITY), Ok(3));
    for other in ["", "a rinh", "a rin", "a ring ", "b ring"] {
        assert_eq!(recover(world.record.clone(), other), Err(Misfit::Identity), "{other:?}");
    }
    let short = Arc::new(LocalRegion::new(1).unwrap());
    assert_eq!(recover(short, IDENTITY), Err(Misfit::Format));
    let blank = Arc::new(LocalRegion::new(world.record.len() / PAGE_SIZE).unwrap());
    assert_eq!(recover(blank, IDENTITY), Err(Misfit::Format));

    // Another backend served the ring meanwhile, without the record.
    let (mut taker, mut answerer) = back::attach(world.pages.clone(), world.layout, 0).unwrap();
    taker.poll().unwrap();
    taker.pop().unwrap();
    let response = Response { id: 0, operation: 0, status: Status::Okay };
    answerer.push(&response).unwrap();
    let _ = answerer.publish();
    let count = Misfit::Count { open: 3, taken: 10, answered: 8 };
    assert_eq!(recover(world.record.clone(), IDENTITY), Err(count));
}
