//! Data written with any mix of plugs, sizes, layouts and rings is on the disk, and reads back.

use super::*;
use crate::link::Notice;
use crate::{Completed, Io, Op, Stats};
use ring_proto::abi::op;
use std::collections::HashMap;
use std::ops::Range;
use std::thread::JoinHandle;
use std::time::Duration;

/// I/Os of a run.
const IOS: u64 = 2000;
/// The longest I/O, in sectors: many requests.
const LONGEST: u64 = 400;

struct Model {
    queue: Queue,
    random: Random,
    /// The part of the disk that is this vCPU's, in sectors, and what should be there.
    part: Range<u64>,
    content: Vec<u8>,
    /// In flight: op and range in sectors.
    flying: HashMap<u64, (Op, Range<u64>)>,
    done: Vec<Completed>,
}

impl Model {
    fn run(mut self) -> (Stats, Range<u64>, Vec<u8>) {
        for cookie in 0..IOS {
            match self.random.below(4) {
                0 => self.queue.plug(),
                1 => self.queue.unplug(),
                _ => {}
            }
            self.step(cookie);
        }
        self.queue.unplug();
        while self.queue.in_flight() > 0 {
            self.reap();
        }
        assert!(self.flying.is_empty());
        (self.queue.stats(), self.part, self.content)
    }

    /// Starts one I/O on a range where nothing is in flight, often right behind the last one.
    fn step(&mut self, cookie: u64) {
        let room = self.part.end - self.part.start;
        let len = if self.random.below(8) == 0 { LONGEST } else { 16 };
        let sectors = 1 + self.random.below(len);
        let last = self.flying.get(&cookie.wrapping_sub(1)).map(|(_, range)| range.clone());
        let start = match (self.random.below(4), last) {
            (0, Some(last)) => last.end,
            (1, Some(last)) => last.start.saturating_sub(sectors).max(self.part.start),
            _ => self.part.start + self.random.below(room - sectors),
        };
        let range = start..start + sectors;
        let overlaps = |r: &Range<u64>| r.start < range.end && range.start < r.end;
        while range.end <= self.part.end && self.flying.values().any(|(_, r)| overlaps(r)) {
            self.reap();
        }
        if range.end > self.part.end {
            return;
        }
        let at = (range.start - self.part.start) as usize * 512;
        let bytes = sectors as usize * 512;
        let op = match self.random.below(16) {
            0 => Op::Flush,
            1 => Op::Discard { len: bytes as u64, secure: false },
            2 => Op::Write { fua: true },
            3..8 => Op::Write { fua: false },
            _ => Op::Read,
        };
        let mut buffer = None;
        if matches!(op, Op::Read | Op::Write { .. }) {
            let mut pages = loop {
                match self.queue.alloc(bytes) {
                    Some(pages) => break pages,
                    None => self.reap(),
                }
            };
            if op != Op::Read {
                let data = self.random.bytes(bytes);
                assert_eq!(pages.write(0, &data), bytes);
                self.content[at..at + bytes].copy_from_slice(&data);
            }
            buffer = Some(pages);
        }
        if matches!(op, Op::Discard { .. }) {
            self.content[at..at + bytes].fill(0);
        }
        let mut io = Io { cookie, op, offset: range.start * 512, buffer };
        self.flying.insert(cookie, (op, range));
        while let Err(refused) = self.queue.submit(io) {
            assert_eq!(refused.reason, crate::Refusal::WouldBlock);
            io = refused.io;
            self.reap();
        }
    }

    fn reap(&mut self) {
        // What is held back never completes.
        self.queue.unplug();
        let mut done = std::mem::take(&mut self.done);
        self.queue.wait(&mut done, None);
        for Completed { cookie, result, buffer } in done.drain(..) {
            result.unwrap();
            let (op, range) = self.flying.remove(&cookie).unwrap();
            if let (Op::Read, Some(buffer)) = (op, buffer) {
                let mut data = vec![0; buffer.len()];
                buffer.read(0, &mut data);
                let at = (range.start - self.part.start) as usize * 512;
                assert!(data == self.content[at..at + data.len()], "sectors {range:?} differ");
            }
        }
        self.done = done;
    }
}

#[test]
fn what_has_no_data_leaves_a_buffer_alone() {
    let mut rig = Rig::new(small(1), 1);
    let _backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::Cache), Conduct::Good);
    let mut queue = rig.queue(0);
    for op_given in [Op::Flush, Op::Discard { len: 512, secure: false }] {
        // More than a request takes.
        let buffer = queue.alloc(64 << 10);
        queue.submit(Io { cookie: 1, op: op_given, offset: 0, buffer }).unwrap();
        let mut done = Vec::new();
        queue.wait(&mut done, None);
        assert!(done[0].result.is_ok() && done[0].buffer.is_some());
    }
    let log: Vec<u8> = rig.storage().log.iter().map(|(operation, _)| *operation).collect();
    assert_eq!(log, [op::FLUSH_DISKCACHE, op::DISCARD]);
}

/// The work of each vCPU, and what it returns.
type Models = Vec<JoinHandle<(Stats, Range<u64>, Vec<u8>)>>;

/// Has each vCPU do its work on a part of the disk, in a thread.
fn start(rig: &Rig) -> Models {
    let vcpus = rig.config.vcpus;
    let share = DISK as u64 / 512 / u64::from(vcpus);
    let start = |vcpu| {
        let start = u64::from(vcpu) * share;
        let model = Model {
            queue: rig.queue(vcpu),
            random: Random(0x9e37_79b9 + u64::from(vcpu)),
            part: start..start + share,
            content: vec![0; share as usize * 512],
            flying: HashMap::new(),
            done: Vec::new(),
        };
        std::thread::spawn(move || model.run())
    };
    (0..vcpus).map(start).collect()
}

/// Waits for the work to be done, and checks the disk.
fn finish(rig: &Rig, models: Models) -> Stats {
    let mut stats = Stats::default();
    for thread in models {
        let (of_vcpu, part, content) = thread.join().unwrap();
        stats += of_vcpu;
        let bytes = part.start as usize * 512..part.end as usize * 512;
        assert!(rig.storage().data[bytes] == content, "the disk differs");
    }
    stats
}

fn run(config: Config, rings: u32, layout: RingLayout, limits: Limits) -> (Rig, Stats) {
    let mut rig = Rig::new(config, rings);
    let _backend = rig.connect(layout, limits, Conduct::Good);
    let stats = finish(&rig, start(&rig));
    for ring in 0..rig.fabric.rings() {
        let of_ring = rig.fabric.stats(ring);
        assert_eq!(of_ring.requests, of_ring.responses);
        assert_eq!(of_ring.contended, 0);
        assert!(of_ring.requests > 0, "ring {ring} carried nothing");
    }
    (rig, stats)
}

#[test]
fn one_ring_a_vcpu() {
    for (layout, indirect) in [(UNION, 0), (UNION, 32), (RingLayout::Split, 32)] {
        let (_, stats) = run(small(2), 2, layout, Rig::limits(layout, indirect, FlushMode::Cache));
        assert!(stats.merges > 0 && stats.splits > 0, "{stats:?}");
        assert_eq!(stats.wakeups, 0, "no other thread is between a vCPU and its own ring");
    }
}

/// They die, fall silent or go in good order, and each offers something else.
#[test]
fn any_number_of_backends_come_and_go() {
    for (vcpus, rings) in [(2, 2), (3, 1), (5, 2)] {
        let mut rig = Rig::new(small(vcpus), rings);
        let models = start(&rig);
        let mut random = Random(0x9e37_79b9);
        let mut backends = 0;
        while backends == 0 || !models.iter().all(JoinHandle::is_finished) {
            let layout = if random.below(2) == 0 { UNION } else { RingLayout::Split };
            let indirect = [0, 12, 32, 256][random.below(4) as usize];
            let flush = [FlushMode::None, FlushMode::Cache, FlushMode::Barrier];
            let flush = flush[random.below(3) as usize];
            let conduct = match random.below(3) {
                0 => Conduct::Good,
                1 => Conduct::AnswersLast,
                _ => Conduct::FallsSilent(random.below(60) as u32),
            };
            let backend = rig.connect(layout, Rig::limits(layout, indirect, flush), conduct);
            backends += 1;
            std::thread::sleep(Duration::from_micros(random.below(3000)));
            if random.below(2) == 0 {
                rig.fabric.post(|| Notice::Hold);
            }
            drop(backend);
            if random.below(2) == 0 {
                rig.fabric.post(|| Notice::Down);
            }
        }
        let stats = finish(&rig, models);
        assert!(backends > 3 && stats.merges > 0 && stats.splits > 0, "{backends}: {stats:?}");
    }
}

#[test]
fn a_full_ring_makes_requests_wait() {
    let limits = Rig::limits(UNION, 0, FlushMode::None);
    let (_, stats) = run(Config { merge: false, ..small(1) }, 1, UNION, limits);
    assert!(stats.requeues > 0, "{stats:?}");
    assert_eq!(stats.merges, 0);
}

#[test]
fn several_vcpus_share_a_ring() {
    for waiting in [Waiting::Event, Waiting::default()] {
        let limits = Rig::limits(UNION, 32, FlushMode::Cache);
        run(Config { waiting, ..small(5) }, 2, UNION, limits);
    }
}

#[test]
fn durable_writes_are_what_the_backend_has() {
    let cases = [
        (FlushMode::None, Conduct::Good, vec![(op::WRITE, 1)]),
        (FlushMode::Cache, Conduct::Good, vec![(op::WRITE, 1), (op::FLUSH_DISKCACHE, 0)]),
        (FlushMode::Barrier, Conduct::Good, vec![(op::WRITE_BARRIER, 1)]),
        // Offered, but refused: the data must be written all the same.
        (FlushMode::Barrier, Conduct::Narrow, vec![(op::WRITE, 1)]),
    ];
    for (flush, conduct, expected) in cases {
        let mut rig = Rig::new(small(1), 1);
        let _backend = rig.connect(UNION, Rig::limits(UNION, 32, flush), conduct);
        let mut queue = rig.queue(0);
        let mut buffer = queue.alloc(512).unwrap();
        buffer.write(0, &[7; 512]);
        queue.submit(Io::write_fua(1, 1024, buffer)).unwrap();
        let mut done = Vec::new();
        while queue.wait(&mut done, None) == 0 {}
        done[0].result.unwrap();
        assert_eq!(rig.storage().log, expected);
        assert_eq!(rig.storage().data[1024..1536], [7; 512]);
        // Longer than a barrier can be.
        queue.write_at(0, &vec![1; 1 << 20]).unwrap();
        queue.flush().unwrap();
        let flushes = rig.storage().log.last().copied();
        let expected = match (flush, conduct) {
            (_, Conduct::Narrow) | (FlushMode::None, _) => (op::WRITE, 256),
            (FlushMode::Cache, _) => (op::FLUSH_DISKCACHE, 0),
            (FlushMode::Barrier, _) => (op::WRITE_BARRIER, 0),
        };
        assert_eq!(flushes, Some(expected));
    }
}

#[test]
fn what_cannot_be_done_is_refused_before_it_is_sent() {
    use crate::Refusal;
    let mut rig = Rig::new(small(1), 1);
    let limits = Limits { sector_size: 4096, ..Rig::limits(UNION, 0, FlushMode::None) };
    let _backend = rig.connect(UNION, limits, Conduct::Good);
    let mut queue = rig.queue(0);
    let size = DISK as u64;
    let mut refusal = |offset, len: usize| {
        let buffer = queue.alloc(len).unwrap();
        queue.submit(Io::read(0, offset, buffer)).unwrap_err().reason
    };
    assert!(matches!(refusal(512, 4096), Refusal::Misaligned { .. }));
    assert!(matches!(refusal(0, 512), Refusal::Misaligned { .. }));
    assert!(matches!(refusal(size, 4096), Refusal::PastEnd { .. }));
    assert!(matches!(refusal(u64::MAX - 4095, 4096), Refusal::PastEnd { .. }));
    let secure = Op::Discard { len: 4096, secure: true };
    let io = Io { cookie: 0, op: secure, offset: 0, buffer: None };
    assert_eq!(queue.submit(io).unwrap_err().reason, Refusal::NotSupported);
    assert!(rig.storage().log.is_empty());
}
