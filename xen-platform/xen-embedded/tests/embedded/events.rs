//! The states of event channels: Xen's common/event_channel.c.

use super::*;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ring_proto::Port;
use xen_platform::{Error, Platform};

fn refusal(domain: &EmbeddedPlatform, peer: DomId, port: Port) -> &'static str {
    match domain.bind_interdomain(peer, port) {
        Err(Error::Port { reason, .. }) => reason,
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn an_unbound_port_can_be_bound_once_and_by_its_peer_only() {
    let host = TestHost::start();
    let (a, b, c) = (host.guest("a"), host.guest("b"), host.guest("c"));
    let mut front = a.alloc_unbound(b.domid()).unwrap();
    assert_eq!(front.port(), Port(1));
    assert!(refusal(&c, a.domid(), front.port()).contains("another domain"));
    assert!(refusal(&b, a.domid(), Port(2)).contains("no such port"));
    assert!(refusal(&b, DomId(99), Port(1)).contains("no such domain"));

    let mut back = b.bind_interdomain(a.domid(), front.port()).unwrap();
    assert!(refusal(&b, a.domid(), front.port()).contains("already bound"));

    // The first event is Xen's own, for what was lost before the port was bound.
    assert!(back.take().unwrap());
    back.unmask().unwrap();
    assert!(!back.take().unwrap() && !front.take().unwrap());

    // Events merge, and are held back by the mask.
    front.notify().unwrap();
    front.notify().unwrap();
    assert!(back.take().unwrap());
    front.notify().unwrap();
    assert!(!back.take().unwrap(), "masked");
    back.unmask().unwrap();
    assert!(back.take().unwrap());

    back.notify().unwrap();
    assert!(front.take().unwrap());
}

#[test]
fn closing_one_end_lets_the_same_peer_bind_again() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let mut front = a.alloc_unbound(b.domid()).unwrap();
    let back = b.bind_interdomain(a.domid(), front.port()).unwrap();
    drop(back);
    front.notify().unwrap();
    assert!(!front.take().unwrap());

    let mut back = b.bind_interdomain(a.domid(), front.port()).unwrap();
    assert!(back.take().unwrap());
    back.notify().unwrap();
    assert!(front.take().unwrap());

    let port = front.port();
    drop(front);
    back.notify().unwrap();
    assert!(refusal(&b, a.domid(), port).contains("no such port"));
}

#[test]
fn a_domain_has_so_many_ports_and_no_more() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    // Each port takes descriptors of this process.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let mut ports = Vec::new();
    let error = loop {
        match a.alloc_unbound(b.domid()) {
            Ok(port) => ports.push(port),
            Err(error) => break error,
        }
    };
    let full = matches!(error, Error::Exhausted { what: "event channel ports", limit: 4096 });
    assert!(full, "{error:?}");
    assert_eq!(ports.len(), 4095);
    drop(ports);
    assert_eq!(a.alloc_unbound(b.domid()).unwrap().port(), Port(1));
}
