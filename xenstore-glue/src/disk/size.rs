//! Sizes with suffixes.

/// A string is not a size.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} is no size: use a number of bytes, or one followed by k, M, G or T (powers of 1024)"
)]
pub struct SizeError(pub String);

/// Suffixes in either case, and how far they shift.
const SUFFIXES: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('k', 10)];

/// Reads a number of bytes such as `512`, `64k` or `2T`.
///
/// # Errors
/// Anything else, and sizes that do not fit in an `off_t`.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let error = || SizeError(text.to_owned());
    let suffix = SUFFIXES.iter().find(|(suffix, _)| {
        text.ends_with([suffix.to_ascii_lowercase(), suffix.to_ascii_uppercase()])
    });
    let (digits, shift) = match suffix {
        Some((_, shift)) => (&text[..text.len() - 1], *shift),
        None => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(error());
    }
    let number: u64 = digits.parse().map_err(|_| error())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(error)?;
    if i64::try_from(bytes).is_err() {
        return Err(error());
    }
    Ok(bytes)
}

/// Writes a number of bytes with the largest suffix that keeps it exact.
pub fn format_size(bytes: u64) -> String {
    let exact = SUFFIXES.iter().find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match exact {
        Some((suffix, shift)) => format!("{}{suffix}", bytes >> shift),
        None => bytes.to_string(),
    }
}
