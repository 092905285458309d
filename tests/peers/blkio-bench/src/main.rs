//! Loads a vhost-user-blk device in the manner of `blkfront bench`: the same job, the same clock (one
//! reading per batch), the same JSON, so that only what lies between differs.

use anyhow::{Context, Result, bail};
use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Entries of a virtqueue: a request takes three, and 128 are in flight at the most.
const QUEUE_SIZE: i32 = 512;
const PAGE: usize = 4096;

#[derive(Parser)]
struct Args {
    /// The device's socket
    socket: PathBuf,
    /// I/Os in flight
    #[arg(long, default_value_t = 1)]
    iodepth: usize,
    /// Block size in bytes
    #[arg(long, default_value_t = 4096)]
    bs: usize,
    /// Bytes of the device that are used
    #[arg(long, default_value_t = 1 << 30)]
    size: u64,
    #[arg(long, value_enum, default_value_t = Pattern::Randread)]
    rw: Pattern,
    /// Seconds that are counted
    #[arg(long, default_value_t = 3.0)]
    runtime: f64,
    /// Seconds before them
    #[arg(long, default_value_t = 0.3)]
    ramp: f64,
    /// Of the places that are read or written
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Spin for completions; otherwise sleep on the queue's descriptor
    #[arg(long)]
    poll: bool,
    /// CPU to run on
    #[arg(long)]
    cpu: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    Read,
    Randread,
    Randwrite,
}

struct Job<'a> {
    args: &'a Args,
    queue: Blkioq,
    /// A block for each I/O in flight.
    buffers: usize,
    since: Vec<Instant>,
    random: u64,
    position: u64,
}

struct Outcome {
    latency: Histogram<u64>,
    elapsed: Duration,
}

impl Job<'_> {
    fn place(&mut self) -> u64 {
        let bs = self.args.bs as u64;
        let blocks = self.args.size / bs;
        if self.args.rw == Pattern::Read {
            self.position = (self.position + 1) % blocks;
            return self.position * bs;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % blocks * bs
    }

    fn submit(&mut self, slot: usize, now: Instant) {
        let (place, len) = (self.place(), self.args.bs);
        let buffer = self.buffers + slot * len;
        self.since[slot] = now;
        if self.args.rw == Pattern::Randwrite {
            self.queue.write(place, buffer as *const u8, len, slot, ReqFlags::empty());
        } else {
            self.queue.read(place, buffer as *mut u8, len, slot, ReqFlags::empty());
        }
    }

    fn run(mut self) -> Result<Outcome> {
        let begin = Instant::now();
        let from = begin + Duration::from_secs_f64(self.args.ramp);
        let end = from + Duration::from_secs_f64(self.args.runtime);
        let depth = self.args.iodepth;
        let mut done: Vec<_> = (0..depth).map(|_| MaybeUninit::<Completion>::uninit()).collect();
        let mut latency = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        (0..depth).for_each(|slot| self.submit(slot, begin));
        let mut flying = depth;
        let mut now = begin;
        while flying > 0 {
            let count = self.queue.do_io(&mut done, 1, None, None)?;
            now = Instant::now();
            for completion in done.iter().take(count) {
                // SAFETY: do_io has filled as many as it says.
                let completion = unsafe { completion.assume_init_ref() };
                if completion.ret != 0 {
                    bail!("I/O failed: {}", completion.ret);
                }
                let slot = completion.user_data;
                if now >= from {
                    latency.saturating_record((now - self.since[slot]).as_nanos() as u64);
                }
                flying -= 1;
                if now < end {
                    self.submit(slot, now);
                    flying += 1;
                }
            }
        }
        Ok(Outcome { latency, elapsed: now - from })
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut device = Blkio::new("virtio-blk-vhost-user")?;
    device.set_str("path", &args.socket.to_string_lossy())?;
    device.connect()?;
    let (sleeping, polled) = if args.poll { (0, 1) } else { (1, 0) };
    device.set_i32("num-queues", sleeping)?;
    device.set_i32("num-poll-queues", polled)?;
    device.set_i32("queue-size", QUEUE_SIZE)?;
    let queues = device.start()?;
    let mut queues = if args.poll { queues.poll_queues } else { queues.queues };
    let region = device.alloc_mem_region((args.iodepth * args.bs).next_multiple_of(PAGE))?;
    device.map_mem_region(&region)?;
    if let Some(cpu) = args.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    let job = Job {
        args: &args,
        queue: queues.pop().context("no queue")?,
        buffers: region.addr,
        since: vec![Instant::now(); args.iodepth],
        random: args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        position: 0,
    };
    let Outcome { latency, elapsed } = job.run()?;
    let quantile = |q| latency.value_at_quantile(q);
    println!(
        r#"{{"total": {{"ios": {}, "iops": {}, "latency_ns": {{"p50": {}, "p99": {}, "p99_9": {}}}}}}}"#,
        latency.len(),
        latency.len() as f64 / elapsed.as_secs_f64(),
        quantile(0.5),
        quantile(0.99),
        quantile(0.999),
    );
    Ok(())
}
