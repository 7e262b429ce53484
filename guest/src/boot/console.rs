//! What the guest says on its console: one line per event, and the last line before the end.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::Write as _;

use rustix::fs::{Mode, OFlags};

/// Makes the console this process's standard streams.
///
/// # Errors
/// When there is no console.
pub fn attach() -> rustix::io::Result<()> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = rustix::fs::open("/dev/console", flags, Mode::empty())?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(())
}

/// Says one line.
pub fn line(message: fmt::Arguments<'_>) {
    say(format_args!("matchlock-guest: {message}\n"));
}

/// Says what failed and why, in one line.
pub fn failure(what: &str, error: &dyn Error) {
    line(format_args!("{what}: {}", chain(error)));
}

/// Says why the guest cannot go on, and ends this process. For PID 1 that is a kernel panic, which
/// the host sees as the machine's reset.
pub fn fatal(error: &dyn Error) -> ! {
    line(format_args!("fatal: {}", chain(error)));
    std::process::exit(1)
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        if write!(text, ": {cause}").is_err() {
            break;
        }
        source = cause.source();
    }
    text
}

fn say(text: fmt::Arguments<'_>) {
    let mut bytes = text.to_string();
    // Only the last character ends the line, whatever came from outside.
    let end = bytes.trim_end().len();
    bytes.truncate(end);
    let mut bytes = bytes.replace(|c: char| c.is_control(), " ");
    bytes.push('\n');
    if std::io::stderr().write_all(bytes.as_bytes()).is_err() {
        // There is nowhere left to say it.
    }
}
