//! The figures as a table, in Markdown, and as JSON.

use super::case::Case;
use super::idle::Idle;
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
    /// From a round of its own, with perf counting.
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

    /// perf's count of an end's figure if there is one, or else the end's own.
    pub(super) fn counted(&self, value: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.counted.as_ref().and_then(&value).or_else(|| self.median(value))
    }
}

const HEAD: &str = "| contender | conditions | IOPS, median (lowest–highest) | p50 µs | p99 µs | p99.9 µs \
    | CPU µs | calls | kicks | sleeps | instructions |\n|---|---|---|---|---|---|---|---|---|---|---|\n";

/// A table for each disk and job.
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
        // Writing to a string does not fail.
        let _ = write!(out, "### {}: {}\n\n{HEAD}", title.0, title.1);
        for row in results.rows.iter().filter(|row| (row.case.disk, row.case.job) == title) {
            let _ = writeln!(out, "{}", line(row));
        }
        out.push('\n');
    }
    out
}

fn line(row: &Row) -> String {
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
    format!(
        "| {} | {}{unfair} | {iops} | {} | {} | {} | {} | {} | {} | {} | {} |",
        row.contender,
        row.case,
        micros(|sample| sample.p50_us),
        micros(|sample| sample.p99_us),
        micros(|sample| sample.p99_9_us),
        both(|end| end.cpu_us, false),
        both(|end| end.calls, true),
        both(|end| end.kicks, false),
        both(|end| end.sleeps, false),
        both(|end| end.instructions, true),
    )
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
