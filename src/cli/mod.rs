//! The command line: one verb per file. The only code that prints.

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use matchlock_host::process::forbid_core_dumps;
use tokio::signal::unix::SignalKind;

use crate::node::config::NodeConfig;
use crate::node::terminal;

mod diagnose;
mod error;
mod exec;
mod gc;
mod gc_report;
mod get;
mod guest;
mod help;
mod hints;
mod image;
mod image_gc;
mod image_import;
mod image_inspect;
mod inspect;
mod kill;
mod later;
mod list;
mod log;
mod looking;
mod number;
mod progress;
mod pull;
mod render;
mod rm;
mod rpc;
mod run;
mod serve;
mod table;
mod timings;
mod verbosity;
mod version;
mod vm_life;
mod warm;

pub use error::CliError;

const SIGXFSZ: i32 = 25;

/// Runs commands in disposable microVMs, and never leaks.
#[derive(Debug, Parser)]
#[command(
    name = "matchlock",
    version = version::LONG,
    propagate_version = false,
    disable_help_subcommand = false,
    max_term_width = 100,
    after_help = "\
Examples:
  matchlock run --image busybox -- uname -a            run a command
  tar c . | matchlock run -i --image busybox -- tar t  give it a stdin
  matchlock list                                       what runs
  matchlock exec vm-0badcafe -- uname -r               a further command
  matchlock log -f vm-0badcafe                         what its command prints
  matchlock gc                                         remove a crash's remains
  matchlock diagnose                                   what this host lacks

Environment:
  MATCHLOCK_HOME            state directory (default ~/.matchlock)
  MATCHLOCK_CACHE           images and guest kernels
                            (default ~/.cache/matchlock)
  MATCHLOCK_KERNEL          a guest kernel instead of the installed one
  MATCHLOCK_HYPERVISOR      as `run --hypervisor` (default auto)
  MATCHLOCK_QEMU            the QEMU program (default qemu-system-x86_64)
  MATCHLOCK_BOOT_TIMEOUT    seconds until a guest that does not get ready is
                            given up (default 120)
  MATCHLOCK_HANG_TIMEOUT    seconds without an answer until a guest's hang is
                            recorded (default 30)
  MATCHLOCK_HISTORY_DAYS    days for which removed microVMs are remembered
                            (default 30)
  MATCHLOCK_SUBNET_POOL     range that subnets are cut from, e.g.
                            base=10.64.0.0/12,size=30 (default 192.168.100.0/24
                            to 192.168.254.0/24, then 10.64.0.0/12 in /30)
  MATCHLOCK_VM_LOG_SIZE_MB  size at which a VM's log moves on to its next file
                            (default 10)
  MATCHLOCK_VM_LOG_FILES    files that are kept of a VM's log (default 3; 0
                            keeps no log)
  MATCHLOCK_AUTO_WARM       0: a first microVM of its kind makes no snapshot for
                            the next (see `matchlock warm`; default 1)
  DOCKER_CONFIG             directory of the config.json with logins to image
                            registries (default ~/.docker)
  SSL_CERT_FILE             certificates to trust instead of this host's own
  HTTPS_PROXY, HTTP_PROXY   proxy to registries, but for hosts in NO_PROXY
  MATCHLOCK_LOG             what is logged on stderr: a level (off, error, warn,
                            info, debug, trace), or e.g.
                            warn,matchlock_host=debug (default warn);
                            --verbose goes before it
  NO_COLOR                  no colours in tables

$MATCHLOCK_HOME/config.toml may set cache, kernel, boot_timeout, hang_timeout,
history_days, subnet_pool, vm_log_size_mb, vm_log_files and auto_warm, and in
[registry] insecure, ca_file and mirrors."
)]
struct Cli {
    #[command(flatten)]
    verbosity: verbosity::Verbosity,
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
    /// Print what a microVM's command has printed
    #[command(visible_alias = "logs")]
    Log(log::LogArgs),
    /// Stop running microVMs and clean up after them
    Kill(kill::KillArgs),
    /// Remove stopped microVMs, with --force running ones too
    #[command(visible_alias = "remove")]
    Rm(rm::RmArgs),
    /// Remove all microVMs that do not run
    #[command(after_help = "\
Exit codes: 0; 1 when one could not be removed: its record is kept, the others are removed.")]
    Prune,
    /// Print a microVM as JSON
    Get(get::GetArgs),
    /// Print microVMs and their history as JSON, also after their removal
    #[command(visible_alias = "stat")]
    Inspect(inspect::InspectArgs),
    /// Remove what crashed microVMs left on this host
    Gc(gc::GcArgs),
    /// Serve a program that drives many microVMs, over stdin and stdout
    Rpc(rpc::RpcArgs),
    /// Serve many programs at once as `rpc` serves one, over a unix socket
    Serve(serve::ServeArgs),
    /// Pull an image from its registry
    Pull(pull::PullArgs),
    /// Import, list, tag and remove images
    Image(image::ImageArgs),
    /// List guest bundles (kernel and initramfs), choose the one to boot, remove others
    Guest(guest::GuestArgs),
    /// Make the snapshot from which later microVMs start
    Warm(warm::WarmArgs),
    /// Check whether this host can run microVMs, and say what to do if not
    Diagnose(diagnose::DiagnoseArgs),
    /// Print the version, the guest and the hypervisor
    Version(version::VersionArgs),
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
    let passes_exit_code = cli.verb.passes_exit_code();
    let code = match cli.verbosity.begin().and_then(|()| dispatch(cli.verb)) {
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
    terminal::restore();
    std::process::exit(i32::from(code))
}

fn parse() -> Result<Cli, ExitCode> {
    let matches = help::unfolded(Cli::command()).try_get_matches();
    matches.and_then(|matches| Cli::from_arg_matches(&matches)).map_err(|error| {
        if !error.use_stderr() {
            // Help or version: asked for, so it goes to stdout and is no failure.
            return match error.print() {
                // Whoever reads us has seen enough.
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
                _ => ExitCode::SUCCESS,
            };
        }
        let words = std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned());
        let mut words = words.into_iter().filter(|arg| !arg.starts_with('-'));
        let verb = words.next().unwrap_or_default();
        let error = match hints::instead(&error, &verb) {
            Some(instead) => CliError::input(instead),
            None => CliError::usage(&error, &help_of(&verb, words.next())),
        };
        render::error(&error);
        ExitCode::from(error.exit_code(matches!(verb.as_str(), "run" | "exec")))
    })
}

/// The verb whose help tells more: of `image tag` that of `image tag`.
fn help_of(verb: &str, next: Option<String>) -> String {
    let command = Cli::command();
    let found = command.find_subcommand(verb).zip(next);
    match found.and_then(|(outer, next)| outer.find_subcommand(next).map(clap::Command::get_name)) {
        Some(inner) => format!("{verb} {inner}"),
        None => verb.to_owned(),
    }
}

fn dispatch(verb: Verb) -> Result<u8, CliError> {
    if let Verb::Later(later) = &verb {
        return Err(later.refuse());
    }
    let config = NodeConfig::load(&|name| std::env::var_os(name));
    let config = config.map_err(|e| CliError::failure(&e));
    // These two have something to say without one.
    let config = match verb {
        Verb::Version(args) => return version::version(&args, config),
        Verb::Diagnose(args) => return block_on(diagnose::diagnose(args, config)),
        _ => config?,
    };
    // They would hold values that are never stored (`-e NAME`).
    forbid_core_dumps().map_err(|e| CliError::failure(&e))?;
    block_on(async {
        // A limit on file sizes is then an error of the write, not the end of this process.
        let too_large = SignalKind::from_raw(SIGXFSZ);
        let _kept = tokio::signal::unix::signal(too_large).map_err(|e| CliError::failure(&e))?;
        match verb {
            Verb::Run(args) => run::run(*args, config).await,
            Verb::Exec(args) => exec::exec(args, config).await,
            Verb::List(args) => list::list(args, config).await,
            Verb::Log(args) => log::log(args, config).await,
            Verb::Kill(args) => kill::kill(args, config).await,
            Verb::Rm(args) => rm::rm(args, config).await,
            Verb::Prune => rm::prune(config).await,
            Verb::Get(args) => get::get(args, config).await,
            Verb::Inspect(args) => inspect::inspect(args, config).await,
            Verb::Gc(args) => gc::gc(args, config).await,
            Verb::Rpc(args) => rpc::rpc(args, config).await,
            Verb::Serve(args) => serve::serve(args, config).await,
            Verb::Pull(args) => pull::pull(args, config).await,
            Verb::Image(args) => image::image(args, config).await,
            Verb::Guest(args) => guest::guest(args, &config),
            Verb::Warm(args) => warm::warm(args, config).await,
            Verb::Version(_) | Verb::Diagnose(_) | Verb::Later(_) => Ok(0),
        }
    })
}

fn block_on(work: impl Future<Output = Result<u8, CliError>>) -> Result<u8, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| CliError::failure(&e))?;
    let code = runtime.block_on(work);
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
