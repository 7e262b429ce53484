//! Verbs and flags that are known but not there yet: recognised, and refused by name.

use std::ffi::OsString;

use clap::{Args, Subcommand};

use super::error::CliError;

/// Verbs of later versions.
#[derive(Debug, Subcommand)]
pub(super) enum LaterVerb {
    #[command(hide = true)]
    AllowList(Anything),
    #[command(hide = true)]
    Build(Anything),
    #[command(hide = true)]
    #[command(hide = true)]
    PortForward(Anything),
    #[command(hide = true)]
    Setup(Anything),
    #[command(hide = true)]
    Volume(Anything),
}

/// Whatever follows.
#[derive(Debug, Args)]
pub(super) struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

impl LaterVerb {
    /// The refusal, which names the verb.
    pub(super) fn refuse(&self) -> CliError {
        let verb = match self {
            Self::AllowList(_) => "allow-list",
            Self::Build(_) => "build",
            Self::PortForward(_) => "port-forward",
            Self::Setup(_) => "setup",
            Self::Volume(_) => "volume",
        };
        let text = format!("`matchlock {verb}` is not available in this version yet");
        CliError::input(format_args!("{text}; see docs/COMPATIBILITY.md"))
    }
}

/// Flags of `run` of later versions.
#[derive(Debug, Default, Args)]
pub(super) struct LaterRunFlags {
    #[arg(long, hide = true)]
    address: Vec<String>,
    #[arg(long, hide = true)]
    allow_host: Vec<String>,
    #[arg(long, hide = true)]
    disk: Vec<String>,
    #[arg(long, hide = true)]
    network_intercept: bool,
    #[arg(short = 'p', long, hide = true)]
    publish: Vec<String>,
    #[arg(long, hide = true)]
    secret: Vec<String>,
    #[arg(short = 'v', long, hide = true)]
    volume: Vec<String>,
    #[arg(long, hide = true)]
    workspace: Option<String>,
}

impl LaterRunFlags {
    /// Refuses the first that was given, by name.
    pub(super) fn refuse(&self) -> Result<(), CliError> {
        let given = [
            ("--address", !self.address.is_empty()),
            ("--allow-host", !self.allow_host.is_empty()),
            ("--disk", !self.disk.is_empty()),
            ("--network-intercept", self.network_intercept),
            ("--publish", !self.publish.is_empty()),
            ("--secret", !self.secret.is_empty()),
            ("--volume", !self.volume.is_empty()),
            ("--workspace", self.workspace.is_some()),
        ];
        refuse_later(&given)
    }
}

/// Refuses the first flag that was given, by name.
pub(super) fn refuse_later(flags: &[(&str, bool)]) -> Result<(), CliError> {
    match flags.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(CliError::input(format_args!(
            "{flag} is not available in this version yet; see docs/COMPATIBILITY.md"
        ))),
    }
}
