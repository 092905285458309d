//! Ring pages for tests: a file, so that another process can map it too.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test takes what it needs, and fails by panicking"
)]

use ring_proto::abi::PAGE_SIZE;
use ring_proto::{Abi, RingLayout, RingPages, SharedMemory};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

pub(crate) const LAYOUTS: [RingLayout; 3] =
    [RingLayout::Union(Abi::X86_64), RingLayout::Union(Abi::X86_32), RingLayout::Split];

/// Pages of an unnamed file, mapped shared.
pub(crate) struct Pages {
    file: File,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is touched only through atomics, from any thread, until `drop`.
unsafe impl Send for Pages {}
// SAFETY: as for Send.
unsafe impl Sync for Pages {}
// SAFETY: mmap's result is aligned to a page, `len` bytes long, and lives as long as the value.
unsafe impl SharedMemory for Pages {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn len(&self) -> usize {
        self.len
    }
}

impl Pages {
    pub(crate) fn new(pages: usize) -> Arc<Self> {
        let len = pages * PAGE_SIZE;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"ring".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor is new and ours.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64).unwrap();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd, 0) };
        assert_ne!(base, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Arc::new(Self { file, base: NonNull::new(base.cast()).unwrap(), len })
    }

    /// Where another process of the same user can open the file.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// All of the pages, as a peer sees them.
    pub(crate) fn words(&self) -> &[AtomicU32] {
        // SAFETY: `len` bytes, aligned, alive as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.cast().as_ptr(), self.len / 4) }
    }

    pub(crate) fn set(&self, word: usize, value: u32) {
        self.words()[word].store(value, Relaxed);
    }

    pub(crate) fn get(&self, word: usize) -> u32 {
        self.words()[word].load(Relaxed)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Pages for a ring; the second set is there for the split layout only.
pub(crate) fn ring_pages(
    layout: RingLayout,
    order: u8,
) -> (RingPages, Arc<Pages>, Option<Arc<Pages>>) {
    let (first, second) = layout.pages(order);
    let requests = Pages::new(first);
    match layout {
        RingLayout::Union(_) => (RingPages::Union(requests.clone()), requests, None),
        RingLayout::Split => {
            let control = Pages::new(second);
            (RingPages::Split(requests.clone(), control.clone()), requests, Some(control))
        }
    }
}
