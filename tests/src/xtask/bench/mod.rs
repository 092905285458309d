//! `cargo xtask bench`: the data path beside its limits and its peers, all from one run.
//!
//! Backends have CPU 1 to themselves and clients CPU 0. Everything is measured once per round, so that
//! figures to compare are close in time; medians of the rounds are shown, with the extremes.

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
use meter::Meter;
use place::Place;
use profiles::Profile;
use report::Results;
use std::fs::File;
use std::time::Duration;

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
    /// Leave out the round in which perf counts system calls and instructions
    #[arg(long)]
    no_perf: bool,
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
    let perf = !options.no_perf && perf_counts();
    let rounds = (0..options.rounds).map(|_| false).chain(perf.then_some(true));
    for (n, perf) in rounds.enumerate() {
        let what =
            if perf { "count".to_owned() } else { format!("{} of {}", n + 1, options.rounds) };
        eprintln!("==> round {what}");
        let meter = Meter { time, perf };
        for (contender, case) in &plan {
            let contender = &contenders[*contender];
            let name = format!("{}: {}: {}: {case}", case.disk, case.job, contender.name());
            let sample = contender.measure(case, &meter, &place).context(name.clone())?;
            eprintln!("    {name}: {}", report::rate(sample.iops));
            let row = results.row(contender.name(), *case);
            if perf { row.counted = Some(sample) } else { row.samples.push(sample) }
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
    if !perf {
        text += "Calls are the programs' own counts: perf was not there, or not wanted.\n";
    }
    for line in left_out {
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

/// Whether perf is there and may count system calls.
fn perf_counts() -> bool {
    let mut command = std::process::Command::new("perf");
    command.args(["stat", "-e", "raw_syscalls:sys_enter", "true"]);
    xen_blk_tests::process::output(&mut command).is_ok()
}
