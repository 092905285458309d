//! What copying costs: pages from one place to another, both larger than the first two caches.

use super::on_client_cpu;
use crate::xtask::bench::case::{BASE, Case, Data, Disk};
use crate::xtask::bench::contender::Contender;
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use anyhow::Result;
use std::hint::black_box;
use std::time::Instant;

const PAGE: usize = 4096;
/// Pages on each side: as many as the buffers of a backend and a guest, together with what else is used.
const PAGES: usize = 1024;

/// The limit of grant copy.
pub(crate) struct Memcpy;

impl Contender for Memcpy {
    fn name(&self) -> &'static str {
        "memcpy of the page"
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        let only = Case { disk: Disk::CachedFile, data: Data::Copy, ..BASE };
        (*case == only).then_some(only)
    }

    fn measure(&self, _case: &Case, meter: &Meter, _place: &Place) -> Result<Sample> {
        on_client_cpu(|| {
            let (from, mut to) = (vec![1u8; PAGE * PAGES], vec![2u8; PAGE * PAGES]);
            let (begin, mut copied) = (Instant::now(), 0u64);
            while begin.elapsed() < meter.time {
                for (from, to) in from.chunks(PAGE).zip(to.chunks_mut(PAGE)) {
                    to.copy_from_slice(black_box(from));
                    copied += 1;
                }
                black_box(&to);
            }
            let mut sample = Sample::rate(copied as f64 / begin.elapsed().as_secs_f64());
            sample.backend.cpu_us = Some(1e6 / sample.iops);
            Ok(sample)
        })
    }
}
