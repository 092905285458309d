//! Buffers that grant copies go through.

use ring_proto::SharedMemory;
use ring_proto::abi::PAGE_SIZE;
use std::ops::Range;
use std::sync::Arc;
use xen_platform::LocalRegion;

/// Indirect requests that a ring can have in flight at a time when it copies. Each takes up to
/// 1 MiB; with more of them a guest could make us hold a gigabyte (XSA-300). Eight keep any disk busy.
const INDIRECT_SLOTS: usize = 8;

/// Page-aligned buffers, of two sizes: one for each direct request the ring can hold, and a few for indirect ones.
pub(super) struct BouncePool {
    region: Arc<LocalRegion>,
    direct: Class,
    indirect: Class,
}

/// Buffers of one size.
struct Class {
    /// Offset of the first in the region.
    base: usize,
    /// Bytes of each.
    size: usize,
    free: Vec<u16>,
}

impl Class {
    fn new(base: usize, pages: usize, count: usize) -> Self {
        Self { base, size: pages * PAGE_SIZE, free: (0..count as u16).rev().collect() }
    }
    fn take(&mut self) -> Option<usize> {
        self.free.pop().map(|n| self.base + usize::from(n) * self.size)
    }
    fn give(&mut self, offset: usize) {
        self.free.push(((offset - self.base) / self.size) as u16);
    }
}

impl BouncePool {
    pub(super) fn new(
        slots: usize,
        direct_pages: usize,
        indirect_pages: usize,
    ) -> xen_platform::Result<Self> {
        let indirect_slots = if indirect_pages > direct_pages { INDIRECT_SLOTS } else { 0 };
        let direct = Class::new(0, direct_pages, slots);
        let indirect = Class::new(slots * direct.size, indirect_pages, indirect_slots);
        let region = LocalRegion::new(slots * direct_pages + indirect_slots * indirect_pages)?;
        Ok(Self { region: Arc::new(region), direct, indirect })
    }

    pub(super) fn region(&self) -> &Arc<LocalRegion> {
        &self.region
    }

    /// A buffer for `bytes`, as a range of the region; `None` while all that are large enough are in use.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Range<usize>> {
        let class = if bytes <= self.direct.size { &mut self.direct } else { &mut self.indirect };
        debug_assert!(bytes <= class.size, "limits bound a request to the larger class");
        class.take().map(|offset| offset..offset + bytes)
    }

    pub(super) fn give(&mut self, range: &Range<usize>) {
        let class =
            if range.start < self.indirect.base { &mut self.direct } else { &mut self.indirect };
        class.give(range.start);
    }

    pub(super) fn address(&self, range: &Range<usize>) -> *mut u8 {
        self.region.base().as_ptr().wrapping_add(range.start)
    }
}
