//! Sizes, byte rates and counts as people write them: `10G`, `512k`, `100M/s`, `20k`.
//!
//! The rule for bytes is that of the coreutils (`truncate -s`): a letter alone or with `iB` is a power of 1024, with
//! `B` a power of 1000, and nothing at all is bytes. Letters may be in either case. A fraction is taken when it gives
//! a whole number (`1.5T`), so that no value is ever rounded behind the operator's back.
//! Counts (operations per second) are decimal: `20k` is 20,000.

use thiserror::Error;

/// Why a text is no size, rate or count. The message says what was found and what is expected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SizeError {
    /// No number at its start.
    #[error("\"{found}\" is not {expected}: it does not start with a number")]
    NoNumber {
        /// The text.
        found: String,
        /// What it should have been, with an example.
        expected: &'static str,
    },
    /// The number is followed by something that is no unit.
    #[error("\"{found}\" is not {expected}: the unit \"{unit}\" is not known")]
    Unit {
        /// The text.
        found: String,
        /// What stands behind the number.
        unit: String,
        /// What it should have been, with an example.
        expected: &'static str,
    },
    /// A fraction that is no whole number in the smallest unit, or has more than 18 digits.
    #[error("\"{found}\" is not a whole number: write it in a smaller unit")]
    Fraction {
        /// The text.
        found: String,
    },
    /// Does not fit 64 bits.
    #[error("\"{found}\" is too large: the largest value is {}", u64::MAX)]
    TooLarge {
        /// The text.
        found: String,
    },
}

const SIZE: &str = "a size in bytes, like 512k, 10G or 10GiB (powers of 1024) or 10GB (power of 1000)";
const RATE: &str = "a rate in bytes per second, like 100M, 100MB/s or 1GiB/s";
const COUNT: &str = "a number of operations, like 500 or 20k (20000)";

/// The letters of units, in order of their powers.
const LETTERS: &[u8] = b"kmgtpe";

/// Bytes from a size such as `512`, `512k`, `10G`, `10GiB`, `10GB`, `1.5T`.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    parse(text, text, SIZE, byte_unit)
}

/// Bytes per second from a size that may end in `/s`.
pub fn parse_byte_rate(text: &str) -> Result<u64, SizeError> {
    parse(text, text.strip_suffix("/s").unwrap_or(text), RATE, byte_unit)
}

/// A count such as `500`, `20k`, `1.5M`; the units are decimal. May end in `/s`.
pub fn parse_count(text: &str) -> Result<u64, SizeError> {
    parse(text, text.strip_suffix("/s").unwrap_or(text), COUNT, count_unit)
}

/// The shortest exact text that [`parse_size`] reads as `bytes`: the largest unit of 1024 that divides it.
pub fn format_size(bytes: u64) -> String {
    let power = (bytes.trailing_zeros() / 10).min(LETTERS.len() as u32);
    match power {
        _ if bytes == 0 => "0".to_owned(),
        0 => bytes.to_string(),
        _ => format!(
            "{}{}iB",
            bytes >> (10 * power),
            (LETTERS[power as usize - 1] as char).to_ascii_uppercase()
        ),
    }
}

/// The value of a unit of bytes.
fn byte_unit(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    let (letter, base) = match unit.strip_suffix("ib") {
        Some(letter) => (letter, 1024u64),
        None => match unit.strip_suffix('b') {
            Some("") => return Some(1),
            Some(letter) => (letter, 1000),
            None if unit.is_empty() => return Some(1),
            None => (unit.as_str(), 1024),
        },
    };
    power(letter, base)
}

/// The value of a unit of operations.
fn count_unit(unit: &str) -> Option<u64> {
    if unit.is_empty() { Some(1) } else { power(&unit.to_ascii_lowercase(), 1000) }
}

fn power(letter: &str, base: u64) -> Option<u64> {
    let [letter] = letter.as_bytes() else { return None };
    let power = LETTERS.iter().position(|known| known == letter)? as u32 + 1;
    Some(base.pow(power)) // 1024^6 is 2^60
}

/// `found` is the whole text for messages, `text` what is left of it to read.
fn parse(
    found: &str,
    text: &str,
    expected: &'static str,
    unit_value: fn(&str) -> Option<u64>,
) -> Result<u64, SizeError> {
    let shown = || found.chars().take(64).collect::<String>();
    let too_large = || SizeError::TooLarge { found: shown() };
    let digits_of = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();

    let (whole, rest) = text.split_at(digits_of(text));
    if whole.is_empty() {
        return Err(SizeError::NoNumber { found: shown(), expected });
    }
    let (fraction, unit) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits_of(rest)),
        None => ("", rest),
    };
    let Some(scale) = unit_value(unit) else {
        return Err(SizeError::Unit { found: shown(), unit: unit.chars().take(16).collect(), expected });
    };
    let fraction_error = || SizeError::Fraction { found: shown() };
    if rest.starts_with('.') && (fraction.is_empty() || fraction.len() > 18) {
        return Err(fraction_error());
    }
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let numerator = u128::from(fraction.parse::<u64>().unwrap_or(0)) * u128::from(scale);
    let denominator = 10u128.pow(fraction.len() as u32);
    if numerator % denominator != 0 {
        return Err(fraction_error());
    }
    let value = u128::from(whole) * u128::from(scale) + numerator / denominator;
    u64::try_from(value).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    //! Goal: what operators write means what the module says, and nothing else is taken.
    //! Method: a table of known answers; round trips and arbitrary input by property tests.

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("512k", 512 << 10),
            ("512K", 512 << 10),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10gib", 10 << 30),
            ("10GB", 10_000_000_000),
            ("1.5T", 3 << 39),
            ("1.000k", 1024),
            ("0.5k", 512),
            ("15.9990234375E", 16_383 << 50),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_byte_rate("100MB/s"), Ok(100_000_000));
        assert_eq!(parse_byte_rate("1M"), Ok(1 << 20));
        assert_eq!(parse_count("20k"), Ok(20_000));
        assert_eq!(parse_count("500/s"), Ok(500));
    }

    #[test]
    fn refused_with_the_reason() {
        use SizeError::*;
        for text in ["", "G", "-1", "+1", " 1", ".5G", "０"] {
            assert!(matches!(parse_size(text), Err(NoNumber { .. })), "{text}");
        }
        for text in ["1X", "1 G", "1Gi", "1GiBs", "1G/s", "1kk", "1,5G", "0x10", "1iB", "1é"] {
            assert!(matches!(parse_size(text), Err(Unit { .. })), "{text}");
        }
        for text in ["1.5", "1.0001k", "1.G", "1.0000000000000000000G"] {
            assert!(matches!(parse_size(text), Err(Fraction { .. })), "{text}");
        }
        for text in ["18446744073709551616", "16E", "99999999999999999999999G"] {
            assert!(matches!(parse_size(text), Err(TooLarge { .. })), "{text}");
        }
        assert!(matches!(parse_count("1KiB"), Err(Unit { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,40}") {
            let _ = (parse_size(&text), parse_byte_rate(&text), parse_count(&text));
        }

        #[test]
        fn near_miss_text_never_panics(text in "[0-9]{0,24}\\.?[0-9]{0,24}[kmgtpeibKMGTPEIB]{0,3}(/s)?") {
            let _ = (parse_size(&text), parse_byte_rate(&text), parse_count(&text));
        }

        #[test]
        fn format_round_trips(mantissa: u64, shift in 0u32..64) {
            let bytes = mantissa << shift;
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
    }
}
