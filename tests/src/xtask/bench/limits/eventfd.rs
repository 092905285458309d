//! What events allow at depth 1: an eventfd there and back between two CPUs, both ends asleep.

use super::{on_client_cpu, pin};
use crate::xtask::bench::case::{BASE, Case, Wait};
use crate::xtask::bench::contender::{BACKEND_CPU, Contender};
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use anyhow::{Result, anyhow};
use nix::sys::eventfd::EventFd;
use std::time::Instant;

/// The value that stops the other end.
const STOP: u64 = 2;

/// The limit of ends that sleep, at depth 1.
pub(crate) struct RoundTrip;

impl Contender for RoundTrip {
    fn name(&self) -> &'static str {
        "an eventfd there and back"
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        let only = Case { depth: 1, ..BASE }.waiting(Wait::Event);
        (*case == only).then_some(only)
    }

    fn measure(&self, _case: &Case, meter: &Meter, _place: &Place) -> Result<Sample> {
        let (there, back) = (EventFd::new()?, EventFd::new()?);
        std::thread::scope(|scope| {
            let far = scope.spawn(|| {
                pin(BACKEND_CPU)?;
                while there.read()? != STOP {
                    back.write(1)?;
                }
                anyhow::Ok(())
            });
            let rate = on_client_cpu(|| {
                let (from, mut trips) = (Instant::now(), 0u64);
                while from.elapsed() < meter.time {
                    there.write(1)?;
                    back.read()?;
                    trips += 1;
                }
                let rate = trips as f64 / from.elapsed().as_secs_f64();
                Ok(rate)
            });
            there.write(STOP)?;
            far.join().map_err(|_| anyhow!("a thread panicked"))??;
            rate.map(Sample::rate)
        })
    }
}
