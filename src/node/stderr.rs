//! Our own words on stderr, which must never hold up a clean-up: whoever reads stderr may have
//! stopped, and the command's own output may wait there already.
//!
//! # Invariants
//! 1. A write waits a bounded time for room, then is dropped.
//! 2. The lock of [`std::io::stderr`] is not taken: a blocked write of the command's stderr, on
//!    another thread, holds it.

use std::io::{self, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// What a pipe that polls as writable takes without blocking (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4096;

/// Writes as much as stderr takes within this time. What it does not take is lost: there is
/// nowhere left to say so.
pub fn write(text: &str, wait: Duration) {
    let stderr = io::stderr();
    let wait = Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    };
    for chunk in text.as_bytes().chunks(CHUNK_BYTES) {
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        if !matches!(poll(&mut fds, Some(&wait)), Ok(ready) if ready > 0) {
            return;
        }
        if rustix::io::write(&stderr, chunk).is_err() {
            return;
        }
    }
}

/// A writer for log lines: they are dropped at once when nobody reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        write(&String::from_utf8_lossy(line), Duration::ZERO);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
