//! The states of xenbus, and the two machines that walk through them.
//!
//! Each end of a split driver writes its own `state` and watches the other's. A watch says only that
//! something changed: whoever reads sees the *current* value, so states in between are missed and
//! values are seen twice. Both machines are therefore fed what was read, in any order and as often as
//! it comes, keep the last of it, and answer with what to do now; feeding the same again yields nothing.
//!
//! Neither machine does I/O. The owner carries out a list of actions in order, one list after the
//! other, and feeds the outcome of a connect back before anything else.

mod backend;
mod frontend;

pub use backend::{BackendAction, BackendEvent, BackendMachine, StalePeer};
pub use frontend::{FrontendAction, FrontendEvent, FrontendMachine};

use std::fmt;

/// `enum xenbus_state` of Xen's public/io/xenbus.h.
///
/// `XenbusStateUnknown` (0) is not here: it is what a reader sees when there is no state, and
/// [`XenbusState::parse`] says so by `None`.
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
    /// This end is about to close, or (written by the toolstack) is asked to.
    Closing = 5,
    /// This end holds nothing of the other's.
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
    /// is `None` and means what a missing node means: there is no such end (any more).
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
