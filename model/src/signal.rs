//! The signals of Linux, by the names that images and people give them.

/// What ends a command unless something else is asked for.
pub const TERM: u8 = 15;

/// The first and the last that a name with `RTMIN` or `RTMAX` counts from, as glibc has them.
const REAL_TIME: (u8, u8) = (34, 64);

/// From 1 on.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The number of a signal: `SIGQUIT`, `quit`, `3`, `SIGRTMIN+3`; `None` if it is none of these, or
/// empty.
#[must_use]
pub fn number(text: &str) -> Option<u8> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().filter(|number| (1..=REAL_TIME.1).contains(number));
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(index) = NAMES.iter().position(|known| *known == name) {
        return u8::try_from(index + 1).ok();
    }
    let (first, last) = REAL_TIME;
    match name {
        "IOT" => return Some(6),
        "CLD" => return Some(17),
        "POLL" => return Some(29),
        "RTMIN" => return Some(first),
        "RTMAX" => return Some(last),
        _ => {}
    }
    let counted = |count: &str| count.parse::<u8>().ok().filter(|n| *n <= last - first);
    if let Some(count) = name.strip_prefix("RTMIN+") {
        return counted(count).map(|count| first + count);
    }
    name.strip_prefix("RTMAX-").and_then(counted).map(|count| last - count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in [
            ("SIGTERM", Some(15)),
            ("SIGQUIT", Some(3)),
            ("usr1", Some(10)),
            ("Sys", Some(31)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-14", Some(50)),
            ("RTMIN", Some(34)),
            ("SIGPOLL", Some(29)),
            ("", None),
            ("0", None),
            ("65", None),
            ("999", None),
            ("SIG", None),
            ("SIGFOO", None),
            ("RTMIN+31", None),
            ("RTMIN+-1", None),
            ("15 ", None),
        ] {
            assert_eq!(number(text), expected, "{text:?}");
        }
        assert_eq!(number("TERM"), Some(TERM));
    }
}
