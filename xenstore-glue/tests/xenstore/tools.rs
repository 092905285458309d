//! Debian's xenstore-utils, which speak through libxenstore.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{Host, program, soon};

/// Runs `line` and returns what it printed, or its complaint if it failed.
async fn run(socket: &Path, line: &[&str]) -> Result<String, String> {
    let mut command = program(line[0], socket);
    let output = soon(command.args(&line[1..]).output()).await.expect("xenstore-utils installed");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_write_list_and_remove() {
    let host = Host::new();
    let dom0 = host.socket(0);
    run(&dom0, &["xenstore-write", "/a/b", "one", "/a/c", "two"]).await.unwrap();
    assert_eq!(run(&dom0, &["xenstore-read", "/a/b", "/a/c"]).await.unwrap(), "one\ntwo\n");
    assert_eq!(run(&dom0, &["xenstore-list", "/a"]).await.unwrap(), "b\nc\n");
    let ls = run(&dom0, &["xenstore-ls", "-f", "/a"]).await.unwrap();
    assert_eq!(ls, "/a/b = \"one\"\n/a/c = \"two\"\n");
    assert!(run(&dom0, &["xenstore-exists", "/a/b"]).await.is_ok());
    run(&dom0, &["xenstore-rm", "/a/b"]).await.unwrap();
    assert!(run(&dom0, &["xenstore-exists", "/a/b"]).await.is_err());
    let refusal = run(&dom0, &["xenstore-read", "/a/b"]).await.unwrap_err();
    assert!(refusal.contains("couldn't read path /a/b"), "{refusal}");
    // Relative paths are dom0's own.
    run(&dom0, &["xenstore-write", "name", "Domain-0"]).await.unwrap();
    let name = host.server.with_store(|store| store.read("/local/domain/0/name"));
    assert_eq!(name.unwrap(), b"Domain-0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions() {
    let host = Host::new();
    host.domain(5);
    let dom0 = host.socket(0);
    run(&dom0, &["xenstore-write", "/secret/key", "value"]).await.unwrap();
    let refusal = run(&host.socket(5), &["xenstore-read", "/secret/key"]).await;
    assert!(refusal.is_err());
    run(&dom0, &["xenstore-chmod", "/secret/key", "n0", "r5"]).await.unwrap();
    let value = run(&host.socket(5), &["xenstore-read", "/secret/key"]).await.unwrap();
    assert_eq!(value, "value\n");
    assert!(run(&host.socket(5), &["xenstore-write", "/secret/key", "mine"]).await.is_err());
    let ls = run(&dom0, &["xenstore-ls", "-p", "/secret"]).await.unwrap();
    assert!(ls.starts_with("key = \"value\"") && ls.contains("(n0,r5)"), "{ls}");
}

/// More names than fit in one message: libxenstore falls back to DIRECTORY_PART.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_longer_than_a_message() {
    let host = Host::new();
    let names: Vec<_> = (0..1000).map(|number| format!("a-rather-long-name-{number:04}")).collect();
    host.server.with_store(|store| {
        for name in &names {
            store.write(&format!("/long/{name}"), b"").unwrap();
        }
    });
    let listed = run(&host.socket(0), &["xenstore-ls", "-f", "/long"]).await.unwrap();
    let expected: Vec<_> = names.iter().map(|name| format!("/long/{name} = \"\"")).collect();
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch() {
    let host = Host::new();
    host.server.with_store(|store| store.write("/seen/key", b"1")).unwrap();
    let mut command = program("xenstore-watch", &host.socket(0));
    let command = command.args(["/seen", "/seen/key"]).stdout(Stdio::piped());
    let mut child = command.spawn().expect("xenstore-utils installed");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || soon(lines.next_line()).await.unwrap().unwrap();
    // Each watch fires when it is registered.
    assert_eq!([next().await, next().await], ["/seen", "/seen/key"]);
    host.server.with_store(|store| store.write("/seen/key", b"2")).unwrap();
    assert_eq!([next().await, next().await], ["/seen/key", "/seen/key"]);
    // A parent is removed: both watches are told, each of its own path.
    host.server.with_store(|store| store.rm("/seen")).unwrap();
    assert_eq!([next().await, next().await], ["/seen/key", "/seen"]);
    child.kill().await.unwrap();
}
