//! The goals of the pair, and whether it reaches them.

use super::case::{BASE, Case, Disk, Wait};
use super::contender::Contender;
use super::idle::{DEVICES, Idle};
use super::limits::{eventfd::RoundTrip, fio::Fio, hop::Hop, memcpy::Memcpy, uring::PlainUring};
use super::ours::Ours;
use super::peers::{qemu::StorageDaemon, rust_vmm};
use super::profiles::{COPIED, SLEEPING_CLIENT, at_depth, devices, iometer, on, rings};
use super::report::{Results, Row, rate};
use super::sample::{Sample, Spread};
use serde::Serialize;
use std::fmt::Write;

/// A goal.
#[derive(Serialize)]
pub(super) struct Goal {
    row: String,
    /// What it is measured by, in words.
    bar: String,
    ours: f64,
    needed: Needed,
    /// `ours` divided by what is needed: if both were measured, the median over the rounds. `None` if the
    /// bar is zero.
    ratio: Option<f64>,
    /// Of `ours` and the bar.
    unit: Unit,
}

/// Which side of the bar to be on.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Needed {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Unit {
    Iops,
    Micros,
    Count,
    Percent,
    Mebibytes,
}

impl Goal {
    fn is_met(&self) -> bool {
        match (self.needed, self.ratio) {
            (Needed::AtLeast(_), Some(ratio)) => ratio >= 1.0,
            (Needed::AtMost(_), Some(ratio)) => ratio <= 1.0,
            (_, None) => self.ours == 0.0,
        }
    }
}

impl Needed {
    fn bar(self) -> f64 {
        match self {
            Self::AtLeast(bar) | Self::AtMost(bar) => bar,
        }
    }
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Iops => rate(value),
            Self::Micros => format!("{value:.3} µs"),
            Self::Count => format!("{value:.3}"),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::Percent => format!("{value:.1} %"),
        }
    }
}

/// The goals, where what they need was measured.
struct Goals<'a> {
    results: &'a Results,
    goals: Vec<Goal>,
}

/// Every goal that `results` have the figures for.
pub(super) fn goals(results: &Results) -> Vec<Goal> {
    let mut all = Goals { results, goals: Vec::new() };
    all.null_polled();
    all.null_event();
    all.files();
    all.copies();
    all.calls();
    all.several();
    all.idle();
    all.goals
}

impl Goals<'_> {
    fn row(&self, contender: &dyn Contender, case: &Case) -> Option<&Row> {
        let case = contender.takes(case)?;
        self.results.find(contender.name(), &case)
    }

    /// IOPS of each round.
    fn iops(&self, contender: &dyn Contender, case: &Case) -> Option<Vec<f64>> {
        Some(self.row(contender, case)?.samples.iter().map(|sample| sample.iops).collect())
    }

    /// Our IOPS, in the best of several cases, against another's times `factor`.
    fn against(
        &mut self,
        row: &str,
        cases: &[Case],
        factor: f64,
        other: &dyn Contender,
        case: Case,
    ) {
        // All of them, or the row would not show what it says.
        let ours: Option<Vec<_>> = cases.iter().map(|case| self.iops(&Ours, case)).collect();
        let (Some(ours), Some(theirs)) = (ours, self.iops(other, &case)) else { return };
        let best = ours.into_iter().max_by(|a, b| median(a).total_cmp(&median(b)));
        let ours = best.unwrap_or_default();
        let bar = format!("{factor} × {} ({})", other.name(), rate(median(&theirs)));
        let needed: Vec<f64> = theirs.iter().map(|theirs| factor * theirs).collect();
        self.by_rounds(row, bar, &ours, Needed::AtLeast, &needed, Unit::Iops);
    }

    /// Compares our figure of each round with what the same round asks for: figures measured right after
    /// each other compare, medians of an hour in which the machine changes do not.
    fn by_rounds(
        &mut self,
        row: &str,
        bar: impl Into<String>,
        ours: &[f64],
        side: fn(f64) -> Needed,
        needed: &[f64],
        unit: Unit,
    ) {
        let ratios: Vec<f64> =
            ours.iter().zip(needed).map(|(ours, needed)| ours / needed).collect();
        let needed = side(median(needed));
        let goal = Goal {
            row: row.to_owned(),
            bar: bar.into(),
            ours: median(ours),
            needed,
            ratio: Some(median(&ratios)),
            unit,
        };
        self.goals.push(goal);
    }

    fn add(&mut self, row: &str, bar: impl Into<String>, ours: f64, needed: Needed, unit: Unit) {
        let ratio = (needed.bar() > 0.0).then(|| ours / needed.bar());
        self.goals.push(Goal { row: row.to_owned(), bar: bar.into(), ours, needed, ratio, unit });
    }

    fn null_polled(&mut self) {
        let row = "null, depth 32, polled";
        self.against(row, &[BASE], 0.5, &Hop, BASE);
        self.against(row, &[BASE], 4.0, &StorageDaemon, BASE);
        self.against(row, &[BASE], 4.0, &rust_vmm::Null, BASE);
        let one = at_depth(BASE, 1);
        let (row, ours) = (format!("null, depth 1, {BETTER}"), better(one));
        self.against(&row, &ours, 0.6, &Hop, one);
        self.against(&row, &ours, 12.0, &StorageDaemon, one);
    }

    fn null_event(&mut self) {
        // Where the client sleeps at once: with backends as they are by default, and with ours asleep as well.
        let (row, ours) = ("null, depth 32, client event-driven, ours adaptive", [SLEEPING_CLIENT]);
        self.against(row, &ours, 3.0, &StorageDaemon, SLEEPING_CLIENT);
        self.against(row, &ours, 3.0, &rust_vmm::Null, SLEEPING_CLIENT);
        let event = BASE.waiting(Wait::Event);
        let row = "null, depth 32, both ends event-driven";
        self.against(row, &[event], 3.0, &StorageDaemon, event);
        self.against(row, &[event], 3.0, &rust_vmm::Null, event);
        let one = at_depth(event, 1);
        // The goal allows two round trips for an I/O, which needs one.
        self.against("null, depth 1, event-driven", &[one], 0.5, &RoundTrip, one);
        if let Some(ours) = self.iops(&Ours, &at_depth(SLEEPING_CLIENT, 1)) {
            let row = "null, depth 1, client event-driven, backend adaptive";
            self.add(row, "160 k", median(&ours), Needed::AtLeast(160e3), Unit::Iops);
        }
    }

    fn files(&mut self) {
        for (disk, factor, limit) in [
            (Disk::CachedFile, 0.9, &PlainUring as &dyn Contender),
            (Disk::CachedFile, 2.0, &StorageDaemon),
            (Disk::DirectFile, 0.98, &Fio),
            (Disk::BlockDevice, 0.98, &Fio),
        ] {
            let row = format!("{disk}, depth 32, {BETTER}");
            self.against(&row, &better(on(disk)), factor, limit, on(disk));
        }
        let (row, mix) = ("IOmeter mix, cached file, depth 64", iometer(Wait::Poll));
        self.against(&format!("{row}, {BETTER}"), &better(mix), 0.9, &Fio, mix);
    }

    fn copies(&mut self) {
        // For a polling backend, this is also the time that an I/O takes.
        let micros = |row: Option<&Row>| -> Option<Vec<f64>> {
            row?.samples.iter().map(|sample| sample.backend.cpu_us).collect()
        };
        let persistent = micros(self.row(&Ours, &on(Disk::CachedFile)));
        let copied = micros(self.row(&Ours, &COPIED));
        let memcpy = micros(self.row(&Memcpy, &COPIED));
        if let (Some(persistent), Some(copied), Some(memcpy)) = (persistent, copied, memcpy) {
            let row = "copy instead of persistent grants, backend's CPU time an I/O";
            let (shown, memcpy_shown) = (median(&persistent), median(&memcpy));
            let bar = format!("persistent ({shown:.3} µs) + memcpy ({memcpy_shown:.3} µs)");
            let needed: Vec<f64> = persistent.iter().zip(&memcpy).map(|(a, b)| a + b).collect();
            self.by_rounds(row, bar, &copied, Needed::AtMost, &needed, Unit::Micros);
        }
    }

    fn calls(&mut self) {
        let both = |sample: &Sample| Some(sample.client.calls? + sample.backend.calls?);
        let cached = on(Disk::CachedFile);
        for (case, bar) in [
            (BASE, 0.0),
            (BASE.waiting(Wait::Adaptive), 0.1),
            (BASE.waiting(Wait::Event), 0.1),
            (cached, 0.1),
            (cached.waiting(Wait::Adaptive), 0.1),
        ] {
            let calls = self.row(&Ours, &case).and_then(|row| row.counted(both));
            if let Some(calls) = calls {
                let row = format!("system calls an I/O, both ends: {}, {case}", case.disk);
                // Of a thousand I/Os, one call of a thread that looks after others.
                let slack = 1e-3;
                self.add(&row, format!("{bar}"), calls, Needed::AtMost(bar + slack), Unit::Count);
            }
        }
    }

    fn several(&mut self) {
        for (what, case) in [("rings", rings as fn(u32) -> Case), ("devices", devices)] {
            let Some(one) = self.iops(&Ours, &case(1)) else { continue };
            for count in [2, 4, 8] {
                let Some(row) = self.row(&Ours, &case(count)) else { continue };
                let contended = row.samples.iter().filter_map(|sample| sample.contended).max();
                let unfair = row.median(Sample::unfairness);
                let name = format!("{count} {what} on two CPUs");
                if let Some(iops) = self.iops(&Ours, &case(count)) {
                    let bar = format!("one of the {what} ({})", rate(median(&one)));
                    self.by_rounds(&name, bar, &iops, Needed::AtLeast, &one, Unit::Iops);
                }
                if let Some(contended) = contended {
                    let name = format!("{name}: waits for the lock of the frontend's mailbox");
                    self.add(&name, "none", contended as f64, Needed::AtMost(0.0), Unit::Count);
                }
                if let Some(unfair) = unfair {
                    let name = format!("{name}: (highest - lowest) / mean");
                    self.add(&name, "10 %", unfair * 100.0, Needed::AtMost(10.0), Unit::Percent);
                }
            }
        }
    }
}

impl Goals<'_> {
    fn idle(&mut self) {
        let Some(idle) = &self.results.idle else { return };
        let Idle { bare_mib, connected_mib, used_mib, idle_mib, wakes } = *idle;
        let devices = format!("{DEVICES} idle devices");
        let needed = Needed::AtMost(200.0);
        let row = format!("{devices}, never used: resident");
        self.add(&row, "200 MiB", connected_mib, needed, Unit::Mebibytes);
        let bar = format!("200 MiB (right after use, guests' pages included: {used_mib:.0} MiB)");
        let row = format!("{devices}, a minute after use: resident");
        self.add(&row, bar, idle_mib, needed, Unit::Mebibytes);
        let each = (used_mib - bare_mib) / f64::from(DEVICES);
        let bound = idle.bound_mib();
        self.add(
            "a device of one ring, right after use",
            "its stated bound",
            each,
            Needed::AtMost(bound),
            Unit::Mebibytes,
        );
        let row = format!("{devices}: wake-ups a second");
        self.add(
            &row,
            "none but the look at the disks' sizes",
            wakes,
            Needed::AtMost(1.0),
            Unit::Count,
        );
    }
}

/// Polled, and adaptive.
fn better(polled: Case) -> [Case; 2] {
    [polled, polled.waiting(Wait::Adaptive)]
}

/// What rows say that show [`better`].
const BETTER: &str = "the better of polled and adaptive";

fn median(values: &[f64]) -> f64 {
    Spread::of(values.iter().copied()).map_or(f64::NAN, |spread| spread.median)
}

/// The goals as a table.
pub(super) fn table(goals: &[Goal]) -> String {
    let mut out = String::from(
        "What was measured in the same rounds is compared by rounds: `ours / needed` is the median of what each \
         round had, and decides; the two beside it are medians of their own.\n\n\
         | row | measured by | ours | needed | ours / needed | |\n|---|---|---|---|---|---|\n",
    );
    for goal in goals {
        let sign = match goal.needed {
            Needed::AtLeast(_) => "≥",
            Needed::AtMost(_) => "≤",
        };
        let ratio = goal.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "| {} | {} | {} | {sign} {} | {ratio} | {} |",
            goal.row,
            goal.bar,
            goal.unit.show(goal.ours),
            goal.unit.show(goal.needed.bar()),
            if goal.is_met() { "met" } else { "**missed**" },
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_round_has_is_compared_and_not_medians() {
        let mut results = Results::default();
        let theirs = rust_vmm::Null.takes(&BASE).unwrap_or(BASE);
        for (ours, needed) in [(40.0, 36.0), (80.0, 100.0), (120.0, 116.0)] {
            results.row(Ours.name(), BASE).samples.push(Sample::rate(ours));
            results.row(rust_vmm::Null.name(), theirs).samples.push(Sample::rate(needed / 4.0));
        }
        let goals = goals(&results);
        let [goal] = goals.as_slice() else { unreachable!("one goal has its figures") };
        let Needed::AtLeast(bar) = goal.needed else { unreachable!("more is better") };
        assert_eq!((goal.ours, bar, goal.ratio), (80.0, 100.0, Some(120.0 / 116.0)));
        assert!(goal.is_met());
    }
}
