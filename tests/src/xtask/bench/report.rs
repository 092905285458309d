//! The figures as a table, in Markdown, and as JSON.

use super::case::Case;
use super::idle::Idle;
use super::meter::{Aim, Which};
use super::sample::{End, Sample, Spread};
use serde::Serialize;
use std::fmt::Write;

/// Everything that was measured.
#[derive(Default, Serialize)]
pub(super) struct Results {
    pub(super) rows: Vec<Row>,
    /// Idle devices, where they were asked for.
    pub(super) idle: Option<Idle>,
}

/// A contender on a case.
#[derive(Serialize)]
pub(super) struct Row {
    pub(super) contender: &'static str,
    pub(super) case: Case,
    /// One per round.
    pub(super) samples: Vec<Sample>,
    /// From rounds of their own.
    pub(super) counted: Option<Sample>,
}

impl Results {
    pub(super) fn row(&mut self, contender: &'static str, case: Case) -> &mut Row {
        let at = self.rows.iter().position(|row| row.contender == contender && row.case == case);
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row { contender, case, samples: Vec::new(), counted: None });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    pub(super) fn find(&self, contender: &str, case: &Case) -> Option<&Row> {
        self.rows.iter().find(|row| row.contender == contender && row.case == *case)
    }
}

impl Row {
    /// Whether a round with this aim measures it.
    pub(super) fn wants(&self, aim: Aim) -> bool {
        // A limit has a rate and no ends.
        let has_ends = || self.samples.iter().any(|sample| sample.backend.cpu_us.is_some());
        !matches!(aim, Aim::Instructions(_)) || self.case.is_countable() && has_ends()
    }

    /// Adds what a round has measured.
    pub(super) fn take(&mut self, aim: Aim, sample: Sample) {
        let counted = &mut self.counted;
        match aim {
            Aim::Times => self.samples.push(sample),
            Aim::Calls => *counted = Some(sample),
            Aim::Instructions(Which::Client) => {
                counted.get_or_insert_default().client.instructions = sample.client.instructions;
            }
            Aim::Instructions(Which::Backend) => {
                counted.get_or_insert_default().backend.instructions = sample.backend.instructions;
            }
        }
    }

    /// Median and extremes of a figure.
    pub(super) fn spread(&self, value: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(value))
    }

    pub(super) fn median(&self, value: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.spread(value).map(|spread| spread.median)
    }

    pub(super) fn iops(&self) -> Option<f64> {
        self.median(|sample| Some(sample.iops))
    }

    /// The count of an end's figure if there is one, or else the end's own.
    pub(super) fn counted(&self, value: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.counted.as_ref().and_then(&value).or_else(|| self.median(value))
    }
}

const COLUMNS: [&str; 11] = [
    "contender",
    "conditions",
    "IOPS, median (lowest–highest)",
    "p50 µs",
    "p99 µs",
    "p99.9 µs",
    "CPU µs",
    "calls",
    "kicks",
    "sleeps",
    "instructions",
];

/// A table for each disk and job, without columns that are empty.
pub(super) fn tables(results: &Results) -> String {
    let mut out = String::new();
    let mut titles: Vec<_> = Vec::new();
    for row in &results.rows {
        let title = (row.case.disk, row.case.job);
        if !titles.contains(&title) {
            titles.push(title);
        }
    }
    for title in titles {
        let rows = results.rows.iter().filter(|row| (row.case.disk, row.case.job) == title);
        let lines: Vec<_> = rows.map(cells).collect();
        let filled = |column: &usize| lines.iter().any(|line| line[*column] != NONE);
        let filled: Vec<usize> = (0..COLUMNS.len()).filter(filled).collect();
        // Writing to a string does not fail.
        let _ = writeln!(out, "### {}: {}\n", title.0, title.1);
        let head = [COLUMNS, ["---"; COLUMNS.len()]].map(|line| line.map(str::to_owned));
        for line in head.iter().chain(&lines) {
            for &column in &filled {
                let _ = write!(out, "| {} ", line[column]);
            }
            out.push_str("|\n");
        }
        out.push('\n');
    }
    out
}

fn cells(row: &Row) -> [String; COLUMNS.len()] {
    let iops = row.spread(|sample| Some(sample.iops));
    let iops = iops.map_or_else(none, |iops| {
        format!("{} ({}–{})", rate(iops.median), rate(iops.lowest), rate(iops.highest))
    });
    let micros = |value: fn(&Sample) -> Option<f64>| row.median(value).map_or_else(none, short);
    let both = |value: fn(&End) -> Option<f64>, counted: bool| {
        let of = |end: fn(&Sample) -> &End| {
            let value = |sample: &Sample| value(end(sample));
            let found = if counted { row.counted(value) } else { row.median(value) };
            found.map_or_else(none, short)
        };
        let (client, backend) = (of(|sample| &sample.client), of(|sample| &sample.backend));
        if (client.as_str(), backend.as_str()) == (NONE, NONE) {
            none()
        } else {
            format!("{client} + {backend}")
        }
    };
    let unfair = row.median(Sample::unfairness);
    let unfair =
        unfair.map_or_else(String::new, |share| format!(", spread {:.0} %", share * 100.0));
    [
        row.contender.to_owned(),
        format!("{}{unfair}", row.case),
        iops,
        micros(|sample| sample.p50_us),
        micros(|sample| sample.p99_us),
        micros(|sample| sample.p99_9_us),
        both(|end| end.cpu_us, false),
        both(|end| end.calls, true),
        both(|end| end.kicks, false),
        both(|end| end.sleeps, false),
        both(|end| end.instructions, true),
    ]
}

const NONE: &str = "–";

fn none() -> String {
    NONE.to_owned()
}

/// I/Os a second, in thousands or millions.
pub(super) fn rate(iops: f64) -> String {
    if iops >= 999_500.0 { format!("{:.2} M", iops / 1e6) } else { format!("{:.1} k", iops / 1e3) }
}

/// Three significant digits, or fewer.
fn short(value: f64) -> String {
    match value {
        _ if value >= 99.95 => format!("{value:.0}"),
        _ if value >= 9.995 => format!("{value:.1}"),
        _ if value >= 0.9995 => format!("{value:.2}"),
        _ if value < 0.0005 => "0".to_owned(),
        _ => format!("{value:.3}"),
    }
}
