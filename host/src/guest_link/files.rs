//! Files of a guest: requests for them, and the entries that it lists.
//!
//! A file is read, written or listed by a job without a command, so that it is carried as a command's
//! streams are: with credit, bounded, and on from session to session.

use bytes::BytesMut;
use matchlock_model::file::{FileEntry, FileOp};
use matchlock_wire::message::{self, FileStart, JobId};
use tokio_util::codec::Decoder as _;

use super::LinkError;
use super::codec::{self, Limited};

/// The longest frame of an entry: a name of 255 bytes and some numbers.
const MAX_ENTRY_FRAME: usize = 512;

/// The longest name that Linux has.
const MAX_NAME_BYTES: usize = 255;

/// The request that opens files.
pub(super) fn file_start(job: JobId, op: &FileOp) -> FileStart {
    let op = match op.clone() {
        FileOp::Read { path, offset, length } => message::FileOp::Read { path, offset, length },
        FileOp::Write { path, offset, mode } => message::FileOp::Write { path, offset, mode },
        FileOp::List { path } => message::FileOp::List { path },
    };
    FileStart { job, op }
}

/// Puts the entries of a listed directory together, from what the guest prints.
#[derive(Debug)]
pub struct FileEntries {
    codec: Limited<message::FileEntry>,
    rest: BytesMut,
}

impl Default for FileEntries {
    fn default() -> Self {
        Self { codec: Limited::new(MAX_ENTRY_FRAME), rest: BytesMut::new() }
    }
}

impl FileEntries {
    /// Takes what was printed; gives the entries that are complete.
    ///
    /// # Errors
    /// When the guest sent something else.
    pub fn take(&mut self, printed: &[u8]) -> Result<Vec<FileEntry>, LinkError> {
        self.rest.extend_from_slice(printed);
        let mut entries = Vec::new();
        let violation = |what: String| LinkError::Protocol { what };
        while let Some(entry) = self
            .codec
            .decode(&mut self.rest)
            .map_err(|error| violation(format!("it listed {}", codec::with_sources(&error))))?
        {
            let name = entry.name.0;
            if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&b'/') {
                return Err(violation("it listed a name that is none".into()));
            }
            let message::FileEntry { size, mode, modified_unix_s, .. } = entry;
            entries.push(FileEntry { name, size, mode, modified_unix_s });
        }
        Ok(entries)
    }

    /// Whether nothing is left over.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.rest.is_empty()
    }
}

/// The frame of an entry, for guests of tests.
pub(super) fn entry_frame(entry: &FileEntry) -> BytesMut {
    let FileEntry { name, size, mode, modified_unix_s } = entry.clone();
    let entry = message::FileEntry { name: message::Bytes(name), size, mode, modified_unix_s };
    codec::encode(entry).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8]) -> FileEntry {
        FileEntry { name: name.into(), size: u64::MAX, mode: 0o100_644, modified_unix_s: -1 }
    }

    #[test]
    fn entries_come_in_any_pieces() {
        let entries = [entry(b"a"), entry(&[0xFF; 255]), entry(b"c")];
        let printed: Vec<u8> =
            entries.iter().flat_map(|entry| entry_frame(entry).to_vec()).collect();
        for size in [1, 7, printed.len()] {
            let mut taken = FileEntries::default();
            let mut got = Vec::new();
            for piece in printed.chunks(size) {
                got.extend(taken.take(piece).expect("entries"));
            }
            assert_eq!(got, entries);
            assert!(taken.is_whole());
        }
    }

    #[test]
    fn what_is_no_entry_ends_it() {
        for name in [&b""[..], b"a/b", &[b'x'; 256]] {
            let printed = entry_frame(&entry(name));
            FileEntries::default().take(&printed).expect_err("a name that is none");
        }
        FileEntries::default().take(&[0, 1, 0, 0]).expect_err("a frame that is too long");
        FileEntries::default().take(&[0, 0, 0, 1, 9]).expect_err("nonsense");
        let mut cut = FileEntries::default();
        assert!(cut.take(&[0, 0]).expect("a part").is_empty() && !cut.is_whole());
    }
}
