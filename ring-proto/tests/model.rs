//! Random steps of the four handles against a model whose counts do not wrap, with a peer that keeps
//! the rules and with one that writes anything anywhere between two steps.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{LAYOUTS, Pages, ring_pages};
use proptest::collection::vec;
use proptest::prelude::*;
use ring_proto::{
    Body, Limits, Request, RequestConsumer, RequestProducer, Response, ResponseConsumer,
    ResponseProducer, RingError, RingLayout, Status, back, front,
};
use std::collections::VecDeque;
use std::sync::Arc;

const LIMITS: Limits = Limits {
    sectors: 1 << 40,
    granule: 1,
    max_indirect_segments: 256,
    read_only: false,
    discard: true,
};

#[derive(Clone, Debug)]
enum Step {
    PushRequests(u8),
    PublishRequests,
    PollRequests,
    PopRequests(u8),
    SleepBackend,
    WakeBackend,
    PushResponses(u8),
    PublishResponses,
    PollResponses,
    PopResponses(u8),
    SleepFrontend,
    /// The peer writes a word: its position, counted from the indices, and its value.
    Scribble(u16, u32),
    /// The peer moves `req_prod` or `rsp_prod` from where it is.
    Nudge(bool, i8),
}

fn steps(hostile: bool) -> impl Strategy<Value = Vec<Step>> {
    let many = 1..80u8;
    let fair = prop_oneof![
        many.clone().prop_map(Step::PushRequests),
        Just(Step::PublishRequests),
        Just(Step::PollRequests),
        many.clone().prop_map(Step::PopRequests),
        Just(Step::SleepBackend),
        Just(Step::WakeBackend),
        many.clone().prop_map(Step::PushResponses),
        Just(Step::PublishResponses),
        Just(Step::PollResponses),
        many.prop_map(Step::PopResponses),
        Just(Step::SleepFrontend),
    ];
    let foul = prop_oneof![
        (prop_oneof![0..8u16, any::<u16>()], prop_oneof![0..600u32, any::<u32>()])
            .prop_map(|(word, value)| Step::Scribble(word, value)),
        (any::<bool>(), any::<i8>()).prop_map(|(which, by)| Step::Nudge(which, by)),
    ];
    vec(prop_oneof![6 => fair, u32::from(hostile) => foul], 1..200)
}

/// Both ends, and how far each has got, counted from 0.
struct Ring {
    requests: RequestProducer,
    responses: ResponseConsumer,
    taker: RequestConsumer,
    answerer: ResponseProducer,
    pages: Arc<Pages>,
    control: Option<Arc<Pages>>,
    start: u32,
    slots: u64,
    req: End,
    rsp: End,
}

/// One direction: pushed by its producer, published, seen and taken by its consumer, which wants an
/// event when `event` is published.
#[derive(Debug)]
struct End {
    pushed: u64,
    published: u64,
    seen: u64,
    taken: u64,
    event: u64,
}

impl End {
    const NEW: Self = Self { pushed: 0, published: 0, seen: 0, taken: 0, event: 1 };

    fn publish(&mut self) -> bool {
        let before = std::mem::replace(&mut self.published, self.pushed);
        before < self.event && self.event <= self.published
    }
}

impl Ring {
    fn new(layout: RingLayout, start: u32) -> Self {
        let (pages, first, control) = ring_pages(layout, 0);
        let (requests, responses) = front::create_at(pages.clone(), layout, 0, start).unwrap();
        let (taker, answerer) = back::attach(pages, layout, 0).unwrap();
        let slots = u64::from(requests.slots());
        let (req, rsp) = (End::NEW, End::NEW);
        Self { requests, responses, taker, answerer, pages: first, control, start, slots, req, rsp }
    }

    /// Word `n` of the shared memory: the four indices first.
    fn word(&self, n: usize) -> (&Pages, usize) {
        match &self.control {
            Some(control) if n < 4 => (control, 16 * n),
            Some(control) if n.is_multiple_of(2) => (control, n / 2 % control.words().len()),
            _ => (&self.pages, n % self.pages.words().len()),
        }
    }

    fn index(&self, n: usize) -> u32 {
        let (pages, word) = self.word(n);
        pages.get(word)
    }

    /// Which count within `allowed` an index on the page stands for, if any.
    fn count(&self, index: u32, allowed: std::ops::RangeInclusive<u64>) -> Option<u64> {
        allowed.into_iter().find(|&count| self.start.wrapping_add(count as u32) == index)
    }

    /// What polling for requests must return: at most `slots` beyond the responses published, and never
    /// fewer than seen before.
    fn see_requests(&mut self) -> Option<u64> {
        let seen = self.count(self.index(0), self.req.seen..=self.rsp.published + self.slots)?;
        self.req.seen = seen;
        Some(seen - self.req.taken)
    }

    /// What polling for responses must return: at most one for each request published.
    fn see_responses(&mut self) -> Option<u64> {
        let seen = self.count(self.index(2), self.rsp.seen..=self.req.published)?;
        self.rsp.seen = seen;
        Some(seen - self.rsp.taken)
    }
}

fn request(k: u64) -> Request {
    Request {
        id: k,
        body: Body::Discard { sector: k, sectors: 2 * k, secure: k.is_multiple_of(2) },
    }
}

fn response(k: u64) -> Response {
    let status = [Status::Okay, Status::Error, Status::NotSupported][k as usize % 3];
    Response { id: k, operation: 5, status }
}

fn same<T>(got: Result<T, RingError>, expected: Option<u64>) -> Result<(), TestCaseError>
where
    u64: From<T>,
{
    match got {
        Ok(n) => prop_assert_eq!(Some(u64::from(n)), expected),
        Err(error) => prop_assert_eq!(None, expected, "{}", error),
    }
    Ok(())
}

fn run(
    layout: RingLayout,
    start: u32,
    steps: Vec<Step>,
    hostile: bool,
) -> Result<(), TestCaseError> {
    let mut ring = Ring::new(layout, start);
    // What is in transit, and what the backend has yet to answer.
    let (mut requests, mut responses, mut open) = (VecDeque::new(), VecDeque::new(), Vec::new());
    for step in steps {
        match step {
            Step::PushRequests(n) => {
                for _ in 0..n {
                    let fits = ring.req.pushed - ring.rsp.taken < ring.slots;
                    let free = ring.slots - (ring.req.pushed - ring.rsp.taken);
                    prop_assert_eq!(u64::from(ring.requests.free()), free);
                    let k = ring.req.pushed;
                    prop_assert_eq!(ring.requests.push(&request(k)).is_ok(), fits);
                    if fits {
                        ring.req.pushed += 1;
                        requests.push_back(request(k));
                    }
                }
            }
            Step::PublishRequests => {
                let wanted = ring.req.publish();
                let got = ring.requests.publish();
                prop_assert!(hostile || got == wanted);
            }
            Step::PollRequests => {
                let expected = ring.see_requests();
                same(ring.taker.poll(), expected)?;
            }
            Step::SleepBackend => {
                let expected = ring.see_requests();
                same(ring.taker.final_check(), expected.map(|n| u64::from(n > 0)))?;
                if expected == Some(0) {
                    ring.req.event = ring.req.taken + 1;
                }
            }
            Step::WakeBackend => {
                ring.taker.withdraw();
                ring.req.event = ring.req.taken;
            }
            Step::PopRequests(n) => {
                for _ in 0..n {
                    let raw = ring.taker.pop();
                    prop_assert_eq!(raw.is_some(), ring.req.taken < ring.req.seen);
                    let Some(raw) = raw else { break };
                    ring.req.taken += 1;
                    prop_assert!(ring.req.taken - ring.rsp.published <= ring.slots);
                    let request = raw.validate(&LIMITS).map(|request| request.to_owned());
                    if !hostile {
                        prop_assert_eq!(request, Ok(requests.pop_front().unwrap()));
                    }
                    open.push(ring.req.taken - 1);
                }
            }
            Step::PushResponses(n) => {
                for _ in 0..n {
                    let open_one = ring.rsp.pushed < ring.req.taken;
                    // Any of those not answered yet will do.
                    let at = (usize::from(n) * 7) % open.len().max(1);
                    let k = open.get(at).copied().unwrap_or(0);
                    prop_assert_eq!(ring.answerer.push(&response(k)).is_ok(), open_one);
                    if open_one {
                        ring.rsp.pushed += 1;
                        responses.push_back(response(open.swap_remove(at)));
                    }
                }
            }
            Step::PublishResponses => {
                let wanted = ring.rsp.publish();
                let got = ring.answerer.publish();
                prop_assert!(hostile || got == wanted);
            }
            Step::PollResponses => {
                let expected = ring.see_responses();
                same(ring.responses.poll(), expected)?;
            }
            Step::SleepFrontend => {
                let expected = ring.see_responses();
                same(ring.responses.final_check(), expected.map(|n| u64::from(n > 0)))?;
                if expected == Some(0) {
                    ring.rsp.event = ring.rsp.taken + 1;
                }
            }
            Step::PopResponses(n) => {
                for _ in 0..n {
                    let got = ring.responses.pop();
                    prop_assert_eq!(got.is_some(), ring.rsp.taken < ring.rsp.seen);
                    let Some(got) = got else { break };
                    ring.rsp.taken += 1;
                    prop_assert!(ring.rsp.taken <= ring.req.published);
                    if !hostile {
                        prop_assert_eq!(got, responses.pop_front().unwrap());
                    }
                }
            }
            Step::Scribble(at, value) => {
                let value = if at < 4 { start.wrapping_add(value) } else { value };
                let (pages, word) = ring.word(at.into());
                pages.set(word, value);
            }
            Step::Nudge(responses, by) => {
                let (pages, word) = ring.word(if responses { 2 } else { 0 });
                pages.set(word, pages.get(word).wrapping_add_signed(by.into()));
            }
        }
    }
    Ok(())
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..300u32).prop_map(u32::wrapping_neg), any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn ends_that_keep_the_rules(layout in 0..3usize, start in start(), steps in steps(false)) {
        run(LAYOUTS[layout], start, steps, false)?;
    }

    #[test]
    fn ends_whose_peer_writes_anything(layout in 0..3usize, start in start(), steps in steps(true)) {
        run(LAYOUTS[layout], start, steps, true)?;
    }
}
