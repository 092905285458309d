//! What one turn of a ring may cost the others: rings on the same thread, and the waiting frontend.

use ring_proto::abi::SECTOR_SIZE;

/// The most bytes that the requests of a round may read or write, not counting the last request, if
/// data is moved at all: the answer to a long request need not wait for fifteen others.
const MAX_BYTES: u64 = 512 * SECTOR_SIZE as u64;
/// The most pages that a turn may map, or unmap when requests end, not counting its last request: the
/// rings on the same thread wait for all of them. (Room for new pages is made by unmapping as many.)
const MAX_MAPS: usize = 256;

/// What is left of a turn. The last request may exceed it.
pub(super) struct Budget {
    bytes: u64,
    maps: usize,
}

impl Budget {
    /// For a disk that moves data or not.
    pub(super) fn new(moves_data: bool) -> Self {
        Self { bytes: if moves_data { MAX_BYTES } else { u64::MAX }, maps: MAX_MAPS }
    }

    #[inline]
    pub(super) fn is_spent(&self) -> bool {
        self.bytes == 0 || self.maps == 0
    }

    /// Charges for data moved.
    #[inline]
    pub(super) fn moves(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Charges for pages mapped (even if that failed) or unmapped.
    #[inline]
    pub(super) fn maps(&mut self, pages: usize) {
        self.maps = self.maps.saturating_sub(pages);
    }
}
