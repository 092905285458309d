//! Tables of a [`Snapshot`].

use super::units::{byte_rate, bytes, count, duration, plain, rate, ratio, time};
use blkback::metrics::{Device, Quantiles, Ring, Snapshot};
use std::fmt::Write;

const SECTOR: u64 = 512;
const NOTE: &str = "p50, p99: upper bounds, of power-of-two buckets; /r: per request\n";

/// Totals since each disk was connected.
pub(super) fn totals(now: &Snapshot) -> String {
    let mut out = heading(now);
    for device in &now.devices {
        about(&mut out, device);
        let rows = rows(device);
        for section in [requests, costs, latencies, grants] {
            out.push_str(&aligned(&section(&rows)));
        }
    }
    if !now.devices.is_empty() {
        out.push('\n');
        out.push_str(NOTE);
    }
    out
}

/// Rates per second between two readings, by disk and ring.
pub(super) fn rates(before: &Snapshot, now: &Snapshot) -> String {
    let mut out = heading(now);
    let elapsed = now.process.uptime_ms.checked_sub(before.process.uptime_ms);
    let Some(ms) = elapsed.filter(|ms| *ms > 0) else {
        out.push_str("the daemon was started anew\n\n");
        return out;
    };
    let seconds = ms as f64 / 1e3;
    let mut table = vec![cells([
        "DISK",
        "RING",
        "r/s",
        "w/s",
        "other/s",
        "read/s",
        "written/s",
        "err/s",
        "batch",
        "kick/r",
        "sys/r",
        "device-p50",
        "device-p99",
    ])];
    for device in &now.devices {
        let earlier = before.devices.iter().find(|earlier| earlier.backend == device.backend);
        let nothing = Vec::new();
        let earlier = earlier.map_or(&nothing, |earlier| &earlier.rings);
        let new = Ring::default();
        let rings = device.rings.iter().enumerate();
        let rings: Vec<_> =
            rings.map(|(index, ring)| ring.since(earlier.get(index).unwrap_or(&new))).collect();
        let total = Ring::total(&rings);
        for (name, ring) in named(&rings, &total) {
            let Ring { counts, derived, .. } = ring;
            let errors = failed(ring).saturating_add(derived.refused);
            table.push(vec![
                format!("{}/{}", device.domain, plain(&device.name)),
                name,
                rate(counts.rd_req, seconds),
                rate(counts.wr_req, seconds),
                rate(counts.f_req.saturating_add(counts.ds_req), seconds),
                byte_rate(counts.rd_sect.saturating_mul(SECTOR), seconds),
                byte_rate(counts.wr_sect.saturating_mul(SECTOR), seconds),
                rate(errors, seconds),
                ratio(derived.mean_batch),
                ratio(derived.kicks_per_request),
                ratio(derived.system_calls_per_request),
                time(derived.device_ns.p50),
                time(derived.device_ns.p99),
            ]);
        }
    }
    out.push_str(&aligned(&table));
    out.push('\n');
    out
}

fn heading(now: &Snapshot) -> String {
    let process = &now.process;
    format!(
        "blkback: disks: {}, connected: {}, up {}, {} of CPU time, {} resident, {} of {} descriptors\n",
        now.devices.len(),
        now.devices.iter().filter(|device| !device.rings.is_empty()).count(),
        duration(process.uptime_ms / 1000),
        duration(process.cpu_ms / 1000),
        bytes(process.resident_bytes),
        process.open_fds,
        count(process.max_fds),
    )
}

fn about(out: &mut String, device: &Device) {
    let mut words = vec![
        format!("device {}", device.device),
        device.kind.clone(),
        device.state.clone(),
        if device.read_only { "read-only" } else { "read-write" }.to_owned(),
    ];
    // The size is unknown until the disk is open.
    words.extend((device.sectors > 0).then(|| bytes(device.sectors.saturating_mul(SECTOR))));
    words.extend(device.strategy.clone());
    words.extend(device.layout.clone());
    let name = format!("{}/{}", device.domain, device.name);
    // Writing to a string does not fail.
    let _ = writeln!(out, "\n{}: {}", plain(&name), plain(&words.join(", ")));
    let _ = writeln!(out, "  on {}", plain(&device.target));
    if let Some(error) = &device.error {
        let _ = writeln!(out, "  error: {}", plain(error));
    }
}

type Rows<'a> = Vec<(String, &'a Ring)>;

fn rows(device: &Device) -> Rows<'_> {
    named(&device.rings, &device.total)
}

/// Each ring with its number, and their total if there are several.
fn named<'a>(rings: &'a [Ring], total: &'a Ring) -> Rows<'a> {
    let each = rings.iter().enumerate().map(|(index, ring)| (index.to_string(), ring));
    each.chain((rings.len() > 1).then(|| ("all".to_owned(), total))).collect()
}

fn failed(ring: &Ring) -> u64 {
    ring.counts.device_errors.saturating_add(ring.counts.grant_errors)
}

type Table = Vec<Vec<String>>;

fn requests(rows: &Rows<'_>) -> Table {
    let head = [
        "RING", "reads", "writes", "flushes", "discards", "read", "written", "indirect", "waited",
        "failed", "refused",
    ];
    table(head, rows, |ring| {
        let Ring { counts, derived, .. } = ring;
        [
            count(counts.rd_req),
            count(counts.wr_req),
            count(counts.f_req),
            count(counts.ds_req),
            bytes(counts.rd_sect.saturating_mul(SECTOR)),
            bytes(counts.wr_sect.saturating_mul(SECTOR)),
            count(counts.indirect_req),
            count(counts.oo_req),
            count(failed(ring)),
            count(derived.refused),
        ]
    })
}

fn costs(rows: &Rows<'_>) -> Table {
    let head = [
        "RING",
        "batch",
        "events",
        "spurious",
        "kicks",
        "saved",
        "sleeps",
        "event/r",
        "kick/r",
        "sleep/r",
        "syscall/r",
    ];
    table(head, rows, |Ring { counts, derived, .. }| {
        [
            ratio(derived.mean_batch),
            count(counts.events),
            count(counts.spurious_events),
            count(counts.kicks),
            count(counts.kicks_saved),
            count(counts.sleeps),
            ratio(derived.events_per_request),
            ratio(derived.kicks_per_request),
            ratio(derived.sleeps_per_request),
            ratio(derived.system_calls_per_request),
        ]
    })
}

fn latencies(rows: &Rows<'_>) -> Table {
    let head = [
        "RING",
        "wait",
        "wait-p50",
        "wait-p99",
        "device",
        "device-p50",
        "device-p99",
        "completion",
        "compl-p50",
        "compl-p99",
    ];
    table(head, rows, |Ring { derived, .. }| {
        let parts = [&derived.ring_wait_ns, &derived.device_ns, &derived.completion_ns];
        let [wait, device, completion] = parts.map(|Quantiles { mean, p50, p99 }| {
            [time(mean.map(|ns| ns as u64)), time(*p50), time(*p99)]
        });
        wait.into_iter().chain(device).chain(completion)
    })
}

fn grants(rows: &Rows<'_>) -> Table {
    let head = ["RING", "copies", "maps", "hits", "evicted", "held"];
    table(head, rows, |ring| {
        let Ring { counts, persistent_held, .. } = ring;
        [
            count(counts.grant_copies),
            count(counts.grant_maps),
            count(counts.persistent_hits),
            count(counts.persistent_evictions),
            count(*persistent_held),
        ]
    })
}

fn table<const N: usize, I>(head: [&str; N], rows: &Rows<'_>, line: impl Fn(&Ring) -> I) -> Table
where
    I: IntoIterator<Item = String>,
{
    let lines = rows.iter().map(|(name, ring)| [name.clone()].into_iter().chain(line(ring)));
    let lines: Vec<Vec<_>> = lines.map(Iterator::collect).collect();
    if lines.is_empty() {
        return lines;
    }
    [cells(head)].into_iter().chain(lines).collect()
}

fn cells<const N: usize>(text: [&str; N]) -> Vec<String> {
    text.map(str::to_owned).to_vec()
}

/// Aligns the first column left and the others right, each as wide as necessary.
fn aligned(table: &Table) -> String {
    let columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = table.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in table {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = match column {
                0 => write!(out, "  {cell:<width$}"),
                _ => write!(out, " {cell:>width$}"),
            };
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A document of the schema, with additions that a later daemon may make, and some fields missing.
    fn reading(uptime_ms: u64, requests: u64) -> Snapshot {
        let ring = json!({
            "rd_req": requests, "rd_sect": requests * 8, "events": requests / 4,
            "kicks": requests / 8, "sleeps": requests / 4, "system_calls": requests / 2,
            "persistent_held": 11, "refused": { "segment": 0, "of the future": 0 },
            "batch": { "buckets": [0, 0, 0, requests / 4], "sum": requests },
            "ring_wait_ns": { "buckets": [], "sum": 0 },
            "device_ns": { "buckets": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, requests], "sum": requests },
            "completion_ns": { "buckets": [], "sum": 0 },
            "derived": Ring::default().derived, "new": 1
        });
        let of =
            |ring| serde_json::from_value::<Ring>(ring).expect("a ring").since(&Ring::default());
        let ring = of(ring);
        let device = Device {
            backend: "/local/domain/0/backend/vbd3/5/51712".to_owned(),
            domain: 5,
            name: "xvda".to_owned(),
            error: Some("\x1b]0;evil\x07".to_owned()),
            sectors: 1 << 31,
            total: Ring::total(&[ring.clone(), ring.clone()]),
            rings: vec![ring.clone(), ring],
            ..Device::default()
        };
        let mut now = Snapshot { devices: vec![device], ..Snapshot::default() };
        now.process.uptime_ms = uptime_ms;
        now
    }

    fn words(text: &str, first: &str) -> Vec<Vec<String>> {
        let lines = text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect());
        lines.filter(|words: &Vec<_>| words.first().is_some_and(|word| word == first)).collect()
    }

    #[test]
    fn totals_are_rows_by_ring_and_of_all() {
        let text = totals(&reading(1000, 80_000));
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let sections = words(&text, "all");
        assert_eq!(sections[0][1..7], ["160k", "0", "0", "0", "625M", "0B"].map(str::to_owned)[..]);
        assert_eq!(sections[1].last().map(String::as_str), Some("0.62"), "1/2 + 1/8");
        assert_eq!(sections[3].last().map(String::as_str), Some("22"));
        assert_eq!(words(&text, "1").len(), 4);
    }

    #[test]
    fn rates_are_what_happened_a_second() {
        let text = rates(&reading(1000, 80_000), &reading(3000, 88_000));
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let rows = words(&text, "5/xvda");
        let row = ["5/xvda", "all", "8000", "0", "0", "31.2M", "0B", "0", "4.00", "0.12", "0.62"];
        assert_eq!(rows[2][..11], row.map(str::to_owned)[..]);
        assert_eq!(rows[2][11..], ["1.0us", "1.0us"].map(str::to_owned)[..]);
        assert!(rates(&reading(3000, 1), &reading(1000, 1)).contains("started anew"));
    }
}
