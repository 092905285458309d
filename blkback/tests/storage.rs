//! Disks, as a ring uses them.

#[path = "storage/device.rs"]
mod device;
#[path = "storage/model.rs"]
mod model;
#[path = "storage/rig.rs"]
mod rig;
#[path = "storage/waiting.rs"]
mod waiting;
#[path = "storage/wrappers.rs"]
mod wrappers;

use blkback::storage::{Direct, OpKind, OpenError, Options, open};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rig::{DEPTH, HUNG, Rig, SECTOR, TestFile, parse, skip};
use std::fs::{File, FileTimes};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};
use xen_platform::EventFile;
use xenstore_glue::disk::{Store, Target};

const MIB: usize = 1 << 20;

fn buffered() -> Options {
    Options { direct: Direct::Off, ..Options::default() }
}

fn resize(file: &TestFile, bytes: usize) {
    File::options().write(true).open(&file.0).expect("open").set_len(bytes as u64).expect("resize");
}

#[test]
fn an_image_is_one_writers_or_many_readers() {
    let file = TestFile::on_disk(MIB as u64);
    let read_only = Options { read_only: true, ..buffered() };
    let refused = |options| matches!(open(&file.target(), options), Err(OpenError::Busy { .. }));
    let writer = open(&file.target(), buffered()).expect("open");
    assert!(refused(read_only), "read while it is written");
    drop(open(&file.target(), Options { shared: true, ..buffered() }).expect("shared on purpose"));
    drop(writer);
    let reader = open(&file.target(), read_only).expect("read");
    drop(open(&file.target(), read_only).expect("read twice"));
    drop(reader);
    // Opening waits for a predecessor that is about to go.
    let predecessor = open(&file.target(), buffered()).expect("open");
    std::thread::scope(|scope| {
        let successor = scope.spawn(|| open(&file.target(), buffered()).is_ok());
        std::thread::sleep(Duration::from_millis(200));
        assert!(!successor.is_finished(), "it does not wait");
        drop(predecessor);
        assert!(successor.join().expect("join"), "the image is free again");
    });
}

/// Each queue of a disk in the page cache that may be written to opens the image anew.
#[test]
fn reads_leave_the_access_time_as_it_is() {
    let file = TestFile::on_disk(MIB as u64);
    let image = File::options().write(true).open(&file.0).expect("open");
    // So old that any read would update it, also with `relatime`.
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    image.set_times(FileTimes::new().set_accessed(old)).expect("set the time");
    for options in [buffered(), Options { read_only: true, ..buffered() }, Options::default()] {
        let mut rig = Rig::new(&file.target(), options);
        let piece = rig.piece(1, 0, SECTOR);
        rig.run(OpKind::Read, 0, vec![piece]).expect("read");
        let accessed = image.metadata().and_then(|metadata| metadata.accessed());
        assert_eq!(accessed.expect("the time"), old, "{options:?}");
    }
}

#[test]
fn more_pieces_than_the_kernel_takes_are_transferred_in_turns() {
    let file = TestFile::on_disk(MIB as u64);
    let mut rig = Rig::new(&file.target(), buffered());
    let data: Vec<u8> = (0..MIB).map(|i| (i / SECTOR) as u8 ^ (i % 251) as u8).collect();
    // Uneven pieces, twice as many as UIO_MAXIOV.
    let mut at = 0;
    let mut pieces = Vec::new();
    while at < MIB {
        let len = (1 + at % 1000).min(MIB - at);
        pieces.push(rig.piece(1, at, len));
        at += len;
    }
    assert!(pieces.len() > 2048, "{} pieces", pieces.len());
    rig.piece(1, 0, MIB).fill(&data);
    rig.run(OpKind::Write, 0, pieces.clone()).expect("write");
    assert!(std::fs::read(&file.0).expect("read") == data);

    rig.piece(1, 0, MIB).fill(&vec![0; MIB]);
    rig.run(OpKind::Read, 0, pieces).expect("read");
    assert!(rig.bytes(1, MIB) == data);
}

#[test]
fn a_batch_is_one_system_call_and_an_idle_poll_none() {
    let file = TestFile::on_disk(MIB as u64);
    let mut rig = Rig::new(&file.target(), buffered());
    rig.read(0, MIB).expect("fill the page cache");
    let before = rig.queue().system_calls();
    for tag in 0..DEPTH as u16 {
        let piece = rig.piece(tag, 0, SECTOR);
        rig.submit(tag, OpKind::Read, 0, vec![piece]);
    }
    assert_eq!(rig.queue().system_calls(), before, "submit only queues");
    rig.finish();
    let after = rig.queue().system_calls();
    // One, unless the cache has lost the page again.
    assert!((1..DEPTH as u64).contains(&(after - before)), "{} system calls", after - before);
    let mut none = Vec::new();
    rig.queue().poll(&mut none).expect("poll");
    assert_eq!(rig.queue().system_calls(), after);
}

#[test]
fn discard_frees_blocks() {
    let file = TestFile::on_disk(MIB as u64);
    let mut rig = Rig::new(&file.target(), Options::default());
    if rig.storage.geometry().discard.is_none() {
        return skip("the file system cannot punch holes");
    }
    rig.write(0, &vec![1; MIB]).expect("write");
    rig.run(OpKind::Flush, 0, Vec::new()).expect("flush");
    let blocks = || std::fs::metadata(&file.0).expect("stat").blocks();
    let before = blocks();
    let discard = OpKind::Discard { bytes: (MIB / 2) as u64, secure: false };
    rig.run(discard, 0, Vec::new()).expect("discard");
    assert!(blocks() <= before / 2 + 8, "{} of {before} blocks are left", blocks());
    let secure = OpKind::Discard { bytes: SECTOR as u64, secure: true };
    let refused = rig.run(secure, 0, Vec::new()).expect_err("a file system keeps what it likes");
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    assert_eq!(std::fs::metadata(&file.0).expect("stat").len(), MIB as u64);

    drop(rig);
    let options = Options { discard: false, ..Options::default() };
    let geometry = open(&file.target(), options).expect("open").geometry();
    assert_eq!(geometry.discard, None);
}

#[test]
fn a_file_is_resized_online() {
    let file = TestFile::on_disk(MIB as u64);
    let mut rig = Rig::new(&file.target(), Options::default());
    assert!(rig.write(MIB, &[1; SECTOR]).is_err(), "past the end");
    resize(&file, 2 * MIB);
    assert_eq!(rig.storage.refresh().expect("refresh").sectors as usize * SECTOR, 2 * MIB);
    rig.write(MIB, &[1; SECTOR]).expect("write behind the old end");

    // Shrunk: operations past the new end, known or not, fail, and no write makes the file grow.
    resize(&file, MIB);
    assert!(rig.read(MIB, SECTOR).is_err(), "nothing there to read");
    assert!(rig.read(MIB - SECTOR, 2 * SECTOR).is_err(), "half of it is there");
    rig.storage.refresh().expect("refresh");
    assert!(rig.write(MIB, &[1; SECTOR]).is_err(), "past the end");
    assert_eq!(std::fs::metadata(&file.0).expect("stat").len(), MIB as u64);
}

#[test]
fn dropping_a_queue_waits_for_its_operations() {
    let file = TestFile::on_disk((DEPTH * MIB) as u64);
    std::fs::write(&file.0, vec![0xa5; DEPTH * MIB]).expect("write");
    let mut rig = Rig::new(&file.target(), Options::default());
    for tag in 0..DEPTH as u16 {
        let piece = rig.piece(tag, 0, MIB);
        rig.submit(tag, OpKind::Read, u64::from(tag) * MIB as u64, vec![piece]);
    }
    rig.queue().wait(Some(Duration::ZERO)).expect("send them");
    let region = rig.region.clone();
    drop(rig);
    let arrived = |tag: usize| {
        use ring_proto::{SharedMemory, Window};
        let mut bytes = vec![0; MIB];
        assert_eq!(region.len(), DEPTH * MIB);
        Window::new(region.clone(), tag * MIB, MIB).expect("in range").read(&mut bytes);
        bytes.iter().all(|byte| *byte == 0xa5)
    };
    // Had it not waited, some of the data would still be missing.
    assert!((0..DEPTH).all(arrived));
}

/// Every kind of queue, with and without wrappers.
fn wakeable() -> (Vec<Target>, TestFile) {
    let file = TestFile::on_disk(MIB as u64);
    let path = file.0.display();
    let targets = [
        "null:1M".into(),
        "memory:1M".into(),
        format!("{path}"),
        "delay:60s,null:1M".into(),
        format!("limit:1000iops,error:50%,delay:60s,{path}"),
    ];
    (targets.iter().map(|text| parse(text)).collect(), file)
}

#[test]
fn the_bell_ends_a_wait_as_long_as_it_is_readable() {
    let (targets, _file) = wakeable();
    for target in targets {
        let event = EventFd::new().expect("eventfd");
        let wake: OwnedFd = event.as_fd().try_clone_to_owned().expect("dup");
        let storage = open(&target, Options::default()).expect("open");
        let mut rig = Rig::woken_by(storage, true, Some(wake), None);
        let mut wait = |time| {
            let start = Instant::now();
            rig.queue().wait(Some(time)).expect("wait");
            rig.queue().poll(&mut Vec::new()).expect("poll");
            start.elapsed()
        };
        event.write(1).expect("write");
        // It is not read: readability is a state, not an event.
        for _ in 0..3 {
            assert!(wait(HUNG) < HUNG, "{target:?}: readable, and slept");
        }
        event.read().expect("read");
        // A poll armed earlier may end one more wait.
        wait(Duration::ZERO);
        let time = Duration::from_millis(5);
        assert!(wait(time) >= time, "{target:?}: nothing to wake up for");
        std::thread::scope(|scope| {
            scope.spawn(|| event.write(1).expect("write"));
            assert!(wait(HUNG) < HUNG, "{target:?}: written to while it slept");
        });
    }
}

/// An event and the bell come together, the bell is reported first, and whoever it woke takes the event. The
/// kernel, which has seen the event, finds nothing to read and goes on waiting in the read.
#[test]
fn a_queue_closes_although_its_event_was_taken_by_another() {
    let (targets, _file) = wakeable();
    for target in targets {
        let storage = open(&target, Options::default()).expect("open");
        let (closed, done) = mpsc::channel();
        std::thread::spawn(move || {
            for _ in 0..20 {
                let bell = EventFd::new().expect("eventfd");
                let channel = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
                let descriptor = channel.as_fd().try_clone_to_owned().expect("dup");
                let events = Some(EventFile { descriptor, event_bytes: 8, unmask: false });
                let wake = Some(bell.as_fd().try_clone_to_owned().expect("dup"));
                let mut rig = Rig::woken_by(storage.clone(), true, wake, events);
                rig.queue().wait(Some(Duration::ZERO)).expect("wait for both");
                bell.write(1).expect("write");
                channel.write(1).expect("write");
                rig.queue().wait(Some(HUNG)).expect("wait");
                // There is nothing left if the kernel has read it.
                let _ = channel.read();
            }
            closed.send(()).expect("somebody waits");
        });
        done.recv_timeout(HUNG).unwrap_or_else(|_| panic!("{target:?}: a queue does not close"));
    }
}

#[test]
fn a_refusal_says_why() {
    let check = |path: &Path, expect: &str| {
        let error = open(
            &Target { wrappers: Vec::new(), store: Store::Path(path.into()) },
            Options::default(),
        )
        .err()
        .expect("refused");
        let text = error.to_string();
        assert!(text.contains(expect) && text.contains(path.to_str().expect("UTF-8")), "{text}");
    };
    check(Path::new("/nonexistent/disk.img"), "does not exist");
    check(Path::new("/dev"), "a directory");
    check(Path::new("/dev/null"), "not a disk");
    check(&TestFile::on_disk(0).0, "is empty");
    check(&TestFile::on_disk(1000).0, "has 1000 bytes, not a multiple of 512");
    for bytes in [0, 511] {
        for store in [Store::Null(bytes), Store::Memory(bytes)] {
            let outcome = open(&Target { wrappers: Vec::new(), store }, Options::default());
            assert!(matches!(outcome, Err(OpenError::TargetSize { .. })));
        }
    }
}
