//! The shared pages, as words that either end may write at any time.
//!
//! All access is through atomics, Rust's one way of saying "this may change under you". The
//! ring's unsafe code is in this file and in `memory.rs`.

use crate::RingLayout;
use crate::abi::{MAX_RING_PAGE_ORDER, PAGE_SIZE};
use crate::layout::{SPLIT_CONTROL_BYTES, SPLIT_RESPONSE_WORDS, UNION_HEADER_BYTES};
use crate::memory::SharedMemory;
use crate::sync::AtomicU32;
#[cfg(not(loom))]
use crate::sync::Ordering::Relaxed;
use core::fmt;

/// Why a ring could not be laid over some pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SetupError {
    /// The order is above our limit.
    #[error("ring-page-order {0} is above the limit of {MAX_RING_PAGE_ORDER}")]
    Order(u8),
    /// There are too few pages, or too many.
    #[error("a ring of this layout and order takes {need} pages, not {have}")]
    Pages {
        /// Pages given.
        have: usize,
        /// Pages needed.
        need: usize,
    },
    /// The ring to attach to claims more requests than it has slots.
    #[error("req_prod {req_prod} is more than {slots} slots ahead of rsp_prod {rsp_prod}")]
    Overrun {
        /// As found on the page.
        req_prod: u32,
        /// As found on the page.
        rsp_prod: u32,
        /// Slots in the ring.
        slots: u32,
    },
}

/// The pages of a ring.
#[derive(Clone)]
pub enum RingPages {
    /// For [`RingLayout::Union`].
    Union(alloc::sync::Arc<dyn SharedMemory>),
    /// For [`RingLayout::Split`]: requests, then control and responses.
    Split(alloc::sync::Arc<dyn SharedMemory>, alloc::sync::Arc<dyn SharedMemory>),
}

/// The four indices on the shared page, in the order of `struct blkif_sring`.
#[derive(Clone, Copy)]
enum Index {
    ReqProd,
    ReqEvent,
    RspProd,
    RspEvent,
}

/// A word of a slot. Either end may write it at any time, so it must never be read twice. Ends that
/// obey the rules never race here: the indices order their accesses.
#[cfg(not(loom))]
#[repr(transparent)]
pub(crate) struct Word(AtomicU32);

#[cfg(not(loom))]
impl Word {
    pub(crate) fn get(&self) -> u32 {
        self.0.load(Relaxed)
    }

    pub(crate) fn set(&self, value: u32) {
        self.0.store(value, Relaxed);
    }
}

/// The same for loom, which reports any two accesses that no index orders.
#[cfg(loom)]
pub(crate) struct Word(loom::cell::UnsafeCell<u32>);

// SAFETY: loom checks each access against all others, and fails the test where two may race.
#[cfg(loom)]
unsafe impl Sync for Word {}

#[cfg(loom)]
impl Word {
    pub(crate) fn get(&self) -> u32 {
        // SAFETY: the pointer is valid, and loom knows of no writer.
        self.0.with(|word| unsafe { *word })
    }

    pub(crate) fn set(&self, value: u32) {
        // SAFETY: the pointer is valid, and loom knows of no other access.
        self.0.with_mut(|word| unsafe { *word = value });
    }
}

/// A full fence: stores before it are visible to all before any load after it.
#[inline]
pub(crate) fn full_fence() {
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    // SAFETY: nothing changes, the word is or-ed with 0. To the compiler it may touch any memory, so
    // nothing moves across it. It orders what `mfence` orders, except write-combining memory, in a
    // fraction of the time; Linux's smp_mb() does the same.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp], 0", options(nostack));
    }
    #[cfg(all(not(target_arch = "x86_64"), not(loom)))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    #[cfg(loom)]
    loom::sync::atomic::fence(loom::sync::atomic::Ordering::SeqCst);
}

/// Prefetches the cache line of a word. With `to_write` the line is fetched in exclusive state, which
/// saves the second transfer between CPUs that a later write would need.
#[inline]
fn prefetch(word: Option<&Word>, to_write: bool) {
    let Some(word) = word else { return };
    #[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(loom)))]
    macro_rules! hint {
        ($($name:literal)*) => {
            // SAFETY: it has no effect that a program can see, whatever the address.
            unsafe {
                core::arch::asm!(
                    concat!($($name),*, " [{}]"),
                    in(reg) core::ptr::from_ref(word),
                    options(nostack, preserves_flags, readonly)
                );
            }
        };
    }
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    if to_write {
        hint!("prefetchw")
    } else {
        hint!("prefetcht0")
    }
    #[cfg(all(target_arch = "aarch64", not(loom)))]
    if to_write {
        hint!("prfm pstl1keep,")
    } else {
        hint!("prfm pldl1keep,")
    }
    let _ = (word, to_write);
}

/// The last word of a request's first segment, or one next to it, whatever the layout. In a union ring
/// of 112-byte slots, one slot in four has it on another cache line than its start.
const FIRST_SEGMENT_END: usize = 7;

/// A ring over shared pages.
pub(crate) struct SharedRing {
    #[cfg(not(loom))]
    words: RawWords,
    #[cfg(loom)]
    words: LoomWords,
    layout: RingLayout,
    mask: u32,
    request_words: usize,
    response_words: usize,
}

impl SharedRing {
    pub(crate) fn layout(&self) -> RingLayout {
        self.layout
    }

    pub(crate) fn slots(&self) -> u32 {
        self.mask + 1
    }

    pub(crate) fn req_prod(&self) -> &AtomicU32 {
        self.words.index(Index::ReqProd)
    }

    pub(crate) fn req_event(&self) -> &AtomicU32 {
        self.words.index(Index::ReqEvent)
    }

    pub(crate) fn rsp_prod(&self) -> &AtomicU32 {
        self.words.index(Index::RspProd)
    }

    pub(crate) fn rsp_event(&self) -> &AtomicU32 {
        self.words.index(Index::RspEvent)
    }

    /// The words of the slot that holds request `index`.
    pub(crate) fn request(&self, index: u32) -> &[Word] {
        self.words.request((index & self.mask) as usize, self.request_words)
    }

    /// Whether responses and requests share slots and overwrite each other.
    fn is_union(&self) -> bool {
        matches!(self.layout, RingLayout::Union(_))
    }

    /// Prefetches the slot of request `index`, up to its first segment. In a union ring the response will
    /// soon overwrite it.
    #[inline]
    pub(crate) fn prefetch_request(&self, index: u32) {
        let slot = self.request(index);
        prefetch(slot.first(), self.is_union());
        prefetch(slot.get(FIRST_SEGMENT_END), self.is_union());
    }

    /// Prefetches the slot of response `index`. In a union ring a request will soon overwrite it.
    #[inline]
    pub(crate) fn prefetch_response(&self, index: u32) {
        if self.is_union() {
            self.prefetch_request(index);
        } else {
            prefetch(self.response(index).first(), false);
        }
    }

    /// The words of the slot that holds response `index`.
    pub(crate) fn response(&self, index: u32) -> &[Word] {
        self.words.response((index & self.mask) as usize, self.response_words)
    }

    fn geometry(layout: RingLayout, order: u8) -> Result<(u32, usize, usize), SetupError> {
        if order > MAX_RING_PAGE_ORDER {
            return Err(SetupError::Order(order));
        }
        let request_words = layout.request_words();
        let response_words = match layout {
            // The response overwrites the request: same slot, same stride.
            RingLayout::Union(_) => request_words,
            RingLayout::Split => SPLIT_RESPONSE_WORDS,
        };
        Ok((layout.slots(order) - 1, request_words, response_words))
    }
}

impl fmt::Debug for SharedRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedRing")
            .field("layout", &self.layout)
            .field("slots", &self.slots())
            .finish_non_exhaustive()
    }
}

/// Addresses within the pages, which `_pages` keeps alive.
#[cfg(not(loom))]
struct RawWords {
    indices: [*const AtomicU32; 4],
    requests: *const Word,
    responses: *const Word,
    _pages: RingPages,
}

// SAFETY: the pages outlive the pointers and are touched only through atomics, from any thread.
#[cfg(not(loom))]
unsafe impl Send for RawWords {}
// SAFETY: as for Send.
#[cfg(not(loom))]
unsafe impl Sync for RawWords {}

#[cfg(not(loom))]
impl SharedRing {
    /// Lays a ring over `pages` without touching them.
    pub(crate) fn new(pages: RingPages, layout: RingLayout, order: u8) -> Result<Self, SetupError> {
        let (mask, request_words, response_words) = Self::geometry(layout, order)?;
        let (first, second) = layout.pages(order);
        let check = |memory: &dyn SharedMemory, need: usize| {
            let have = memory.len() / PAGE_SIZE;
            if have == need { Ok(()) } else { Err(SetupError::Pages { have, need }) }
        };
        let at = |memory: &dyn SharedMemory, byte: usize| {
            memory.base().as_ptr().wrapping_add(byte).cast_const()
        };
        let words = match &pages {
            RingPages::Union(memory) => {
                check(&**memory, first + second)?;
                let index = |n: usize| at(&**memory, n * 4).cast();
                let slots = at(&**memory, UNION_HEADER_BYTES).cast();
                RawWords {
                    indices: [index(0), index(1), index(2), index(3)],
                    requests: slots,
                    responses: slots,
                    _pages: pages,
                }
            }
            RingPages::Split(requests, control) => {
                check(&**requests, first)?;
                check(&**control, second)?;
                let index = |n: usize| at(&**control, n * 64).cast();
                RawWords {
                    indices: [index(0), index(1), index(2), index(3)],
                    requests: at(&**requests, 0).cast(),
                    responses: at(&**control, SPLIT_CONTROL_BYTES).cast(),
                    _pages: pages,
                }
            }
        };
        Ok(Self { words, layout, mask, request_words, response_words })
    }

    /// Empties the ring, as a frontend does before it shares the pages (`SHARED_RING_INIT`).
    pub(crate) fn reset(&self, index: u32) {
        let event = index.wrapping_add(1);
        self.req_prod().store(index, Relaxed);
        self.rsp_prod().store(index, Relaxed);
        self.req_event().store(event, Relaxed);
        self.rsp_event().store(event, Relaxed);
    }
}

#[cfg(not(loom))]
impl RawWords {
    fn index(&self, which: Index) -> &AtomicU32 {
        // SAFETY: `new` put these four aligned words inside the pages, and they are alive.
        unsafe { &*self.indices[which as usize] }
    }

    fn request(&self, slot: usize, words: usize) -> &[Word] {
        // SAFETY: `slot` is masked to the slots that `RingLayout::slots` fitted into the pages, whose
        // number `new` checked; `words` is the stride. The base is 4-byte aligned. A request slot and
        // a response slot of a union ring are the same memory: both are shared slices of atomics.
        unsafe { core::slice::from_raw_parts(self.requests.wrapping_add(slot * words), words) }
    }

    fn response(&self, slot: usize, words: usize) -> &[Word] {
        // SAFETY: as for `request`; `RingLayout::pages` made room for as many responses.
        unsafe { core::slice::from_raw_parts(self.responses.wrapping_add(slot * words), words) }
    }
}

/// The same words as loom models them: a page that no peer scribbles on.
#[cfg(loom)]
struct LoomWords {
    indices: [AtomicU32; 4],
    requests: alloc::vec::Vec<Word>,
    responses: Option<alloc::vec::Vec<Word>>,
}

#[cfg(loom)]
impl SharedRing {
    /// A ring of `slots` slots. A full-size one has too many states for a model checker.
    pub(crate) fn model(layout: RingLayout, slots: u32) -> Self {
        let (_, request_words, response_words) = Self::geometry(layout, 0).unwrap_or((0, 28, 28));
        let words = |n: usize| (0..n).map(|_| Word(loom::cell::UnsafeCell::new(0))).collect();
        let indices = [0, 1, 0, 1].map(AtomicU32::new);
        Self {
            words: LoomWords {
                indices,
                requests: words(slots as usize * request_words),
                responses: matches!(layout, RingLayout::Split)
                    .then(|| words(slots as usize * response_words)),
            },
            layout,
            mask: slots - 1,
            request_words,
            response_words,
        }
    }
}

#[cfg(loom)]
impl LoomWords {
    fn index(&self, which: Index) -> &AtomicU32 {
        &self.indices[which as usize]
    }

    fn request(&self, slot: usize, words: usize) -> &[Word] {
        &self.requests[slot * words..][..words]
    }

    fn response(&self, slot: usize, words: usize) -> &[Word] {
        &self.responses.as_ref().unwrap_or(&self.requests)[slot * words..][..words]
    }
}
