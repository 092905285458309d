//! What the toolstack writes, seen by both ends through their own xenstore connections.

use super::*;
use std::process::Output;
use xen_embedded::XENSTORED_SOCKET;
use xen_platform::embedded::protocol::{XENSTORE_SOCKET, domain_dir};
use xenstore_glue::client::{Client, Endpoint};
use xenstore_glue::wire::Errno;

async fn xenstore(host: &TestHost, domid: DomId) -> Client {
    let socket = match domid.0 {
        0 => host.dir.join(XENSTORED_SOCKET),
        _ => domain_dir(&host.dir, domid).join(XENSTORE_SOCKET),
    };
    Client::connect(Endpoint::Unix(socket)).await.unwrap()
}

/// A `xen-embedded` that runs while the test plays the backend.
fn start_cli(host: &TestHost, args: &[&str]) -> tokio::task::JoinHandle<Output> {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_xen-embedded"));
    command.arg("--dir").arg(&host.dir).args(args);
    tokio::spawn(async move { command.output().await.unwrap() })
}

async fn wait_for(client: &Client, path: &str, value: Option<&str>) {
    let wait = async {
        let mut watch = client.watch(path).await.unwrap();
        while client.read_optional(path).await.unwrap().as_deref() != value.map(str::as_bytes) {
            watch.next().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| unreachable!("{path} {value:?}"));
}

const DISK: &str = "vdev=xvda,format=raw,backendtype=tap,backend=stor,target=null:64G";

#[tokio::test]
async fn a_domain_owns_what_libxl_gives_it_and_reads_its_name() {
    let host = TestHost::start();
    let a = host.create("a", OnCrash::Destroy);
    let b = host.create("b", OnCrash::Destroy);
    let guest = xenstore(&host, a).await;
    assert_eq!(guest.read("name").await.unwrap(), b"a");
    assert_eq!(guest.read("cpu/1/availability").await.unwrap(), b"online");
    guest.write("data/x", "1").await.unwrap();
    guest.write("error/device/vbd/1/error", "text").await.unwrap();
    let theirs = format!("/local/domain/{}/name", b.0);
    for refused in [
        guest.write("name", "b").await.unwrap_err(),
        guest.write("device/vbd/1/backend", "x").await.unwrap_err(),
        guest.read(&theirs).await.unwrap_err(),
        guest.directory(&format!("/libxl/{}", a.0)).await.unwrap_err(),
    ] {
        assert_eq!(refused.errno(), Some(Errno::Eacces), "{refused}");
    }
}

#[tokio::test]
async fn a_disk_comes_and_goes() {
    let host = TestHost::start();
    let stor = host.create("stor", OnCrash::Preserve);
    let guest = host.create("guest", OnCrash::Destroy);
    let backend = xenstore(&host, stor).await;
    let dir = format!("backend/vbd3/{}/51712", guest.0);
    let state = format!("{dir}/state");

    let attach = start_cli(&host, &["attach", "guest", DISK]);
    wait_for(&backend, &state, Some("1")).await;
    assert_eq!(backend.read(&format!("{dir}/params")).await.unwrap(), b"aio:null:64G");
    backend.write(&state, "2").await.unwrap();
    let attached = attach.await.unwrap();
    assert!(attached.status.success(), "{attached:?}");
    let told = format!("51712 /local/domain/{}/{dir}\n", stor.0);
    assert_eq!(String::from_utf8(attached.stdout).unwrap(), told);

    let (done, _, complaint) = host.cli(&["attach", "guest", DISK]);
    assert!(!done && complaint.contains("already has device 51712"), "{complaint}");

    let frontend = xenstore(&host, guest).await;
    frontend.write("device/vbd/51712/queue-0/event-channel", "5").await.unwrap();
    frontend.write("device/vbd/51712/queue-0/ring-ref", "8").await.unwrap();
    frontend.write("device/vbd/51712/state", "3").await.unwrap();
    let (_, table, _) = host.cli(&["list", "guest"]);
    let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
    let (be, fe) = (stor.0.to_string(), guest.0.to_string());
    assert_eq!(row[..6], ["51712", &be, &fe, "3", "5", "8"], "{table}");

    let detach = start_cli(&host, &["detach", "guest", "xvda"]);
    wait_for(&backend, &state, Some("5")).await;
    assert_eq!(backend.read(&format!("{dir}/online")).await.unwrap(), b"0");
    backend.write(&state, "6").await.unwrap();
    // A driver domain removes the backend's directory itself.
    wait_for(&frontend, "device/vbd/51712", None).await;
    backend.rm(&dir).await.unwrap();
    let detached = detach.await.unwrap();
    assert!(detached.status.success(), "{detached:?}");
    assert_eq!(host.cli(&["list"]).1.lines().count(), 1);

    let (done, _, complaint) = host.cli(&["detach", "guest", "xvda"]);
    assert!(!done && complaint.contains("has no device 51712"), "{complaint}");
}

#[tokio::test]
async fn a_backend_that_refuses_a_disk_is_quoted() {
    let host = TestHost::start();
    let stor = host.create("stor", OnCrash::Preserve);
    let guest = host.create("guest", OnCrash::Destroy);
    let backend = xenstore(&host, stor).await;
    let dir = format!("backend/vbd3/{}/51712", guest.0);
    let attach = start_cli(&host, &["attach", "guest", DISK]);
    wait_for(&backend, &format!("{dir}/state"), Some("1")).await;
    backend.write(&format!("{dir}/hotplug-error"), "no \x1b[31m such file").await.unwrap();
    backend.write(&format!("{dir}/hotplug-status"), "error").await.unwrap();
    let attached = attach.await.unwrap();
    let complaint = String::from_utf8(attached.stderr).unwrap();
    assert!(!attached.status.success() && complaint.contains("such file"), "{complaint}");
    assert!(!complaint.contains('\x1b'), "{complaint}");

    assert!(host.cli(&["attach", "guest", "xvda,raw"]).2.contains("^"));
    let served_by_guest = "vdev=xvdb,backend=guest,target=null:1G";
    let (done, _, complaint) = host.cli(&["attach", "guest", served_by_guest]);
    assert!(!done && complaint.contains("no driver domain"), "{complaint}");
}

/// A task that writes to a node as long as it may.
fn keep_writing(client: Client, path: String) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move { while client.write(&path, "6").await.is_ok() {} })
}

/// Either end could make a transaction fail.
#[tokio::test]
async fn neither_end_can_veto_a_removal() {
    let host = TestHost::start();
    let dom0 = xenstore(&host, DomId(0)).await;
    let stor = host.create("stor", OnCrash::Preserve);
    let guest = host.create("guest", OnCrash::Preserve);
    for disk in ["xvda", "xvdb"] {
        let line = format!("vdev={disk},format=raw,backendtype=tap,backend=stor,target=null:1G");
        assert!(host.cli(&["attach", "guest", &line, "--no-wait"]).0);
    }
    let (front, back) = (xenstore(&host, guest).await, xenstore(&host, stor).await);
    let dir = format!("backend/vbd3/{}/51712", guest.0);
    let _ends = [
        keep_writing(front, "device/vbd/51712/state".to_owned()),
        keep_writing(xenstore(&host, guest).await, "device/vbd/51728/state".to_owned()),
        keep_writing(xenstore(&host, guest).await, "data/x".to_owned()),
        keep_writing(back, format!("{dir}/state")),
    ];
    for removal in [&["detach", "guest", "xvda", "--force"][..], &["domain", "destroy", "guest"]] {
        let removed = start_cli(&host, removal).await.unwrap();
        assert!(removed.status.success(), "{removed:?}");
    }
    for gone in [format!("/local/domain/{}", guest.0), format!("/libxl/{}", guest.0)] {
        assert!(!dom0.exists(&gone).await.unwrap(), "{gone}");
    }
}

#[tokio::test]
async fn a_destroyed_guest_leaves_its_backends_to_close() {
    let host = TestHost::start();
    let guest = host.create("guest", OnCrash::Destroy);
    let dom0 = xenstore(&host, DomId(0)).await;
    let disk = "vdev=xvdb,format=raw,target=null:1G";
    assert!(host.cli(&["attach", "guest", disk, "--no-wait"]).0);
    let dir = format!("/local/domain/0/backend/vbd/{}/51728", guest.0);
    dom0.write(&format!("{dir}/state"), "4").await.unwrap();
    let mut released = dom0.watch("@releaseDomain").await.unwrap();
    released.next().await.unwrap();

    // Its process ends, and with it the domain.
    drop(EmbeddedPlatform::attach(&host.dir, "guest").unwrap());
    tokio::time::timeout(PATIENCE, released.next()).await.unwrap().unwrap();
    assert!(!dom0.exists(&format!("/local/domain/{}", guest.0)).await.unwrap());
    assert_eq!(dom0.read(&format!("{dir}/state")).await.unwrap(), b"5");
    assert_eq!(dom0.read(&format!("{dir}/online")).await.unwrap(), b"0");
    dom0.write(&format!("{dir}/state"), "6").await.unwrap();
    wait_for(&dom0, &dir, None).await;
}
