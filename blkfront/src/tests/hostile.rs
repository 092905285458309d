//! A backend that lies loses its device, and nothing else happens.

use super::*;
use crate::{Cause, Completed, Io, IoError, Refusal, Violation};

fn lie(conduct: Conduct, vcpus: u32) -> Violation {
    let mut rig = Rig::new(small(vcpus), 1);
    let backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::None), conduct);
    let mut queues: Vec<Queue> = (0..vcpus).map(|vcpu| rig.queue(vcpu)).collect();
    let mut done = Vec::new();
    for queue in &mut queues {
        queue.plug();
        for cookie in 0..8 {
            let buffer = queue.alloc(4096).unwrap();
            // Far apart: eight requests.
            queue.submit(Io::read(cookie, cookie * 8192, buffer)).unwrap();
        }
        queue.unplug();
    }
    for queue in &mut queues {
        while queue.in_flight() > 0 {
            queue.wait(&mut done, None);
        }
        let refused = queue.submit(Io::flush(0)).unwrap_err();
        assert_eq!(refused.reason, Refusal::Gone);
        assert!(queue.alloc(4096).is_none(), "the backend may be at work on any page");
    }
    // Until here it works on what it has taken: the queues' pages must still be granted.
    drop(backend);
    assert_eq!(done.len(), 8 * vcpus as usize);
    assert!(done.iter().any(|completed| completed.result == Err(IoError::Gone)));
    let kept_back = |io: &Completed| io.buffer.is_none() == (io.result == Err(IoError::Gone));
    assert!(done.iter().all(kept_back));
    match rig.commands.try_recv().unwrap() {
        Command::Failed(Cause::Violation { violation, ring: 0 }) => violation,
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn a_lie_stops_the_device() {
    for vcpus in [1, 2] {
        assert!(matches!(lie(Conduct::UnknownId, vcpus), Violation::Id { .. }));
        assert!(matches!(lie(Conduct::TagBeyondRing, vcpus), Violation::Id { .. }));
        assert!(matches!(lie(Conduct::Twice, vcpus), Violation::Id { .. }));
        assert!(matches!(lie(Conduct::OtherOperation, vcpus), Violation::Operation { .. }));
        assert!(matches!(lie(Conduct::Overrun, vcpus), Violation::Ring(_)));
    }
}

#[test]
fn an_error_is_an_error_of_its_io_only() {
    let mut rig = Rig::new(small(1), 1);
    let backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::None), Conduct::Fails);
    let mut queue = rig.queue(0);
    assert_eq!(
        queue.read_at(0, &mut [0; 512]).unwrap_err().kind(),
        std::io::Error::from_raw_os_error(libc::EIO).kind()
    );
    drop(backend);
    let _backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::None), Conduct::Good);
    queue.read_at(0, &mut [0; 512]).unwrap();
}

/// A backend that copies holds no mapping of a page that it has yet to write to.
#[test]
fn what_a_backend_may_copy_to_stays_granted() {
    let mut rig = Rig::new(small(1), 1);
    let limits = Rig::limits(UNION, 0, FlushMode::None);
    let backend = rig.connect(UNION, limits, Conduct::FallsSilent(0));
    let mut queue = rig.queue(0);
    let buffer = queue.alloc(4096).unwrap();
    queue.submit(Io::read(0, 0, buffer)).unwrap();
    let granted = rig.host.granted();
    drop(queue);
    // All but the ring.
    assert_eq!(rig.host.granted(), granted - 1);
    drop(backend);
    let host = rig.host.clone();
    drop(rig);
    assert_eq!(host.granted(), 0);
}
