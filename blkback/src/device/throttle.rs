//! Limits what one device writes to the log, since its guest decides how often things happen.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::warn;

/// Messages at once: as many as a device logs from attach to detach when all is well.
const BURST: u32 = 10;
/// The time between further messages: what a log can take from a host full of hostile guests.
const REFILL: Duration = Duration::from_secs(1);

/// A token bucket for messages that a guest can cause at will.
#[derive(Debug)]
pub(super) struct Throttle(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// When the last token was added.
    since: Instant,
    suppressed: u64,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Bucket { tokens: BURST, since: Instant::now(), suppressed: 0 }))
    }

    /// Whether a message may be written now. If so, first logs how many were suppressed before it.
    pub(super) fn admits(&self) -> bool {
        // No code that holds it can panic.
        let admitted = self.0.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if let Some(suppressed @ 1..) = admitted {
            warn!("{suppressed} more messages suppressed");
        }
        admitted.is_some()
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let bucket = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        if bucket.suppressed > 0 {
            warn!("{} more messages suppressed", bucket.suppressed);
        }
    }
}

impl Bucket {
    /// Takes a token, if there is one, and returns the number of messages suppressed before.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let elapsed = now.saturating_duration_since(self.since).as_secs() / REFILL.as_secs();
        if let Ok(earned @ 1..) = u32::try_from(elapsed) {
            self.tokens = BURST.min(self.tokens.saturating_add(earned));
            self.since += REFILL * earned;
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                Some(std::mem::take(&mut self.suppressed))
            }
            None => {
                self.suppressed += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_message_a_second_and_counted_exactly() {
        let start = Instant::now();
        let mut bucket = Bucket { tokens: BURST, since: start, suppressed: 0 };
        let (mut written, mut reported) = (0, 0);
        const MESSAGES: u32 = 100_000;
        for message in 0..MESSAGES {
            // A thousand per second.
            if let Some(suppressed) = bucket.take(start + Duration::from_millis(message.into())) {
                written += 1;
                reported += suppressed;
            }
        }
        // In the 99.999 seconds after the first message, 99 tokens were added.
        assert_eq!(written, u64::from(BURST) + 99);
        assert_eq!(written + reported + bucket.suppressed, u64::from(MESSAGES));
        // Silence fills the bucket, and no further.
        let later = start + Duration::from_secs(1_000_000);
        let admitted = (0..2 * BURST).filter(|_| bucket.take(later).is_some()).count();
        assert_eq!(admitted, BURST as usize);
    }
}
