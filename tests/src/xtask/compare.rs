//! The tables of the scenario `compare`: backends beside each other on one host.

use super::bench::sample::Spread;
use super::xen::text;
use serde_json::Value;
use std::collections::BTreeMap;
use xen_blk_tests::xen::machine::Outcome;

/// The backends, as the scenario calls them, and the prefix of their counters.
const BACKENDS: [(&str, &str); 3] = [("kernel", "kernel"), ("qdisk", "user"), ("ours", "user")];
/// The functions by which dom0's kernel asks for grants.
const GRANT_PROBES: [&str; 3] = ["gnttab_map_refs", "gnttab_unmap_refs", "gnttab_batch_copy"];
/// `USER_HZ`: the unit of `/proc/stat` is 10 ms.
const TICK_US: f64 = 10_000.0;

/// One row of one backend in one round.
struct Sample {
    iops: f64,
    ios: f64,
    guest_events: f64,
}

type Key<'a> = (u64, &'a str, &'a str);

/// The tables in Markdown; nothing if the scenario was another one.
pub(super) fn tables(outcome: &Outcome) -> Option<String> {
    let mut samples: BTreeMap<Key<'_>, Sample> = BTreeMap::new();
    let mut rows: Vec<&str> = Vec::new();
    for row in outcome.named("row") {
        let name = text(&row["row"]);
        if !rows.contains(&name) {
            rows.push(name);
        }
        let job = &row["fio"]["jobs"][0];
        let sum = |what: &str| number(&job["read"][what]) + number(&job["write"][what]);
        let sample = Sample {
            iops: sum("iops"),
            ios: sum("total_ios").max(1.0),
            guest_events: number(&row["guest_events"]),
        };
        samples.insert((row["round"].as_u64()?, text(&row["backend"]), name), sample);
    }
    if rows.is_empty() {
        return None;
    }
    let counters: BTreeMap<&str, &Value> =
        outcome.named("counters").map(|value| (text(&value["step"]), value)).collect();
    let table = Tables { samples, counters };
    let mut out = String::from(
        "| IOPS, median (lowest-highest) | dom0 itself | xen-blkback | qdisk | blkback | \
         of xen-blkback | of qdisk |\n|---|---|---|---|---|---|---|\n",
    );
    for row in &rows {
        let iops = |backend| table.spread(backend, row, |s, _, _| s.iops);
        let shown = |backend| {
            let Spread { lowest, median, highest } = iops(backend);
            format!("{median:.0} ({lowest:.0}-{highest:.0})")
        };
        let of = |peer| iops("ours").median / iops(peer).median;
        out += &format!(
            "| {row} | {} | {} | {} | {} | {:.2} | {:.1} |\n",
            shown("direct"),
            shown("kernel"),
            shown("qdisk"),
            shown("ours"),
            of("kernel"),
            of("qdisk"),
        );
    }
    out += "\n| an I/O | backend | CPU us, backend's threads | CPU us, all of dom0 | \
            events to the backend | events to the guest | grants mapped, unmapped, copied |\n\
            |---|---|---|---|---|---|---|\n";
    for row in &rows {
        for (backend, prefix) in BACKENDS {
            let per_io = |name: String, scale: f64| {
                let delta = |s: &Sample, before: &Value, after: &Value| {
                    (number(&after[&name]) - number(&before[&name])) * scale / s.ios
                };
                table.spread(backend, row, delta).median
            };
            let grants = GRANT_PROBES.map(|probe| {
                let pages = |value: &Value| last_number(text(&value[probe]));
                let delta = |s: &Sample, before: &Value, after: &Value| {
                    (pages(after) - pages(before)) / s.ios
                };
                format!("{:.3}", table.spread(backend, row, delta).median)
            });
            out += &format!(
                "| {row} | {backend} | {:.1} | {:.1} | {:.3} | {:.3} | {} |\n",
                per_io(format!("{backend}_ns"), 1e-3),
                per_io("busy_ticks".to_owned(), TICK_US),
                per_io(format!("{prefix}_events"), 1.0),
                table.spread(backend, row, |s, _, _| s.guest_events / s.ios).median,
                grants.join(", "),
            );
        }
    }
    Some(out)
}

struct Tables<'a> {
    samples: BTreeMap<Key<'a>, Sample>,
    /// By step: `ROUND BACKEND ROW`, and the same with ` end`.
    counters: BTreeMap<&'a str, &'a Value>,
}

impl Tables<'_> {
    /// The spread over the timed rounds of what `value` makes of a row and dom0's counters around it.
    fn spread(
        &self,
        backend: &str,
        row: &str,
        value: impl Fn(&Sample, &Value, &Value) -> f64,
    ) -> Spread {
        let found = (self.samples.iter()).filter(|((_, b, r), _)| *b == backend && *r == row).map(
            |((round, ..), sample)| {
                let (before, after) = self.around(*round, backend, row);
                value(sample, before, after)
            },
        );
        let nothing = Spread { lowest: f64::NAN, median: f64::NAN, highest: f64::NAN };
        Spread::of(found).unwrap_or(nothing)
    }

    fn around(&self, round: u64, backend: &str, row: &str) -> (&Value, &Value) {
        let step = format!("{round} {backend} {row}");
        let at = |step: &str| self.counters.get(step).copied().unwrap_or(&Value::Null);
        (at(&step), at(&format!("{step} end")))
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// `hitcount: 3 count: 12` is 12; what was never hit is 0.
fn last_number(text: &str) -> f64 {
    text.rsplit(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}
