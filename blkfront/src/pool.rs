//! Data pages, granted to the backend until the disk is closed.
//!
//! A request then costs no grant operation, and a backend with persistent grants maps each page
//! once. Buffers are chains of single pages, so the pool cannot fragment, and pages are handed out
//! last in, first out: a few pages stay hot, in our caches and among the grants a backend keeps.
//!
//! The backend may read and write a pool page at any time, also after a request is over. Hence no
//! reference into a page is ever given out: data is copied in, and copied out once.

use crate::slab::NONE;
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{GrantRef, SharedMemory, Window};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use xen_platform::GrantedPages;

/// The pages, and the chains they form.
pub(crate) struct Pages {
    memory: Arc<dyn SharedMemory>,
    refs: Box<[GrantRef]>,
    /// The page that follows, in a buffer or on a free list. Written by whoever owns the page.
    next: Box<[AtomicU32]>,
    /// Pages of buffers that were dropped: any thread pushes, the pool alone takes, and it takes all.
    dropped: AtomicU32,
    // When neither a buffer nor the disk needs them any more, they are taken back, or left to the platform
    // until the peer lets go.
    _grants: Box<dyn GrantedPages>,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("pages", &self.refs.len()).finish_non_exhaustive()
    }
}

impl Pages {
    fn next(&self, page: u32) -> u32 {
        self.next.get(page as usize).map_or(NONE, |n| n.load(Ordering::Relaxed))
    }

    fn link(&self, page: u32, next: u32) {
        if let Some(n) = self.next.get(page as usize) {
            n.store(next, Ordering::Relaxed);
        }
    }

    fn give_back(&self, first: u32, last: u32) {
        let mut head = self.dropped.load(Ordering::Relaxed);
        loop {
            self.link(last, head);
            // Release: the links, and the data copied out, come before the page is used again.
            match self.dropped.compare_exchange_weak(
                head,
                first,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    fn window(&self, page: u32, offset: usize, len: usize) -> Option<Window> {
        Window::new(self.memory.clone(), page as usize * PAGE_SIZE + offset, len)
    }
}

/// A vCPU's granted pages.
#[derive(Debug)]
pub(crate) struct Pool {
    pages: Arc<Pages>,
    free: u32,
    free_count: u32,
}

impl Pool {
    pub(crate) fn new(grants: Box<dyn GrantedPages>) -> Self {
        let refs: Box<[GrantRef]> = grants.refs().into();
        let count = u32::try_from(refs.len()).unwrap_or(NONE - 1);
        let next = (1..=count).map(|n| AtomicU32::new(if n == count { NONE } else { n })).collect();
        let pages = Pages {
            memory: grants.memory(),
            refs,
            next,
            dropped: AtomicU32::new(NONE),
            _grants: grants,
        };
        Self { pages: Arc::new(pages), free: if count == 0 { NONE } else { 0 }, free_count: count }
    }

    /// Its pages, to keep.
    pub(crate) fn pages(&self) -> Arc<Pages> {
        self.pages.clone()
    }

    /// A buffer of `len` bytes, or `None` when there are not that many free pages now.
    pub(crate) fn alloc(&mut self, len: usize) -> Option<IoBuffer> {
        let count = u32::try_from(len.div_ceil(PAGE_SIZE)).ok()?;
        if count == 0 {
            return None;
        }
        // Pages dropped last come first, although others are free: they are the hot ones.
        if self.pages.dropped.load(Ordering::Relaxed) != NONE {
            self.collect();
        }
        if count > self.free_count {
            return None;
        }
        let first = self.free;
        let mut last = first;
        for _ in 1..count {
            last = self.pages.next(last);
        }
        self.free = self.pages.next(last);
        self.free_count -= count;
        self.pages.link(last, NONE);
        Some(IoBuffer { pages: self.pages.clone(), first, last, count, len })
    }

    fn collect(&mut self) {
        // Acquire: see `give_back`.
        let mut page = self.pages.dropped.swap(NONE, Ordering::Acquire);
        while page != NONE {
            let next = self.pages.next(page);
            self.pages.link(page, self.free);
            self.free = page;
            self.free_count += 1;
            page = next;
        }
    }

    pub(crate) fn owns(&self, buffer: &IoBuffer) -> bool {
        Arc::ptr_eq(&self.pages, &buffer.pages)
    }

    pub(crate) fn gref(&self, page: u32) -> GrantRef {
        self.pages.refs.get(page as usize).copied().unwrap_or_default()
    }

    /// The page after `page` in its buffer.
    pub(crate) fn next(&self, page: u32) -> u32 {
        self.pages.next(page)
    }
}

/// Data pages of a queue's pool. They go back to it when the buffer is dropped, on any thread.
///
/// The backend can change the contents at any time: only what [`IoBuffer::read`] copied out can be checked
/// and used.
#[derive(Debug)]
pub struct IoBuffer {
    pages: Arc<Pages>,
    first: u32,
    last: u32,
    count: u32,
    len: usize,
}

impl IoBuffer {
    /// Bytes that an I/O with this buffer transfers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether that is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes there is room for.
    pub fn capacity(&self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Makes the next I/O transfer `len` bytes, or [`IoBuffer::capacity`] if that is less.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.capacity());
    }

    /// Copies into the buffer, from byte `offset` of it. Returns how many bytes there was room for.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> usize {
        self.walk(offset, from.len(), |window, range| {
            if let Some(from) = from.get(range) {
                window.write(from);
            }
        })
    }

    /// Copies out of the buffer, from byte `offset` of it. Returns how many bytes there were.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> usize {
        self.walk(offset, to.len(), |window, range| {
            if let Some(to) = to.get_mut(range) {
                window.read(to);
            }
        })
    }

    fn walk(
        &self,
        offset: usize,
        len: usize,
        mut visit: impl FnMut(&Window, std::ops::Range<usize>),
    ) -> usize {
        let len = len.min(self.len.saturating_sub(offset));
        let mut page = self.page_at(offset);
        let (mut within, mut done) = (offset % PAGE_SIZE, 0);
        while done < len {
            let part = (len - done).min(PAGE_SIZE - within);
            if let Some(window) = self.pages.window(page, within, part) {
                visit(&window, done..done + part);
            }
            done += part;
            within = 0;
            page = self.pages.next(page);
        }
        done
    }

    /// Where bytes `offset..` of the buffer lie, page by page, for a system call that fills or drains them.
    /// The pointers are valid for as long as the buffer lives.
    pub(crate) fn runs(&self, offset: usize) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        let base = self.pages.memory.base().as_ptr();
        let mut page = self.page_at(offset);
        let mut at = offset;
        std::iter::from_fn(move || {
            let left = self.len.checked_sub(at).filter(|&left| left > 0)?;
            let within = at % PAGE_SIZE;
            let len = left.min(PAGE_SIZE - within);
            let run = base.wrapping_add(page as usize * PAGE_SIZE + within);
            page = self.pages.next(page);
            at += len;
            Some((run, len))
        })
    }

    /// The start of its memory, if its pages are contiguous. As [`IoBuffer::runs`].
    #[cfg(feature = "ublk")]
    pub(crate) fn contiguous(&self) -> Option<*mut u8> {
        let mut page = self.first;
        for _ in 1..self.count {
            let next = self.pages.next(page);
            if next != page + 1 {
                return None;
            }
            page = next;
        }
        Some(self.pages.memory.base().as_ptr().wrapping_add(self.first as usize * PAGE_SIZE))
    }

    /// The page that byte `offset` is in.
    pub(crate) fn page_at(&self, offset: usize) -> u32 {
        let mut page = self.first;
        for _ in 0..offset / PAGE_SIZE {
            page = self.pages.next(page);
        }
        page
    }
}

impl Drop for IoBuffer {
    fn drop(&mut self) {
        self.pages.give_back(self.first, self.last);
    }
}
