//! The checks of single values.

use std::net::IpAddr;

use super::{CpuMillis, MAX_COMMAND_BYTES, MAX_HOSTNAME_BYTES, SpecError};
use crate::guest::HostEntry;

pub(super) fn check_length(argv: &[Vec<u8>], env: &[(Vec<u8>, Vec<u8>)]) -> Result<(), SpecError> {
    let bytes = argv.iter().map(|word| word.len() + 1).sum::<usize>()
        + env.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
    if bytes > MAX_COMMAND_BYTES {
        return Err(SpecError::CommandTooLong { bytes });
    }
    Ok(())
}

pub(super) fn check_image(image: &str) -> Result<(), SpecError> {
    crate::image::check_tag(image).map_err(|_| SpecError::Form {
        what: "--image",
        given: image.to_owned(),
        expected: "not an image name; see `matchlock image ls` for those that are here",
    })
}

pub(super) fn check_cpus(cpus: f64, host_cpus: u32) -> Result<CpuMillis, SpecError> {
    let refused =
        |expected: String| SpecError::Range { flag: "--cpus", given: cpus.to_string(), expected };
    let range = || format!("a number from 0.01 to {host_cpus}, the CPUs of this host");
    if !cpus.is_finite() || cpus < 0.01 || cpus > f64::from(host_cpus) {
        return Err(refused(range()));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the range was just checked: at most the host's CPUs times 1000"
    )]
    let millis = (cpus * 1000.0).round() as u32;
    Ok(CpuMillis(millis))
}

pub(super) fn check_range(
    flag: &'static str,
    given: u64,
    min: u64,
    max: u64,
    unit: &str,
) -> Result<(), SpecError> {
    if (min..=max).contains(&given) {
        return Ok(());
    }
    Err(SpecError::Range {
        flag,
        given: given.to_string(),
        expected: format!("{min} to {max} {unit}"),
    })
}

pub(super) fn check_hostname(text: &str) -> Result<(), SpecError> {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() <= MAX_HOSTNAME_BYTES && text.split('.').all(label) {
        return Ok(());
    }
    Err(SpecError::Form {
        what: "--hostname",
        given: text.to_owned(),
        expected: "use up to 63 of a-z A-Z 0-9 - and single dots, not starting or ending with -",
    })
}

/// Checks a working directory given by a user.
///
/// # Errors
/// When it is not an absolute path.
pub fn check_workdir(text: &str) -> Result<(), SpecError> {
    if text.starts_with('/') && !text.contains('\0') {
        return Ok(());
    }
    Err(SpecError::Form {
        what: "--workdir",
        given: text.to_owned(),
        expected: "use an absolute path in the guest, for example /work",
    })
}

/// Checks a user given by a user; whether it exists is known in the guest only.
///
/// # Errors
/// When it cannot be a user in any guest.
pub fn check_user(text: &str) -> Result<(), SpecError> {
    let mut parts = text.split(':');
    let good = |part: Option<&str>| {
        part.is_some_and(|p| !p.is_empty() && !p.contains(char::is_whitespace) && !p.contains('\0'))
    };
    let group = parts.clone().nth(1);
    if good(parts.next()) && (group.is_none() || good(group)) && text.split(':').count() <= 2 {
        return Ok(());
    }
    Err(SpecError::Form {
        what: "--user",
        given: text.to_owned(),
        expected: "use uid, uid:gid, a name, or name:group",
    })
}

pub(super) fn parse_add_host(text: &str) -> Result<HostEntry, SpecError> {
    let refused = |expected| SpecError::Form {
        what: "invalid add-host mapping",
        given: text.to_owned(),
        expected,
    };
    let (host, ip) = text.split_once(':').ok_or_else(|| refused("expected host:ip"))?;
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if host.is_empty() || host.len() > 253 || !host.chars().all(good) {
        return Err(refused("the host name before the first colon is empty or not a host name"));
    }
    let ip = ip.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(ip);
    let ip: IpAddr = ip
        .parse()
        .map_err(|_| refused("what follows the first colon is not an IPv4 or IPv6 address"))?;
    Ok(HostEntry { host: host.to_owned(), ip })
}
