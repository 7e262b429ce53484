//! Errors of the command line: one line, and an exit code.

use std::error::Error;
use std::fmt;

use matchlock_model::exit;
use matchlock_model::failure::{Failure, chain};

/// Why a verb failed.
#[derive(Debug)]
pub struct CliError {
    usage: bool,
    message: String,
    code: Option<u8>,
}

impl CliError {
    /// The command line is wrong.
    #[must_use]
    pub fn usage(error: &clap::Error, verb: &str) -> Self {
        let rendered = error.render().to_string();
        // clap puts the point first, in a paragraph of its own; tips and usage follow.
        let point: Vec<&str> =
            rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
        let point = point.join(" ");
        let point = point.strip_prefix("error: ").unwrap_or(&point);
        let help = match verb {
            "" => "matchlock --help".to_owned(),
            verb if verb.starts_with('-') => "matchlock --help".to_owned(),
            _ if error.kind() == clap::error::ErrorKind::InvalidSubcommand => {
                "matchlock --help".to_owned()
            }
            verb => format!("matchlock {verb} --help"),
        };
        let similar = match error.get(clap::error::ContextKind::SuggestedArg) {
            Some(clap::error::ContextValue::String(flag)) => format!(" (did you mean {flag}?)"),
            _ => String::new(),
        };
        Self { usage: true, message: format!("{point}{similar}; see `{help}`"), code: None }
    }

    /// The arguments cannot be what they are.
    #[must_use]
    pub fn input(message: impl fmt::Display) -> Self {
        Self { usage: true, message: message.to_string(), code: None }
    }

    /// Something failed.
    #[must_use]
    pub fn failure(error: &(dyn Error + 'static)) -> Self {
        Self { usage: false, message: chain(error), code: None }
    }

    /// Something failed, in our own words.
    #[must_use]
    pub fn message(message: impl fmt::Display) -> Self {
        Self { usage: false, message: message.to_string(), code: None }
    }

    /// The same, with an exit code of its own.
    #[must_use]
    pub fn with_code(self, code: u8) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The exit code: of `run` and `exec`, or of the other verbs.
    #[must_use]
    pub const fn exit_code(&self, passes_exit_code: bool) -> u8 {
        match (self.code, passes_exit_code, self.usage) {
            (Some(code), _, _) => code,
            (None, true, _) => exit::MATCHLOCK_FAILED,
            (None, false, true) => exit::USAGE,
            (None, false, false) => exit::FAILURE,
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Failure> for CliError {
    fn from(failure: Failure) -> Self {
        Self::message(failure)
    }
}
