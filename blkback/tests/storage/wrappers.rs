//! Disks that are slow, limited and broken on purpose.

use crate::rig::{DEPTH, Rig, SECTOR, TestFile};
use blkback::storage::{FaultKind, FaultRate, Faults, Limits, OpKind, Options, Target, open};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

const NULL: Target = Target::Null { bytes: 1 << 20 };

fn faulty(kind: Option<FaultKind>, rate: FaultRate) -> Rig {
    Rig::new(&Target::Error(Faults { kind, rate }, Box::new(NULL)), Options::default())
}

#[test]
fn every_third_write_fails() {
    let period = NonZeroU64::new(3).expect("not zero");
    let mut rig = faulty(Some(FaultKind::Write), FaultRate::Every(period));
    let outcomes: Vec<_> = (0..9)
        .map(|_| {
            rig.read(0, SECTOR).expect("reads do not fail");
            rig.write(0, &[0; SECTOR]).map_err(|e| e.raw_os_error())
        })
        .collect();
    let failed = Err(Some(libc::EIO));
    assert_eq!(outcomes, [Ok(()), Ok(()), failed].repeat(3));
}

#[test]
fn a_share_fails_the_same_way_every_time() {
    let sequence = || -> Vec<bool> {
        let mut rig = faulty(None, FaultRate::PerMillion(10_000));
        (0..20_000).map(|_| rig.run(OpKind::Flush, 0, Vec::new()).is_err()).collect()
    };
    let first = sequence();
    let failed = first.iter().filter(|failed| **failed).count();
    assert!((150..=250).contains(&failed), "{failed} of 20000 at 1 %");
    assert!(first == sequence());
}

#[test]
fn a_delay_is_kept_and_counted_in_flight() {
    let delay = Duration::from_millis(5);
    let mut rig = Rig::new(&Target::Delay(delay, Box::new(NULL)), Options::default());
    let start = Instant::now();
    for tag in 0..DEPTH as u16 {
        rig.submit(tag, OpKind::Flush, 0, Vec::new());
    }
    let mut done = Vec::new();
    rig.queue().poll(&mut done).expect("poll");
    if start.elapsed() < delay {
        assert!(done.is_empty(), "completed before its time");
        assert_eq!(rig.queue().in_flight(), DEPTH);
    }
    done.append(&mut rig.finish());
    assert!(start.elapsed() >= delay);
    let tags: Vec<_> = done.iter().map(|completion| completion.tag).collect();
    assert_eq!(tags, (0..DEPTH as u16).collect::<Vec<_>>());
}

#[test]
fn held_operations_do_not_keep_a_queue() {
    let file = TestFile::on_disk(1 << 20);
    let minute = Duration::from_secs(60);
    let one = Limits { operations: NonZeroU64::new(1), bytes: None };
    for target in [
        Target::Delay(minute, Box::new(file.target())),
        Target::Limit(one, Box::new(file.target())),
    ] {
        let start = Instant::now();
        let mut rig = Rig::new(&target, Options::default());
        for tag in 0..DEPTH as u16 {
            let piece = rig.piece(tag, 0, SECTOR);
            rig.submit(tag, OpKind::Write { fua: false }, 0, vec![piece]);
        }
        rig.queue().wait(Some(Duration::ZERO)).expect("send them");
        assert_eq!(rig.queue().in_flight(), DEPTH);
        drop(rig);
        assert!(start.elapsed() < minute / 2, "{target:?}: waited for what it held back itself");
    }
}

#[test]
fn a_limit_is_shared_by_the_queues_of_a_disk() {
    const RINGS: u64 = 2;
    const EACH: u64 = 1000;
    // 512 bytes each: the second bucket is the narrow one the second time.
    for (operations, bytes) in [(10_000, 1 << 40), (1 << 40, 10_000 * 512)] {
        let limits =
            Limits { operations: NonZeroU64::new(operations), bytes: NonZeroU64::new(bytes) };
        let target = Target::Limit(limits, Box::new(NULL));
        let storage = open(&target, Options::default()).expect("open");
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..RINGS {
                scope.spawn(|| {
                    let mut rig = Rig::on(storage.clone(), true, Vec::new());
                    for _ in 0..EACH {
                        rig.read(0, SECTOR).expect("read");
                    }
                });
            }
        });
        // 200 ms, less the 10 ms that an idle disk has saved up.
        let taken = start.elapsed();
        assert!(taken >= Duration::from_millis(185), "2000 at 10000 a second took {taken:?}");
        assert!(taken < Duration::from_secs(5), "2000 at 10000 a second took {taken:?}");
    }
}
