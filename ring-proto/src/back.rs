//! The backend's halves: requests come out of one, responses go into the other.

#[cfg(not(loom))]
use crate::codec::decode_request_to;
use crate::codec::{decode_request, encode_response};
use crate::request::{RawRequest, Response};
use crate::shared::{SharedRing, full_fence};
#[cfg(not(loom))]
use crate::sync::AtomicU32;
use crate::sync::{Arc, Halves, Ordering};
use crate::{RingError, RingFull, RingLayout};
#[cfg(not(loom))]
use crate::{RingPages, SetupError};

/// Attaches to a ring that a frontend has made.
///
/// On a fresh ring both indices are 0. On a ring that another backend has served, it resumes after the
/// last response, as Linux's backend does (`xen_blkif_map` in drivers/block/xen-blkback/xenbus.c), so
/// requests between there and `req_prod` are seen again. A caller that kept copies of those already
/// taken skips them ([`RequestConsumer::skip`]).
///
/// # Errors
/// If the pages do not fit the layout, or the indices found are impossible.
#[cfg(not(loom))]
pub fn attach(
    pages: RingPages,
    layout: RingLayout,
    order: u8,
) -> Result<(RequestConsumer, ResponseProducer), SetupError> {
    let ring = SharedRing::new(pages, layout, order)?;
    let slots = ring.slots();
    let rsp_prod = ring.rsp_prod().load(Ordering::Acquire);
    let req_prod = ring.req_prod().load(Ordering::Acquire);
    if req_prod.wrapping_sub(rsp_prod) > slots {
        return Err(SetupError::Overrun { req_prod, rsp_prod, slots });
    }
    Ok(halves(Arc::new(ring), rsp_prod))
}

/// The two halves of a backend whose next request and response are both number `index`.
pub(crate) fn halves(ring: Arc<SharedRing>, index: u32) -> (RequestConsumer, ResponseProducer) {
    let halves = Halves::starting_at(index);
    (
        RequestConsumer {
            ring: ring.clone(),
            halves: halves.clone(),
            taken: index,
            seen: index,
            answered: index,
        },
        ResponseProducer { ring, halves, pushed: index, published: index, taken: index },
    )
}

/// Slots to prefetch while one is processed: moving a slot between CPUs takes as long as some requests.
pub(crate) const FETCH_AHEAD: u32 = 4;

/// Takes requests. Owned by one thread.
#[derive(Debug)]
#[repr(align(128))]
pub struct RequestConsumer {
    ring: Arc<SharedRing>,
    halves: Arc<Halves>,
    /// `req_cons`
    taken: u32,
    /// `req_prod` as last checked: requests up to here may be taken.
    seen: u32,
    /// Responses pushed, as last heard from the other half.
    answered: u32,
}

impl RequestConsumer {
    /// Slots in the ring.
    pub fn slots(&self) -> u32 {
        self.ring.slots()
    }

    /// How the ring is laid out.
    pub fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    /// Looks for new requests, and says how many wait to be taken.
    ///
    /// # Errors
    /// If `req_prod` has an impossible value.
    #[inline]
    pub fn poll(&mut self) -> Result<u32, RingError> {
        // Acquire: the requests themselves were written before the index.
        let req_prod = self.ring.req_prod().load(Ordering::Acquire);
        if req_prod != self.seen {
            self.check(req_prod)?;
            self.seen = req_prod;
            let few = self.seen.wrapping_sub(self.taken).min(FETCH_AHEAD);
            for ahead in 0..few {
                self.ring.prefetch_request(self.taken.wrapping_add(ahead));
            }
        }
        Ok(self.seen.wrapping_sub(self.taken))
    }

    /// A frontend reuses a slot only after it has taken a response, which must have been pushed first. So
    /// `req_prod` is at most `slots` ahead of the responses, and never behind what was seen before.
    fn check(&mut self, req_prod: u32) -> Result<(), RingError> {
        let slots = self.ring.slots();
        if req_prod.wrapping_sub(self.answered) > slots {
            // Relaxed: the other half stored this before it published the responses that allowed this
            // `req_prod`, and only the number itself is used.
            self.answered = self.halves.responses.0.load(Ordering::Relaxed);
        }
        let (ahead, seen) =
            (req_prod.wrapping_sub(self.answered), self.seen.wrapping_sub(self.answered));
        if ahead > slots || ahead < seen {
            return Err(RingError::RequestOverrun { req_prod, rsp_prod: self.answered, slots });
        }
        Ok(())
    }

    /// Copies the next of the requests that [`Self::poll`] has seen out of the ring.
    pub fn pop(&mut self) -> Option<RawRequest> {
        let mut raw = RawRequest::default();
        self.pop_into(&mut raw).then_some(raw)
    }

    /// As [`Self::pop`], into `raw`, which saves moving it; `false` when there is none.
    #[inline]
    pub fn pop_into(&mut self, raw: &mut RawRequest) -> bool {
        if self.taken == self.seen {
            return false;
        }
        self.fetch_ahead();
        decode_request(self.ring.request(self.taken), self.ring.layout(), raw);
        self.advance(1);
        true
    }

    /// As [`Self::pop_into`], and also stores the words it read in `copy`, which is
    /// [`RingLayout::request_words`] long, for [`RawRequest::from_copy`].
    ///
    /// # Panics
    /// If `copy` is shorter.
    #[cfg(not(loom))]
    #[inline]
    pub fn pop_to(&mut self, raw: &mut RawRequest, copy: &[AtomicU32]) -> bool {
        if self.taken == self.seen {
            return false;
        }
        self.fetch_ahead();
        decode_request_to(self.ring.request(self.taken), self.ring.layout(), copy, raw);
        self.advance(1);
        true
    }

    /// Another CPU wrote the slots, so a few are prefetched while one is processed. Never beyond those
    /// seen: that would take away cache lines that the frontend is about to write.
    #[inline]
    fn fetch_ahead(&self) {
        let ahead = self.taken.wrapping_add(FETCH_AHEAD);
        if self.seen.wrapping_sub(self.taken) > FETCH_AHEAD {
            self.ring.prefetch_request(ahead);
        }
    }

    #[inline]
    fn advance(&mut self, by: u32) {
        self.taken = self.taken.wrapping_add(by);
        // Release: the slot was read before the other half may write a response over it.
        self.halves.requests.0.store(self.taken, Ordering::Release);
    }

    /// Number of the next request to be taken (`req_cons`).
    #[inline]
    pub fn index(&self) -> u32 {
        self.taken
    }

    /// Skips `count` of the requests that [`Self::poll`] has seen. A predecessor took and copied them, and
    /// their slots may be overwritten by now; they must still be answered. Returns `false` and does
    /// nothing if there are not that many.
    pub fn skip(&mut self, count: u32) -> bool {
        let there = count <= self.seen.wrapping_sub(self.taken);
        if there {
            self.advance(count);
        }
        there
    }

    /// Asks for an event with the next request, then looks once more. It is safe to sleep only if this
    /// returns `false` (`RING_FINAL_CHECK_FOR_REQUESTS`).
    ///
    /// # Errors
    /// As [`Self::poll`].
    pub fn final_check(&mut self) -> Result<bool, RingError> {
        if self.poll()? > 0 {
            return Ok(true);
        }
        self.ring.req_event().store(self.taken.wrapping_add(1), Ordering::Relaxed);
        // Either the frontend sees our `req_event` or we see its request: without a full fence on both
        // sides, both may miss and sleep for ever.
        full_fence();
        Ok(self.poll()? > 0)
    }

    /// Withdraws the request for an event made by [`Self::final_check`], which spares both ends an event.
    /// For a thread that something else has woken and that polls anyway. Check again before the next sleep.
    pub fn withdraw(&mut self) {
        // The event index of a request that was published long ago.
        self.ring.req_event().store(self.taken, Ordering::Relaxed);
    }
}

/// Pushes responses. Owned by one thread, not necessarily the one that takes requests.
#[derive(Debug)]
#[repr(align(128))]
pub struct ResponseProducer {
    ring: Arc<SharedRing>,
    halves: Arc<Halves>,
    /// `rsp_prod_pvt`
    pushed: u32,
    /// `rsp_prod` on the page.
    published: u32,
    /// Requests taken, as last heard from the other half.
    taken: u32,
}

impl ResponseProducer {
    /// Writes a response. The frontend sees it after [`Self::publish`].
    ///
    /// # Errors
    /// [`RingFull`] if every request taken already has its response.
    #[inline]
    pub fn push(&mut self, response: &Response) -> Result<(), RingFull> {
        if self.pushed == self.taken {
            self.taken = self.halves.requests.0.load(Ordering::Acquire);
            if self.pushed == self.taken {
                return Err(RingFull);
            }
        }
        encode_response(self.ring.response(self.pushed), self.ring.layout(), response);
        self.pushed = self.pushed.wrapping_add(1);
        Ok(())
    }

    /// Number of the next response to be pushed (`rsp_prod_pvt`).
    pub fn index(&self) -> u32 {
        self.pushed
    }

    /// Responses pushed but not yet published.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.pushed.wrapping_sub(self.published)
    }

    /// Shows the frontend what was pushed, and returns whether it wants an event for it
    /// (`RING_PUSH_RESPONSES_AND_CHECK_NOTIFY`).
    #[must_use = "a frontend that asked for an event sleeps until it comes"]
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.published == self.pushed {
            return false;
        }
        let before = core::mem::replace(&mut self.published, self.pushed);
        // First, or the other half may see requests made possible by responses it does not know of.
        self.halves.responses.0.store(self.pushed, Ordering::Relaxed);
        self.ring.rsp_prod().store(self.pushed, Ordering::Release);
        full_fence();
        crosses(before, self.pushed, self.ring.rsp_event().load(Ordering::Relaxed))
    }
}

/// Whether moving an index from `old` to `new` passed the one that an event was asked for.
pub(crate) fn crosses(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}
