//! The command line: one verb per file. The only code that prints.

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use matchlock_host::process::forbid_core_dumps;
use tokio::signal::unix::SignalKind;
use tracing_subscriber::EnvFilter;

use crate::node::config::NodeConfig;
use crate::node::stderr::LogWriter;

mod error;
mod exec;
mod gc;
mod get;
mod image;
mod inspect;
mod kill;
mod later;
mod list;
mod looking;
mod render;
mod rm;
mod run;
mod timings;
mod version;

pub use error::CliError;

const SIGXFSZ: i32 = 25;

/// The environment variable that says what is logged.
const LOG_VARIABLE: &str = "MATCHLOCK_LOG";

/// Runs commands in disposable microVMs, and never leaks.
#[derive(Debug, Parser)]
#[command(
    name = "matchlock",
    version = version::VERSION,
    propagate_version = false,
    disable_help_subcommand = false,
    max_term_width = 100,
    after_help = "\
Examples:
  matchlock run --image busybox -- sh -c 'uname -a'    run a command, pass its exit code on
  tar c . | matchlock run -i --image busybox -- tar t  give it a stdin
  matchlock list                                       what runs
  matchlock exec vm-0badcafe -- uname -r               a further command in a VM
  matchlock gc                                         remove what a crash left

Environment:
  MATCHLOCK_HOME          state directory (default ~/.matchlock)
  MATCHLOCK_CACHE         images and guest kernels (default ~/.cache/matchlock)
  MATCHLOCK_KERNEL        a guest kernel instead of the installed one
  MATCHLOCK_QEMU          the QEMU program (default qemu-system-x86_64)
  MATCHLOCK_BOOT_TIMEOUT  seconds until a guest that does not get ready is given up (default 120)
  MATCHLOCK_HISTORY_DAYS  days for which removed microVMs are remembered (default 30)
  MATCHLOCK_SUBNET_POOL   range that subnets are cut from, e.g. base=10.64.0.0/12,size=30 (default
                          192.168.100.0/24 to 192.168.254.0/24, then that one)
  MATCHLOCK_LOG           what is logged on stderr, e.g. debug (default warn)

$MATCHLOCK_HOME/config.toml may set cache, kernel, boot_timeout, history_days
and subnet_pool."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a command in a new microVM
    Run(Box<run::RunArgs>),
    /// Run a further command in a running microVM
    Exec(exec::ExecArgs),
    /// List microVMs
    #[command(visible_alias = "ls")]
    List(list::ListArgs),
    /// Stop a running microVM and clean up after it
    Kill(kill::KillArgs),
    /// Remove a stopped microVM
    #[command(visible_alias = "remove")]
    Rm(rm::RmArgs),
    /// Print a microVM as JSON
    Get(get::GetArgs),
    /// Print a microVM and its history as JSON, also after its removal
    #[command(visible_alias = "stat")]
    Inspect(inspect::InspectArgs),
    /// Remove what crashed microVMs left on this host
    Gc(gc::GcArgs),
    /// Import, list and remove images
    Image(image::ImageArgs),
    /// Print the version
    Version,
    #[command(flatten)]
    Later(later::LaterVerb),
}

impl Verb {
    /// Whether failures before the command's own end have the exit code of `run` and `exec`.
    const fn passes_exit_code(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Exec(_))
    }
}

/// Parses, runs, prints the error, returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    start_logging();
    let passes_exit_code = cli.verb.passes_exit_code();
    let code = match dispatch(cli.verb) {
        Ok(code) => code,
        Err(error) => {
            render::error(&error);
            error.exit_code(passes_exit_code)
        }
    };
    finish(code)
}

/// Ends the process without waiting for a thread that reads our stdin.
#[expect(clippy::exit, reason = "a thread may sit in read(0) for ever; everything else has ended")]
fn finish(code: u8) -> ! {
    std::process::exit(i32::from(code))
}

fn parse() -> Result<Cli, ExitCode> {
    let matches = Cli::command().try_get_matches();
    matches.and_then(|matches| Cli::from_arg_matches(&matches)).map_err(|error| {
        if !error.use_stderr() {
            // Help or version: asked for, so it goes to stdout and is no failure.
            return match error.print() {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        let verb = std::env::args().nth(1).unwrap_or_default();
        let error = CliError::usage(&error, &verb);
        render::error(&error);
        ExitCode::from(error.exit_code(matches!(verb.as_str(), "run" | "exec")))
    })
}

fn start_logging() {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| LogWriter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .compact()
        .init();
}

fn dispatch(verb: Verb) -> Result<u8, CliError> {
    let verb = match verb {
        Verb::Version => return version::version(),
        Verb::Later(later) => return Err(later.refuse()),
        verb => verb,
    };
    let config =
        NodeConfig::load(&|name| std::env::var_os(name)).map_err(|e| CliError::failure(&e))?;
    // They would hold values that are never stored (`-e NAME`).
    forbid_core_dumps().map_err(|e| CliError::failure(&e))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| CliError::failure(&e))?;
    let code = runtime.block_on(async {
        // A limit on file sizes is then an error of the write, not the end of this process.
        let too_large = SignalKind::from_raw(SIGXFSZ);
        let _kept = tokio::signal::unix::signal(too_large).map_err(|e| CliError::failure(&e))?;
        match verb {
            Verb::Run(args) => run::run(*args, config).await,
            Verb::Exec(args) => exec::exec(args, config).await,
            Verb::List(args) => list::list(args, config).await,
            Verb::Kill(args) => kill::kill(args, config).await,
            Verb::Rm(args) => rm::rm(args, config).await,
            Verb::Get(args) => get::get(args, config).await,
            Verb::Inspect(args) => inspect::inspect(args, config).await,
            Verb::Gc(args) => gc::gc(args, config).await,
            Verb::Image(args) => image::image(args, config).await,
            Verb::Version | Verb::Later(_) => Ok(0),
        }
    });
    // Not dropped: that would wait for a blocking read of stdin.
    runtime.shutdown_background();
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
