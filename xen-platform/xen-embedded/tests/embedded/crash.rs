//! What happens to a domain's resources when its process, or the broker, ends.

use super::*;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use xen_platform::embedded::protocol::{self, HYPERVISOR_SOCKET, Request, VERSION, domain_dir};
use xen_platform::{Access, CopyDirection, CopySegment, Error, GrantStatus, LocalRegion, Platform};

const CHILD_READY: &str = "child is ready";

/// Run by others as a process of its own: "victim" maps what dom "a" granted to it, binds its
/// event channel and waits to be killed. It finds both in a file in the broker's directory.
#[test]
#[ignore = "a part of other tests"]
fn victim() {
    let dir = PathBuf::from(std::env::var_os("XE_TEST_DIR").unwrap());
    let victim = EmbeddedPlatform::attach(&dir, "victim").unwrap();
    let a = control::find_domain(&dir, "a").unwrap();
    let numbers = std::fs::read_to_string(dir.join("numbers")).unwrap();
    let mut numbers = numbers.split(' ').map(|n| n.parse().unwrap());
    let port = ring_proto::Port(numbers.next().unwrap());
    let refs: Vec<_> = numbers.map(GrantRef).collect();
    let _mapped = victim.map(a, &refs, Access::ReadWrite).unwrap();
    let _read = victim.map(a, &refs[..1], Access::ReadOnly).unwrap();
    let _channel = victim.bind_interdomain(a, port).unwrap();
    println!("{CHILD_READY}");
    loop {
        std::thread::park();
    }
}

fn start_victim(host: &TestHost, port: ring_proto::Port, refs: &[GrantRef]) -> Child {
    let mut numbers = port.0.to_string();
    for gref in refs {
        numbers += &format!(" {}", gref.0);
    }
    std::fs::write(host.dir.join("numbers"), numbers).unwrap();
    let mut child = spawn_child("crash::victim", &host.dir);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(CHILD_READY)), "the child failed");
    child
}

#[test]
fn a_killed_grantee_holds_nothing() {
    let host = TestHost::start();
    let a = host.guest("a");
    let victim = host.create("victim", OnCrash::Destroy);
    let pages = a.grant(victim, 2, Access::ReadWrite).unwrap();
    let channel = a.alloc_unbound(victim).unwrap();
    let refs = pages.refs().to_vec();
    let mut child = start_victim(&host, channel.port(), &refs);

    let in_use = || entry(&a, refs[0]).flags & (GTF_READING | GTF_WRITING) != 0;
    assert!(in_use());
    let second = EmbeddedPlatform::attach(&host.dir, "victim");
    assert!(second.unwrap_err().to_string().contains("is attached to the domain"));

    child.kill().unwrap();
    child.wait().unwrap();
    eventually("its uses end", || !in_use());
    pages.revoke().map_err(|(_, e)| e).unwrap();
    channel.notify().unwrap();
    // By its policy, nobody can be that domain again.
    eventually("it is destroyed", || control::find_domain(&host.dir, "victim").is_err());
    let again = EmbeddedPlatform::attach(&host.dir, &victim.0.to_string());
    assert!(matches!(again, Err(Error::Io { .. })), "{again:?}");
}

#[test]
fn destroying_a_domain_kills_its_process() {
    let host = TestHost::start();
    let a = host.guest("a");
    let victim = host.create("victim", OnCrash::Preserve);
    let pages = a.grant(victim, 1, Access::ReadWrite).unwrap();
    let channel = a.alloc_unbound(victim).unwrap();
    let mut child = start_victim(&host, channel.port(), pages.refs());

    let (done, _, complaint) = host.cli(&["domain", "destroy", "victim"]);
    assert!(done, "{complaint}");
    assert!(!child.wait().unwrap().success());
    pages.revoke().map_err(|(_, e)| e).unwrap();
    assert!(control::find_domain(&host.dir, "victim").is_err());
}

/// As `victim`, but a child of its own holds its connection and outlives it.
#[test]
#[ignore = "a part of other tests"]
fn with_heir() {
    let dir = PathBuf::from(std::env::var_os("XE_TEST_DIR").unwrap());
    let domid = control::find_domain(&dir, "victim").unwrap();
    let flags = SockFlag::empty();
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = domain_dir(&dir, domid).join(HYPERVISOR_SOCKET);
    connect(socket.as_raw_fd(), &UnixAddr::new(&address).unwrap()).unwrap();
    let attach = Request::Attach { version: VERSION.to_owned() };
    protocol::send(socket.as_fd(), &attach, &[]).unwrap();
    let mut heir = Command::new("cat").stdin(socket).spawn().unwrap();
    println!("{CHILD_READY}");
    heir.wait().unwrap();
}

#[test]
fn destroying_a_domain_needs_nobody_to_cooperate() {
    let host = TestHost::start();
    host.create("victim", OnCrash::Preserve);
    let mut child = spawn_child("crash::with_heir", &host.dir);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(CHILD_READY)), "the child failed");
    eventually("it is attached", || {
        host.cli(&["domain", "list"]).1.contains(&child.id().to_string())
    });

    let (done, _, complaint) = host.cli(&["domain", "destroy", "victim"]);
    assert!(done, "{complaint}");
    assert!(!child.wait().unwrap().success());
    // The heir has read the end of the connection: nobody takes it for a later domain's process.
    let reader = std::thread::spawn(move || lines.all(|line| line.is_ok()));
    eventually("the heir ends", || reader.is_finished());
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let host = TestHost::start();
    let ours = |mode| PermissionsExt::from_mode(mode);
    let dir = host.dir.join("dom1");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, ours(0o757)).unwrap();
    let (done, _, complaint) = host.cli(&["domain", "create", "a"]);
    assert!(!done && complaint.contains("others may write"), "{complaint}");
    std::fs::set_permissions(&host.dir, ours(0o777)).unwrap();
    let (done, _, complaint) = host.cli(&["serve"]);
    assert!(!done && complaint.contains("others may write"), "{complaint}");
}

#[test]
fn a_killed_process_can_be_replaced_at_once() {
    let host = TestHost::start();
    let a = host.guest("a");
    let victim = host.create("victim", OnCrash::Preserve);
    for _ in 0..20 {
        let pages = a.grant(victim, 1, Access::ReadWrite).unwrap();
        let channel = a.alloc_unbound(victim).unwrap();
        let mut child = start_victim(&host, channel.port(), pages.refs());
        child.kill().unwrap();
        child.wait().unwrap();
        let next = EmbeddedPlatform::attach(&host.dir, "victim").unwrap();
        // The old process holds nothing any more, and its successor can take its place.
        drop(next.bind_interdomain(a.domid(), channel.port()).unwrap());
        drop(next.map(a.domid(), pages.refs(), Access::ReadWrite).unwrap());
        pages.revoke().map_err(|(_, e)| e).unwrap();
    }
}

#[test]
fn a_domain_that_is_preserved_starts_afresh() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let pages = a.grant(b.domid(), 1, Access::ReadWrite).unwrap();
    fill_page(&pages.memory(), 0, 4);
    let gref = pages.refs()[0];
    let mut copier = b.copier(a.domid()).unwrap();
    let mapped: Arc<dyn SharedMemory> = b.map(a.domid(), &[gref], Access::ReadOnly).unwrap();

    let domid = a.domid();
    drop(pages);
    drop(a);
    let local = LocalRegion::new(1).unwrap();
    let mut segments = [CopySegment {
        gref,
        offset: 0,
        len: 1,
        local: 0,
        direction: CopyDirection::FromPeer,
        status: Ok(()),
    }];
    eventually("the peer is gone", || {
        copier.copy(&local, &mut segments).unwrap();
        segments[0].status == Err(GrantStatus::BadDomain)
    });
    // What is mapped stays: Xen keeps a dead domain's pages for those who map them.
    assert_eq!(read_page(&mapped, 0), [4; PAGE_SIZE]);

    let a = EmbeddedPlatform::attach(&host.dir, "a").unwrap();
    assert_eq!(a.domid(), domid);
    let pages = a.grant(b.domid(), 1, Access::ReadWrite).unwrap();
    assert_eq!(read_page(&pages.memory(), 0), [0; PAGE_SIZE]);
    b.map(domid, pages.refs(), Access::ReadWrite).unwrap();
}

#[test]
fn the_end_of_the_broker_is_an_error_that_says_so() {
    let mut host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let pages = a.grant(b.domid(), 1, Access::ReadWrite).unwrap();
    let channel = a.alloc_unbound(b.domid()).unwrap();
    host.broker.kill().unwrap();
    host.broker.wait().unwrap();

    let error = b.map(a.domid(), pages.refs(), Access::ReadOnly).unwrap_err();
    assert!(matches!(error, Error::BrokerGone { .. }), "{error}");
    assert!(error.to_string().contains("xen-embedded serve"), "{error}");
    channel.notify().unwrap();
    let error = EmbeddedPlatform::attach(&host.dir, "a").unwrap_err();
    assert!(error.to_string().contains("is `xen-embedded serve` running"), "{error}");
}
