//! The fields of tar headers and the records of PAX headers, from bytes to values.
//!
//! Nothing here reads a stream or knows a limit: a field that makes no sense is none.

/// A number of a header: octal text, or base 256 when the first bit is set. Blank is zero.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement; the second bit is the sign. At most twelve bytes: an i128 holds them.
        let start = i128::from(first & 0x7f) - if first & 0x40 == 0 { 0 } else { 0x80 };
        let value = rest.iter().fold(start, |value, byte| (value << 8) | i128::from(*byte));
        return i64::try_from(value).ok();
    }
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let text = std::str::from_utf8(&field[..end]).ok()?.trim_matches(' ');
    if text.is_empty() {
        return Some(0);
    }
    if text.starts_with('+') || text.starts_with('-') {
        return None;
    }
    i64::from_str_radix(text, 8).ok()
}

pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with a decimal fraction; a negative time is rounded towards the past.
pub(super) fn fraction(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos = part.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanos = nanos.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    let seconds: i64 = whole.parse().ok()?;
    Some((seconds, nanos))
}

/// The records of an extended header: `<length> <key>=<value>\n`, the length counting all of it.
pub(super) fn records(mut text: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    while !text.is_empty() {
        let space = text.iter().position(|byte| *byte == b' ')?;
        let length = usize::try_from(decimal(&text[..space])?).ok()?;
        if length <= space + 1 || length > text.len() {
            return None;
        }
        let (record, rest) = text.split_at(length);
        let body = record[space + 1..].strip_suffix(b"\n")?;
        let equals = body.iter().position(|byte| *byte == b'=')?;
        if equals == 0 {
            return None;
        }
        found.push((body[..equals].to_vec(), body[equals + 1..].to_vec()));
        text = rest;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"0000755\0"), Some(0o755));
        assert_eq!(number(b"   755 \0"), Some(0o755));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"12345678"), None, "an 8 is not octal");
        assert_eq!(number(b"-0000001"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0xee, 0x6b, 0x28, 0]), Some(4_000_000_000));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]), Some(-256));
        let mut huge = [0_u8; 12];
        huge[0] = 0x80;
        huge[4] = 0x80;
        assert_eq!(number(&huge), None, "2^63 is over the range");
        huge[4] = 0x7f;
        assert_eq!(number(&huge), Some(0x7f00_0000_0000_0000));
    }

    #[test]
    fn records_keep_newlines_in_values() {
        let text = b"21 a.b=one\ntwo\x00three\n11 size=12\n";
        let found = records(text).unwrap();
        assert_eq!(found[0], (b"a.b".to_vec(), b"one\ntwo\0three".to_vec()));
        assert_eq!(found[1], (b"size".to_vec(), b"12".to_vec()));
        for bad in
            [&b"5 a=b"[..], b"99 a=b\n", b"0 a=b\n", b"x a=b\n", b"6 abc\n", b"5 =b\n", b"\0"]
        {
            assert_eq!(records(bad), None, "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_have_fractions() {
        assert_eq!(fraction(b"1700000000.5"), Some((1_700_000_000, 500_000_000)));
        assert_eq!(fraction(b"7"), Some((7, 0)));
        assert_eq!(fraction(b"7.1234567891"), Some((7, 123_456_789)));
        assert_eq!(fraction(b"-3.5").map(|time| time.0), Some(-3));
        assert_eq!(fraction(b"7.x"), None);
        assert_eq!(fraction(b""), None);
    }
}
