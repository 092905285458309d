//! Plain io_uring on one CPU: what a file can do with no ring and no other process in front of it.

use anyhow::{Context, Result};
use io_uring::{IoUring, opcode, types};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of each read.
const BLOCK: usize = 4096;

/// Reads of 4 KiB at random a second, `depth` at a time, submitted and reaped in batches.
pub(crate) fn random_read(path: &Path, depth: u32, cpu: usize, time: Duration) -> Result<f64> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    let file = File::open(path)?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(depth)
        .context("io_uring")?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let mut buffers = vec![[0u8; BLOCK]; depth as usize];
    let mut idle: Vec<usize> = (0..buffers.len()).collect();
    let (mut done, mut random) = (0u64, 0x9e37_79b9_7f4a_7c15u64);
    let from = Instant::now();
    while from.elapsed() < time || idle.len() < buffers.len() {
        if from.elapsed() < time {
            for n in idle.drain(..) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let read =
                    opcode::Read::new(types::Fixed(0), buffers[n].as_mut_ptr(), BLOCK as u32)
                        .offset(random % blocks * BLOCK as u64)
                        .build()
                        .user_data(n as u64);
                // SAFETY: the buffer is in flight once, and the loop ends when none is any more.
                unsafe { ring.submission().push(&read) }.context("the queue is full")?;
            }
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            anyhow::ensure!(entry.result() == BLOCK as i32, "read: {}", entry.result());
            idle.push(entry.user_data() as usize);
            done += 1;
        }
    }
    Ok(done as f64 / from.elapsed().as_secs_f64())
}
