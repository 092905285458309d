//! Writes figures and plots into docs: the goals' into a section of `docs/performance.md`, other profiles'
//! into pages of their own.

use super::Options;
use super::case::Case;
use super::ours::MANY_SLICES;
use super::report::{Results, Row};
use crate::xtask::plot::{self, Series};
use crate::xtask::root;
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use xen_blk_tests::process::run as output;

const PAGE: &str = "docs/performance.md";
/// Other pages, and all plots.
const PAGES: &str = "docs/performance";
/// The profile that is on the page itself, between these lines.
const GOALS: &str = "goals";
const BEGIN: &str = "<!-- bench goals -->\n";
const END: &str = "<!-- end of bench goals -->\n";
/// The fewest points that make a line.
const POINTS: usize = 3;

/// Replaces the section of the goals, or the page of other profiles.
pub(super) fn write(
    options: &Options,
    conditions: &str,
    results: &Results,
    text: &str,
) -> Result<()> {
    let names = options.profile.iter().filter_map(ValueEnum::to_possible_value);
    let name = names.map(|name| name.get_name().to_owned()).collect::<Vec<_>>().join("+");
    let plots = plots(results, &name)?;
    let written = if name == GOALS {
        let page = std::fs::read_to_string(root().join(PAGE))?;
        let from = page.find(BEGIN).context(BEGIN)?;
        let to = page.find(END).context(END)?;
        let plots = shown(&plots, "performance/");
        let page = format!("{}{BEGIN}{conditions}\n{text}{plots}{}", &page[..from], &page[to..]);
        std::fs::write(root().join(PAGE), page)?;
        PAGE.to_owned()
    } else {
        let path = format!("{PAGES}/{name}.md");
        let title = format!("# Measured: {name}\n\nBy `cargo xtask bench --profile {name}`, as");
        let how = "[performance](../performance.md) says.";
        let page = format!("{title} {how}\n\n{conditions}\n{text}{}", shown(&plots, ""));
        std::fs::write(root().join(&path), page)?;
        path
    };
    println!("Written: {written}");
    Ok(())
}

/// Plots, as a page shows them.
fn shown(plots: &[String], directory: &str) -> String {
    plots.iter().map(|plot| format!("\n![{plot}]({directory}{plot})\n")).collect()
}

/// What, where, when and how. To be called before measuring: afterwards the tree may be another.
pub(super) fn conditions(options: &Options) -> Result<String> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model =
        cpus.lines().find_map(|line| line.strip_prefix("model name\t: ")).context("cpuinfo")?;
    let kernel = output(Command::new("uname").arg("-r"))?;
    let date = output(Command::new("date").args(["-u", "+%F"]))?;
    let git = |arguments: &[&str]| output(Command::new("git").args(arguments).current_dir(root()));
    let commit = git(&["rev-parse", "--short", "HEAD"])?;
    // Figures end up in documentation, which does not change the programs.
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!*.md"])?;
    Ok(format!(
        "{}{}, {model}, {} CPUs, Linux {}, {}; {} rounds of {} s, with several rings or devices of {} s.\n",
        commit.trim(),
        if changed.is_empty() { "" } else { "-dirty" },
        std::thread::available_parallelism()?,
        kernel.trim(),
        date.trim(),
        options.rounds,
        options.seconds,
        options.seconds.max(MANY_SLICES.as_secs_f64()),
    ))
}

/// What a plot has along its x axis: how to read it from a case and how to set it.
type Axis = (&'static str, fn(&mut Case) -> &mut u32);

const AXES: [Axis; 3] = [
    ("depth", |case| &mut case.depth),
    ("rings", |case| &mut case.rings),
    ("devices", |case| &mut case.devices),
];

/// A plot for each disk and job that was measured at several values of an axis. Returns their names.
fn plots(results: &Results, name: &str) -> Result<Vec<String>> {
    std::fs::create_dir_all(root().join(PAGES))?;
    let mut plots = Vec::new();
    for (axis, field) in AXES {
        let mut titles: BTreeMap<String, Vec<Series>> = BTreeMap::new();
        let mut seen: Vec<(&str, Case)> = Vec::new();
        for row in &results.rows {
            let same = |case: Case| {
                let mut case = case;
                *field(&mut case) = 0;
                case
            };
            let key = (row.contender, same(row.case));
            if seen.contains(&key) {
                continue;
            }
            seen.push(key);
            let rows = results.rows.iter();
            let rows = rows.filter(|row| (row.contender, same(row.case)) == key);
            let point = |row: &Row| Some((*field(&mut row.case.clone()), row.iops()?));
            let mut points: Vec<_> = rows.filter_map(point).collect();
            points.sort_by_key(|(x, _)| *x);
            if points.len() >= POINTS {
                let title = format!("{}, {}", row.case.disk, row.case.job);
                let name = format!("{} {}", row.contender, conditions_of(&row.case));
                titles.entry(title).or_default().push(Series { name, points });
            }
        }
        for (title, series) in titles {
            let file: String =
                format!("{name} {title} {axis}").replace(|c: char| !c.is_ascii_alphanumeric(), "-");
            let file = format!("{}.svg", file.to_lowercase());
            plot::lines(&root().join(PAGES).join(Path::new(&file)), &title, axis, &series)?;
            plots.push(file);
        }
    }
    Ok(plots)
}

/// What distinguishes a line from others of its contender: everything but the axes.
fn conditions_of(case: &Case) -> String {
    let text = Case { rings: 1, devices: 1, ..*case }.to_string();
    text.split_once(", ").map_or_else(String::new, |(_, rest)| format!("({rest})"))
}
