//! Figures and plots into `docs/performance.md`, in a section of each profile's own.

use super::Options;
use super::case::Case;
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
const PLOTS: &str = "docs/performance";
/// A line needs that many points.
const POINTS: usize = 3;

/// Replaces the section of these profiles, or adds one at the end of the page.
pub(super) fn write(options: &Options, results: &Results, text: &str) -> Result<()> {
    let names = options.profile.iter().filter_map(ValueEnum::to_possible_value);
    let name = names.map(|name| name.get_name().to_owned()).collect::<Vec<_>>().join("+");
    let mut section = format!("{}\n{text}", conditions(options)?);
    for plot in plots(results, &name)? {
        section += &format!("\n![{plot}](performance/{plot})\n");
    }
    let path = root().join(PAGE);
    let page = std::fs::read_to_string(&path)?;
    let (begin, end) =
        (format!("<!-- bench {name} -->\n"), format!("<!-- end of bench {name} -->\n"));
    let page = match (page.find(&begin), page.find(&end)) {
        (Some(from), Some(to)) if from < to => {
            format!("{}{begin}{section}{}", &page[..from], &page[to..])
        }
        _ => format!("{page}\n## Measured: {name}\n\n{begin}{section}{end}"),
    };
    std::fs::write(&path, page)?;
    println!("Written: {PAGE}");
    Ok(())
}

/// Where, when and how.
fn conditions(options: &Options) -> Result<String> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model =
        cpus.lines().find_map(|line| line.strip_prefix("model name\t: ")).context("cpuinfo")?;
    let kernel = output(Command::new("uname").arg("-r"))?;
    let date = output(Command::new("date").args(["-u", "+%F"]))?;
    Ok(format!(
        "{model}, {} CPUs, Linux {}, {}; {} rounds of {} s.\n",
        std::thread::available_parallelism()?,
        kernel.trim(),
        date.trim(),
        options.rounds,
        options.seconds,
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
    std::fs::create_dir_all(root().join(PLOTS))?;
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
            plot::lines(&root().join(PLOTS).join(Path::new(&file)), &title, axis, &series)?;
            plots.push(file);
        }
    }
    Ok(plots)
}

/// What tells a line from others of its contender: everything but the axes.
fn conditions_of(case: &Case) -> String {
    let text = Case { rings: 1, devices: 1, ..*case }.to_string();
    text.split_once(", ").map_or_else(String::new, |(_, rest)| format!("({rest})"))
}
