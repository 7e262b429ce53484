//! A VM's log: what the own command of a VM prints, both streams in the order in which it came.
//!
//! ```text
//!  LogWriter ─► vm.log ─ full ─► vm.log.1 ─► … ─► vm.log.<files - 1> ─► gone
//!                 ▲                  ▲
//!  LogReader ─────┴── goes through ──┘  oldest first, and on from file to file as they move
//! ```
//!
//! # Invariants
//! 1. The files of one VM never hold more than [`LogLimits::total`] bytes, whatever its guest prints.
//! 2. Files are reached through a descriptor of their directory and never through a link: once the
//!    directory is removed nothing is made in its place.
//! 3. A reader that follows misses nothing while files move on, unless a file is gone before its turn.
//!
//! The bytes are the guest's: whatever it prints is in there, also what it should have kept to itself.
//!
//! # On error
//! What cannot be written is told to the caller and left out; the next write tries again, also to make
//! a file that could not be made. A crash between two renames leaves a gap in the numbers, which
//! readers pass over.

mod read;
#[cfg(test)]
mod tests;
mod write;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;

use matchlock_failpoints::Area;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::rootfs::VmPaths;

pub use read::{LogKind, LogReader, Tail};
pub use write::LogWriter;

/// What a crash may come between.
pub const POINTS: Area = Area::new("vm_log", &["open"]);

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// The largest size of a file.
    pub file_bytes: u64,
    /// How many files there are at most; 0 keeps nothing.
    pub files: u32,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { file_bytes: 10 << 20, files: 3 }
    }
}

impl LogLimits {
    /// The largest number of files.
    pub const MOST_FILES: u32 = 100;

    /// The most that all files of a VM hold.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.file_bytes.saturating_mul(self.files as u64)
    }
}

/// The name of the log's file of this age; 0 is the one that is written.
fn name(age: u32) -> OsString {
    match age {
        0 => "vm.log".into(),
        age => format!("vm.log.{age}").into(),
    }
}

/// The directory of a VM's logs; `None` when there is none.
fn open_dir(paths: &VmPaths) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, paths.logs(), flags, Mode::empty()) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
