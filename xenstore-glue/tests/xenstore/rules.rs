//! What xenstored refuses, grants and tells, request by request, on the store without sockets.

use xenstore_glue::store::{ConnectionId, Output, Store, quota};
use xenstore_glue::wire::{Access, Errno, MessageType, Path, Perm, Reply, Request};

/// One domain's connection, with short method names.
struct Peer(ConnectionId);

impl Peer {
    /// Introduces `domid`, whose directory it owns, and connects.
    fn new(store: &mut Store, domid: u16) -> Self {
        if domid != 0 {
            let home = format!("/local/domain/{domid}");
            store.introduce(domid).unwrap();
            store.mkdir(&home).unwrap();
            store.set_perms(&home, &[Perm::new(domid, Access::None)]).unwrap();
        }
        let peer = Self(store.connect(domid).unwrap());
        store.take_outputs();
        peer
    }

    fn ask(&self, store: &mut Store, tx_id: u32, request: Request) -> Result<Reply, Errno> {
        match store.handle(self.0, tx_id, request) {
            Reply::Error(errno) => Err(errno),
            reply => Ok(reply),
        }
    }

    fn begin(&self, store: &mut Store) -> Result<u32, Errno> {
        match self.ask(store, 0, Request::TransactionStart)? {
            Reply::TransactionStart(id) => Ok(id),
            other => panic!("{other:?}"),
        }
    }

    fn commit(&self, store: &mut Store, tx_id: u32) -> Result<Reply, Errno> {
        self.ask(store, tx_id, Request::TransactionEnd { commit: true })
    }
}

fn path(text: &str) -> Path {
    Path::new(text).unwrap()
}

fn read(text: &str) -> Request {
    Request::Read(path(text))
}

fn write(text: &str, value: &str) -> Request {
    Request::Write { path: path(text), value: value.into() }
}

fn perms(text: &str, perms: &[Perm]) -> Request {
    Request::SetPerms { path: path(text), perms: perms.to_vec() }
}

fn watch(text: &str, token: &str) -> Request {
    Request::Watch { path: path(text), token: token.into() }
}

fn value(text: &str) -> Result<Reply, Errno> {
    Ok(Reply::Read(text.into()))
}

/// The paths of the events for a connection since the last call.
fn events(store: &mut Store, peer: &Peer) -> Vec<String> {
    let outputs = store.take_outputs().into_iter();
    let of_peer = outputs.filter_map(|output| match output {
        Output::Event(id, Reply::WatchEvent { path, .. }) if id == peer.0 => Some(path.to_string()),
        _ => None,
    });
    of_peer.collect()
}

#[test]
fn transactions_are_isolated_and_conflict() {
    let mut store = Store::new();
    let (a, b) = (Peer::new(&mut store, 0), Peer::new(&mut store, 0));
    let s = &mut store;
    s.write("/x", b"0").unwrap();
    s.write("/y", b"0").unwrap();

    // Nobody sees it before the commit, then everybody does.
    let tx = a.begin(s).unwrap();
    a.ask(s, tx, write("/x", "1")).unwrap();
    assert_eq!((a.ask(s, tx, read("/x")), b.ask(s, 0, read("/x"))), (value("1"), value("0")));
    b.ask(s, 0, write("/y", "other")).unwrap();
    a.commit(s, tx).unwrap();
    assert_eq!(b.ask(s, 0, read("/x")), value("1"));
    assert_eq!(a.commit(s, tx), Err(Errno::Enoent), "the id is spent");

    // Somebody else has written what was read.
    let tx = a.begin(s).unwrap();
    a.ask(s, tx, read("/y")).unwrap();
    a.ask(s, tx, write("/x", "2")).unwrap();
    b.ask(s, 0, write("/y", "again")).unwrap();
    assert_eq!(a.commit(s, tx), Err(Errno::Eagain));
    assert_eq!(b.ask(s, 0, read("/x")), value("1"));

    // Somebody else has created what was missing when read.
    let tx = a.begin(s).unwrap();
    assert_eq!(a.ask(s, tx, read("/new")), Err(Errno::Enoent));
    b.ask(s, 0, write("/new", "")).unwrap();
    assert_eq!(a.commit(s, tx), Err(Errno::Eagain));

    // Two transactions: one creates a child below the node that the other removes.
    let (tx, other) = (a.begin(s).unwrap(), b.begin(s).unwrap());
    a.ask(s, tx, Request::Rm(path("/new"))).unwrap();
    b.ask(s, other, write("/new/child", "")).unwrap();
    b.commit(s, other).unwrap();
    assert_eq!(a.commit(s, tx), Err(Errno::Eagain));
    assert!(s.read("/new/child").is_ok());

    // A dropped one leaves nothing.
    let tx = a.begin(s).unwrap();
    a.ask(s, tx, Request::Rm(path("/x"))).unwrap();
    a.ask(s, tx, Request::TransactionEnd { commit: false }).unwrap();
    assert_eq!(b.ask(s, 0, read("/x")), value("1"));
    assert_eq!(a.ask(s, 77, read("/x")), Err(Errno::Enoent), "no such transaction");
}

#[test]
fn permissions_are_xenstoreds() {
    let mut store = Store::new();
    let (dom1, dom2) = (Peer::new(&mut store, 1), Peer::new(&mut store, 2));
    let s = &mut store;
    s.write("/dom0/only", b"").unwrap();

    // It learns neither a value nor whether there is one.
    assert_eq!(dom1.ask(s, 0, read("/dom0/only")), Err(Errno::Eacces));
    assert_eq!(dom1.ask(s, 0, read("/dom0/missing")), Err(Errno::Eacces));
    assert_eq!(dom1.ask(s, 0, write("/dom0/mine", "")), Err(Errno::Eacces));
    assert_eq!(dom1.ask(s, 0, read("missing")), Err(Errno::Enoent), "in its own directory");

    // Relative paths; what a domain creates is its own, what dom0 creates is its parent's.
    dom1.ask(s, 0, write("device/vbd/51712/state", "1")).unwrap();
    let state = "/local/domain/1/device/vbd/51712/state";
    assert_eq!(s.get_perms(state), Ok(vec![Perm::new(1, Access::None)]));
    assert_eq!(dom2.ask(s, 0, read(state)), Err(Errno::Eacces));
    s.write("/local/domain/1/by-dom0", b"").unwrap();
    assert_eq!(s.get_perms("/local/domain/1/by-dom0"), Ok(vec![Perm::new(1, Access::None)]));

    // The owner lets others in, the list is inherited, the creator becomes the owner.
    let shared = [Perm::new(1, Access::None), Perm::new(2, Access::Both)];
    dom1.ask(s, 0, perms("device/vbd/51712", &shared)).unwrap();
    dom2.ask(s, 0, write("/local/domain/1/device/vbd/51712/from-2", "")).unwrap();
    let inherited = [Perm::new(2, Access::None), Perm::new(2, Access::Both)];
    let from2 = "/local/domain/1/device/vbd/51712/from-2";
    assert_eq!(s.get_perms(from2), Ok(inherited.to_vec()));
    assert_eq!(dom1.ask(s, 0, read(from2)), Err(Errno::Eacces));

    // Only dom0 gives nodes away; only the owner changes permissions.
    let theirs = [Perm::new(2, Access::None)];
    assert_eq!(dom1.ask(s, 0, perms("device", &theirs)), Err(Errno::Eperm));
    assert_eq!(dom2.ask(s, 0, perms(state, &theirs)), Err(Errno::Eacces));

    // Privileged requests, and the one way to become privileged over another domain.
    assert_eq!(dom1.ask(s, 0, Request::Release(2)), Err(Errno::Eacces));
    assert_eq!(dom1.ask(s, 0, Request::Control(vec![])), Err(Errno::Eacces));
    let dom0 = Peer::new(s, 0);
    dom0.ask(s, 0, Request::SetTarget { domid: 2, target: 1 }).unwrap();
    assert_eq!(dom2.ask(s, 0, read(state)), value("1"));

    // Special names are not nodes to read or write; the root stays.
    assert_eq!(dom0.ask(s, 0, write("@releaseDomain", "")), Err(Errno::Einval));
    assert_eq!(dom0.ask(s, 0, Request::Rm(path("/"))), Err(Errno::Einval));
    assert_eq!(dom0.ask(s, 0, Request::Rm(path("/no/such"))), Err(Errno::Enoent));
}

#[test]
fn quotas_hold_for_domains_and_not_for_dom0() {
    let mut store = Store::new();
    let (dom0, dom1) = (Peer::new(&mut store, 0), Peer::new(&mut store, 1));
    let s = &mut store;
    let big = "x".repeat(quota::NODE_BYTES);
    assert_eq!(dom1.ask(s, 0, write("big", &big)), Err(Errno::Enospc));
    dom0.ask(s, 0, write("big", &big)).unwrap();

    let list = [Perm::new(1, Access::None); quota::PERMS + 1];
    assert_eq!(dom1.ask(s, 0, perms("/local/domain/1", &list)), Err(Errno::Enospc));

    for number in 0..quota::WATCHES {
        dom1.ask(s, 0, watch("w", &number.to_string())).unwrap();
    }
    assert_eq!(dom1.ask(s, 0, watch("w", "more")), Err(Errno::Enospc));
    assert_eq!(dom1.ask(s, 0, watch("w", "0")), Err(Errno::Eexist));
    // A second connection is still the same domain.
    let again = Peer(s.connect(1).unwrap());
    assert_eq!(again.ask(s, 0, watch("w", "more")), Err(Errno::Enospc));
    dom1.ask(s, 0, Request::Unwatch { path: path("w"), token: "0".into() }).unwrap();
    again.ask(s, 0, watch("w", "more")).unwrap();

    let open: Vec<_> = (0..quota::TRANSACTIONS).map(|_| dom1.begin(s).unwrap()).collect();
    assert_eq!(dom1.begin(s), Err(Errno::Enospc));
    let tx = open[0];
    assert_eq!(dom1.ask(s, tx, Request::TransactionStart), Err(Errno::Ebusy));

    // Its directory counts, too. Names are kept short of the size of a node.
    let leaf = |number: usize| format!("d{}/n{number}", number / 100);
    let (mut owned, mut number) = (1, 0);
    while owned < quota::NODES {
        // The leaf, and for a multiple of 100 its directory, too: 10 directories in all.
        dom1.ask(s, 0, write(&leaf(number), "")).unwrap();
        owned += if number % 100 == 0 { 2 } else { 1 };
        number += 1;
    }
    assert_eq!(owned, quota::NODES);
    assert_eq!(dom1.ask(s, 0, write("one-more", "")), Err(Errno::Enospc));
    assert_eq!(dom1.ask(s, tx, write("one-more", "")), Err(Errno::Enospc));
    // Removed nodes no longer count, also within a transaction.
    dom1.ask(s, tx, Request::Rm(path("d0/n0"))).unwrap();
    dom1.ask(s, tx, write("one-more", "")).unwrap();
    dom1.commit(s, tx).unwrap();
    assert_eq!(dom1.ask(s, 0, write("two-more", "")), Err(Errno::Enospc));

    // A reset frees watches and transactions.
    assert_eq!(dom1.ask(s, 0, Request::ResetWatches), Ok(Reply::Ok(MessageType::ResetWatches)));
    dom1.begin(s).unwrap();
}

#[test]
fn watches_tell_who_may_know() {
    let mut store = Store::new();
    let (dom0, dom1, dom2) =
        (Peer::new(&mut store, 0), Peer::new(&mut store, 1), Peer::new(&mut store, 2));
    let s = &mut store;

    // Once on registration, though the node does not exist; relative stays relative.
    dom1.ask(s, 0, watch("device", "t")).unwrap();
    assert_eq!(events(s, &dom1), ["device"]);
    dom1.ask(s, 0, write("device/vbd", "")).unwrap();
    assert_eq!(events(s, &dom1), ["device/vbd"]);
    dom1.ask(s, 0, Request::Rm(path("/local/domain/1/device"))).unwrap();
    assert_eq!(events(s, &dom1), ["device"]);
    dom1.ask(s, 0, write("devices", "")).unwrap();
    assert_eq!(events(s, &dom1), Vec::<String>::new(), "a sibling of a similar name");

    // No events for what the watcher cannot read, until it can.
    let key = "/local/domain/1/key";
    dom2.ask(s, 0, watch(key, "t")).unwrap();
    dom1.ask(s, 0, write(key, "")).unwrap();
    assert_eq!(events(s, &dom2), [key], "of the registration only");
    let shared = [Perm::new(1, Access::None), Perm::new(2, Access::Read)];
    dom1.ask(s, 0, perms(key, &shared)).unwrap();
    dom1.ask(s, 0, write(key, "2")).unwrap();
    dom1.ask(s, 0, perms(key, &shared[..1])).unwrap();
    assert_eq!(events(s, &dom2), [key, key, key], "the last one is of the right lost");
    dom1.ask(s, 0, write(key, "3")).unwrap();
    assert_eq!(events(s, &dom2), Vec::<String>::new());

    // A transaction's changes fire when it is committed, one event per path.
    dom0.ask(s, 0, watch("/local", "t")).unwrap();
    events(s, &dom0);
    let tx = dom0.begin(s).unwrap();
    dom0.ask(s, tx, write("/local/a", "1")).unwrap();
    dom0.ask(s, tx, write("/local/a", "2")).unwrap();
    dom0.ask(s, tx, write("/local/b", "")).unwrap();
    assert_eq!(events(s, &dom0), Vec::<String>::new());
    dom0.commit(s, tx).unwrap();
    assert_eq!(events(s, &dom0), ["/local/a", "/local/b"]);

    // Special watches: for dom0, and for domains that it allows.
    for peer in [&dom0, &dom1, &dom2] {
        peer.ask(s, 0, watch("@releaseDomain", "t")).unwrap();
    }
    let allowed = [Perm::new(0, Access::None), Perm::new(1, Access::Read)];
    s.set_perms("@releaseDomain", &allowed).unwrap();
    s.introduce(9).unwrap();
    s.take_outputs();
    s.release(9).unwrap();
    let told = s.take_outputs().into_iter().map(|output| match output {
        Output::Event(id, _) => id,
        Output::Close(id) => panic!("{id:?} closed"),
    });
    assert_eq!(told.collect::<Vec<_>>(), [dom0.0, dom1.0]);
}

/// Many changes at once reach a watcher only if its outbox holds them; else it must look again.
#[test]
fn a_huge_commit_is_one_event_a_watch() {
    let mut store = Store::new();
    let (dom0, dom1) = (Peer::new(&mut store, 0), Peer::new(&mut store, 1));
    let s = &mut store;
    dom0.ask(s, 0, watch("/local/domain", "t")).unwrap();
    for number in 0..quota::WATCHES {
        dom1.ask(s, 0, watch("data", &number.to_string())).unwrap();
    }
    s.take_outputs();
    let tx = dom1.begin(s).unwrap();
    for number in 0..800 {
        let deep = format!("/{}", "x".repeat(94) + &(number % 2).to_string()).repeat(20);
        dom1.ask(s, tx, write(&format!("data{deep}/{number}"), "")).unwrap();
    }
    dom1.commit(s, tx).unwrap();
    let told = s.take_outputs();
    assert_eq!(told.len(), 1 + quota::WATCHES);
    for output in told {
        let Output::Event(_, Reply::WatchEvent { path, .. }) = output else { panic!("{output:?}") };
        assert!(["/local/domain", "data"].contains(&path.as_str()), "{path}");
    }
}

#[test]
fn a_released_domain_leaves_nothing() {
    let mut store = Store::new();
    let (back, front) = (Peer::new(&mut store, 1), Peer::new(&mut store, 2));
    let s = &mut store;
    let shared = [Perm::new(2, Access::None), Perm::new(1, Access::Read)];
    front.ask(s, 0, write("device/vbd/0/state", "4")).unwrap();
    for node in ["device/vbd/0", "device/vbd/0/state"] {
        front.ask(s, 0, perms(node, &shared)).unwrap();
    }
    let to_front = [Perm::new(1, Access::None), Perm::new(2, Access::Read)];
    back.ask(s, 0, write("backend", "")).unwrap();
    back.ask(s, 0, perms("backend", &to_front)).unwrap();
    let state = "/local/domain/2/device/vbd/0/state";
    back.ask(s, 0, watch(state, "t")).unwrap();
    s.take_outputs();

    s.release(2).unwrap();
    let outputs = s.take_outputs();
    assert!(outputs.contains(&Output::Close(front.0)));
    let event = Reply::WatchEvent { path: path(state), token: "t".into() };
    assert!(outputs.contains(&Output::Event(back.0, event)), "its backend sees it go");
    assert_eq!(s.read("/local/domain/2"), Err(Errno::Enoent));
    assert_eq!(s.connect(2), None);
    assert_eq!(front.ask(s, 0, read("x")), Err(Errno::Eio), "a request on its way");
    // A later domain of the same number starts with nothing.
    let reborn = Peer::new(s, 2);
    assert_eq!(reborn.ask(s, 0, read("/local/domain/1/backend")), Err(Errno::Eacces));
}
