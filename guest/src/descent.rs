//! Which process descends from which: read from `/proc`, as one moment shows it.

use std::collections::HashMap;
use std::io;

/// The init of the guest, which nobody signals.
const INIT: i32 = 1;

/// The parent of each process.
///
/// # Errors
/// When `/proc` cannot be listed. A process that ends meanwhile is left out.
pub fn parents() -> io::Result<HashMap<i32, i32>> {
    let mut parents = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match std::fs::read(entry.path().join("stat")) {
            Ok(stat) => parents.extend(parent(&stat).map(|parent| (pid, parent))),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(parents)
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The parent in a line of `stat`; the name before it may hold anything, also parentheses.
fn parent(stat: &[u8]) -> Option<i32> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(&stat[end + 1..]).ok()?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// All processes that are none of these and descend from none of these, without the init.
pub fn others(parents: &HashMap<i32, i32>, these: &[i32]) -> Vec<i32> {
    let descends = |pid: i32| {
        let mut pid = pid;
        // No line of parents is longer than all of them, whatever one moment made of it.
        for _ in 0..=parents.len() {
            if these.contains(&pid) {
                return true;
            }
            match parents.get(&pid) {
                Some(parent) if *parent > INIT => pid = *parent,
                _ => return false,
            }
        }
        false
    };
    parents.keys().copied().filter(|pid| *pid != INIT && !descends(*pid)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_after_the_name() {
        assert_eq!(parent(b"7 (a) b) (c) S 3 7 7 0 -1\n"), Some(3));
        assert_eq!(parent(b"7 (x) S"), None);
        assert_eq!(parent(b""), None);
        let ours = i32::try_from(std::process::id()).unwrap();
        assert_eq!(parents().unwrap()[&ours], nix::unistd::getppid().as_raw());
    }

    #[test]
    fn who_descends_from_others_is_told_apart() {
        let parents = [(1, 0), (2, 0), (10, 1), (11, 10), (12, 11), (20, 1), (21, 20), (30, 30)];
        let mut others = others(&parents.into(), &[10]);
        others.sort_unstable();
        assert_eq!(others, [2, 20, 21, 30]);
    }
}
