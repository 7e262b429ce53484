//! Printing: lines, JSON for scripts, errors in one line. Tables are in [`table`](super::table).

use std::io::{self, BufWriter, IsTerminal as _, Write as _};
use std::time::Duration;

use serde::Serialize;

use super::error::CliError;
use super::verbosity;
use crate::node::stderr;

/// How long our own words wait for a reader of stderr that is busy.
const STDERR_WAIT: Duration = Duration::from_secs(2);

/// Prints an error on stderr, in one line.
pub(super) fn error(error: &CliError) {
    let line: String =
        error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    tell(&line);
}

/// Prints a line about ourselves on stderr, but with `--quiet`.
pub(super) fn note(line: &str) {
    if !verbosity::is_quiet() {
        tell(line);
    }
}

/// A line about ourselves for somebody at a terminal, if there is one who wants it.
pub(super) fn on_terminal(line: &'static str) -> Option<&'static str> {
    let wanted = !verbosity::is_quiet() && io::stderr().is_terminal();
    wanted.then_some(line)
}

/// Prints a line on stderr that was asked for.
pub(super) fn tell(line: &str) {
    stderr::write(&format!("matchlock: {line}\n"), STDERR_WAIT);
}

/// Prints lines on stdout.
pub(super) fn lines<S: AsRef<str>>(lines: impl IntoIterator<Item = S>) -> Result<(), CliError> {
    // Rust's own writes each line by itself.
    let mut stdout = BufWriter::new(io::stdout().lock());
    let print = || -> io::Result<()> {
        for line in lines {
            writeln!(stdout, "{}", line.as_ref())?;
        }
        stdout.flush()
    };
    match print() {
        // Whoever reads us has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|e| CliError::failure(&e)),
    }
}

/// Prints a line on stdout that somebody must get: that nobody reads is an error too.
pub(super) fn line_for_somebody(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// A number of things: `1 VM`, `2 VMs`.
pub(super) fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// Prints a value as indented JSON.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| CliError::failure(&e))?;
    lines([text])
}

/// A size as people read it.
pub(super) fn megabytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one decimal of a megabyte is shown")]
    let megabytes = bytes as f64 / (1024.0 * 1024.0);
    format!("{megabytes:.1} MB")
}
