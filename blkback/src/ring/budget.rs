//! What a turn may cost the others: the rings that share its thread, and the frontend, which waits for answers.

use ring_proto::abi::SECTOR_SIZE;

/// Bytes that the requests of a round read or write at the most, but for those of its last
/// request, where data is moved at all: the answer to a long one need not wait for fifteen others.
const MAX_BYTES: u64 = 512 * SECTOR_SIZE as u64;
/// Pages that a turn maps, or unmaps when requests end, at the most, but for those of its last request: the
/// rings that share the thread wait for all of them. (Room for new pages is made by as many unmapped.)
const MAX_MAPS: usize = 256;

/// What is left of it. The last request may take more.
pub(super) struct Budget {
    bytes: u64,
    maps: usize,
}

impl Budget {
    /// For a disk that moves data, or not.
    pub(super) fn new(moves_data: bool) -> Self {
        Self { bytes: if moves_data { MAX_BYTES } else { u64::MAX }, maps: MAX_MAPS }
    }

    #[inline]
    pub(super) fn is_spent(&self) -> bool {
        self.bytes == 0 || self.maps == 0
    }

    /// Data is moved.
    #[inline]
    pub(super) fn moves(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Pages are mapped, or that was tried, or unmapped.
    #[inline]
    pub(super) fn maps(&mut self, pages: usize) {
        self.maps = self.maps.saturating_sub(pages);
    }
}
