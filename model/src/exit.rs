//! Exit codes, as `docs/SPECIFICATION.md` lists them.

/// The command inside took longer than `--timeout`.
pub const TIMEOUT: u8 = 124;
/// Matchlock itself failed, so there is no exit code of the command.
pub const MATCHLOCK_FAILED: u8 = 125;
/// The command was found but could not be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// The command was not found.
pub const NOT_FOUND: u8 = 127;
/// A verb other than `run` and `exec` failed.
pub const FAILURE: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;

/// The exit code of a process that a signal ended.
#[must_use]
pub const fn by_signal(signal: u8) -> u8 {
    128u8.saturating_add(signal)
}
