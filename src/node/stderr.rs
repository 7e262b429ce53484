//! Our own words on stderr, which must never hold up a clean-up: whoever reads stderr may have
//! stopped, and the command's own output may wait there already.
//!
//! # Invariants
//! 1. A write waits a bounded time for room, then is dropped.
//! 2. The lock of [`std::io::stderr`] is not taken: a blocked write of the command's stderr, on
//!    another thread, holds it.
//! 3. Whatever is drawn there makes room for words, and is drawn anew after them.
//! 4. On a raw terminal each line begins on the left all the same.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::terminal;

/// What a pipe that polls as writable takes without blocking (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4096;

/// Takes what is drawn away, writes, draws it anew.
pub type MakeRoom = fn(&mut dyn FnMut());

static MAKE_ROOM: OnceLock<MakeRoom> = OnceLock::new();

/// From now on words are written in this way; the first who asks has it for good.
pub fn make_room_with(make_room: MakeRoom) {
    MAKE_ROOM.get_or_init(|| make_room);
}

/// Writes as much as stderr takes within this time. What it does not take is lost: there is
/// nowhere left to say so.
pub fn write(text: &str, wait: Duration) {
    match MAKE_ROOM.get() {
        Some(make_room) => make_room(&mut || put(text, wait)),
        None => put(text, wait),
    }
}

/// Draws as much as stderr takes at once.
pub fn draw(text: &str) {
    put(text, Duration::ZERO);
}

fn put(text: &str, wait: Duration) {
    let stderr = io::stderr();
    let text = if terminal::is_raw() && stderr.is_terminal() {
        Cow::Owned(text.replace('\n', "\r\n"))
    } else {
        Cow::Borrowed(text)
    };
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
