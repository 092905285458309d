//! Sizes and times as fio writes them, and as people read them.

use std::time::Duration;

/// Reads a size: a number with `k`, `m`, `g`, `t` or `p`, each 1024 times the one before, optionally
/// followed by `b` or `ib`; in upper or lower case.
pub(crate) fn size<T: TryFrom<u64>>(text: &str) -> Result<T, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = lower.get(digits.len()..).unwrap_or_default();
    let suffix = suffix.strip_suffix("ib").or(suffix.strip_suffix('b')).unwrap_or(suffix);
    let shift = match suffix {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(format!("{text:?} is no size: say 4k, 64m, 1g")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is no size: say 4k, 64m, 1g"))?;
    let bytes = number.checked_mul(1 << shift).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| format!("{text:?} is too large"))
}

/// Reads a time: a number of seconds, or one with `us`, `ms`, `s`, `m`, `h` or `d`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let micros = match text.get(digits.len()..).unwrap_or_default() {
        "us" => 1,
        "ms" => 1000,
        "" | "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return Err(format!("{text:?} is no time: say 30, 500ms, 2m")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is no time: say 30, 500ms, 2m"))?;
    let micros = number.checked_mul(micros).ok_or_else(|| format!("{text:?} is too long"))?;
    Ok(Duration::from_micros(micros))
}

/// Reads fio's idea of a boolean.
pub(crate) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(format!("{text:?} is neither 0 nor 1")),
    }
}

/// Writes bytes in units of 1024.
pub(crate) fn show_bytes(bytes: f64) -> String {
    scaled(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Writes a count in units of 1000.
pub(crate) fn show_count(count: f64) -> String {
    scaled(count, 1000.0, &["", "k", "M", "G"])
}

/// Writes nanoseconds in a unit that fits.
pub(crate) fn show_ns(ns: f64) -> String {
    scaled(ns, 1000.0, &["ns", "us", "ms", "s"])
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = "";
    for (n, name) in units.iter().enumerate() {
        unit = name;
        if value < step || n + 1 == units.len() {
            break;
        }
        value /= step;
    }
    let space = if unit.is_empty() { "" } else { " " };
    let digits = if value >= 100.0 || value.fract() == 0.0 { 0 } else { 2 };
    format!("{value:.digits$}{space}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_fio_does() {
        assert_eq!(size("512"), Ok(512_u64));
        assert_eq!(size("4k"), Ok(4096_u64));
        assert_eq!(size("4KiB"), Ok(4096_u64));
        assert_eq!(size("1MB"), Ok(1_u64 << 20));
        assert_eq!(size("4g"), Ok(4_u64 << 30));
        for wrong in ["", "k", "4x", "-1", "4 k", "99999999999999p"] {
            assert!(size::<u64>(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(time("30"), Ok(Duration::from_secs(30)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2m"), Ok(Duration::from_secs(120)));
        assert!(time("2w").is_err());
    }

    #[test]
    fn numbers_are_written_to_be_read() {
        assert_eq!(show_bytes(512.0), "512 B");
        assert_eq!(show_bytes(4096.0), "4 KiB");
        assert_eq!(show_count(1_348_488.0), "1.35 M");
        assert_eq!(show_ns(25_400.0), "25.40 us");
    }
}
