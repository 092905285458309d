//! Disks that are slow, limited and broken on purpose.

use crate::rig::{AREA, DEPTH, HUNG, Rig, SECTOR, TestFile, parse};
use blkback::storage::{OpKind, Options, open};
use std::time::{Duration, Instant};

#[test]
fn a_share_fails_the_same_way_every_time() {
    let sequence = || -> Vec<bool> {
        let mut rig = Rig::new(&parse("error:flush@1%,null:1M"), Options::default());
        (0..20_000)
            .map(|_| {
                rig.read(0, SECTOR).expect("only flushes fail");
                match rig.run(OpKind::Flush, 0, Vec::new()) {
                    Ok(()) => false,
                    Err(e) => e.raw_os_error() == Some(libc::EIO),
                }
            })
            .collect()
    };
    let first = sequence();
    let failed = first.iter().filter(|failed| **failed).count();
    assert!((150..=250).contains(&failed), "{failed} of 20000 at 1 %");
    assert!(first == sequence());
}

#[test]
fn a_failed_write_is_not_done() {
    let mut rig = Rig::new(&parse("error:write@100%,memory:1M"), Options::default());
    rig.write(0, &[1; SECTOR]).expect_err("all writes fail");
    assert_eq!(rig.read(0, SECTOR).expect("reads do not"), [0; SECTOR]);
}

#[test]
fn a_delay_is_kept_and_counted_in_flight() {
    let delay = Duration::from_millis(5);
    let mut rig = Rig::new(&parse("delay:5ms,null:1M"), Options::default());
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
    for wrapper in ["delay:60s", "limit:1iops"] {
        let target = parse(&format!("{wrapper},{}", file.0.display()));
        let start = Instant::now();
        let mut rig = Rig::new(&target, Options::default());
        for tag in 0..DEPTH as u16 {
            let piece = rig.piece(tag, 0, SECTOR);
            rig.submit(tag, OpKind::Write, 0, vec![piece]);
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
    for limit in ["10000iops", "5000k/s"] {
        let target = parse(&format!("limit:{limit},null:1M"));
        let storage = open(&target, Options::default()).expect("open");
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..RINGS {
                scope.spawn(|| {
                    let mut rig = Rig::on(storage.clone(), true);
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

#[test]
fn a_ring_that_ends_does_not_wait_for_a_limit_but_the_disk_pays_for_it() {
    // 100 s for each operation.
    let target = parse("error:0%,delay:1ms,limit:10k/s,null:16M");
    let storage = open(&target, Options::default()).expect("open");
    let fill = |rig: &mut Rig| {
        for tag in 0..DEPTH as u16 {
            let piece = rig.piece(tag, 0, AREA);
            rig.submit(tag, OpKind::Read, 0, vec![piece]);
        }
    };
    let mut ending = Rig::on(storage.clone(), true);
    fill(&mut ending);
    ending.queue().hurry();
    assert_eq!(ending.finish().len(), DEPTH);
    // What an operation on its way leads to, such as the write that follows a flush.
    fill(&mut ending);
    assert_eq!(ending.finish().len(), DEPTH);
    let mut next = Rig::on(storage, true);
    fill(&mut next);
    let due = next.queue().due().expect("it is held back");
    assert!(due > Instant::now() + Duration::from_secs(60), "the limit was forgotten");
}

/// Without persistent grants, a frontend's data would be left where it is, with nothing to count.
#[test]
fn data_is_moved_where_bytes_are_limited() {
    for (target, moves_data) in
        [("null:1M", false), ("limit:1000iops,null:1M", false), ("limit:1M/s,null:1M", true)]
    {
        let storage = open(&parse(target), Options::default()).expect("open");
        assert_eq!(storage.geometry().moves_data, moves_data, "{target}");
        let again = storage.refresh().expect("look again");
        assert_eq!(again.moves_data, moves_data, "{target}, refreshed");
    }
}

/// As on a thread that sleeps at once: it takes what needs no system call, and otherwise waits.
#[test]
fn what_is_held_back_starts_when_its_time_has_come() {
    let file = TestFile::on_disk(1 << 20);
    for store in ["null:1M".to_owned(), file.0.display().to_string()] {
        for wrapper in ["limit:1000iops", "delay:1ms", "limit:1000iops,delay:1ms"] {
            let mut rig = Rig::new(&parse(&format!("{wrapper},{store}")), Options::default());
            let start = Instant::now();
            for n in 0..4 * DEPTH {
                let tag = (n % DEPTH) as u16;
                let piece = rig.piece(tag, 0, SECTOR);
                rig.submit(tag, OpKind::Read, 0, vec![piece]);
                let mut done = Vec::new();
                while tag as usize + 1 == DEPTH && rig.queue().in_flight() > 0 {
                    rig.queue().reap(&mut done);
                    if done.is_empty() {
                        rig.queue().wait(Some(HUNG)).expect("wait");
                    }
                    assert!(start.elapsed() < HUNG, "{wrapper},{store} hangs");
                    done.clear();
                }
            }
        }
    }
}
