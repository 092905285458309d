//! How far a producer has come: what ring.h does with `prod_pvt` and `RING_PUSH_..._AND_CHECK_NOTIFY`.

use crate::shared::full_fence;
use crate::sync::{AtomicU32, Ordering};

/// The indices that a producer shares.
pub(crate) struct Indices<'a> {
    /// What this side's consumer hears of it.
    pub(crate) half: &'a AtomicU32,
    /// `req_prod` or `rsp_prod`.
    pub(crate) prod: &'a AtomicU32,
    /// `req_event` or `rsp_event`.
    pub(crate) event: &'a AtomicU32,
}

/// Numbers of the next entries that are to be pushed, shown, and looked at for an event.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    pub(crate) pushed: u32,
    shown: u32,
    published: u32,
}

impl Progress {
    pub(crate) const fn starting_at(index: u32) -> Self {
        Self { pushed: index, shown: index, published: index }
    }

    #[inline]
    pub(crate) fn push(&mut self) {
        self.pushed = self.pushed.wrapping_add(1);
    }

    #[inline]
    pub(crate) const fn unshown(&self) -> u32 {
        self.pushed.wrapping_sub(self.shown)
    }

    #[inline]
    pub(crate) const fn is_published(&self) -> bool {
        self.published == self.pushed
    }

    /// Shows the peer what was pushed, and says whether it is known to want an event for it.
    #[inline]
    pub(crate) fn show(&mut self, Indices { half, prod, event }: &Indices<'_>) -> bool {
        if self.shown != self.pushed {
            self.shown = self.pushed;
            // First, or the consumer may see what rests on entries that it has not heard of.
            half.store(self.pushed, Ordering::Relaxed);
            prod.store(self.pushed, Ordering::Release);
        }
        let wanted = crosses(self.published, self.pushed, event.load(Ordering::Relaxed));
        if wanted {
            self.published = self.pushed;
        }
        wanted
    }

    /// Shows the peer what was pushed, and says whether it wants an event for what was since the last time.
    #[inline]
    pub(crate) fn publish(&mut self, indices: &Indices<'_>) -> bool {
        if self.show(indices) {
            return true;
        }
        if self.is_published() {
            return false;
        }
        // Either we see the peer's wish, or it sees our index: see `final_check`.
        full_fence();
        let event = indices.event.load(Ordering::Relaxed);
        crosses(core::mem::replace(&mut self.published, self.pushed), self.pushed, event)
    }
}

/// Whether an index that moved from `old` to `new` passed the one an event was asked for.
const fn crosses(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}
