//! `cargo xtask bench`: the data path beside its limits and its peers, all from one run.
//!
//! Backends have CPU 1 to themselves and clients CPU 0. Everything is measured once per round, so that
//! figures to compare are close in time; medians of the rounds are shown, with the extremes.

mod callgrind;
mod case;
mod contender;
mod goals;
mod idle;
mod limits;
mod meter;
mod ours;
mod page;
mod peers;
mod place;
mod profiles;
mod report;
pub(super) mod sample;

use super::{packages, target};
use anyhow::{Context, Result, ensure};
use case::Case;
use contender::Contender;
use meter::{Aim, CALLS, INSTRUCTIONS, Meter, Which};
use place::Place;
use profiles::Profile;
use report::Results;
use std::fs::File;
use std::process::Command;
use std::time::Duration;
use xen_blk_tests::process::run as output;

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure; --list says what is in each
    #[arg(long, value_enum, default_value = "goals", value_delimiter = ',')]
    profile: Vec<Profile>,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Rounds; each measures everything once
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Contenders whose name has one of these in it [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Cases whose description has all of these in it, such as `null,depth 1,`
    #[arg(long, value_delimiter = ';', value_name = "TEXT")]
    cases: Vec<String>,
    /// Leave out the round that counts system calls and instructions
    #[arg(long)]
    no_count: bool,
    /// Put tables and plots into docs/performance.md, or for other profiles than goals into docs/performance
    #[arg(long)]
    write: bool,
    /// Say what would be measured, and do nothing
    #[arg(long)]
    list: bool,
}

/// Measures and prints tables; leaves `bench.json` behind.
///
/// # Errors
/// What failed.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut contenders = contender::all();
    contenders.retain(|contender| named(options, contender.name()));
    let plan = plan(options, &contenders);
    if options.list {
        for (contender, case) in &plan {
            println!("{}: {}: {}: {case}", case.disk, case.job, contenders[*contender].name());
        }
        return Ok(());
    }
    let time = Duration::try_from_secs_f64(options.seconds).context("--seconds")?;
    ensure!(time >= meter::SHORTEST, "--seconds must be {:?} at least", meter::SHORTEST);
    let cpus = std::thread::available_parallelism()?.get();
    ensure!(cpus >= 2, "two CPUs are needed, one for each end");
    let (plan, left_out) = prepare(&contenders, plan)?;
    let idle = wants_idle(options);
    if idle {
        packages::install(idle::NEEDS)?;
    }
    let conditions = options.write.then(|| page::conditions(options)).transpose()?;
    let place = Place::new()?;
    let mut results = Results::default();
    let rounds = (1..=options.rounds).map(|n| (format!("{n} of {}", options.rounds), Aim::Times));
    let (counts, notes) = counts(options, &plan);
    for (what, aim) in rounds.chain(counts) {
        eprintln!("==> round {what}");
        let meter = Meter::new(aim, time);
        for (contender, case) in &plan {
            let contender = &contenders[*contender];
            let row = results.row(contender.name(), *case);
            if !row.wants(aim) {
                continue;
            }
            let name = format!("{}: {}: {}: {case}", case.disk, case.job, contender.name());
            let sample = contender.measure(case, &meter, &place).context(name.clone())?;
            eprintln!("    {name}: {}", report::rate(sample.iops));
            row.take(aim, sample);
        }
    }
    if idle {
        eprintln!("==> {} idle devices", idle::DEVICES);
        results.idle = Some(idle::measure()?);
    }
    let mut text = String::new();
    let goals = goals::goals(&results);
    if !goals.is_empty() {
        text += &format!("### Goals\n\n{}\n", goals::table(&goals));
    }
    text += &report::tables(&results);
    for line in notes.into_iter().chain(left_out) {
        text += &format!("{line}\n");
    }
    println!("\n{text}");
    let path = target().join("bench/bench.json");
    let all = serde_json::json!({ "results": results, "goals": goals });
    serde_json::to_writer_pretty(File::create(&path)?, &all)?;
    if let Some(conditions) = conditions {
        page::write(options, &conditions, &results, &text)?;
    }
    println!("Left behind: {}", path.display());
    Ok(())
}

fn named(options: &Options, name: &str) -> bool {
    options.only.is_empty() || options.only.iter().any(|part| name.contains(part.as_str()))
}

/// Which contender, by number, is measured on which case.
type Plan = Vec<(usize, Case)>;

fn plan(options: &Options, contenders: &[Box<dyn Contender>]) -> Plan {
    let mut plan = Plan::new();
    let cases = options.profile.iter().flat_map(|profile| profile.cases());
    for case in cases {
        for (n, contender) in contenders.iter().enumerate() {
            let Some(case) = contender.takes(&case) else { continue };
            let name = format!("{}: {}: {case},", case.disk, case.job);
            let wanted = options.cases.iter().all(|part| name.contains(part.as_str()));
            if wanted && !plan.contains(&(n, case)) {
                plan.push((n, case));
            }
        }
    }
    plan
}

/// Builds and installs what takes part. Returns what can be measured, and a line for each contender
/// that cannot.
fn prepare(contenders: &[Box<dyn Contender>], mut plan: Plan) -> Result<(Plan, Vec<String>)> {
    let mut left_out = Vec::new();
    for (n, contender) in contenders.iter().enumerate() {
        if !plan.iter().any(|(of, _)| *of == n) {
            continue;
        }
        let ready = packages::install(contender.needs()).and_then(|()| contender.prepare());
        if let Err(error) = ready {
            // Without ours there is nothing to compare.
            ensure!(n > 0, error);
            let missing = packages::missing(contender.needs());
            let hint = if missing.is_empty() {
                String::new()
            } else {
                format!(" (apt-get install {})", missing.join(" "))
            };
            left_out.push(format!("Left out: {}: {error:#}{hint}", contender.name()));
            plan.retain(|(of, _)| *of != n);
        }
    }
    Ok((plan, left_out))
}

/// Idle devices are not a case; they go with the goals and by their own name.
fn wants_idle(options: &Options) -> bool {
    let profiles = [Profile::Goals, Profile::Idle, Profile::All];
    let all = options.cases.is_empty() && options.only.is_empty();
    all && options.profile.iter().any(|profile| profiles.contains(profile))
}

/// The rounds that count instead of timing, by name, and a line for whatever is to be said of their counts.
fn counts(options: &Options, plan: &Plan) -> (Vec<(String, Aim)>, Vec<String>) {
    let (mut rounds, mut notes) = (Vec::new(), Vec::new());
    let mut round = |name: &str, aim| rounds.push((name.to_owned(), aim));
    let calls = !options.no_count && perf_counts(CALLS);
    if calls {
        round("that counts system calls", Aim::Calls);
    } else {
        notes.push("Calls are the programs' own counts: perf has none, or was not wanted.".into());
    }
    let countable = plan.iter().any(|(_, case)| case.is_countable());
    if options.no_count || !countable || calls && perf_counts(INSTRUCTIONS) {
        return (rounds, notes);
    }
    match packages::install(callgrind::NEEDS) {
        Ok(()) => {
            round("that counts clients' instructions", Aim::Instructions(Which::Client));
            round("that counts backends' instructions", Aim::Instructions(Which::Backend));
            notes.push("Instructions: those in user space, as callgrind counts them.".into());
        }
        Err(error) => notes.push(format!("Instructions are not counted: {error:#}")),
    }
    (rounds, notes)
}

/// Whether perf is there and may count an event.
fn perf_counts(event: &str) -> bool {
    let mut command = Command::new("perf");
    command.args(["stat", "-x", ",", "-o", "/dev/stdout", "-e", event, "true"]);
    // Words stand for a count that is missing.
    let counted = |text: String| {
        let counts =
            |line: &str| line.contains(event) && line.starts_with(|c: char| c.is_ascii_digit());
        text.lines().any(counts)
    };
    output(&mut command).is_ok_and(counted)
}
