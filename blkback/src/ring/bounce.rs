//! Bounce buffers, for data that the device does not read or write in the guest's pages themselves.

use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::ops::Range;
use std::sync::Arc;
use xen_platform::LocalRegion;

/// Buffers for requests larger than a page: pages of each, and their number. Each ring has so many, so
/// no guest can make us hold more than 7.4 MiB for one, and a page a slot (XSA-300); that keeps any disk busy.
const LARGER: [(usize, usize); 3] = [
    // A direct request.
    (11, 32),
    // The most that Linux's frontend asks for, 128 KiB.
    (32, 16),
    // What blkif.h allows.
    (256, 4),
];
/// One-page buffers registered with the kernel: as many as most rings have in flight. Registering
/// allocates the memory at once. For larger buffers the kernel's page look-up is cheap compared to the
/// copying.
const REGISTERED: usize = 64;

/// Page-aligned buffers: one page for each request that the ring can hold, and some of larger sizes.
pub(super) struct BouncePool {
    region: Arc<LocalRegion>,
    /// From small to large, in the order of the region.
    classes: Vec<Class>,
}

/// Buffers of one size.
struct Class {
    /// Where they are in the region, in bytes.
    range: Range<usize>,
    /// Bytes of each.
    size: usize,
    free: Vec<u16>,
}

impl Class {
    fn new(base: usize, pages: usize, count: usize) -> Self {
        let size = pages * PAGE_SIZE;
        // Taken from the end, so the first are used most, and the others perhaps never touched.
        Self { range: base..base + size * count, size, free: (0..count as u16).rev().collect() }
    }
}

impl BouncePool {
    /// For a ring of `slots` requests, each of at most `pages` pages.
    pub(super) fn new(slots: usize, pages: usize) -> xen_platform::Result<Self> {
        let mut classes = vec![Class::new(0, 1, slots)];
        let mut end = classes[0].range.end;
        for (size, count) in LARGER {
            if classes.last().is_some_and(|class| class.size >= pages * PAGE_SIZE) {
                break;
            }
            let class = Class::new(end, size.min(pages), count.min(slots));
            end = class.range.end;
            classes.push(class);
        }
        Ok(Self { region: Arc::new(LocalRegion::new(end / PAGE_SIZE)?), classes })
    }

    pub(super) fn region(&self) -> &Arc<LocalRegion> {
        &self.region
    }

    /// How many bytes at the start of the region are worth registering.
    pub(super) fn registered(&self) -> usize {
        self.classes[0].range.end.min(REGISTERED * PAGE_SIZE)
    }

    /// A buffer for `bytes`, as a range of the region; `None` while all large enough buffers are in use.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Range<usize>> {
        let mut fitting = self.classes.iter_mut().filter(|class| bytes <= class.size);
        fitting.find_map(|class| {
            let at = class.range.start + usize::from(class.free.pop()?) * class.size;
            Some(at..at + bytes)
        })
    }

    pub(super) fn give(&mut self, range: &Range<usize>) {
        let class = self.classes.iter_mut().find(|class| class.range.contains(&range.start));
        debug_assert!(class.is_some(), "what was taken is given back");
        if let Some(class) = class {
            class.free.push(((range.start - class.range.start) / class.size) as u16);
        }
    }

    pub(super) fn address(&self, range: &Range<usize>) -> *mut u8 {
        self.region.base().as_ptr().wrapping_add(range.start)
    }

    /// Gives the unregistered memory of classes that are not in use back to the kernel.
    pub(super) fn purge(&mut self) {
        let registered = self.registered();
        for Class { range, size, free } in &self.classes {
            if free.len() == range.len() / size {
                // Cannot fail for a range within the region.
                let first = range.start.max(registered);
                let _ = self.region.release(first / PAGE_SIZE..range.end / PAGE_SIZE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring_proto::abi::MAX_INDIRECT_SEGMENTS;

    #[test]
    fn buffers_are_apart_and_come_back() {
        for (slots, pages) in [(32, 11), (32, MAX_INDIRECT_SEGMENTS), (1024, 40), (1, 1)] {
            let mut pool = BouncePool::new(slots, pages).expect("memory");
            for bytes in [512, PAGE_SIZE, PAGE_SIZE + 512, 11 * PAGE_SIZE, pages * PAGE_SIZE] {
                let bytes = bytes.min(pages * PAGE_SIZE);
                let mut taken: Vec<_> = std::iter::from_fn(|| pool.take(bytes)).collect();
                assert!(!taken.is_empty(), "{bytes} bytes of {pages} pages");
                taken.sort_by_key(|range| range.start);
                assert!(taken.windows(2).all(|pair| pair[0].end <= pair[1].start));
                assert!(taken.last().is_some_and(|range| range.end <= pool.region.len()));
                if bytes <= PAGE_SIZE {
                    assert!(taken.len() >= slots, "each request that fits a page has a buffer");
                }
                taken.iter().for_each(|range| pool.give(range));
            }
            assert!(pool.registered() <= pool.region.len());
            pool.purge();
        }
    }
}
