//! Plain io_uring on one CPU: what a file can do with no ring and no other process in front of it.

use super::on_client_cpu;
use crate::xtask::bench::case::{Case, Disk, Job, Wait};
use crate::xtask::bench::contender::{Contender, seed};
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use anyhow::{Context, Result};
use io_uring::{IoUring, opcode, types};
use nix::fcntl::OFlag;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of each read.
const BLOCK: usize = 4096;

/// Aligned, as guests' pages are.
#[derive(Clone)]
#[repr(align(4096))]
struct Page([u8; BLOCK]);

/// The limit of cached files.
pub(crate) struct PlainUring;

impl Contender for PlainUring {
    fn name(&self) -> &'static str {
        "plain io_uring, one CPU"
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        let takes = case.is_plain()
            && case.rings == 1
            && (case.disk, case.job) == (Disk::CachedFile, Job::RandomRead);
        takes.then_some(case.waiting(Wait::Event))
    }

    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample> {
        let path = place.path(case.disk)?.context("a null disk")?;
        on_client_cpu(|| random_read(path, case.depth, meter.time))
    }
}

/// Reads 4 KiB at random, `depth` at a time, submitted and reaped in batches.
fn random_read(path: &Path, depth: u32, time: Duration) -> Result<Sample> {
    // As blkback and fio open it.
    let file = File::options().read(true).custom_flags(OFlag::O_NOATIME.bits()).open(path)?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(depth)
        .context("io_uring")?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let mut buffers = vec![Page([0; BLOCK]); depth as usize];
    let mut idle: Vec<usize> = (0..buffers.len()).collect();
    let (mut done, mut calls, mut random) = (0u64, 0u64, seed() | 1);
    let from = Instant::now();
    loop {
        // Checked once per round: between two checks the time could end, with nothing in flight to wait
        // for.
        let is_over = from.elapsed() >= time;
        if is_over && idle.len() == buffers.len() {
            break;
        }
        if !is_over {
            for n in idle.drain(..) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let read =
                    opcode::Read::new(types::Fixed(0), buffers[n].0.as_mut_ptr(), BLOCK as u32)
                        .offset(random % blocks * BLOCK as u64)
                        .build()
                        .user_data(n as u64);
                // SAFETY: the buffer is in flight once, and the loop ends when none is any more.
                unsafe { ring.submission().push(&read) }.context("the queue is full")?;
            }
        }
        ring.submit_and_wait(1)?;
        calls += 1;
        for entry in ring.completion() {
            anyhow::ensure!(entry.result() == BLOCK as i32, "read: {}", entry.result());
            idle.push(entry.user_data() as usize);
            done += 1;
        }
    }
    let mut sample = Sample::rate(done as f64 / from.elapsed().as_secs_f64());
    sample.client.cpu_us = Some(1e6 / sample.iops);
    sample.client.calls = Some(calls as f64 / done as f64);
    Ok(sample)
}
