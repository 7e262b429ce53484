//! Printing: tables for people, JSON for scripts, errors in one line.

use std::io::{self, Write as _};
use std::time::Duration;

use serde::Serialize;

use super::error::CliError;
use crate::node::stderr;

/// How long our own words wait for a reader of stderr that is busy.
const STDERR_WAIT: Duration = Duration::from_secs(2);

/// Prints an error on stderr, in one line.
pub(super) fn error(error: &CliError) {
    let line: String =
        error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    note(&line);
}

/// Prints a line about ourselves on stderr.
pub(super) fn note(line: &str) {
    stderr::write(&format!("matchlock: {line}\n"), STDERR_WAIT);
}

/// Prints lines on stdout.
pub(super) fn lines<S: AsRef<str>>(lines: impl IntoIterator<Item = S>) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
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

/// Prints a table: columns padded with two spaces, aligned left.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> Result<(), CliError> {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let header = line(header.to_vec());
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    lines(std::iter::once(header).chain(rows))
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
