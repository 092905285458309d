//! What an I/O costs, without a clock: instructions, system calls, events and allocations for the same
//! requests each time, checked against the bounds recorded in `tests/cost.toml`.

mod allocations;
mod callgrind;
mod frontend;
mod rig;
mod served;

use anyhow::{Context, Result, bail, ensure};
use blkback::ring::Strategy;
use rig::{Counts, SECTORS};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use xen_blk_tests::host::{Host, Programs};
use xen_platform::Waiting;

/// Rounds that are counted.
const ROUNDS: u64 = 100;
/// Rounds of the two runs whose instructions are subtracted, so that the cost of starting and ending
/// cancels out.
const FEW: u64 = 16;
const MANY: u64 = 80;

/// The environment of the run under callgrind: a name of the file, and rounds.
const NAME: &str = "XEN_BLK_COST";
const COUNT: &str = "XEN_BLK_COST_ROUNDS";
/// Requests a round: what a ring of one page holds.
const DEPTH: u64 = 32;

/// `tests/cost.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bounds {
    /// How far instructions may be above what is recorded, in per cent.
    slack: f64,
    /// Of a ring's thread, by name.
    backend: BTreeMap<String, Bound>,
    /// Of a vCPU, by name.
    frontend: BTreeMap<String, Bound>,
}

impl Bounds {
    fn all(&self) -> impl Iterator<Item = (&String, &Bound)> {
        self.backend.iter().chain(&self.frontend)
    }
}

/// What a request may cost.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bound {
    instructions: Option<f64>,
    /// `None` where the kernel's timing decides.
    system_calls: Option<f64>,
    events: f64,
    kicks: f64,
    sleeps: f64,
    allocations: f64,
}

fn bounds() -> Result<Bounds> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/cost.toml");
    let text = std::fs::read_to_string(path).context(path)?;
    toml::from_str(&text).context(path)
}

/// Whose cost is counted, and for what work.
enum Work {
    Backend(rig::Work),
    Frontend(frontend::Work),
}

impl Work {
    fn run(&self, host: &Host, name: &str, rounds: u64) -> Result<Counts> {
        match self {
            Self::Backend(work) => rig::serve(host, name, work, rounds),
            Self::Frontend(work) => frontend::drive(host, name, *work, rounds),
        }
    }

    /// The functions that callgrind counts.
    fn functions(&self) -> &'static [&'static str] {
        match self {
            Self::Backend(_) => &["ring::thread::Thread::run"],
            Self::Frontend(_) => &["frontend::submit", "frontend::take"],
        }
    }
}

/// The work of each name in the file.
fn works(host: &Host) -> Result<Vec<(&'static str, Work)>> {
    let file = host.dir().join("disk.raw");
    std::fs::write(&file, vec![0; SECTORS as usize * 512])?;
    let file = file.display().to_string();
    let (null, memory) = ("null:1G".to_owned(), format!("memory:{}", SECTORS * 512));
    let work = |target: &String, strategy, waiting, writes| {
        Work::Backend(rig::Work { target: target.clone(), strategy, waiting, writes })
    };
    let front = |vcpus, waiting| Work::Frontend(frontend::Work { vcpus, waiting });
    let (poll, event) = (Waiting::Poll, Waiting::Event);
    Ok(vec![
        ("null-poll", work(&null, Strategy::Nothing, poll, true)),
        ("null-event", work(&null, Strategy::Nothing, event, true)),
        ("memory-copy-poll", work(&memory, Strategy::Copy, poll, true)),
        ("memory-copy-event", work(&memory, Strategy::Copy, event, true)),
        ("memory-persistent-poll", work(&memory, Strategy::Persistent, poll, true)),
        ("memory-persistent-event", work(&memory, Strategy::Persistent, event, true)),
        ("memory-bounce-poll", work(&memory, Strategy::Bounce, poll, true)),
        ("memory-map-event", work(&memory, Strategy::Map, event, true)),
        ("file-copy-poll", work(&file, Strategy::Copy, poll, true)),
        ("file-persistent-poll", work(&file, Strategy::Persistent, poll, true)),
        // Valgrind lets no other thread run while one waits in io_uring: there are no instructions of
        // files. A cached read is done in the call that asks for it; a write may be put off.
        ("file-persistent-event", work(&file, Strategy::Persistent, event, false)),
        ("own-ring-poll", front(1, poll)),
        ("own-ring-event", front(1, event)),
        ("shared-ring-poll", front(2, poll)),
        ("shared-ring-event", front(2, event)),
    ])
}

/// Figures above their bounds, one per line.
#[derive(Default)]
struct Excess(String);

impl Excess {
    fn check(&mut self, name: &str, what: &str, now: f64, bound: f64) {
        eprintln!("{name}: {what}: {now:.4}, bound {bound:.4}");
        if now > bound {
            // Writing to a string does not fail.
            let _ = writeln!(self.0, "{name}: {what} an I/O: {now:.4}, were at most {bound:.4}");
        }
    }

    fn end(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        bail!(
            "an I/O costs more than tests/cost.toml says; if it must, change it there:\n{}",
            self.0
        )
    }
}

#[test]
fn an_io_costs_no_more_calls_events_and_allocations_than_recorded() -> Result<()> {
    let bounds = bounds()?;
    let host = Host::start(Programs::beside_us()?)?;
    let works = works(&host)?;
    ensure!(works.len() == bounds.all().count(), "tests/cost.toml has other names than the test");
    let mut excess = Excess::default();
    for (name, work) in works {
        let bound = match work {
            Work::Backend(_) => bounds.backend.get(name),
            Work::Frontend(_) => bounds.frontend.get(name),
        };
        let bound = bound.with_context(|| format!("{name} is not in tests/cost.toml"))?;
        let counts = work.run(&host, name, ROUNDS)?;
        let Counts { requests, allocations, system_calls, events, kicks, sleeps } = counts;
        ensure!(requests >= ROUNDS, "{name}: {counts:?}");
        // This one allocates: a counter that counts nothing would meet all bounds.
        ensure!(name != "memory-map-event" || allocations > 0, "allocations are not counted");
        for (what, count, bound) in [
            ("allocations", allocations, bound.allocations),
            ("system calls", system_calls, bound.system_calls.unwrap_or(f64::INFINITY)),
            ("events", events, bound.events),
            ("kicks", kicks, bound.kicks),
            ("sleeps", sleeps, bound.sleeps),
        ] {
            excess.check(name, what, count as f64 / requests as f64, bound);
        }
    }
    excess.end()
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "the bounds are those of `cargo test`'s build")]
fn an_io_takes_no_more_instructions_than_recorded() -> Result<()> {
    let bounds = bounds()?;
    let host = Host::start(Programs::beside_us()?)?;
    let works = works(&host)?;
    let mut excess = Excess::default();
    for (name, bound) in bounds.all() {
        let Some(bound) = bound.instructions else { continue };
        let work = works.iter().find(|(other, _)| other == name).context("no such work")?;
        let run = |rounds: u64| {
            let environment = [(NAME, name.as_str()), (COUNT, &rounds.to_string())];
            callgrind::thread("under_callgrind", &environment, work.1.functions())
        };
        let now = (run(MANY)? - run(FEW)?) as f64 / ((MANY - FEW) * DEPTH) as f64;
        excess.check(name, "instructions", now, bound * (1.0 + bounds.slack / 100.0));
    }
    excess.end()
}

/// Not a test: this is what runs under callgrind.
#[test]
#[ignore = "run under callgrind by another"]
fn under_callgrind() -> Result<()> {
    let name = std::env::var(NAME).context(NAME)?;
    let rounds = std::env::var(COUNT).context(COUNT)?.parse()?;
    let host = Host::start(Programs::beside_us()?)?;
    let work = works(&host)?.into_iter().find(|(other, _)| *other == name);
    work.context("no such work")?.1.run(&host, "guest", rounds)?;
    Ok(())
}
