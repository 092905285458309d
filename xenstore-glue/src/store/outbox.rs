use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::quota;
use crate::wire::{Errno, PAYLOAD_MAX, Reply};

/// Messages to be written to one connection. Filled by any task that changes the store, emptied
/// by the connection's task; bounded by [`quota::OUTBOX_BYTES`] and the
/// longest replies to [`quota::OUTSTANDING`] requests.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    /// Something was queued, or the outbox was closed.
    pub(super) changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    messages: Vec<Arc<[u8]>>,
    bytes: usize,
    /// The events among the messages, so that each is queued once.
    events: HashSet<Arc<[u8]>>,
    closed: bool,
}

impl Outbox {
    /// Queues the reply to a request.
    pub(super) fn reply(&self, req_id: u32, tx_id: u32, reply: &Reply) {
        let too_long = Reply::Error(Errno::E2big);
        let packet = reply.to_packet(req_id, tx_id).or_else(|_| too_long.to_packet(req_id, tx_id));
        if let Ok(packet) = packet {
            let mut message = Vec::new();
            packet.encode(&mut message);
            self.lock().push(message.into());
            self.changed.notify_one();
        }
    }

    /// Queues an event, unless an equal one is queued already. `false` if there is no room.
    pub(super) fn event(&self, event: &Reply) -> bool {
        // xenstored does not send events that are too long either.
        let Ok(packet) = event.to_packet(0, 0) else { return true };
        let mut message = Vec::new();
        packet.encode(&mut message);
        let mut queue = self.lock();
        if queue.closed || queue.events.contains(&message[..]) {
            return true;
        }
        // Replies need no such check: they are bounded by quota::OUTSTANDING.
        if queue.bytes + message.len() > quota::OUTBOX_BYTES + quota::OUTSTANDING * PAYLOAD_MAX {
            return false;
        }
        let message: Arc<[u8]> = message.into();
        queue.events.insert(Arc::clone(&message));
        queue.push(message);
        self.changed.notify_one();
        true
    }

    /// Drops the queued events.
    pub(super) fn forget_events(&self) {
        let mut queue = self.lock();
        let events = std::mem::take(&mut queue.events);
        queue.messages.retain(|message| !events.contains(message));
        queue.bytes = queue.messages.iter().map(|message| message.len()).sum();
    }

    /// Moves everything queued to `out`. `false` if the outbox is closed.
    pub(super) fn take(&self, out: &mut Vec<u8>) -> bool {
        let mut queue = self.lock();
        for message in queue.messages.drain(..) {
            out.extend_from_slice(&message);
        }
        queue.events.clear();
        queue.bytes = 0;
        !queue.closed
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Drops all queued messages and makes the connection's task end.
    pub(super) fn close(&self) {
        *self.lock() = Queue { closed: true, ..Queue::default() };
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code that holds it can panic.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn push(&mut self, message: Arc<[u8]>) {
        if !self.closed {
            self.bytes += message.len();
            self.messages.push(message);
        }
    }
}
