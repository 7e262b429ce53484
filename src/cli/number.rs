//! Numbers of the command line, refused in words that say what to write instead.

use std::time::Duration;

/// A whole number.
pub(super) fn whole(text: &str) -> Result<u64, &'static str> {
    match text.parse() {
        Ok(number) => Ok(number),
        Err(_) if is_digits(text) => Err("that number is too large"),
        Err(_) => Err("use a whole number, without a unit"),
    }
}

/// A number of days.
pub(super) fn days(text: &str) -> Result<u32, &'static str> {
    u32::try_from(whole(text)?).map_err(|_| "that number is too large")
}

/// A time: `10s`, `1m30s`, `500ms`, or a bare number of seconds.
pub(super) fn duration(text: &str) -> Result<Duration, &'static str> {
    match text.parse::<u32>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds.into())),
        Err(_) => humantime::parse_duration(text)
            .map_err(|_| "use a number with a unit, e.g. 10s, 1m30s, 500ms, or seconds"),
    }
}

/// A number with or without a fraction.
pub(super) fn fraction(text: &str) -> Result<f64, &'static str> {
    text.parse().map_err(|_| "use a number, e.g. 2 or 0.5")
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_told_what_to_write() {
        assert_eq!(whole("512"), Ok(512));
        for text in ["512m", "-1", "1.5", "", "1e3"] {
            assert_eq!(whole(text), Err("use a whole number, without a unit"), "{text:?}");
        }
        assert_eq!(whole(&"9".repeat(30)), Err("that number is too large"));
        assert_eq!((days("30"), days("4294967296").is_err()), (Ok(30), true));
        assert_eq!(fraction("0.5"), Ok(0.5));
        assert!(fraction("half").is_err());
        for (text, seconds) in [("90", 90), ("90s", 90), ("1m30s", 90), ("1h", 3600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["soon", "-1", "1.5", "99999999999", ""] {
            assert!(duration(text).unwrap_err().contains("10s, 1m30s, 500ms"), "{text}");
        }
    }
}
