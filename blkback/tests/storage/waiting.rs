//! What ends a wait, and who takes the event.

use crate::rig::{HUNG, Rig, SECTOR, TestFile};
use blkback::storage::{OpKind, Options, Woken, open};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use xen_platform::EventFile;

const SOON: Option<Duration> = Some(Duration::from_millis(20));

fn rig(file: &TestFile, events: EventFile) -> Rig {
    let storage = open(&file.target(), Options::default()).expect("open");
    Rig::woken_by(storage, true, None, Some(events))
}

fn wait(rig: &mut Rig, timeout: Option<Duration>) -> Woken {
    rig.queue().wait(timeout).expect("wait")
}

/// A channel as on the embedded platform: it is never masked.
#[test]
fn an_event_is_taken_once_whenever_it_comes() {
    let file = TestFile::on_disk(1 << 20);
    let channel = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let descriptor = channel.as_fd().try_clone_to_owned().expect("clone");
    let events = EventFile { descriptor, event_bytes: size_of::<u64>() as u32, unmask: false };
    let mut rig = rig(&file, events);
    for round in 0..100_u64 {
        // It comes before the wait, with the previous poll still armed, and at times beside an operation.
        let busy = round % 2 == 1;
        if busy {
            let piece = rig.piece(0, 0, SECTOR);
            rig.submit(0, OpKind::Read, round * SECTOR as u64, vec![piece]);
        }
        channel.write(1 + round).expect("event");
        while wait(&mut rig, Some(HUNG)) != Woken::Event {}
        assert!(channel.read().is_err(), "the event was taken");
        if busy {
            assert!(rig.finish().into_iter().all(|completion| completion.result.is_ok()));
        }
        assert_eq!(wait(&mut rig, Some(Duration::ZERO)), Woken::Time);
    }
    // The kernel still waits for an event; that must not outlive the queue.
    drop(rig);
    channel.write(7).expect("event");
    assert_eq!(channel.read().expect("left alone"), 7);
}

/// A channel as on Xen: it is masked until what was read is written back.
#[test]
fn an_event_is_unmasked_by_the_wait_after_it() {
    let file = TestFile::on_disk(4096);
    let (mut port, ours) = UnixStream::pair().expect("socket");
    for socket in [&port, &ours] {
        socket.set_nonblocking(true).expect("non-blocking");
    }
    let events = EventFile { descriptor: ours.into(), event_bytes: 4, unmask: true };
    let mut rig = rig(&file, events);
    assert_eq!(wait(&mut rig, SOON), Woken::Time);
    let mut back = [0; 8];
    for event in [*b"ABCD", *b"EFGH"] {
        port.write_all(&event).expect("event");
        assert_eq!(wait(&mut rig, Some(HUNG)), Woken::Event);
        let early = port.read(&mut back).map_err(|error| error.kind());
        assert_eq!(early, Err(ErrorKind::WouldBlock), "masked until the work is done");
        assert_eq!(wait(&mut rig, SOON), Woken::Time);
        assert_eq!(port.read(&mut back).expect("unmasked"), 4);
        assert_eq!(back[..4], event);
    }
    // What cannot be read as an event is left to whoever is woken.
    port.write_all(b"IJ").expect("half an event");
    assert_eq!(wait(&mut rig, Some(HUNG)), Woken::Descriptor);
    assert_eq!(wait(&mut rig, SOON), Woken::Time);
    port.write_all(b"KL").expect("anything");
    assert_eq!(wait(&mut rig, Some(HUNG)), Woken::Descriptor);
    assert_eq!(wait(&mut rig, Some(HUNG)), Woken::Descriptor);
}
