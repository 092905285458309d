//! Numbers in at most five or six characters.

/// A count: `9999`, `12.3k`, `4.6M`.
pub(super) fn count(value: u64) -> String {
    if value < 10_000 { value.to_string() } else { scaled(value as f64, 1000.0, COUNTS) }
}

/// Bytes in powers of 1024: `512B`, `4.0K`, `1.5G`.
pub(super) fn bytes(value: u64) -> String {
    scaled(value as f64, 1024.0, BYTES)
}

/// A count per second.
pub(super) fn rate(count: u64, seconds: f64) -> String {
    let value = count as f64 / seconds;
    if value < 10_000.0 { format!("{value:.0}") } else { scaled(value, 1000.0, COUNTS) }
}

/// Bytes per second.
pub(super) fn byte_rate(bytes: u64, seconds: f64) -> String {
    scaled(bytes as f64 / seconds, 1024.0, BYTES)
}

/// A ratio or a mean: `0.25`, `17.3`; `-` if there is none.
pub(super) fn ratio(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value < 10.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.1}"),
    }
}

/// Nanoseconds: `511ns`, `65us`, `1.0ms`; `-` if unknown.
pub(super) fn time(ns: Option<u64>) -> String {
    ns.map_or_else(|| "-".to_owned(), |ns| scaled(ns as f64, 1000.0, TIMES))
}

/// `3d 04:05`, `04:05:06`.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60 % 60, seconds / 3600 % 24, seconds / 86400);
    match days {
        0 => format!("{hours:02}:{minutes:02}:{:02}", seconds % 60),
        _ => format!("{days}d {hours:02}:{minutes:02}"),
    }
}

/// Untrusted text, without characters that a terminal would take for a command.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

const COUNTS: &[&str] = &["", "k", "M", "G", "T", "P", "E"];
const BYTES: &[&str] = &["B", "K", "M", "G", "T", "P", "E"];
const TIMES: &[&str] = &["ns", "us", "ms", "s"];

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // A value that would be rounded up to a full step counts as one.
    while value >= step - 0.5 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 99.95);
    format!("{value:.decimals$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_change_units_without_growing_wider() {
        assert_eq!(
            ["0", "9999", "10.0k", "1.0M", "18.4E"].map(str::to_owned),
            [count(0), count(9999), count(10_000), count(999_999), count(u64::MAX)]
        );
        assert_eq!(
            ["1023B", "1.0K", "1.0M", "1.5G"].map(str::to_owned),
            [bytes(1023), bytes(1024), bytes((1 << 20) - 1), bytes(3 << 29)]
        );
        assert_eq!(
            ["-", "511ns", "65.5us", "1.0ms", "275s"].map(str::to_owned),
            [
                time(None),
                time(Some(511)),
                time(Some(65_535)),
                time(Some(999_999)),
                time(Some((1 << 38) - 1))
            ]
        );
        assert_eq!("1d 00:01", duration(86_460));
        assert_eq!("a\u{fffd}[2Jb", plain("a\x1b[2Jb"));
    }
}
