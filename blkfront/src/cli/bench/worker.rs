//! A job: one thread, one queue.

use super::Shared;
use super::job::Job;
use super::verify::Ledger;
use anyhow::{Context, anyhow, bail};
use blkfront::{Completed, Io, IoBuffer, IoError, Op, Queue};
use hdrhistogram::Histogram;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Longer latencies are recorded as this: a minute.
const LONGEST_NS: u64 = 60_000_000_000;
/// Significant decimal digits of a latency.
const DIGITS: u8 = 3;
/// Faults that are printed; the rest are only counted.
const SHOWN: u64 = 10;
/// The longest wait for a completion before a job checks whether the run is over.
const PATIENCE: Duration = Duration::from_millis(100);
/// Random places to try for one that overlaps nothing in flight, before waiting for a completion.
const TRIES: u32 = 16;

/// Reads, or writes.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) ios: u64,
    pub(crate) bytes: u64,
    /// Nanoseconds.
    pub(crate) latency: Option<Histogram<u64>>,
}

impl Default for Side {
    fn default() -> Self {
        // The bounds are constants that the histogram accepts.
        Self { ios: 0, bytes: 0, latency: Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).ok() }
    }
}

impl Side {
    fn record(&mut self, ios: u64, bytes: u64, ns: u64) {
        self.ios += ios;
        self.bytes += ios * bytes;
        if let Some(latency) = &mut self.latency {
            latency.saturating_record_n(ns, ios);
        }
    }

    fn reset(&mut self) {
        (self.ios, self.bytes) = (0, 0);
        if let Some(latency) = &mut self.latency {
            latency.reset();
        }
    }
}

impl AddAssign<&Self> for Side {
    fn add_assign(&mut self, other: &Self) {
        self.ios += other.ios;
        self.bytes += other.bytes;
        if let (Some(mine), Some(theirs)) = (&mut self.latency, &other.latency) {
            // The bounds are the same: it cannot fail.
            let _ = mine.add(theirs);
        }
    }
}

/// The results of one job, or of all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) reads: Side,
    pub(crate) writes: Side,
    pub(crate) errors: u64,
    /// Chunks that differ from what was written.
    pub(crate) faults: u64,
    /// Bytes read back at the end.
    pub(crate) verified: u64,
    /// Of the longest-running job, without ramp and read-back.
    pub(crate) elapsed: Duration,
}

impl Outcome {
    /// Records `count` I/Os, all reads or all writes of `len` bytes, begun at the same time.
    fn record(&mut self, (write, len, since): (bool, u64, u64), count: u64, now: u64) {
        if count > 0 {
            let side = if write { &mut self.writes } else { &mut self.reads };
            side.record(count, len, now.saturating_sub(since));
        }
    }
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.reads += &other.reads;
        self.writes += &other.writes;
        self.errors += other.errors;
        self.faults += other.faults;
        self.verified += other.verified;
        self.elapsed = self.elapsed.max(other.elapsed);
    }
}

/// An I/O slot; its index is the cookie.
#[derive(Debug, Default)]
struct Slot {
    /// Kept here while the slot is idle.
    buffer: Option<IoBuffer>,
    write: bool,
    offset: u64,
    len: u64,
    /// Nanoseconds since the run began.
    since: u64,
}

/// A block size to draw.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Bytes.
    len: u64,
    /// Number of places for a random block. As in fio, places are multiples of the smallest block.
    places: u64,
}

#[derive(Debug)]
pub(crate) struct Worker {
    n: usize,
    queue: Queue,
    job: Arc<Job>,
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    /// Slots keep their buffers.
    keep: bool,
    idle: Vec<usize>,
    done: Vec<Completed>,
    ledger: Option<Ledger>,
    /// The job's part of the disk.
    start: u64,
    size: u64,
    /// Where a sequential pattern continues, relative to `start`.
    position: u64,
    /// Bytes between two places.
    unit: u64,
    /// Each size once per percent of its share; a single size just once.
    blocks: Vec<Block>,
    random: u64,
    outcome: Outcome,
}

impl Worker {
    pub(crate) fn new(
        n: usize,
        mut queue: Queue,
        job: Arc<Job>,
        shared: Arc<Shared>,
    ) -> anyhow::Result<Self> {
        let size = job.size.context("the job has no size")?;
        let start = job.offset + n as u64 * size;
        let mut slots = Vec::new();
        // With one block size, each slot keeps its buffer. With several, each I/O allocates one, so that
        // only the pages in flight are used: a backend keeps only so many mapped.
        let keep = job.min_block() == job.max_block();
        for _ in 0..job.iodepth {
            let mut slot = Slot::default();
            if keep {
                let buffer = queue.alloc(job.buffer_bytes());
                slot.buffer = Some(buffer.context("no pages left for a buffer")?);
            }
            slots.push(slot);
        }
        let ledger = match job.verify {
            Some(_) => Some(Ledger::new(start, size, job.min_block(), job.max_block())?),
            None => None,
        };
        let unit = job.min_block();
        let blocks = job.bssplit.iter().flat_map(|share| {
            let (len, places) = (share.bytes, (size - share.bytes) / unit + 1);
            std::iter::repeat_n(Block { len, places }, share.percent.into())
        });
        let blocks = if keep { blocks.take(1).collect() } else { blocks.collect() };
        let seed = job.randseed.wrapping_add(n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Ok(Self {
            n,
            idle: (0..slots.len()).rev().collect(),
            done: Vec::with_capacity(slots.len()),
            slots,
            keep,
            queue,
            job,
            shared,
            ledger,
            start,
            size,
            position: 0,
            unit,
            blocks,
            random: seed | 1,
            outcome: Outcome::default(),
        })
    }

    pub(crate) fn run(mut self, cpu: Option<usize>) -> anyhow::Result<Outcome> {
        let pinned = cpu.map_or(Ok(()), |cpu| {
            let mut set = CpuSet::new();
            set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        });
        // Even if pinning failed: the others wait for us here.
        self.shared.ready.wait();
        pinned.map_err(|e| {
            let cpu = cpu.unwrap_or_default();
            anyhow!("job {} cannot run on CPU {cpu}: {}", self.n, e.desc())
        })?;
        let begin = self.now();
        self.load(begin)?;
        if self.ledger.is_some() {
            self.read_back()?;
        }
        Ok(self.outcome)
    }

    fn now(&self) -> u64 {
        nanos(self.shared.epoch.elapsed())
    }

    fn load(&mut self, begin: u64) -> anyhow::Result<()> {
        let ramp = nanos(self.job.ramp_time);
        let end = self.job.runtime.map_or(u64::MAX, |time| begin + ramp + nanos(time));
        let budget = if self.job.time_based { u64::MAX } else { self.size };
        let (mut from, mut now, mut issued, mut bytes) = (begin, begin, 0u64, 0u64);
        let mut ramping = ramp > 0;
        loop {
            if ramping && now >= begin + ramp {
                ramping = false;
                from = now;
                self.outcome.reads.reset();
                self.outcome.writes.reset();
            }
            let over = now >= end || bytes >= budget || self.shared.stop.load(Ordering::Relaxed);
            if over && self.queue.in_flight() == 0 {
                break;
            }
            if !over {
                let allowed = self.job.rate_iops.map_or(u64::MAX, |rate| {
                    let due = u128::from(now - begin) * u128::from(rate) / 1_000_000_000 + 1;
                    u64::try_from(due).unwrap_or(u64::MAX).saturating_sub(issued)
                });
                self.queue.plug();
                for _ in 0..allowed.min(self.idle.len() as u64) {
                    let Some(len) = self.issue(now)? else { break };
                    issued += 1;
                    bytes += len;
                    if bytes >= budget {
                        break;
                    }
                }
                self.queue.unplug();
            }
            if self.queue.in_flight() == 0 {
                // The rate limit allows nothing yet.
                std::thread::sleep(Duration::from_micros(50));
                now = self.now();
                continue;
            }
            // Do not sleep past the time at which the rate limit allows the next I/O.
            let paced = self.job.rate_iops.is_some() && !self.idle.is_empty();
            let patience = if paced { Duration::from_millis(1) } else { PATIENCE };
            self.queue.wait(&mut self.done, Some(patience));
            now = self.now();
            self.reap(now);
        }
        self.outcome.elapsed = Duration::from_nanos(now - from);
        Ok(())
    }

    /// Starts an I/O and returns its length; `None` when every place tried overlaps what is in flight.
    fn issue(&mut self, now: u64) -> anyhow::Result<Option<u64>> {
        let write = self.draw_direction();
        let Some(block) = self.draw_block() else { return Ok(None) };
        let Some(offset) = self.draw_place(block) else { return Ok(None) };
        let Some(n) = self.idle.pop() else { return Ok(None) };
        self.submit(n, write, offset, block.len, now)?;
        Ok(Some(block.len))
    }

    #[inline(always)]
    fn submit(
        &mut self,
        n: usize,
        write: bool,
        offset: u64,
        len: u64,
        now: u64,
    ) -> anyhow::Result<()> {
        let slot = self.slots.get_mut(n).context("no such slot")?;
        if slot.buffer.is_none() {
            slot.buffer = self.queue.alloc(len as usize);
        }
        // The pool has pages for the whole depth, as long as the disk exists.
        let Some(buffer) = &mut slot.buffer else { bail!("the device is gone") };
        if buffer.len() != len as usize {
            buffer.set_len(len as usize);
        }
        if let (true, Some(ledger)) = (write, &mut self.ledger) {
            buffer.write(0, ledger.fill(offset, len as usize));
        }
        (slot.write, slot.offset, slot.len, slot.since) = (write, offset, len, now);
        let op = if write { Op::Write { fua: false } } else { Op::Read };
        self.queue
            .submit(Io { cookie: n as u64, op, offset, buffer: slot.buffer.take() })
            .map_err(|refused| anyhow!("{len} bytes at offset {offset}: {}", refused.reason))
    }

    fn reap(&mut self, now: u64) {
        let completed = self.done.len() as u64;
        // I/Os submitted together that complete together are recorded together.
        let (mut alike, mut count) = ((false, 0, 0), 0);
        for Completed { cookie, result, buffer } in self.done.drain(..) {
            let n = cookie as usize;
            let Some(slot) = self.slots.get_mut(n) else { continue };
            self.idle.push(n);
            slot.buffer = buffer;
            let outcome = &mut self.outcome;
            match (result, &mut self.ledger, &slot.buffer) {
                (Err(error), ..) => failed(outcome, slot, error),
                (Ok(()), Some(ledger), Some(buffer)) if !slot.write => {
                    check(ledger, slot, buffer, &mut outcome.faults);
                }
                _ => {}
            }
            if result.is_ok() {
                let this = (slot.write, slot.len, slot.since);
                if this != alike {
                    outcome.record(
                        std::mem::replace(&mut alike, this),
                        std::mem::take(&mut count),
                        now,
                    );
                }
                count += 1;
            }
            if !self.keep {
                // It overlaps nothing until it is used again.
                (slot.buffer, slot.len) = (None, 0);
            }
        }
        self.outcome.record(alike, count, now);
        if let Some(done) = self.shared.done.get(self.n) {
            done.store(done.load(Ordering::Relaxed) + completed, Ordering::Relaxed);
        }
    }

    /// Reads back everything that was written, in pieces of the largest block.
    fn read_back(&mut self) -> anyhow::Result<()> {
        let (reads, writes) = (self.outcome.reads.clone(), self.outcome.writes.clone());
        let (mut at, largest) = (0, self.job.max_block());
        while at < self.size || self.queue.in_flight() > 0 {
            self.queue.plug();
            while at < self.size && !self.shared.stop.load(Ordering::Relaxed) {
                let len = largest.min(self.size - at);
                let offset = self.start + at;
                let written = self.ledger.as_ref().is_some_and(|l| l.any(offset, len as usize));
                if written {
                    let Some(n) = self.idle.pop() else { break };
                    self.submit(n, false, offset, len, 0)?;
                    self.outcome.verified += len;
                }
                at += len;
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                at = self.size;
            }
            self.queue.unplug();
            self.queue.wait(&mut self.done, Some(PATIENCE));
            self.reap(0);
        }
        (self.outcome.reads, self.outcome.writes) = (reads, writes);
        Ok(())
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((u128::from(self.random) * u128::from(below)) >> 64) as u64
    }

    fn draw_direction(&mut self) -> bool {
        match (self.job.rw.reads(), self.job.rw.writes()) {
            (true, true) => self.draw(100) >= u64::from(self.job.rwmixread),
            (_, writes) => writes,
        }
    }

    fn draw_block(&mut self) -> Option<Block> {
        let n = match self.blocks.len() {
            1 => 0,
            several => self.draw(several as u64) as usize,
        };
        self.blocks.get(n).copied()
    }

    fn draw_place(&mut self, block: Block) -> Option<u64> {
        let len = block.len;
        if !self.job.rw.random() {
            let at = if self.position + len > self.size { 0 } else { self.position };
            let place = self.start + at;
            if self.overlaps(place, len) {
                return None;
            }
            self.position = at + len;
            return Some(place);
        }
        for _ in 0..TRIES {
            let place = self.start + self.draw(block.places) * self.unit;
            if !self.overlaps(place, len) {
                return Some(place);
            }
        }
        None
    }

    /// Whether an I/O in flight overlaps the range. Overlaps only matter when data is verified.
    fn overlaps(&self, offset: u64, len: u64) -> bool {
        let flying = |slot: &&Slot| slot.buffer.is_none();
        let meets = |slot: &Slot| {
            slot.len > 0 && slot.offset < offset + len && offset < slot.offset + slot.len
        };
        self.ledger.is_some() && self.slots.iter().filter(flying).any(meets)
    }
}

fn failed(outcome: &mut Outcome, slot: &Slot, error: IoError) {
    outcome.errors += 1;
    if outcome.errors <= SHOWN {
        let what = if slot.write { "write" } else { "read" };
        eprintln!("blkfront: {what} of {} bytes at offset {}: {error}", slot.len, slot.offset);
    }
}

fn check(ledger: &mut Ledger, slot: &Slot, buffer: &IoBuffer, faults: &mut u64) {
    let read = |to: &mut [u8]| buffer.read(0, to);
    ledger.check(slot.offset, slot.len as usize, read, |at, fault| {
        *faults += 1;
        if *faults <= SHOWN {
            eprintln!("blkfront: verify: offset {at}: {fault}");
        }
    });
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4)
}
