//! Files in memory, for the guests of tests: a path and its bytes. A directory is there as long as
//! something is below it.

use std::collections::{BTreeMap, BTreeSet};

use matchlock_model::exec::{ExecRefusal, ExecRefusalKind};
use matchlock_model::file::{FileEntry, FileOp};

use super::files::entry_frame;

type Files = BTreeMap<String, Vec<u8>>;

const REGULAR: u32 = 0o100_644;
const DIRECTORY: u32 = 0o040_755;

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// What reading or listing prints.
pub(super) fn print(files: &Files, op: &FileOp) -> Result<Vec<u8>, ExecRefusal> {
    let printed = match op {
        FileOp::Read { path, offset, length } => files.get(path).map(|bytes| {
            let from = bytes.get(index(*offset)..).unwrap_or_default();
            from[..index(length.unwrap_or(u64::MAX)).min(from.len())].to_vec()
        }),
        FileOp::List { path } => list(files, path),
        FileOp::Write { .. } => Some(Vec::new()),
    };
    printed.ok_or_else(|| ExecRefusal {
        kind: ExecRefusalKind::NotFound,
        message: format!("{}: No such file or directory", op.path()),
    })
}

fn list(files: &Files, path: &str) -> Option<Vec<u8>> {
    let below = format!("{}/", path.trim_end_matches('/'));
    let mut seen = BTreeSet::new();
    let mut printed = Vec::new();
    for (path, bytes) in files {
        let Some(rest) = path.strip_prefix(&below) else { continue };
        let (name, is_dir) = rest.split_once('/').map_or((rest, false), |(name, _)| (name, true));
        if seen.insert(name) {
            let mode = if is_dir { DIRECTORY } else { REGULAR };
            let size = if is_dir { 0 } else { bytes.len() as u64 };
            let entry = FileEntry { name: name.into(), size, mode, modified_unix_s: 7 };
            printed.extend(entry_frame(&entry));
        }
    }
    (!seen.is_empty() || path == "/").then_some(printed)
}

/// Opens a file to be written; where its next byte goes.
pub(super) fn open(files: &mut Files, path: &str, offset: Option<u64>) -> usize {
    let file = files.entry(path.to_owned()).or_default();
    if offset.is_none() {
        file.clear();
    }
    index(offset.unwrap_or(0)).min(file.len())
}

/// Writes bytes; where the next goes.
pub(super) fn write(files: &mut Files, path: &str, at: usize, data: &[u8]) -> usize {
    let file = files.entry(path.to_owned()).or_default();
    let end = at + data.len();
    file.resize(file.len().max(end), 0);
    file[at..end].copy_from_slice(data);
    end
}
