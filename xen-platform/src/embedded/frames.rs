//! Which frames of a domain are free.

use std::collections::BTreeMap;

/// Runs of free frames: their lengths, by first frame.
#[derive(Debug)]
pub(super) struct FrameAllocator {
    free: BTreeMap<u32, u32>,
    total: u32,
}

impl FrameAllocator {
    pub(super) fn new(total: u32) -> Self {
        Self { free: BTreeMap::from([(0, total)]), total }
    }

    pub(super) fn total(&self) -> usize {
        self.total as usize
    }

    /// `count` frames, consecutive if possible, or `None` if there are not enough.
    pub(super) fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        let mut missing = u32::try_from(count).ok()?;
        let available: u64 = self.free.values().map(|&len| u64::from(len)).sum();
        if available < u64::from(missing) {
            return None;
        }
        let mut frames = Vec::with_capacity(count);
        let fits = self.free.iter().find(|&(_, &len)| len >= missing).map(|(&first, _)| first);
        while missing > 0 {
            let run = fits.or_else(|| self.free.keys().next().copied())?;
            let len = self.free.remove(&run)?;
            let taken = len.min(missing);
            frames.extend(run..run + taken);
            if taken < len {
                self.free.insert(run + taken, len - taken);
            }
            missing -= taken;
        }
        Some(frames)
    }

    /// Gives `frames` back, which must have come from [`FrameAllocator::allocate`].
    pub(super) fn release(&mut self, frames: &[u32]) {
        for &frame in frames {
            let mut first = frame;
            let mut len = self.free.remove(&(frame + 1)).unwrap_or(0) + 1;
            if let Some((&before, &before_len)) = self.free.range(..frame).next_back()
                && before + before_len == frame
            {
                first = before;
                len += before_len;
            }
            self.free.insert(first, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_again_and_no_frame_is_given_twice() {
        let mut frames = FrameAllocator::new(8);
        let a = frames.allocate(3).expect("free");
        let b = frames.allocate(3).expect("free");
        assert_eq!((a.as_slice(), b.as_slice()), (&[0, 1, 2][..], &[3, 4, 5][..]));
        assert!(frames.allocate(3).is_none());
        frames.release(&a);
        // Two holes: neither is long enough alone.
        let c = frames.allocate(5).expect("enough in two runs");
        assert_eq!(c, [0, 1, 2, 6, 7]);
        frames.release(&b);
        frames.release(&c);
        assert_eq!(frames.free, BTreeMap::from([(0, 8)]));
    }
}
