//! How much is said on stderr: `-q`, `--verbose`, `MATCHLOCK_LOG`.
//!
//! Three kinds of words go there: errors, always; notes and progress, but with `--quiet`; the log, as
//! far as its filter lets it. The command's own output is none of them.

use std::sync::OnceLock;

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::error::CliError;
use crate::node::stderr::LogWriter;

/// The environment variable that says what is logged.
const LOG_VARIABLE: &str = "MATCHLOCK_LOG";

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The flags of every verb.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Verbosity {
    /// No notes and no progress on stderr, only errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Log more on stderr, twice even more; -v before the verb
    #[arg(long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// The same. Behind `run` it is --volume.
    #[arg(short = 'v', hide = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    v: u8,
}

static QUIET: OnceLock<bool> = OnceLock::new();

/// Whether notes and progress are unwanted.
pub(super) fn is_quiet() -> bool {
    QUIET.get().copied().unwrap_or(false)
}

/// What logs an error that we tell in a line of our own: a certificate that is not trusted.
const SAID_BY_US: &str = "rustls_platform_verifier=off";

impl Verbosity {
    /// Makes it so for this process, and starts the log.
    pub(super) fn begin(self) -> Result<(), CliError> {
        QUIET.get_or_init(|| self.quiet);
        let filter = self.filter(std::env::var_os(LOG_VARIABLE).as_deref())?;
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| LogWriter)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_target(false)
            .compact()
            .init();
        Ok(())
    }

    /// Flags are worth more than the environment, which is checked all the same.
    fn filter(self, variable: Option<&std::ffi::OsStr>) -> Result<EnvFilter, CliError> {
        let text = variable.filter(|text| !text.is_empty());
        let asked = text.map(|text| parse(&text.to_string_lossy())).transpose()?;
        let by_flag = match (self.quiet, self.verbose.saturating_add(self.v)) {
            (true, _) => "error",
            (false, 0) => match asked {
                Some(asked) => return Ok(asked),
                None => "warn",
            },
            (false, 1) => "warn,matchlock=info",
            (false, 2) => "info,matchlock=debug",
            (false, _) => "debug,matchlock=trace",
        };
        Ok(EnvFilter::new(format!("{by_flag},{SAID_BY_US}")))
    }
}

/// Reads a filter. A single word that is no level would be taken for a target, and silence everything.
fn parse(text: &str) -> Result<EnvFilter, CliError> {
    let refused = |why: &str| {
        CliError::message(format_args!(
            "{LOG_VARIABLE} is {text:?}: {why}; use one of {}, or e.g. warn,matchlock_host=debug",
            LEVELS.join(", ")
        ))
    };
    let text: Vec<&str> = text.split(',').map(str::trim).collect();
    let word = |part: &&str| !part.contains(['=', '[']) && part.parse::<u8>().is_err();
    for part in text.iter().copied().filter(word) {
        if !LEVELS.iter().any(|level| part.eq_ignore_ascii_case(level)) {
            return Err(refused(&format!("{part:?} is no level")));
        }
    }
    EnvFilter::try_new(text.join(",")).map_err(|error| refused(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    const PLAIN: Verbosity = Verbosity { quiet: false, verbose: 0, v: 0 };

    fn filter(verbosity: Verbosity, variable: Option<&str>) -> Result<String, String> {
        let filter = verbosity.filter(variable.map(OsStr::new));
        let plain = |text: String| text.replace(&format!("{SAID_BY_US},"), "");
        filter.map(|filter| plain(filter.to_string())).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_worth_more_than_the_environment() {
        assert_eq!(filter(PLAIN, None).unwrap(), "warn");
        assert_eq!(filter(PLAIN, Some("")).unwrap(), "warn");
        assert_eq!(filter(PLAIN, Some("debug")).unwrap(), "debug");
        assert_eq!(filter(Verbosity { quiet: true, ..PLAIN }, Some("debug")).unwrap(), "error");
        let verbose = Verbosity { verbose: 1, ..PLAIN };
        assert!(filter(verbose, Some("error")).unwrap().contains("matchlock=info"));
        let both = Verbosity { verbose: 1, v: 1, ..PLAIN };
        assert!(filter(both, None).unwrap().contains("matchlock=debug"));
    }

    #[test]
    fn a_filter_that_is_none_is_refused_by_name() {
        for text in ["bogus", "warn,bogus", "matchlock=loud", "a=b=c", "matchlock_host"] {
            let told = filter(PLAIN, Some(text)).unwrap_err();
            assert!(told.contains("MATCHLOCK_LOG") && told.contains(text), "{told}");
            assert_eq!(told.lines().count(), 1, "{told}");
        }
        for text in ["INFO", "warn,matchlock_host=trace", "off", "3", "warn, matchlock=debug"] {
            filter(PLAIN, Some(text)).unwrap();
        }
    }
}
