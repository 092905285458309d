//! The same random operations on every kind of disk and on a plain vector.

use crate::rig::{AREA, DEPTH, Random, Rig, SECTOR, TestFile, parse, skip};
use blkback::storage::{Direct, IoVec, OpKind, Options, Storage, open};
use std::ops::Range;
use std::sync::Arc;

/// The disk fits into the memory of one tag, to be read in one operation at the end.
pub(crate) const DISK: usize = AREA;
const BATCHES: usize = 150;
const LONGEST: usize = 64 * SECTOR;

pub(crate) fn check(storage: Arc<dyn Storage>, register: bool, seed: u64) {
    check_above(1, storage, register, seed);
}

/// As [`check`], where only whole sectors of `sector` bytes can be discarded.
pub(crate) fn check_above(sector: usize, storage: Arc<dyn Storage>, register: bool, seed: u64) {
    let geometry = storage.geometry();
    assert_eq!(geometry.sectors as usize * SECTOR, DISK);
    let unit = geometry.sector_size as usize;
    let mut rig = Rig::on(storage, register);
    let mut random = Random(seed);
    let mut model = vec![0; DISK];
    for _ in 0..BATCHES {
        let discard = geometry.discard.is_some().then_some(sector);
        batch(&mut rig, &mut random, &mut model, unit, discard);
    }
    let now = rig.read(0, DISK).expect("read all");
    assert!(now == model, "the disk differs from the model, seed {seed}");
}

/// Operations that are in flight together touch different sectors, as their order is undefined.
fn batch(
    rig: &mut Rig,
    random: &mut Random,
    model: &mut [u8],
    unit: usize,
    discard: Option<usize>,
) {
    let mut taken: Vec<Range<usize>> = Vec::new();
    let mut expected = vec![None; DEPTH];
    for tag in 0..DEPTH as u16 {
        let len = unit * (1 + random.below(LONGEST / unit));
        let start = unit * random.below((DISK - len) / unit + 1);
        let range = start..start + len;
        if taken.iter().any(|other| other.start < range.end && range.start < other.end) {
            continue;
        }
        taken.push(range.clone());
        let buffers = pieces(rig, random, tag, len, unit);
        match random.below(10) {
            0..=3 => {
                expected[usize::from(tag)] = Some(model[range].to_vec());
                rig.submit(tag, OpKind::Read, start as u64, buffers);
            }
            4..=7 => {
                let data: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                rig.piece(tag, 0, len).fill(&data);
                model[range].copy_from_slice(&data);
                rig.submit(tag, OpKind::Write, start as u64, buffers);
            }
            8 if discard.is_some() => {
                let sector = discard.unwrap_or_default();
                let end = range.end / sector * sector;
                let from = range.start.next_multiple_of(sector).min(end);
                model[from..end].fill(0);
                let kind = OpKind::Discard { bytes: len as u64, secure: false };
                rig.submit(tag, kind, start as u64, Vec::new());
            }
            _ => rig.submit(tag, OpKind::Flush, 0, Vec::new()),
        }
    }
    let submitted = taken.len();
    let done = rig.finish();
    assert_eq!(done.len(), submitted);
    for completion in done {
        completion.result.expect("no operation fails");
        if let Some(data) = &expected[usize::from(completion.tag)] {
            assert!(rig.bytes(completion.tag, data.len()) == *data, "a read differs");
        }
    }
}

/// The first `len` bytes of the memory of `tag`, in one piece or several.
fn pieces(rig: &Rig, random: &mut Random, tag: u16, len: usize, unit: usize) -> Vec<IoVec> {
    if random.below(2) == 0 {
        return vec![rig.piece(tag, 0, len)];
    }
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < len {
        let size = (unit * (1 + random.below(8))).min(len - at);
        pieces.push(rig.piece(tag, at, size));
        at += size;
    }
    pieces
}

fn options(direct: Direct) -> Options {
    Options { direct, ..Options::default() }
}

#[test]
fn memory() {
    let storage = open(&parse("memory:1M"), Options::default()).expect("open");
    check(storage, true, 1);
}

#[test]
fn file_buffered() {
    let file = TestFile::on_disk(DISK as u64);
    check(open(&file.target(), options(Direct::Off)).expect("open"), true, 2);
}

#[test]
fn file_direct() {
    let file = TestFile::on_disk(DISK as u64);
    let Ok(storage) = open(&file.target(), options(Direct::On)) else {
        return skip(&format!("no O_DIRECT in {:?}", file.0));
    };
    check(storage.clone(), true, 3);
    let file = TestFile::on_disk(DISK as u64);
    check(open(&file.target(), options(Direct::On)).expect("open"), false, 4);
}

#[test]
fn file_in_memory() {
    let file = TestFile::new("/dev/shm", DISK as u64);
    check(open(&file.target(), options(Direct::Auto)).expect("open"), false, 5);
}

#[test]
fn wrapped() {
    let file = TestFile::on_disk(DISK as u64);
    let target = format!("delay:50us,limit:20000iops,limit:1G/s,error:0%,{}", file.0.display());
    check(open(&parse(&target), Options::default()).expect("open"), true, 6);
}
