//! The frontend's end.

use super::XenbusState::{self, *};

/// What the owner of a [`FrontendMachine`] has observed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontendEvent {
    /// The backend's `state`; `None` when missing or absurd: the device was removed.
    Backend(Option<XenbusState>),
    /// [`FrontendAction::Connect`] succeeded.
    Connected,
    /// [`FrontendAction::Offer`] or [`FrontendAction::Connect`] failed. A device that was in use starts over,
    /// as if the backend had refused; whoever wants that no more feeds [`FrontendEvent::Close`].
    Failed,
    /// The user is done with the device.
    Close,
    /// The frontend's own directory vanished.
    DirectoryRemoved,
    /// The backend was given time to close and did not.
    GiveUp,
}

/// What the owner of a [`FrontendMachine`] does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontendAction {
    /// Read the backend's offer, make rings and event channels, write their keys, then `state` =
    /// `Initialised`.
    Offer,
    /// Read the device's properties and take up I/O, beginning with what an earlier connection left
    /// unanswered; feed [`FrontendEvent::Connected`] or [`FrontendEvent::Failed`].
    Connect,
    /// Write `state`.
    Publish(XenbusState),
    /// Take no new request and wait, within bounds, for the answers to those in flight.
    Drain,
    /// The backend has let go: revoke rings and data, free event channels. Requests without an answer
    /// stay with the owner for the next `Connect`, or fail at [`FrontendAction::Gone`].
    Disconnect,
    /// Read `sectors` again. Comes with every look at a backend that stays `Connected`, so expect it
    /// to be unchanged.
    Resized,
    /// Nothing more will come: drop the machine.
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down,
    Offered,
    Connecting,
    Up,
}

/// Decides what a frontend does about its backend.
///
/// - A backend that comes back to `InitWait` has lost our rings: disconnect and offer new ones.
/// - A backend that closes a device that was in use may come back (a daemon that is replaced):
///   the machine closes, starts over at `Initialising`, and waits. So it does if a connection comes to
///   nothing then: somebody depends on the device. One that closes before the device was ever in use has
///   refused it, and asking again would be answered the same: the machine ends.
/// - A predecessor's `state` is closed first, so that the backend lets go of its rings.
/// - Grants are revoked only when the backend is `Closed` or starts over (XSA-396).
#[derive(Clone, Debug)]
pub struct FrontendMachine {
    link: Link,
    published: XenbusState,
    /// A predecessor's state must be closed before this frontend begins.
    inherited: bool,
    /// Whether to start over once closed.
    again: bool,
    /// It was connected.
    used: bool,
    closing: bool,
    ended: bool,
}

impl FrontendMachine {
    /// A machine for a frontend whose own `state` node holds `state`: `Initialising` on a device that
    /// is new, something else where a predecessor died.
    pub fn new(state: Option<XenbusState>) -> Self {
        let published = state.unwrap_or(Closed);
        Self {
            link: Link::Down,
            published,
            inherited: published != Initialising,
            again: true,
            used: false,
            closing: false,
            ended: false,
        }
    }

    /// Whether I/O can be done.
    pub fn is_connected(&self) -> bool {
        self.link == Link::Up && !self.closing
    }

    /// Whether the machine has answered [`FrontendAction::Gone`].
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes an observation and says what to do.
    pub fn handle(&mut self, event: FrontendEvent) -> Vec<FrontendAction> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        match event {
            FrontendEvent::Backend(Some(state)) => self.observe(state, &mut actions),
            FrontendEvent::Backend(None) | FrontendEvent::GiveUp => {
                self.disconnect(&mut actions);
                self.publish(Closed, &mut actions);
                self.end(&mut actions);
            }
            FrontendEvent::DirectoryRemoved => {
                self.disconnect(&mut actions);
                self.end(&mut actions);
            }
            FrontendEvent::Connected => {
                if self.link == Link::Connecting {
                    self.link = Link::Up;
                    self.used = true;
                    self.again = true;
                    self.publish(Connected, &mut actions);
                }
            }
            FrontendEvent::Failed => {
                if !self.closing {
                    self.again = self.used;
                }
                self.close(&mut actions);
            }
            FrontendEvent::Close => {
                self.again = false;
                self.close(&mut actions);
            }
        }
        actions
    }

    fn observe(&mut self, backend: XenbusState, actions: &mut Vec<FrontendAction>) {
        if self.closing || self.inherited {
            self.publish(Closed, actions);
            if backend == Closed {
                self.closed(actions);
            }
            return;
        }
        match (backend, self.link) {
            (InitWait, Link::Offered) => {}
            (InitWait, _) => {
                self.disconnect(actions);
                self.link = Link::Offered;
                self.published = Initialised;
                // Refused unless it connects.
                self.again = self.used;
                actions.push(FrontendAction::Offer);
            }
            (Connected, Link::Offered) => {
                self.link = Link::Connecting;
                actions.push(FrontendAction::Connect);
            }
            (Connected, Link::Up) => actions.push(FrontendAction::Resized),
            // Connected to a predecessor of ours.
            (Connected, Link::Down) => self.close(actions),
            (Closing, _) => self.close(actions),
            (Closed, Link::Down) => {}
            // Nothing to drain: nobody answers any more.
            (Closed, _) => {
                self.publish(Closed, actions);
                self.closed(actions);
            }
            // A backend that is being set up anew.
            _ => {}
        }
    }

    /// Tells the backend that we finish, and finishes.
    fn close(&mut self, actions: &mut Vec<FrontendAction>) {
        if self.closing {
            return;
        }
        self.closing = true;
        if self.published != Closed {
            self.publish(Closing, actions);
        }
        if self.link == Link::Up {
            actions.push(FrontendAction::Drain);
        }
        self.publish(Closed, actions);
    }

    /// The backend holds nothing of ours any more.
    fn closed(&mut self, actions: &mut Vec<FrontendAction>) {
        self.disconnect(actions);
        self.closing = false;
        self.inherited = false;
        if self.again {
            self.publish(Initialising, actions);
        } else {
            self.end(actions);
        }
    }

    fn publish(&mut self, state: XenbusState, actions: &mut Vec<FrontendAction>) {
        if self.published != state {
            self.published = state;
            actions.push(FrontendAction::Publish(state));
        }
    }

    fn disconnect(&mut self, actions: &mut Vec<FrontendAction>) {
        if self.link != Link::Down {
            self.link = Link::Down;
            actions.push(FrontendAction::Disconnect);
        }
    }

    fn end(&mut self, actions: &mut Vec<FrontendAction>) {
        self.ended = true;
        actions.push(FrontendAction::Gone);
    }
}
