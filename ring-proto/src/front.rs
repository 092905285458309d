//! The frontend's halves: requests go into one, responses come out of the other.

use crate::abi::Segment;
use crate::back::{FETCH_AHEAD, crosses};
use crate::codec::{decode_response, encode_request};
use crate::request::{Request, Response};
use crate::shared::{SharedRing, full_fence};
use crate::sync::{Arc, Halves, Ordering};
use crate::{RingError, RingFull, RingLayout};
#[cfg(not(loom))]
use crate::{RingPages, SetupError};
use core::ops::Deref;

/// Creates an empty ring in pages of our own, which need not be initialized.
///
/// # Errors
/// If the pages do not fit the layout.
#[cfg(not(loom))]
pub fn create(
    pages: RingPages,
    layout: RingLayout,
    order: u8,
) -> Result<(RequestProducer, ResponseConsumer), SetupError> {
    create_at(pages, layout, order, 0)
}

/// As [`create`], but the first request has number `index`, so that a test of wrap-around need not
/// wait for 2^32 requests. A backend that starts at 0 regardless of `rsp_prod` cannot follow.
///
/// # Errors
/// As [`create`].
#[cfg(not(loom))]
pub fn create_at(
    pages: RingPages,
    layout: RingLayout,
    order: u8,
    index: u32,
) -> Result<(RequestProducer, ResponseConsumer), SetupError> {
    let ring = SharedRing::new(pages, layout, order)?;
    ring.reset(index);
    Ok(halves(Arc::new(ring), index))
}

/// The two halves of a frontend on an empty ring whose first request is number `index`.
pub(crate) fn halves(ring: Arc<SharedRing>, index: u32) -> (RequestProducer, ResponseConsumer) {
    let halves = Halves::starting_at(index);
    (
        RequestProducer {
            ring: ring.clone(),
            halves: halves.clone(),
            pushed: index,
            published: index,
            freed: index,
        },
        ResponseConsumer { ring, halves, taken: index, seen: index, requested: index },
    )
}

/// Pushes requests. Owned by one thread.
#[derive(Debug)]
#[repr(align(128))]
pub struct RequestProducer {
    ring: Arc<SharedRing>,
    halves: Arc<Halves>,
    /// `req_prod_pvt`
    pushed: u32,
    /// `req_prod` on the page.
    published: u32,
    /// Responses taken, as last heard from the other half; each one freed a slot.
    freed: u32,
}

impl RequestProducer {
    /// Slots in the ring.
    pub fn slots(&self) -> u32 {
        self.ring.slots()
    }

    /// Slots that are free now.
    pub fn free(&mut self) -> u32 {
        self.freed = self.halves.responses.0.load(Ordering::Acquire);
        self.ring.slots() - self.pushed.wrapping_sub(self.freed)
    }

    /// Writes a request. The backend sees it after [`Self::publish`].
    ///
    /// # Errors
    /// [`RingFull`] when no slot is free.
    #[inline(always)]
    pub fn push<S: Deref<Target = [Segment]>>(
        &mut self,
        request: &Request<S>,
    ) -> Result<(), RingFull> {
        let full = |freed| self.pushed.wrapping_sub(freed) >= self.ring.slots();
        if full(self.freed) {
            let freed = self.halves.responses.0.load(Ordering::Acquire);
            if full(freed) {
                return Err(RingFull);
            }
            self.freed = freed;
        }
        encode_request(self.ring.request(self.pushed), self.ring.layout(), request);
        self.pushed = self.pushed.wrapping_add(1);
        Ok(())
    }

    /// Requests pushed but not yet published.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.pushed.wrapping_sub(self.published)
    }

    /// Shows the backend what was pushed, and returns whether it wants an event for it
    /// (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`).
    #[must_use = "a backend that asked for an event sleeps until it comes"]
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.published == self.pushed {
            return false;
        }
        let before = core::mem::replace(&mut self.published, self.pushed);
        // First, or the other half may see responses to requests it does not know of.
        self.halves.requests.0.store(self.pushed, Ordering::Relaxed);
        self.ring.req_prod().store(self.pushed, Ordering::Release);
        full_fence();
        crosses(before, self.pushed, self.ring.req_event().load(Ordering::Relaxed))
    }
}

/// Takes responses. Owned by one thread, not necessarily the one that pushes requests.
#[derive(Debug)]
#[repr(align(128))]
pub struct ResponseConsumer {
    ring: Arc<SharedRing>,
    halves: Arc<Halves>,
    /// `rsp_cons`
    taken: u32,
    /// `rsp_prod` as last checked: responses up to here may be taken.
    seen: u32,
    /// Requests published, as last heard from the other half.
    requested: u32,
}

impl ResponseConsumer {
    /// Looks for new responses, and says how many wait to be taken.
    ///
    /// # Errors
    /// If `rsp_prod` has an impossible value.
    #[inline]
    pub fn poll(&mut self) -> Result<u32, RingError> {
        // Acquire: the responses themselves were written before the index.
        let rsp_prod = self.ring.rsp_prod().load(Ordering::Acquire);
        if rsp_prod != self.seen {
            let claimed = rsp_prod.wrapping_sub(self.taken);
            if claimed > self.requested.wrapping_sub(self.taken) {
                // Relaxed: the other half stored this before it published the requests that are answered
                // here, and only the number itself is used.
                self.requested = self.halves.requests.0.load(Ordering::Relaxed);
            }
            if claimed > self.requested.wrapping_sub(self.taken)
                || claimed < self.seen.wrapping_sub(self.taken)
            {
                let (taken, pushed) = (self.taken, self.requested);
                return Err(RingError::ResponseOverrun { rsp_prod, taken, pushed });
            }
            self.seen = rsp_prod;
            let few = self.seen.wrapping_sub(self.taken).min(FETCH_AHEAD);
            for ahead in 0..few {
                self.ring.prefetch_response(self.taken.wrapping_add(ahead));
            }
        }
        Ok(self.seen.wrapping_sub(self.taken))
    }

    /// Copies the next of the responses that [`Self::poll`] has seen out of the ring, and frees its slot.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Response> {
        if self.taken == self.seen {
            return None;
        }
        if self.seen.wrapping_sub(self.taken) > FETCH_AHEAD {
            self.ring.prefetch_response(self.taken.wrapping_add(FETCH_AHEAD));
        }
        let response = decode_response(self.ring.response(self.taken), self.ring.layout());
        self.taken = self.taken.wrapping_add(1);
        // Release: the slot was read before the other half may write a request over it.
        self.halves.responses.0.store(self.taken, Ordering::Release);
        Some(response)
    }

    /// Asks for an event with the next response, then looks once more. It is safe to sleep only if this
    /// returns `false` (`RING_FINAL_CHECK_FOR_RESPONSES`).
    ///
    /// # Errors
    /// As [`Self::poll`].
    pub fn final_check(&mut self) -> Result<bool, RingError> {
        if self.poll()? > 0 {
            return Ok(true);
        }
        self.ring.rsp_event().store(self.taken.wrapping_add(1), Ordering::Relaxed);
        // As in the backend's: one of the two ends must see what the other wrote.
        full_fence();
        Ok(self.poll()? > 0)
    }
}
