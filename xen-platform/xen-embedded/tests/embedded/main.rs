//! Domains that share memory and events through a real broker.
#![allow(clippy::unwrap_used, reason = "tests")]

mod crash;
mod events;
mod grants;
mod toolstack;

use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, SharedMemory, Window};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use xen_platform::embedded::EmbeddedPlatform;
use xen_platform::embedded::control::{self, Answer, NewDomain, OnCrash};

/// How long to wait for anything that another process must do.
const PATIENCE: Duration = Duration::from_secs(20);

/// A broker in a directory of its own; both go when this is dropped.
struct TestHost {
    dir: PathBuf,
    broker: Child,
}

impl TestHost {
    fn start() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("xe-{}-{n}", std::process::id()));
        let mut broker = Command::new(env!("CARGO_BIN_EXE_xen-embedded"))
            .env("RUST_LOG", "warn")
            .args(["serve", "--dir"])
            .arg(&dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(broker.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("ready"), "the broker said {line:?}");
        Self { dir, broker }
    }

    fn create(&self, name: &str, on_crash: OnCrash) -> DomId {
        let new = NewDomain {
            name: name.to_owned(),
            domid: None,
            memory: 1 << 20,
            vcpus: 2,
            // Only driver domains may use what is granted to them.
            driver_domain: on_crash == OnCrash::Preserve || name == "victim",
            on_crash,
        };
        match control::ask(&self.dir, &control::Command::CreateDomain(new)).unwrap() {
            Answer::Domain(info) => DomId(info.domid),
            other => unreachable!("{other:?}"),
        }
    }

    fn guest(&self, name: &str) -> Arc<EmbeddedPlatform> {
        self.create(name, OnCrash::Preserve);
        EmbeddedPlatform::attach(&self.dir, name).unwrap()
    }

    /// Runs `xen-embedded`. Returns its success, output and complaints.
    fn cli(&self, args: &[&str]) -> (bool, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_xen-embedded"))
            .arg("--dir")
            .arg(&self.dir)
            .args(args)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        let _ = self.broker.kill();
        let _ = self.broker.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Runs one ignored test of this program in a process of its own, with its output piped.
fn spawn_child(test: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--nocapture", "--exact", test])
        .env("XE_TEST_DIR", dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for a condition that another process brings about.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A page's bytes.
fn read_page(memory: &Arc<dyn SharedMemory>, page: usize) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    Window::new(Arc::clone(memory), page * PAGE_SIZE, PAGE_SIZE).unwrap().read(&mut bytes);
    bytes
}

fn fill_page(memory: &Arc<dyn SharedMemory>, page: usize, byte: u8) {
    let window = Window::new(Arc::clone(memory), page * PAGE_SIZE, PAGE_SIZE).unwrap();
    window.write(&[byte; PAGE_SIZE]);
}

/// A `grant_entry_v1` as it lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    flags: u16,
    domid: u16,
    frame: u32,
}

/// From grant_table.h.
const GTF_PERMIT_ACCESS: u16 = 1;
const GTF_READING: u16 = 1 << 3;
const GTF_WRITING: u16 = 1 << 4;

fn entry_window(domain: &EmbeddedPlatform, gref: GrantRef) -> Window {
    Window::new(domain.grant_table(), gref.0 as usize * 8, 8).unwrap()
}

fn entry(domain: &EmbeddedPlatform, gref: GrantRef) -> Entry {
    let mut bytes = [0; 8];
    entry_window(domain, gref).read(&mut bytes);
    let [f0, f1, d0, d1, frame @ ..] = bytes;
    Entry {
        flags: u16::from_le_bytes([f0, f1]),
        domid: u16::from_le_bytes([d0, d1]),
        frame: u32::from_le_bytes(frame),
    }
}

fn write_entry(domain: &EmbeddedPlatform, gref: GrantRef, entry: Entry) {
    let mut bytes = Vec::new();
    bytes.extend(entry.flags.to_le_bytes());
    bytes.extend(entry.domid.to_le_bytes());
    bytes.extend(entry.frame.to_le_bytes());
    entry_window(domain, gref).write(&bytes);
}
