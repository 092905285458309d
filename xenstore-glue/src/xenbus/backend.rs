//! The backend's end.

use super::XenbusState::{self, *};

/// What to do about a frontend that is `Connected` to a backend process that has died.
///
/// The owner decides from the frontend's directory, before it makes the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StalePeer {
    /// Go to `InitWait` and wait until the frontend offers new rings. For frontends that reissue the
    /// requests in flight, as [`super::FrontendMachine`] does.
    Restart,
    /// Map the rings named in xenstore and resume at `rsp_prod`. For Linux's frontend, which ignores
    /// `InitWait` once it is connected (`blkback_changed` in xen-blkfront.c).
    Attach,
}

/// What the owner of a [`BackendMachine`] has observed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendEvent {
    /// The frontend's `state`; `None` if missing or invalid, which counts as `Closed`: a forced
    /// destroy deletes the frontend's directory.
    Frontend(Option<XenbusState>),
    /// The backend's own `online` node; if missing, `false`, as in Linux (`xenbus_dev_is_online`).
    Online(bool),
    /// The keys of a connected frontend are no longer those it was connected with: it started over
    /// between two reads of its state.
    Rekeyed,
    /// The backend's own directory vanished.
    DirectoryRemoved,
    /// The storage can be used. If the directory has a `script`, this must not come before
    /// `hotplug-status`=`connected`: until then the toolstack may still be waiting to see `InitWait`.
    StorageReady,
    /// The storage cannot be used (any more).
    StorageFailed,
    /// The size of the storage changed.
    Resized,
    /// [`BackendAction::Connect`] succeeded.
    Connected,
    /// [`BackendAction::Connect`] failed; the owner has undone what it did and written `error`.
    ConnectFailed,
    /// The device can no longer be served, whatever the frontend does.
    GiveUp,
}

/// What the owner of a [`BackendMachine`] does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendAction {
    /// Write the offer, then `state` = `InitWait`.
    Advertise,
    /// Read the frontend's keys, map its rings, bind its event channels, write the device's properties;
    /// then feed [`BackendEvent::Connected`] or [`BackendEvent::ConnectFailed`].
    Connect,
    /// Write `state`.
    Publish(XenbusState),
    /// Write `sectors`, then the same `state` again, which is how a frontend learns of a new size.
    Resize,
    /// Stop the rings, unmap, unbind. Also ends a connect in progress; do not feed its outcome then.
    Disconnect,
    /// Remove the backend's directory (in a transaction that checks that `online` is still 0: the
    /// toolstack may be attaching the same device again) and drop the machine.
    Retire,
    /// Drop the machine and leave xenstore alone.
    Forget,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down,
    Connecting,
    Up,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Storage {
    Opening,
    Ready,
    Failed,
}

/// Decides what a backend does about its frontend, its toolstack and its storage.
///
/// - `Advertise` needs no storage: under xl the script that finds it runs after `InitWait`.
/// - A frontend seen at `Initialising` is not connected until it is seen to have offered its rings,
///   so `InitWait` lasts at least until the frontend answers.
/// - `Initialised` offers rings. Some frontends (those of OVMF and Mini-OS, and so of pv-grub and stub
///   domains) go to `Connected` at once and wait for us; as in Linux's backend, that counts the same.
/// - `Connect` is never repeated without a `Disconnect` in between (XSA-350).
/// - The link stays up while the frontend is `Closing`, however long that takes, and is taken over from
///   a predecessor in that state, too: Linux goes on with I/O until the last user closes. Linux's
///   backend has no time-out either; the toolstack has one, and can remove the directory by force.
/// - After `Retire` or `Forget` the machine returns no more actions.
#[derive(Clone, Debug)]
pub struct BackendMachine {
    stale: StalePeer,
    /// The latest observations; nothing happens before both are known.
    frontend: Option<XenbusState>,
    online: Option<bool>,
    storage: Storage,
    link: Link,
    published: XenbusState,
    /// We have acted already, so rings in xenstore are no longer a predecessor's.
    begun: bool,
    /// We gave up on this frontend until it starts over.
    refused: bool,
    ended: bool,
}

impl BackendMachine {
    /// A machine that has seen nothing and published nothing.
    pub fn new(stale: StalePeer) -> Self {
        Self {
            stale,
            frontend: None,
            online: None,
            storage: Storage::Opening,
            link: Link::Down,
            published: Initialising,
            begun: false,
            refused: false,
            ended: false,
        }
    }

    /// The state that this end last asked its owner to publish.
    pub fn state(&self) -> XenbusState {
        self.published
    }

    /// Whether rings are mapped.
    pub fn is_connected(&self) -> bool {
        self.link == Link::Up
    }

    /// Whether a [`BackendAction::Connect`] is for rings that a predecessor served: we have not
    /// advertised, so they cannot be an answer to us.
    pub fn takes_over(&self) -> bool {
        self.published == Initialising
    }

    /// Whether the machine has returned [`BackendAction::Retire`] or [`BackendAction::Forget`].
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes an observation and returns what to do.
    pub fn handle(&mut self, event: BackendEvent) -> Vec<BackendAction> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        let rekeyed = event == BackendEvent::Rekeyed && self.link == Link::Up;
        match event {
            BackendEvent::Frontend(state) => self.observe(state.unwrap_or(Closed), &mut actions),
            BackendEvent::Online(online) => {
                // Toolstacks overwrite our `state` with `Closing` in the same transaction, and then
                // wait for `Closed`: whatever we published must be published again.
                if !online && self.online == Some(true) {
                    self.published = Initialising;
                }
                self.online = Some(online);
            }
            BackendEvent::Rekeyed if rekeyed => self.disconnect(&mut actions),
            BackendEvent::Rekeyed => {}
            BackendEvent::DirectoryRemoved => {
                self.disconnect(&mut actions);
                self.end(BackendAction::Forget, &mut actions);
            }
            BackendEvent::StorageReady => self.storage = Storage::Ready,
            BackendEvent::StorageFailed => self.storage = Storage::Failed,
            BackendEvent::Resized if self.link == Link::Up && self.published == Connected => {
                actions.push(BackendAction::Resize);
            }
            BackendEvent::Resized => {}
            BackendEvent::Connected if self.link == Link::Connecting => self.link = Link::Up,
            BackendEvent::ConnectFailed if self.link == Link::Connecting => {
                self.link = Link::Down;
                self.refused = true;
            }
            BackendEvent::Connected | BackendEvent::ConnectFailed => {}
            BackendEvent::GiveUp => {
                self.refused = true;
                self.close(&mut actions);
            }
        }
        self.decide(rekeyed, &mut actions);
        actions
    }

    fn observe(&mut self, frontend: XenbusState, actions: &mut Vec<BackendAction>) {
        let frontend =
            if frontend == Connected && self.is_offered() { Initialised } else { frontend };
        // Back at `Initialised` from anywhere else: new rings, and we missed the states between.
        if frontend == Initialised && self.frontend != Some(Initialised) {
            self.disconnect(actions);
        }
        if matches!(frontend, Closed | Initialising | InitWait) {
            self.refused = false;
        }
        self.frontend = Some(frontend);
    }

    /// Whether a frontend that is now `Connected` must have offered rings: it was not connected before,
    /// and we have served none since.
    fn is_offered(&self) -> bool {
        let was_not = matches!(self.frontend, Some(Closed | Initialising | InitWait | Initialised));
        self.begun && self.link == Link::Down && was_not
    }

    fn decide(&mut self, rekeyed: bool, actions: &mut Vec<BackendAction>) {
        let (Some(frontend), Some(online)) = (self.frontend, self.online) else { return };
        if self.ended {
            return;
        }
        let stop = self.refused || !online || self.storage == Storage::Failed;
        match frontend {
            Closed => self.close(actions),
            // A frontend that never started has nothing to finish.
            Initialising | InitWait if stop => self.close(actions),
            // A predecessor's frontend, which is served until it closes, even if it is being detached.
            Connected | Closing if self.takes_up() => self.attach(actions),
            _ if stop || frontend == Closing => {
                if self.published != Closed {
                    self.publish(Closing, actions);
                }
            }
            Initialising | InitWait => {
                self.disconnect(actions);
                self.advertise(actions);
            }
            _ => match self.link {
                Link::Connecting => {}
                Link::Up if self.published == Closing && frontend != Initialised => {}
                Link::Up => self.publish(Connected, actions),
                Link::Down if frontend == Initialised || rekeyed => self.connect(actions),
                // Connected, but not to us.
                Link::Down if self.published == Closing => {}
                Link::Down => self.advertise(actions),
            },
        }
    }

    /// Whether to take over the rings of a connected frontend as they are, now or once the storage is
    /// ready.
    fn takes_up(&self) -> bool {
        let begins = !self.begun || self.link == Link::Connecting && self.takes_over();
        begins
            && !self.refused
            && self.stale == StalePeer::Attach
            && self.storage != Storage::Failed
    }

    fn connect(&mut self, actions: &mut Vec<BackendAction>) {
        self.advertise(actions);
        self.attach(actions);
    }

    fn attach(&mut self, actions: &mut Vec<BackendAction>) {
        if self.storage == Storage::Ready && self.link == Link::Down {
            self.link = Link::Connecting;
            self.begun = true;
            actions.push(BackendAction::Connect);
        }
    }

    fn advertise(&mut self, actions: &mut Vec<BackendAction>) {
        if self.published != InitWait {
            self.published = InitWait;
            self.begun = true;
            actions.push(BackendAction::Advertise);
        }
    }

    fn publish(&mut self, state: XenbusState, actions: &mut Vec<BackendAction>) {
        if self.published != state {
            self.published = state;
            self.begun = true;
            actions.push(BackendAction::Publish(state));
        }
    }

    fn disconnect(&mut self, actions: &mut Vec<BackendAction>) {
        if self.link != Link::Down {
            self.link = Link::Down;
            actions.push(BackendAction::Disconnect);
        }
    }

    /// Lets go of the frontend, and of the device if it has been detached.
    fn close(&mut self, actions: &mut Vec<BackendAction>) {
        self.disconnect(actions);
        self.publish(Closed, actions);
        if self.online == Some(false) {
            self.end(BackendAction::Retire, actions);
        }
    }

    fn end(&mut self, how: BackendAction, actions: &mut Vec<BackendAction>) {
        self.ended = true;
        actions.push(how);
    }
}
