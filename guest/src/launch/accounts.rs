//! Reads the image's account files, which may hold anything.

use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

/// The most that is read of an account file.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// The content of an account file; nothing if there is none.
///
/// # Errors
/// When it is not a regular file, too long, or cannot be read.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Opening must not wait: a pipe or a terminal in its place would stop the agent.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let found = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    let count = std::fs::File::from(file).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if u64::try_from(count).unwrap_or(u64::MAX) > MAX_BYTES {
        return Err(io::Error::other("larger than 4 MiB"));
    }
    Ok(bytes)
}

/// The fields of each line that is not a comment and has at least `fields` of them.
pub(super) fn records(bytes: &[u8], fields: usize) -> impl Iterator<Item = Vec<&[u8]>> {
    bytes
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.starts_with(b"#"))
        .map(|line| line.split(|byte| *byte == b':').collect::<Vec<_>>())
        .filter(move |record| record.len() >= fields)
}

/// A number as an id; the last one means "no change" to the kernel and is none.
pub(super) fn id(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let id = std::str::from_utf8(text).ok()?.parse().ok()?;
    (id != u32::MAX).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_short_regular_file_is_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("passwd");
        assert_eq!(read(&path).unwrap(), b"");
        assert_eq!(read(&path.join("below")).unwrap(), b"");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(read(&path).unwrap(), b"x");
        assert_eq!(read(&path.join("below")).unwrap(), b"");
        let large = std::fs::File::create(&path).unwrap();
        large.set_len(MAX_BYTES).unwrap();
        assert_eq!(read(&path).unwrap().len(), 4 * 1024 * 1024);
        large.set_len(MAX_BYTES + 1).unwrap();
        assert!(read(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&path).is_err(), "a pipe is refused, and not waited for");
        assert!(read(root.path()).is_err());
    }

    #[test]
    fn ids_are_decimal_numbers_below_the_last() {
        assert_eq!(id(b"0"), Some(0));
        assert_eq!(id(b"007"), Some(7));
        assert_eq!(id(b"4294967294"), Some(4_294_967_294));
        for bad in ["", "-1", "+1", " 1", "1 ", "4294967295", "99999999999", "a"] {
            assert_eq!(id(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
