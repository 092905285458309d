//! A backend that dies, and the one that comes after it.

use super::*;
use crate::link::Notice;
use crate::{Io, Op, Refusal};
use std::time::{Duration, Instant};

/// Bytes of each of the writes: 24 pages, an indirect request.
const LONG: usize = 24 * 4096;
const WRITES: u64 = 20;

fn replaced(vcpus: u32, first: RingLayout, second: RingLayout) {
    let mut rig = Rig::new(small(vcpus), 1);
    let limits = Rig::limits(first, 32, FlushMode::Cache);
    let backend = rig.connect(first, limits, Conduct::FallsSilent(3));
    let mut queues: Vec<Queue> = (0..vcpus).map(|vcpu| rig.queue(vcpu)).collect();
    let mut done = Vec::new();
    let part = DISK as u64 / u64::from(vcpus);
    for (base, queue) in (0..).map(|n| n * part).zip(&mut queues) {
        for n in 0..WRITES {
            let mut buffer = queue.alloc(LONG).unwrap();
            buffer.write(0, &[n as u8 + 1; LONG]);
            let io = Io::write_fua(n, base + n * LONG as u64, buffer);
            queue.submit(io).unwrap();
        }
    }
    // Take all three answers: everything else is in flight, or waits.
    while rig.fabric.stats(0).responses < 3 {
        queues.iter_mut().for_each(|queue| {
            queue.poll(&mut done);
        });
    }
    drop(backend);
    rig.fabric.post(|| Notice::Down);
    for queue in &mut queues {
        queue.poll(&mut done);
        // I/O is also taken without a backend.
        let mut buffer = queue.alloc(512).unwrap();
        buffer.write(0, &[99; 512]);
        queue.submit(Io::write(99, part * u64::from(queue.vcpu()) + part - 512, buffer)).unwrap();
        assert!(queue.in_flight() > 0);
    }
    rig.storage().log.clear();
    // No indirect requests any more: each becomes several.
    let limits = Rig::limits(second, 0, FlushMode::Cache);
    let _backend = rig.connect(second, limits, Conduct::Good);
    for queue in &mut queues {
        while queue.in_flight() > 0 {
            queue.wait(&mut done, None);
        }
    }
    assert_eq!(done.len() as u64, (WRITES + 1) * u64::from(vcpus));
    assert!(done.iter().all(|completed| completed.result.is_ok()));
    let storage = rig.storage();
    for vcpu in 0..vcpus as usize {
        let base = vcpu * part as usize;
        for n in 0..WRITES as usize {
            let at = base + n * LONG;
            assert!(storage.data[at..at + LONG].iter().all(|b| usize::from(*b) == n + 1));
        }
        assert_eq!(storage.data[base + part as usize - 1], 99);
    }
    let most = second.max_direct_segments() as u64 * 8;
    assert!(storage.log.iter().all(|(_, sectors)| *sectors <= most));
    assert!(rig.fabric.stats(0).lost > 0);
}

#[test]
fn what_was_in_flight_is_issued_again() {
    replaced(1, UNION, UNION);
    replaced(1, RingLayout::Split, UNION);
    replaced(2, UNION, RingLayout::Split);
}

#[test]
fn a_backend_that_never_comes_back_fails_what_waits() {
    let mut rig = Rig::new(small(1), 1);
    let limits = Rig::limits(UNION, 0, FlushMode::None);
    let backend = rig.connect(UNION, limits, Conduct::FallsSilent(0));
    let mut queue = rig.queue(0);
    let buffer = queue.alloc(512).unwrap();
    queue.submit(Io::read(1, 0, buffer)).unwrap();
    drop(backend);
    rig.fabric.post(|| Notice::Down);
    rig.fabric.post(|| Notice::Gone);
    let mut done = Vec::new();
    queue.wait(&mut done, None);
    assert_eq!(done[0].result, Err(crate::IoError::Gone));
    let refused = queue.submit(Io::flush(2)).unwrap_err();
    assert_eq!(refused.reason, Refusal::Gone);
}

#[test]
fn the_thread_that_sleeps_hears_of_it() {
    let mut rig = Rig::new(small(1), 1);
    let limits = Rig::limits(UNION, 0, FlushMode::None);
    let backend = rig.connect(UNION, limits, Conduct::FallsSilent(0));
    let mut queue = rig.queue(0);
    let reader = std::thread::spawn(move || queue.read_at(0, &mut [0; 512]));
    while rig.storage().log.is_empty() {
        std::thread::yield_now();
    }
    drop(backend);
    let _backend = rig.connect(UNION, limits, Conduct::Good);
    reader.join().unwrap().unwrap();
}

#[test]
fn a_durable_write_is_flushed_where_only_the_new_backend_has_a_cache() {
    use ring_proto::abi::op::{FLUSH_DISKCACHE, WRITE};
    let mut rig = Rig::new(small(1), 1);
    let none = Rig::limits(UNION, 0, FlushMode::None);
    let backend = rig.connect(UNION, none, Conduct::FallsSilent(0));
    let mut queue = rig.queue(0);
    let buffer = queue.alloc(512).unwrap();
    queue.submit(Io::write_fua(0, 0, buffer)).unwrap();
    while rig.storage().log.is_empty() {
        std::thread::yield_now();
    }
    drop(backend);
    rig.storage().log.clear();
    let cache = Rig::limits(UNION, 0, FlushMode::Cache);
    let _backend = rig.connect(UNION, cache, Conduct::Good);
    let mut done = Vec::new();
    queue.wait(&mut done, None);
    assert_eq!(done[0].result, Ok(()));
    assert_eq!(rig.storage().log, [(WRITE, 1), (FLUSH_DISKCACHE, 0)]);
}

#[test]
fn a_flush_reaches_a_new_backend_with_a_cache_that_its_queue_has_not_heard_of() {
    use ring_proto::abi::op::{FLUSH_DISKCACHE, WRITE};
    // Each with a ring of its own, and both on one.
    for rings in [2, 1] {
        let mut rig = Rig::new(small(2), rings);
        let none = Rig::limits(UNION, 0, FlushMode::None);
        let backend = rig.connect(UNION, none, Conduct::Good);
        let (mut idle, mut busy) = (rig.queue(0), rig.queue(1));
        idle.flush().unwrap();
        assert!(rig.storage().log.is_empty(), "nothing to flush");
        drop(backend);
        rig.fabric.post(|| Notice::Down);
        let _backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::Cache), Conduct::Good);
        busy.write_at(0, &[7; 512]).unwrap();
        idle.flush().unwrap();
        assert_eq!(rig.storage().log, [(WRITE, 1), (FLUSH_DISKCACHE, 0)]);
    }
}

#[test]
fn what_a_new_backend_has_no_request_for_is_not_sent() {
    let mut rig = Rig::new(small(1), 1);
    let cache = Limits { secure_discard: true, ..Rig::limits(UNION, 0, FlushMode::Cache) };
    let backend = rig.connect(UNION, cache, Conduct::FallsSilent(0));
    let mut queue = rig.queue(0);
    queue.submit(Io::flush(0)).unwrap();
    let discard = |cookie, secure| {
        let op = Op::Discard { len: 4096, secure };
        Io { cookie, op, offset: 0, buffer: None }
    };
    queue.submit(discard(1, true)).unwrap();
    queue.submit(discard(2, false)).unwrap();
    while rig.storage().log.len() < 3 {
        std::thread::yield_now();
    }
    drop(backend);
    rig.storage().log.clear();
    let _backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::None), Conduct::Good);
    let mut done = Vec::new();
    while queue.in_flight() > 0 {
        queue.wait(&mut done, None);
    }
    done.sort_by_key(|completed| completed.cookie);
    let results: Vec<_> = done.iter().map(|completed| completed.result).collect();
    assert_eq!(results, [Ok(()), Err(crate::IoError::NotSupported), Ok(())]);
    assert_eq!(rig.storage().log, [(ring_proto::abi::op::DISCARD, 8)]);
}

#[test]
fn an_answer_that_was_shown_before_the_backend_went_counts() {
    for vcpus in [1, 2] {
        let mut rig = Rig::new(small(vcpus), 1);
        let limits = Rig::limits(UNION, 0, FlushMode::Cache);
        let backend = rig.connect(UNION, limits, Conduct::AnswersLast);
        let mut queue = rig.queue(0);
        queue.submit(Io::flush(0)).unwrap();
        while rig.storage().log.is_empty() {
            std::thread::yield_now();
        }
        drop(backend);
        rig.fabric.post(|| Notice::Down);
        let mut done = Vec::new();
        assert_eq!(queue.wait(&mut done, Some(Duration::from_secs(5))), 1);
        assert_eq!(done[0].result, Ok(()));
    }
}

#[test]
fn a_ring_s_owner_sleeps_while_a_vcpu_knows_of_more_connections() {
    let mut rig = Rig::new(small(2), 1);
    let limits = Rig::limits(UNION, 0, FlushMode::Cache);
    let _backend = rig.connect(UNION, limits, Conduct::Good);
    let mut queue = rig.queue(0);
    let end = Instant::now() + Duration::from_secs(5);
    let sleeps_again = |before| {
        while rig.fabric.stats(0).sleeps == before {
            assert!(Instant::now() < end, "it does not sleep");
            std::thread::yield_now();
        }
    };
    sleeps_again(0);
    // The owner's notice of the second connection was replaced by a later one.
    rig.fabric.link.mailboxes[0].post(Notice::Up { connection: 2, limits, ring: None });
    queue.poll(&mut Vec::new());
    let before = rig.fabric.stats(0).sleeps;
    queue.submit(Io::flush(0)).unwrap();
    sleeps_again(before);
}
