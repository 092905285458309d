use super::XenbusState::*;
use super::*;
use proptest::prelude::*;

type B = BackendEvent;
type F = FrontendEvent;

/// A backend that has advertised to a new frontend and whose storage is ready.
fn waiting() -> BackendMachine {
    let mut back = BackendMachine::new(StalePeer::Restart);
    assert_eq!(back.handle(B::Frontend(Some(Initialising))), []);
    assert_eq!(back.handle(B::Online(true)), [BackendAction::Advertise]);
    assert_eq!(back.handle(B::StorageReady), []);
    back
}

fn connected() -> BackendMachine {
    let mut back = waiting();
    assert_eq!(back.handle(B::Frontend(Some(Initialised))), [BackendAction::Connect]);
    assert_eq!(back.handle(B::Connected), [BackendAction::Publish(Connected)]);
    assert_eq!(back.handle(B::Frontend(Some(Connected))), []);
    back
}

#[test]
fn only_single_digits_from_1_to_8_are_states() {
    for state in XenbusState::ALL {
        assert_eq!(XenbusState::parse(state.value().as_bytes()), Some(state));
    }
    for absurd in [&b""[..], b"0", b"9", b"04", b"4\n", b"-1", b"four", b"\xff", b"4294967300"] {
        assert_eq!(XenbusState::parse(absurd), None);
    }
}

#[test]
fn storage_may_come_after_the_frontend() {
    let mut back = BackendMachine::new(StalePeer::Restart);
    back.handle(B::Online(true));
    assert_eq!(back.handle(B::Frontend(Some(Initialising))), [BackendAction::Advertise]);
    assert_eq!(back.handle(B::Frontend(Some(Initialised))), []);
    assert_eq!(back.handle(B::StorageReady), [BackendAction::Connect]);
}

/// OVMF's and Mini-OS's frontends: they wait for a `Connected` backend, and are `Connected` themselves.
#[test]
fn a_frontend_may_say_connected_at_once() {
    let serves = [BackendAction::Connect];
    for stale in [StalePeer::Attach, StalePeer::Restart] {
        let mut back = BackendMachine::new(stale);
        back.handle(B::Frontend(Some(Initialising)));
        back.handle(B::Online(true));
        // The disk may take its time.
        assert_eq!(back.handle(B::Frontend(Some(Connected))), []);
        assert_eq!(back.handle(B::Frontend(Some(Connected))), []);
        assert_eq!(back.handle(B::StorageReady), serves);
        assert_eq!(back.handle(B::Connected), [BackendAction::Publish(Connected)]);
        assert_eq!(back.handle(B::Frontend(Some(Connected))), []);
        // The firmware lets go of the disk, and the kernel takes it.
        back.handle(B::Frontend(Some(Closed)));
        assert_eq!(back.handle(B::Frontend(Some(Initialising))), [BackendAction::Advertise]);
        assert_eq!(back.handle(B::Frontend(Some(Initialised))), serves);
    }
}

#[test]
fn a_rebooting_guest_finds_initwait_again() {
    let mut back = connected();
    assert_eq!(back.handle(B::Frontend(Some(Closing))), [BackendAction::Publish(Closing)]);
    assert!(back.is_connected(), "Linux goes on with I/O while Closing");
    let closed = [BackendAction::Disconnect, BackendAction::Publish(Closed)];
    assert_eq!(back.handle(B::Frontend(Some(Closed))), closed);
    assert_eq!(back.handle(B::Frontend(Some(Closed))), []);
    assert_eq!(back.handle(B::Frontend(Some(Initialising))), [BackendAction::Advertise]);

    // A guest that starts over so fast that only the last state is seen.
    let anew = [BackendAction::Disconnect, BackendAction::Advertise];
    assert_eq!(connected().handle(B::Frontend(Some(Initialising))), anew);
    let anew = [BackendAction::Disconnect, BackendAction::Advertise, BackendAction::Connect];
    assert_eq!(connected().handle(B::Frontend(Some(Initialised))), anew);
    assert_eq!(connected().handle(B::Rekeyed), anew);
}

#[test]
fn removal_ends_in_retirement() {
    let mut back = connected();
    assert_eq!(back.handle(B::Online(false)), [BackendAction::Publish(Closing)]);
    assert_eq!(
        back.handle(B::Frontend(Some(Closed))),
        [BackendAction::Disconnect, BackendAction::Publish(Closed), BackendAction::Retire]
    );
    assert_eq!(back.handle(B::Frontend(Some(Initialising))), []);

    // No driver in the guest: nothing to wait for.
    let retired = [BackendAction::Publish(Closed), BackendAction::Retire];
    assert_eq!(waiting().handle(B::Online(false)), retired);
    // Removed long after the guest let go: the toolstack has written Closing over our Closed.
    let mut back = connected();
    back.handle(B::Frontend(Some(Closed)));
    assert_eq!(back.handle(B::Online(false)), retired);
    // Forced destroy.
    let closed = [BackendAction::Disconnect, BackendAction::Publish(Closed)];
    assert_eq!(connected().handle(B::Frontend(None)), closed);
    let forgotten = [BackendAction::Disconnect, BackendAction::Forget];
    assert_eq!(connected().handle(B::DirectoryRemoved), forgotten);
    // A broken ring, while the guest does not let go.
    let mut back = connected();
    back.handle(B::Online(false));
    let forced = [BackendAction::Disconnect, BackendAction::Publish(Closed), BackendAction::Retire];
    assert_eq!(back.handle(B::GiveUp), forced);
}

#[test]
fn a_resize_is_told_only_to_a_connected_frontend() {
    assert_eq!(connected().handle(B::Resized), [BackendAction::Resize]);
    assert_eq!(waiting().handle(B::Resized), []);
}

#[test]
fn a_predecessors_frontend_is_restarted_or_taken_over() {
    let mut back = BackendMachine::new(StalePeer::Restart);
    back.handle(B::Online(true));
    back.handle(B::StorageReady);
    assert_eq!(back.handle(B::Frontend(Some(Connected))), [BackendAction::Advertise]);
    assert_eq!(back.handle(B::Frontend(Some(Connected))), []);
    assert_eq!(back.handle(B::Frontend(Some(Initialised))), [BackendAction::Connect]);

    let mut back = BackendMachine::new(StalePeer::Attach);
    back.handle(B::Online(true));
    back.handle(B::StorageReady);
    assert_eq!(back.handle(B::Frontend(Some(Connected))), [BackendAction::Connect]);
    assert_eq!(back.handle(B::Connected), [BackendAction::Publish(Connected)]);

    // Detached while mounted: it is served until it closes, also by a successor.
    for state in [Connected, Closing] {
        let mut back = BackendMachine::new(StalePeer::Attach);
        back.handle(B::Online(false));
        assert_eq!(back.handle(B::Frontend(Some(state))), []);
        assert_eq!(back.handle(B::StorageReady), [BackendAction::Connect]);
        assert_eq!(back.handle(B::Connected), [BackendAction::Publish(Closing)]);
        assert!(back.is_connected());
    }
}

#[test]
fn a_refused_frontend_is_closed_until_it_starts_over() {
    let mut back = waiting();
    back.handle(B::Frontend(Some(Initialised)));
    assert_eq!(back.handle(B::ConnectFailed), [BackendAction::Publish(Closing)]);
    assert_eq!(back.handle(B::Frontend(Some(Initialised))), []);
    assert_eq!(back.handle(B::Frontend(Some(Closed))), [BackendAction::Publish(Closed)]);
    assert_eq!(back.handle(B::Frontend(Some(Initialising))), [BackendAction::Advertise]);

    // The same from the other side: it does not ask a second time.
    let mut front = FrontendMachine::new(Some(Initialising));
    assert_eq!(front.handle(F::Backend(Some(InitWait))), [FrontendAction::Offer]);
    let close = [FrontendAction::Publish(Closing), FrontendAction::Publish(Closed)];
    assert_eq!(front.handle(F::Backend(Some(Closing))), close);
    let gone = [FrontendAction::Disconnect, FrontendAction::Gone];
    assert_eq!(front.handle(F::Backend(Some(Closed))), gone);

    // Unless somebody depends on it.
    for refused in [F::Backend(Some(Closing)), F::Failed] {
        let mut front = FrontendMachine::new(Some(Initialising));
        front.handle(F::Backend(Some(InitWait)));
        front.handle(F::Backend(Some(Connected)));
        front.handle(F::Connected);
        let offers = [FrontendAction::Disconnect, FrontendAction::Offer];
        assert_eq!(front.handle(F::Backend(Some(InitWait))), offers);
        assert_eq!(front.handle(refused), close);
        let again = [FrontendAction::Disconnect, FrontendAction::Publish(Initialising)];
        assert_eq!(front.handle(F::Backend(Some(Closed))), again);
        assert_eq!(front.handle(F::Backend(Some(InitWait))), [FrontendAction::Offer]);
    }
}

fn state() -> impl Strategy<Value = Option<XenbusState>> {
    prop::option::weighted(0.9, prop::sample::select(XenbusState::ALL.to_vec()))
}

fn backend_event() -> impl Strategy<Value = BackendEvent> {
    prop_oneof![
        8 => state().prop_map(B::Frontend),
        3 => Just(B::Connected),
        2 => any::<bool>().prop_map(B::Online),
        2 => Just(B::StorageReady),
        1 => prop::sample::select(vec![
            B::Rekeyed, B::StorageFailed, B::Resized, B::ConnectFailed, B::GiveUp,
            B::DirectoryRemoved,
        ]),
    ]
}

proptest! {
    #[test]
    fn the_backend_keeps_its_word_under_any_events(
        attach in any::<bool>(),
        events in prop::collection::vec(backend_event(), 0..60),
    ) {
        let mut back =
            BackendMachine::new(if attach { StalePeer::Attach } else { StalePeer::Restart });
        let (mut held, mut ended, mut seen_initialised) = (false, false, false);
        for event in events {
            if let B::Frontend(state) = event {
                seen_initialised = match state {
                    Some(Initialised) => true,
                    // Not connected to us: it offers rings.
                    Some(Connected) if !held => true,
                    Some(Initialising | InitWait | Closed) | None => false,
                    _ => seen_initialised,
                };
            }
            for action in back.handle(event) {
                prop_assert!(!ended, "{action:?} after the end");
                match action {
                    BackendAction::Connect => {
                        prop_assert!(!held, "connected twice");
                        prop_assert!(attach || seen_initialised || event == B::Rekeyed);
                        held = true;
                    }
                    BackendAction::Disconnect => {
                        prop_assert!(held, "nothing to disconnect");
                        held = false;
                    }
                    BackendAction::Advertise => prop_assert!(!held),
                    BackendAction::Publish(Connected) => prop_assert!(back.is_connected()),
                    BackendAction::Publish(Closed) => prop_assert!(!held),
                    BackendAction::Retire | BackendAction::Forget => ended = true,
                    _ => {}
                }
            }
            if event == B::ConnectFailed && !back.is_connected() {
                held = false;
            }
            let level = matches!(
                event,
                B::Frontend(_) | B::Online(_) | B::StorageReady | B::StorageFailed
            );
            if level {
                prop_assert_eq!(back.handle(event), vec![], "seen twice, done twice");
            }
        }
        // Whatever came before, the backend lets go of a frontend that goes away.
        back.handle(B::Online(true));
        back.handle(B::Frontend(Some(Closing)));
        // (A predecessor's frontend is taken over first, if storage may yet come.)
        let waits = attach && back.state() == Initialising;
        prop_assert!(back.has_ended() || waits || matches!(back.state(), Closing | Closed));
        back.handle(B::Frontend(None));
        prop_assert!(!back.is_connected());
        prop_assert!(back.has_ended() || back.state() == Closed);
    }

    #[test]
    fn the_frontend_keeps_its_word_under_any_events(
        own in state(),
        events in prop::collection::vec(prop_oneof![
            6 => state().prop_map(F::Backend),
            3 => Just(F::Connected),
            1 => prop::sample::select(vec![F::Failed, F::Close, F::GiveUp, F::DirectoryRemoved]),
        ], 0..60),
    ) {
        let mut front = FrontendMachine::new(own);
        let (mut rings, mut connecting, mut ended) = (false, false, false);
        for event in events {
            for action in front.handle(event) {
                prop_assert!(!ended, "{action:?} after the end");
                match action {
                    FrontendAction::Offer => {
                        prop_assert!(!rings, "rings offered twice");
                        rings = true;
                        connecting = false;
                    }
                    FrontendAction::Connect => {
                        prop_assert!(rings && !connecting);
                        connecting = true;
                    }
                    FrontendAction::Disconnect => {
                        prop_assert!(rings);
                        rings = false;
                    }
                    FrontendAction::Publish(Initialising) => prop_assert!(!rings),
                    FrontendAction::Gone => {
                        prop_assert!(!rings, "granted for ever");
                        ended = true;
                    }
                    _ => {}
                }
            }
        }
        front.handle(F::Close);
        front.handle(F::Backend(Some(Closed)));
        prop_assert!(front.has_ended());
    }
}

/// Two ends with a xenstore in between, which holds only current values.
struct Pair {
    back: BackendMachine,
    front: FrontendMachine,
    back_state: XenbusState,
    front_state: XenbusState,
    /// Which rings are in xenstore, which the frontend uses, and which the backend has mapped.
    keys: u32,
    used: Option<u32>,
    mapped: Option<u32>,
    /// What an end has read but not yet acted on.
    back_read: Option<XenbusState>,
    front_read: Option<XenbusState>,
    /// The frontend reads as soon as `InitWait` is written, before the backend has finished its actions.
    nosy: bool,
}

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            back: BackendMachine::new(StalePeer::Restart),
            front: FrontendMachine::new(Some(Initialising)),
            back_state: Initialising,
            front_state: Initialising,
            keys: 0,
            used: None,
            mapped: None,
            back_read: None,
            front_read: None,
            nosy: false,
        };
        pair.start_backend();
        pair
    }

    fn start_backend(&mut self) {
        self.mapped = None;
        self.back_read = None;
        self.back = BackendMachine::new(StalePeer::Restart);
        self.back(B::Online(true));
        self.back(B::StorageReady);
    }

    fn start_frontend(&mut self) {
        self.used = None;
        self.front_read = None;
        self.front = FrontendMachine::new(Some(self.front_state));
    }

    fn back(&mut self, event: BackendEvent) -> bool {
        let actions = self.back.handle(event);
        for action in &actions {
            match action {
                BackendAction::Advertise => {
                    self.back_state = InitWait;
                    if self.nosy {
                        self.front_read = Some(InitWait);
                    }
                }
                BackendAction::Publish(state) => self.back_state = *state,
                BackendAction::Connect => {
                    self.mapped = Some(self.keys);
                    self.back(B::Connected);
                }
                BackendAction::Disconnect => self.mapped = None,
                BackendAction::Resize | BackendAction::Retire | BackendAction::Forget => {}
            }
        }
        !actions.is_empty()
    }

    fn front(&mut self, event: FrontendEvent) -> bool {
        let actions = self.front.handle(event);
        for action in &actions {
            match action {
                FrontendAction::Offer => {
                    self.keys += 1;
                    self.used = Some(self.keys);
                    self.front_state = Initialised;
                }
                FrontendAction::Connect => {
                    self.front(F::Connected);
                }
                FrontendAction::Publish(state) => self.front_state = *state,
                FrontendAction::Disconnect => self.used = None,
                _ => {}
            }
        }
        actions.iter().any(|action| *action != FrontendAction::Resized)
    }

    fn look_back(&mut self) -> bool {
        let read = self.back_read.take().unwrap_or(self.front_state);
        let mut busy = self.back(B::Frontend(Some(read)));
        let live = matches!(read, Initialised | Connected);
        if self.back.is_connected() && live && self.mapped != Some(self.keys) {
            busy |= self.back(B::Rekeyed);
        }
        busy
    }

    fn look_front(&mut self) -> bool {
        let read = self.front_read.take().unwrap_or(self.back_state);
        self.front(F::Backend(Some(read)))
    }

    fn settle(&mut self) {
        for _ in 0..50 {
            // Acting on an earlier read is progress, but a current one must follow.
            let stale = self.back_read.is_some() || self.front_read.is_some();
            let back = self.look_back();
            if !(self.look_front() | back | stale) {
                return;
            }
        }
        panic!("the two ends chase each other");
    }
}

proptest! {
    #[test]
    fn the_two_ends_meet_and_part_whatever_dies_between(
        steps in prop::collection::vec(0..12u8, 0..80),
    ) {
        let mut pair = Pair::new();
        for step in steps {
            match step {
                0..=3 => { pair.look_back(); }
                4..=7 => { pair.look_front(); }
                8 => pair.start_backend(),
                9 => pair.start_frontend(),
                10 => pair.back_read = pair.back_read.or(Some(pair.front_state)),
                _ => pair.nosy = !pair.nosy,
            }
        }
        pair.settle();
        prop_assert_eq!((pair.back_state, pair.front_state), (Connected, Connected));
        prop_assert!(pair.back.is_connected() && pair.front.is_connected());
        prop_assert_eq!(pair.mapped, Some(pair.keys));
        prop_assert_eq!(pair.used, Some(pair.keys));

        pair.front(F::Close);
        pair.settle();
        prop_assert_eq!(pair.back_state, Closed);
        prop_assert_eq!((pair.mapped, pair.used), (None, None));
        prop_assert!(pair.front.has_ended() && !pair.back.has_ended());
    }
}
