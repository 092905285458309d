//! A [`Snapshot`] in the Prometheus text exposition format 0.0.4.

use super::distribution::Distribution;
use super::snapshot::{Device, Ring, Snapshot};
use crate::ring::TIMED_ROUNDS;
use crate::stats::Counts;
use std::fmt::{self, Display, Write};

/// The answer's `Content-Type`.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const NANOSECONDS: f64 = 1e9;
/// Bits of the `le` bounds of times: 1 µs to 17 s by factors of 4. Each costs a series per ring;
/// `/stats` has finer ones.
const TIME_BITS: [usize; 13] = [10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34];
/// Bits of the `le` bounds of batches: a round has at most 16 requests.
const BATCH_BITS: [usize; 5] = [1, 2, 3, 4, 5];

/// Renders `snapshot`.
pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut out = Text(String::new());
    // Writing to a string does not fail.
    let _ = out.all(snapshot);
    out.0
}

/// A device or a ring, with its labels.
struct Labelled<'a, T> {
    labels: String,
    of: &'a T,
}

struct Text(String);

impl Text {
    fn all(&mut self, snapshot: &Snapshot) -> fmt::Result {
        self.process(snapshot)?;
        let devices = snapshot.devices.iter().map(|of| Labelled { labels: labels(of), of });
        let devices: Vec<_> = devices.collect();
        self.devices(&devices)?;
        let rings: Vec<_> = devices
            .iter()
            .flat_map(|device| {
                device.of.rings.iter().enumerate().map(|(ring, of)| Labelled {
                    labels: format!("{},ring=\"{ring}\"", device.labels),
                    of,
                })
            })
            .collect();
        self.rings(&rings)
    }

    fn process(&mut self, snapshot: &Snapshot) -> fmt::Result {
        let process = &snapshot.process;
        let seconds = process.cpu_ms as f64 / 1e3;
        self.head("process_cpu_seconds_total", "counter", "Processor time, user and system.")?;
        self.sample("process_cpu_seconds_total", "", seconds)?;
        let gauges = [
            ("process_start_time_seconds", "Start time since 1970.", process.start_time_s),
            ("process_resident_memory_bytes", "Resident memory.", process.resident_bytes),
            ("process_open_fds", "Open file descriptors.", process.open_fds),
            ("process_max_fds", "Limit of open file descriptors.", process.max_fds),
        ];
        for (name, help, value) in gauges {
            self.head(name, "gauge", help)?;
            self.sample(name, "", value)?;
        }
        Ok(())
    }

    fn devices(&mut self, devices: &[Labelled<'_, Device>]) -> fmt::Result {
        let name = "blkback_device_info";
        self.head(name, "gauge", "1; what a device is, in labels.")?;
        for Labelled { labels, of } in devices {
            let labels = format!(
                "{labels},target=\"{}\",strategy=\"{}\",layout=\"{}\",read_only=\"{}\"",
                Escaped(&of.target),
                Escaped(of.strategy.as_deref().unwrap_or_default()),
                Escaped(of.layout.as_deref().unwrap_or_default()),
                of.read_only,
            );
            self.sample(name, &labels, 1)?;
        }
        type Gauge = (&'static str, &'static str, fn(&Device) -> u64);
        let gauges: [Gauge; 4] = [
            ("state", "Xenbus state of this end; 4 is connected.", |of| of.state_number.into()),
            ("size_bytes", "Size.", |of| of.sectors.saturating_mul(512)),
            ("rings", "Rings connected.", |of| of.rings.len() as u64),
            ("error", "1 where something went wrong last; what it was is in /stats.", |of| {
                of.error.is_some().into()
            }),
        ];
        for (name, help, value) in gauges {
            let name = format!("blkback_device_{name}");
            self.head(&name, "gauge", help)?;
            for Labelled { labels, of } in devices {
                self.sample(&name, labels, value(of))?;
            }
        }
        Ok(())
    }

    fn rings(&mut self, rings: &[Labelled<'_, Ring>]) -> fmt::Result {
        for (index, (name, help)) in Counts::FIELDS.iter().enumerate() {
            let name = format!("blkback_{name}_total");
            self.head(&name, "counter", help)?;
            for Labelled { labels, of } in rings {
                self.sample(&name, labels, of.counts.values()[index])?;
            }
        }
        let name = "blkback_refused_total";
        self.head(name, "counter", "Requests refused, by reason.")?;
        for Labelled { labels, of } in rings {
            for (reason, count) in &of.refused {
                self.sample(name, &format!("{labels},reason=\"{}\"", Escaped(reason)), count)?;
            }
        }
        let name = "blkback_persistent_held";
        self.head(name, "gauge", "Persistent grants held.")?;
        for Labelled { labels, of } in rings {
            self.sample(name, labels, of.persistent_held)?;
        }
        type Histogram = (&'static str, &'static str, fn(&Ring) -> &Distribution);
        let times: [Histogram; 3] = [
            ("ring_wait", "Time from an event to when its requests were taken", |of| {
                &of.ring_wait_ns
            }),
            ("device", "Time from when a request was taken to when the device had done it", |of| {
                &of.device_ns
            }),
            (
                "completion",
                "Time from when the device was done to when the response could be seen",
                |of| &of.completion_ns,
            ),
        ];
        for (name, help, part) in times {
            let name = format!("blkback_{name}_seconds");
            let help = format!("{help}, of one round in {TIMED_ROUNDS}.");
            self.histogram(&name, &help, rings, part, &TIME_BITS, NANOSECONDS)?;
        }
        let (name, help) = ("blkback_batch_requests", "Requests taken from the ring at a time.");
        self.histogram(name, help, rings, |of| &of.batch, &BATCH_BITS, 1.0)
    }

    /// Values are divided by `unit`; a bucket ends at 2^bits - 1, and values are whole numbers.
    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        rings: &[Labelled<'_, Ring>],
        part: fn(&Ring) -> &Distribution,
        bits: &[usize],
        unit: f64,
    ) -> fmt::Result {
        self.head(name, "histogram", help)?;
        let bucket = format!("{name}_bucket");
        for Labelled { labels, of } in rings {
            let values = part(of);
            for bits in bits {
                let end = ((1_u64 << bits) - 1) as f64 / unit;
                self.sample(&bucket, &format!("{labels},le=\"{end}\""), values.at_most(*bits))?;
            }
            self.sample(&bucket, &format!("{labels},le=\"+Inf\""), values.count())?;
            self.sample(&format!("{name}_sum"), labels, values.sum as f64 / unit)?;
            self.sample(&format!("{name}_count"), labels, values.count())?;
        }
        Ok(())
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) -> fmt::Result {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}")
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) -> fmt::Result {
        if labels.is_empty() {
            writeln!(self.0, "{name} {value}")
        } else {
            writeln!(self.0, "{name}{{{labels}}} {value}")
        }
    }
}

/// Includes `kind`, because a stale directory of another kind may have the same numbers, and two
/// series with the same labels spoil the whole answer.
fn labels(device: &Device) -> String {
    format!(
        "domain=\"{}\",kind=\"{}\",device=\"{}\",name=\"{}\"",
        device.domain,
        Escaped(&device.kind),
        device.device,
        Escaped(&device.name)
    )
}

/// A label's value: `\`, `"` and line feed are escaped, all else stands for itself.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for char in self.0.chars() {
            match char {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}
