//! Our client, when things go wrong.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::ttyname;

use xenstore_glue::client::{
    Client, Commit, Endpoint, Error, MAX_OUTSTANDING, MAX_UNDRAINED_PATHS, Nodes,
};
use xenstore_glue::store::quota;
use xenstore_glue::wire::{
    Access, Decoder, Errno, HEADER_LEN, PAYLOAD_MAX, Path, Perm, Request, WireError,
};

use crate::{Host, soon};

async fn connect(host: &Host, domid: u16) -> Client {
    Client::connect(Endpoint::Unix(host.socket(domid))).await.unwrap()
}

#[tokio::test]
async fn every_request_once() {
    let host = Host::new();
    host.domain(3);
    let client = connect(&host, 0).await;
    client.write("/a/value", [0, 255, b'x']).await.unwrap();
    assert_eq!(client.read("/a/value").await.unwrap(), [0, 255, b'x']);
    assert!(matches!(client.read_string("/a/value").await, Err(Error::NotText { .. })));
    client.mkdir("/a/dir").await.unwrap();
    assert_eq!(client.directory("/a").await.unwrap(), ["dir", "value"]);
    assert!(client.directory("/a/dir").await.unwrap().is_empty());
    let perms = [Perm::new(3, Access::None), Perm::new(0, Access::Both)];
    client.set_perms("/a", &perms).await.unwrap();
    assert_eq!(client.get_perms("/a").await.unwrap(), perms);
    client.rm("/a").await.unwrap();
    client.rm("/a/dir/deep").await.unwrap();
    assert!(!client.exists("/a").await.unwrap());
    assert_eq!(client.read_optional("/a").await.unwrap(), None);
    let missing = client.read("/a").await.unwrap_err();
    assert!(missing.is_not_found());
    assert_eq!(
        missing.to_string(),
        "xenstore refused Read of /a: ENOENT (no such node, transaction or domain)"
    );
    assert!(matches!(client.read("bad path").await, Err(Error::Path(_))));
    assert!(matches!(client.write("/a", vec![0; 5000]).await, Err(Error::Wire(_))));
    client.release(3).await.unwrap();
    assert!(client.release(3).await.unwrap_err().is_not_found());
    client.introduce(4, 1, 1).await.unwrap();
    let nobody = Client::connect(Endpoint::Unix("/nonexistent".into())).await;
    assert!(matches!(nobody, Err(Error::Connect { .. })));
}

/// The server has one thread, as in the broker.
#[tokio::test]
async fn a_client_that_never_stops_asking_does_not_keep_others_waiting() {
    let host = Host::new();
    host.domain(1);
    let message = |request: Request| {
        let mut bytes = Vec::new();
        request.to_packet(1, 0).unwrap().encode(&mut bytes);
        bytes
    };
    let path = |text: &str| Path::new(text).unwrap();
    // Many watches make a write slow, so that there is always one more.
    let mut watcher = UnixStream::connect(host.socket(1)).unwrap();
    for number in 0..quota::WATCHES {
        let token = number.to_string().into();
        watcher.write_all(&message(Request::Watch { path: path("data"), token })).unwrap();
    }
    let greedy = UnixStream::connect(host.socket(1)).unwrap();
    let (mut ask, mut take) = (greedy.try_clone().unwrap(), greedy.try_clone().unwrap());
    let writes = message(Request::Write { path: path("data"), value: vec![] }).repeat(1000);
    let asking = std::thread::spawn(move || while ask.write_all(&writes).is_ok() {});
    let taking =
        std::thread::spawn(move || while take.read(&mut [0; 1 << 16]).is_ok_and(|n| n > 0) {});
    let (socket, read) = (host.socket(0), message(Request::Read(path("/local"))));
    let modest = tokio::task::spawn_blocking(move || {
        // By then the greedy client is busy.
        std::thread::sleep(Duration::from_millis(100));
        let mut modest = UnixStream::connect(socket)?;
        modest.set_read_timeout(Some(Duration::from_secs(5)))?;
        let answered = (0..10).try_for_each(|_| {
            modest.write_all(&read)?;
            modest.read_exact(&mut [0; HEADER_LEN])
        });
        greedy.shutdown(std::net::Shutdown::Both)?;
        answered
    });
    modest.await.unwrap().unwrap();
    asking.join().unwrap();
    taking.join().unwrap();
}

/// The device, as far as it can be tested without Xen: a FIFO opened once for both directions, like
/// the device, returns every message, so that a request reads as its own reply.
#[tokio::test]
async fn the_device_is_one_file_for_both_ways() {
    let host = Host::new();
    let fifo = host.dir.join("xenbus");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let client = Client::connect(Endpoint::Device(fifo)).await.unwrap();
    assert_eq!(soon(client.read("/echo")).await.unwrap(), b"/echo\0");
    assert_eq!(soon(client.read("/again")).await.unwrap(), b"/again\0");
    // The kernel's buffer holds the header, too.
    let max = PAYLOAD_MAX - HEADER_LEN;
    let refused = client.write("/a", vec![0; max - 2]).await;
    assert!(matches!(refused, Err(Error::Wire(WireError::TooLong { len, max: limit }))
        if limit == max && len == max + 1));
}

/// The kernel keeps one message per open file and sends it later. A terminal is a device whose other
/// end a test can hold.
#[tokio::test]
async fn the_device_gets_one_request_at_a_time() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut raw = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut raw);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &raw).unwrap();
    let client = Client::connect(Endpoint::Device(ttyname(&pty.slave).unwrap())).await.unwrap();
    let mut kernel = std::fs::File::from(pty.master);
    let (requests, arrived) = std::sync::mpsc::channel();
    let mut reader = kernel.try_clone().unwrap();
    std::thread::spawn(move || {
        let mut message = vec![0; HEADER_LEN + b"/a\0".len()];
        while reader.read_exact(&mut message).is_ok() && requests.send(message.clone()).is_ok() {}
    });
    let reads: Vec<_> = ["/a", "/b", "/c"]
        .map(|path| {
            (
                path,
                tokio::spawn({
                    let client = client.clone();
                    async move { client.read(path).await }
                }),
            )
        })
        .into();
    let waiting = tokio::task::spawn_blocking(move || {
        for _ in 0..3 {
            let message = arrived.recv_timeout(Duration::from_secs(10)).unwrap();
            assert!(arrived.recv_timeout(Duration::from_millis(200)).is_err(), "two at a time");
            // A request reads as its own reply.
            kernel.write_all(&message).unwrap();
        }
        kernel
    });
    for (path, read) in reads {
        assert_eq!(soon(read).await.unwrap().unwrap(), format!("{path}\0").into_bytes());
    }
    waiting.await.unwrap();
}

/// More names than fit in one message, and more requests than may be outstanding.
#[tokio::test]
async fn long_directories_and_many_requests() {
    let host = Host::new();
    let client = connect(&host, 0).await;
    let names: Vec<_> = (0..1500).map(|number| format!("name-{number:04}")).collect();
    let writers = names.iter().map(|name| {
        let (client, path) = (client.clone(), format!("/long/{name}"));
        tokio::spawn(async move { client.write(&path, path.as_bytes()).await })
    });
    let writers: Vec<_> = writers.collect();
    assert!(writers.len() > MAX_OUTSTANDING);
    for writer in writers {
        soon(writer).await.unwrap().unwrap();
    }
    assert_eq!(soon(client.directory("/long")).await.unwrap(), names);
    assert_eq!(client.read_string("/long/name-0042").await.unwrap(), "/long/name-0042");
}

/// Eight tasks increment one node: a lost update or a transaction left open would show.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_are_tried_again() {
    async fn add_one(nodes: &Nodes) -> Result<(), Error> {
        let count: u32 = nodes.read_string("/count").await?.parse().unwrap();
        nodes.write("/count", (count + 1).to_string()).await
    }
    let host = Host::new();
    let client = connect(&host, 0).await;
    client.write("/count", "0").await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    while let Err(error) = client.transact(async |tx| add_one(tx).await).await {
                        assert!(matches!(error, Error::Conflict), "{error}");
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        soon(task).await.unwrap();
    }
    assert_eq!(client.read_string("/count").await.unwrap(), "80");

    let transaction = client.transaction().await.unwrap();
    add_one(&transaction).await.unwrap();
    add_one(&client).await.unwrap();
    assert_eq!(transaction.commit().await.unwrap(), Commit::Conflict);
}

/// A refusal in a transaction that meets a conflict is no answer: both nodes exist before the change
/// and after it.
#[tokio::test]
async fn half_of_a_change_is_not_believed() {
    let host = Host::new();
    let client = connect(&host, 0).await;
    client.write("/disk/backend", "").await.unwrap();
    client.write("/disk/state", "4").await.unwrap();
    let looks = AtomicU32::new(0);
    let state = soon(client.transact(async |tx| {
        tx.read_string("/disk/backend").await?;
        let first = looks.fetch_add(1, Ordering::Relaxed) == 0;
        if first {
            client.rm("/disk").await?;
        }
        let state = tx.read_string("/disk/state").await;
        if first {
            assert!(matches!(state, Err(Error::Refused { errno: Errno::Enoent, .. })), "{state:?}");
            client.write("/disk/backend", "").await?;
            client.write("/disk/state", "1").await?;
        }
        state
    }));
    assert_eq!(state.await.unwrap(), "1");

    // A refusal that repeats is an answer.
    looks.store(0, Ordering::Relaxed);
    let missing = soon(client.transact(async |tx| {
        looks.fetch_add(1, Ordering::Relaxed);
        tx.read("/no-such-node").await
    }));
    assert_eq!(missing.await.unwrap_err().errno(), Some(Errno::Enoent));
    assert_eq!(looks.into_inner(), 2);
}

/// Dropped transactions and watches are released, or an unprivileged domain would soon run out.
#[tokio::test]
async fn what_is_dropped_is_given_back() {
    let host = Host::new();
    host.domain(1);
    let client = connect(&host, 1).await;
    for _ in 0..3 * quota::TRANSACTIONS {
        drop(client.transaction().await.unwrap());
        // Also when a caller gives up before the answer.
        let mut start = Box::pin(client.transaction());
        assert!(futures::poll!(&mut start).is_pending());
    }
    for _ in 0..2 * quota::WATCHES {
        let mut watch = soon(client.watch("device")).await.unwrap();
        assert_eq!(watch.next().await.unwrap(), "device");
        let mut start = Box::pin(client.watch("device"));
        assert!(futures::poll!(&mut start).is_pending());
    }
}

/// XSA-349: requests go on even if nobody takes the events.
#[tokio::test]
async fn undrained_events_do_not_block_requests() {
    let host = Host::new();
    let client = connect(&host, 0).await;
    let mut few = client.watch("/few").await.unwrap();
    let mut many = client.watch("/many").await.unwrap();
    const PATHS: usize = MAX_UNDRAINED_PATHS * 3 / 2;
    for number in 0..PATHS {
        let path = format!("/many/{number}");
        soon(client.write(&path, "")).await.unwrap();
        soon(client.write("/few/one", number.to_string())).await.unwrap();
    }
    // Changes of one path were one event.
    assert_eq!(few.next().await.unwrap(), "/few");
    assert_eq!(few.next().await.unwrap(), "/few/one");
    // There were too many paths: "read it all again", then the later ones.
    assert_eq!(many.next().await.unwrap(), "/many");
    for number in MAX_UNDRAINED_PATHS..PATHS {
        assert_eq!(soon(many.next()).await.unwrap(), format!("/many/{number}"));
    }
    client.write("/few/two", "").await.unwrap();
    assert_eq!(soon(few.next()).await.unwrap(), "/few/two");
}

#[tokio::test]
async fn a_restart_of_the_server_fires_every_watch_again() {
    let host = Host::new();
    let client = connect(&host, 0).await;
    // More watches than requests may be outstanding.
    let mut watches = Vec::new();
    for number in 0..3 * MAX_OUTSTANDING {
        watches.push(client.watch(&format!("/w/{number}")).await.unwrap());
    }
    for watch in &mut watches {
        soon(watch.next()).await.unwrap();
    }
    let transaction = client.transaction().await.unwrap();

    host.server.shutdown();
    host.server.listen(host.socket(0), 0).unwrap();
    for watch in &mut watches {
        let path = watch.path().to_owned();
        assert_eq!(soon(watch.next()).await.unwrap(), path);
    }
    // They work: a change arrives at the right watch.
    client.write("/w/7/state", "1").await.unwrap();
    assert_eq!(soon(watches[7].next()).await.unwrap(), "/w/7/state");
    // A transaction of the earlier connection must not become one of this connection.
    let lost = transaction.write("/x", "").await;
    assert!(matches!(lost, Err(Error::ConnectionLost)));
    assert!(matches!(transaction.commit().await, Err(Error::ConnectionLost)));
    assert!(client.read("/x").await.unwrap_err().is_not_found());
}

/// Requests wait for the server to come back: those it never saw, and those it did not answer.
#[tokio::test]
async fn requests_wait_for_the_connection() {
    let host = Host::new();
    let client = connect(&host, 0).await;
    let mut watch = client.watch("/first").await.unwrap();
    soon(watch.next()).await.unwrap();
    host.server.shutdown();
    let mut requests = Box::pin(async {
        client.write("/x", "1").await?;
        let mut watch = client.watch("/x").await?;
        assert_eq!(watch.next().await?, "/x");
        let transaction = client.transaction().await?;
        transaction.write("/x", "2").await?;
        assert_eq!(transaction.commit().await?, Commit::Committed);
        client.read_string("/x").await
    });
    // Sent to a connection that is closed already, or to none.
    for _ in 0..100 {
        assert!(futures::poll!(&mut requests).is_pending());
        tokio::task::yield_now().await;
    }
    host.server.listen(host.socket(0), 0).unwrap();
    assert_eq!(soon(requests).await.unwrap(), "2");
}

/// However often the server restarts, each addition is made at least once, and a second time only
/// after a warning by `may_be_done`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_start_over_with_the_connection() {
    const ADDITIONS: u32 = 500;
    const RESTARTS: u32 = 30;
    let host = Host::new();
    let client = connect(&host, 0).await;
    client.write("/count", "0").await.unwrap();
    let warned = AtomicU32::new(0);
    let additions = async {
        for number in 1..=ADDITIONS {
            let count = soon(client.transact(async |tx| {
                let count: u32 = tx.read_string("/count").await?.parse().unwrap();
                if count == number {
                    assert!(tx.may_be_done(), "done twice without a warning");
                    warned.fetch_add(1, Ordering::Relaxed);
                    return Ok(count);
                }
                tx.write("/count", number.to_string()).await?;
                Ok(number)
            }));
            assert_eq!(count.await.unwrap(), number);
        }
    };
    let restarts = async {
        for _ in 0..RESTARTS {
            // The next restart comes when something has got through.
            let before = client.read_string("/count").await.unwrap();
            host.server.shutdown();
            host.server.listen(host.socket(0), 0).unwrap();
            while before != ADDITIONS.to_string()
                && soon(client.read_string("/count")).await.unwrap() == before
            {}
        }
    };
    tokio::join!(additions, restarts);
    assert_eq!(client.read_string("/count").await.unwrap(), ADDITIONS.to_string());
    assert!(warned.into_inner() <= RESTARTS);
}

/// Without its runtime, a client fails instead of waiting for ever.
#[test]
fn a_client_whose_runtime_is_gone_fails() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let host = first.block_on(async { Host::new() });
    let client = first.block_on(connect(&host, 0));
    drop(first);
    runtime().block_on(async {
        assert!(matches!(soon(client.read("/x")).await, Err(Error::ConnectionLost)));
        assert!(matches!(soon(client.watch("/x")).await, Err(Error::ConnectionLost)));
        let transacted = soon(client.transact(async |tx| tx.write("/x", "").await)).await;
        assert!(matches!(transacted, Err(Error::ConnectionLost)));
    });
}

/// A watch that xenstore refuses to register again reports it, instead of staying silent.
#[tokio::test]
async fn a_watch_refused_after_a_restart_fails() {
    let host = Host::new();
    host.domain(1);
    let client = connect(&host, 1).await;
    let mut watch = client.watch("device").await.unwrap();
    soon(watch.next()).await.unwrap();
    host.server.shutdown();
    // Another program in the domain uses up its watches.
    let other = host.dir.join("other");
    host.server.listen(&other, 1).unwrap();
    let other = Client::connect(Endpoint::Unix(other)).await.unwrap();
    let mut taken = Vec::new();
    for _ in 0..quota::WATCHES {
        taken.push(other.watch("x").await.unwrap());
    }
    host.server.listen(host.socket(1), 1).unwrap();
    let refused = soon(watch.next()).await.unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::Enospc));
}

/// A client that watches and does not read costs the server a bounded queue; when it reads again it
/// is told to look at everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_late_is_told_to_look_again() {
    let host = Host::new();
    let client = connect(&host, 0).await;
    let mut late = UnixStream::connect(host.socket(0)).unwrap();
    let mut bytes = Vec::new();
    let watch = Request::Watch { path: Path::new("/w").unwrap(), token: vec![b't'; 900] };
    watch.to_packet(1, 0).unwrap().encode(&mut bytes);
    late.write_all(&bytes).unwrap();
    // Each event has 900 bytes: three times what the server and the socket may hold.
    let all = 3 * (quota::OUTBOX_BYTES + quota::OUTBOX_BYTES) / 900;
    for number in 0..all {
        soon(client.write(&format!("/w/{number}"), "")).await.unwrap();
    }
    let read = tokio::task::spawn_blocking(move || {
        let (mut decoder, mut buf, mut events, mut on_itself) =
            (Decoder::default(), [0; 4096], 0, 0);
        // The first is for the registration.
        while on_itself < 2 {
            let len = late.read(&mut buf).unwrap();
            assert_ne!(len, 0, "closed");
            let mut input = &buf[..len];
            while let Some(packet) = decoder.feed(&mut input).unwrap() {
                events += 1;
                on_itself += usize::from(packet.payload.starts_with(b"/w\0"));
            }
        }
        events
    });
    assert!(soon(read).await.unwrap() < all / 2);
}
