//! The states of xenbus, and the state machines of the two ends.
//!
//! Each end of a split driver writes its own `state` and watches the other's. A watch says only that
//! something changed, and a reader sees the *current* value: states in between are missed, and values
//! are seen twice. So both machines are fed whatever was read, in any order and any number of times.
//! They keep the latest, and return what to do now; feeding the same value again yields nothing.
//!
//! Neither machine does I/O. The owner carries out each list of actions in order before the next, and
//! feeds back the outcome of a connect before anything else.

mod backend;
mod frontend;

pub use backend::{BackendAction, BackendEvent, BackendMachine, StalePeer};
pub use frontend::{FrontendAction, FrontendEvent, FrontendMachine};

use std::fmt;

/// `enum xenbus_state` of Xen's public/io/xenbus.h.
///
/// `XenbusStateUnknown` (0) is not here: it is what a reader sees when there is no state, for which
/// [`XenbusState::parse`] returns `None`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum XenbusState {
    /// Written by the toolstack, and by a frontend that starts over.
    Initialising = 1,
    /// The backend has written what it offers and waits for the frontend's keys.
    InitWait = 2,
    /// The frontend has written its rings and event channels.
    Initialised = 3,
    /// This end can do I/O.
    Connected = 4,
    /// This end is about to close, or (if written by the toolstack) is asked to.
    Closing = 5,
    /// This end holds no resources of the other end.
    Closed = 6,
    /// Unused by block devices.
    Reconfiguring = 7,
    /// Unused by block devices.
    Reconfigured = 8,
}

impl XenbusState {
    const ALL: [Self; 8] = [
        Self::Initialising,
        Self::InitWait,
        Self::Initialised,
        Self::Connected,
        Self::Closing,
        Self::Closed,
        Self::Reconfiguring,
        Self::Reconfigured,
    ];

    /// Reads the value of a `state` node: one digit, 1 to 8. Anything else (0, words, an empty node)
    /// is `None`, which means the same as a missing node: there is no such end (any more).
    pub fn parse(value: &[u8]) -> Option<Self> {
        match value {
            [digit] => Self::ALL.into_iter().find(|state| b'0' + *state as u8 == *digit),
            _ => None,
        }
    }

    /// What to write to a `state` node.
    pub fn value(self) -> String {
        (self as u8).to_string()
    }
}

impl fmt::Display for XenbusState {
    /// The name and the number, as in `InitWait (2)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} ({})", *self as u8)
    }
}

#[cfg(test)]
mod tests;
