//! The frontend's end.

use super::XenbusState::{self, *};

/// What the owner of a [`FrontendMachine`] has observed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontendEvent {
    /// The backend's `state`; `None` if missing or invalid: the device was removed.
    Backend(Option<XenbusState>),
    /// [`FrontendAction::Connect`] succeeded.
    Connected,
    /// [`FrontendAction::Offer`] or [`FrontendAction::Connect`] failed. A device that was in use starts over,
    /// as if the backend had refused; to prevent that, feed [`FrontendEvent::Close`].
    Failed,
    /// The user is done with the device.
    Close,
    /// The frontend's own directory vanished.
    DirectoryRemoved,
    /// The backend did not close in time.
    GiveUp,
}

/// What the owner of a [`FrontendMachine`] does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontendAction {
    /// Read the backend's offer, make rings and event channels, write their keys, then `state` =
    /// `Initialised`.
    Offer,
    /// Read the device's properties and start I/O, first what an earlier connection left unanswered;
    /// then feed [`FrontendEvent::Connected`] or [`FrontendEvent::Failed`].
    Connect,
    /// Write `state`.
    Publish(XenbusState),
    /// Take no new requests and wait, for a bounded time, for the responses to those in flight.
    Drain,
    /// The backend has let go: revoke rings and data, free event channels. Unanswered requests stay
    /// with the owner for the next `Connect`, or fail at [`FrontendAction::Gone`].
    Disconnect,
    /// Read `sectors` again. Returned on every observation of a backend that stays `Connected`, so it is
    /// usually unchanged.
    Resized,
    /// No more actions will follow: drop the machine.
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
/// - A backend that closes a device in use may come back (a daemon being replaced): the machine
///   closes, starts over at `Initialising`, and waits. It does the same if a later connection fails,
///   since somebody depends on the device. A backend that closes before the device was ever in use has
///   refused it, and would do so again: the machine ends.
/// - A predecessor's `state` is set to `Closed` first, so that the backend lets go of its rings.
/// - Grants are revoked only when the backend is `Closed` or starts over (XSA-396).
#[derive(Clone, Debug)]
pub struct FrontendMachine {
    link: Link,
    published: XenbusState,
    /// A predecessor's state must be closed before this frontend starts.
    inherited: bool,
    /// Whether to start over once closed.
    again: bool,
    /// The device has been connected.
    used: bool,
    closing: bool,
    ended: bool,
}

impl FrontendMachine {
    /// A machine for a frontend whose own `state` node holds `state`: `Initialising` on a new device,
    /// something else after a predecessor died.
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

    /// Whether the machine has returned [`FrontendAction::Gone`].
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes an observation and returns what to do.
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
                // Counts as refused unless it connects.
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
            // Nothing to drain: nobody will answer.
            (Closed, _) => {
                self.publish(Closed, actions);
                self.closed(actions);
            }
            // A backend that is being set up again.
            _ => {}
        }
    }

    /// Tells the backend that we are closing, and closes.
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

    /// The backend no longer holds anything of ours.
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
