//! A ring and what is in flight on it.

use crate::Violation;
use crate::stats::Counters;
use ring_proto::{Body, Request, RequestProducer, Response, ResponseConsumer, Segment, Status};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use xen_platform::{EventChannel, GrantedPages, STORM_EVENTS, STORM_PAUSE};

/// Bits of a request's id that hold its tag; the others count the tag's uses, so that a response that comes
/// twice, or late, does not match the request that has the tag by then. 32 bits in all, because the split
/// layout carries no more.
const TAG_BITS: u32 = 16;
const TAG_MASK: u32 = (1 << TAG_BITS) - 1;

/// The most requests to publish at a time: enough to be worth the fence and the transfer of the index's
/// cache line, few enough for both ends to work at the same time.
const PUBLISH_EVERY: u32 = 8;

/// One connection's ring, and all that must live as long.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) producer: RequestProducer,
    pub(crate) consumer: ResponseConsumer,
    pub(crate) channel: Box<dyn EventChannel>,
    /// Dropped last: revoking comes after the last use.
    pub(crate) _pages: Vec<Box<dyn GrantedPages>>,
}

/// Whose request it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Owner {
    /// Which of the vCPUs that share the ring.
    pub(crate) user: u32,
    /// Its number with that vCPU.
    pub(crate) request: u32,
}

#[derive(Clone, Copy, Debug)]
struct Tag {
    /// The id it is, or was last, in flight with.
    id: u32,
    busy: bool,
    operation: u8,
    owner: Owner,
    /// Issue number: the order to reissue in.
    order: u64,
}

/// What went wrong with a ring.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) enum Failure {
    Violation(#[from] Violation),
    Platform(#[from] xen_platform::Error),
}

impl From<ring_proto::RingError> for Failure {
    fn from(error: ring_proto::RingError) -> Self {
        Self::Violation(error.into())
    }
}

/// The tag of the request that a response answers: in flight, with the same id and operation.
fn answered<'a>(tags: &'a mut [Tag], response: &Response) -> Result<&'a mut Tag, Violation> {
    let Response { id, operation, .. } = *response;
    let tag = u32::try_from(id).ok().and_then(|id| {
        let tag = tags.get_mut((id & TAG_MASK) as usize)?;
        (tag.busy && tag.id == id).then_some(tag)
    });
    let tag = tag.ok_or(Violation::Id { id })?;
    let expected = tag.operation;
    if operation == expected {
        Ok(tag)
    } else {
        Err(Violation::Operation { id, operation, expected })
    }
}

/// A hardware queue, in blk-mq's terms. Owned by one thread.
#[derive(Debug)]
pub(crate) struct HwQueue {
    ring: Ring,
    /// One for each slot of the ring.
    tags: Box<[Tag]>,
    free: Vec<u32>,
    issues: u64,
    masked: bool,
    /// Consecutive events without a response.
    in_vain: u32,
    counters: Arc<Counters>,
}

impl HwQueue {
    pub(crate) fn new(ring: Ring, counters: Arc<Counters>) -> Self {
        let slots = ring.producer.slots();
        let owner = Owner { user: 0, request: 0 };
        let tag = |n| Tag { id: n, busy: false, operation: 0, owner, order: 0 };
        Self {
            tags: (0..slots).map(tag).collect(),
            free: (0..slots).rev().collect(),
            ring,
            issues: 0,
            masked: false,
            in_vain: 0,
            counters,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        self.ring.channel.as_fd()
    }

    /// Puts a request on the ring; `false` when it is full. The backend sees it after
    /// [`HwQueue::publish`] at the latest.
    #[inline(always)]
    pub(crate) fn push(&mut self, owner: Owner, body: Body<&[Segment]>) -> bool {
        let Some(&n) = self.free.last() else { return false };
        let Some(tag) = self.tags.get_mut(n as usize) else { return false };
        let id = n | (tag.id & !TAG_MASK).wrapping_add(1 << TAG_BITS);
        let request = Request { id: id.into(), body };
        if self.ring.producer.push(&request).is_err() {
            return false;
        }
        let operation = request.response_operation();
        *tag = Tag { id, busy: true, operation, owner, order: self.issues };
        self.free.pop();
        self.issues += 1;
        true
    }

    /// Whether so much was pushed that it should be published, for the backend to work, or wake up, while we make
    /// more. With few in flight half of them are enough.
    #[inline]
    pub(crate) fn has_enough(&self) -> bool {
        let in_flight = (self.tags.len() - self.free.len()) as u32;
        self.ring.producer.unpublished() >= (in_flight / 2).min(PUBLISH_EVERY)
    }

    /// Publishes what was pushed, and wakes the backend if it sleeps.
    pub(crate) fn publish(&mut self) -> Result<(), Failure> {
        let pushed = self.ring.producer.unpublished();
        if pushed == 0 {
            return Ok(());
        }
        self.counters.requests.add(pushed.into());
        if self.ring.producer.publish() {
            self.counters.kicks_sent.add(1);
            self.counters.syscalls.add(1);
            self.ring.channel.notify()?;
        } else {
            self.counters.kicks_avoided.add(1);
        }
        Ok(())
    }

    /// Takes the responses there are and returns their number. Each must answer a request in flight, with
    /// the same id and operation.
    pub(crate) fn poll(&mut self, mut end: impl FnMut(Owner, Status)) -> Result<u32, Failure> {
        let waiting = self.ring.consumer.poll()?;
        if waiting == 0 {
            return Ok(0);
        }
        self.in_vain = 0;
        let mut taken = 0;
        let outcome = loop {
            let Some(response) = self.ring.consumer.pop() else { break Ok(waiting) };
            match answered(&mut self.tags, &response) {
                Ok(tag) => {
                    tag.busy = false;
                    self.free.push(tag.id & TAG_MASK);
                    taken += 1;
                    end(tag.owner, response.status);
                }
                Err(violation) => break Err(violation.into()),
            }
        };
        self.counters.responses.add(taken);
        outcome
    }

    /// Asks for an event and looks once more; `true` when it is safe to sleep.
    pub(crate) fn arm(&mut self) -> Result<bool, Failure> {
        if std::mem::take(&mut self.masked) {
            if self.in_vain >= STORM_EVENTS {
                std::thread::sleep(STORM_PAUSE);
            }
            self.counters.syscalls.add(self.ring.channel.unmask()?.into());
        }
        Ok(!self.ring.consumer.final_check()?)
    }

    /// For after a sleep: takes the event, if one ended it. The channel stays masked until
    /// [`HwQueue::arm`], which delays unmasking when events bring no responses: a backend cannot make us
    /// run as fast as it likes (XSA-391).
    pub(crate) fn take_event(&mut self) -> Result<bool, Failure> {
        self.counters.syscalls.add(1);
        let taken = self.ring.channel.take()?;
        if taken {
            self.masked = true;
            self.in_vain = self.in_vain.saturating_add(1);
            self.counters.events.add(1);
        }
        Ok(taken)
    }

    /// Unanswered requests, in the order in which they were issued. For a ring that is given up.
    pub(crate) fn unanswered(&self) -> Vec<Owner> {
        let mut busy: Vec<&Tag> = self.tags.iter().filter(|tag| tag.busy).collect();
        busy.sort_unstable_by_key(|tag| tag.order);
        busy.into_iter().map(|tag| tag.owner).collect()
    }
}

impl Drop for HwQueue {
    /// What is in flight will not be answered any more.
    fn drop(&mut self) {
        self.counters.lost.add((self.tags.len() - self.free.len()) as u64);
    }
}
