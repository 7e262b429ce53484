//! `matchlock version`: what this program is, and what it would run.

use clap::Args;
use matchlock_host::diagnose::{Check, Status, hypervisor};
use matchlock_host::guest_bundle::GuestBundle;
use matchlock_model::failure::chain;
use serde::Serialize;

use super::error::CliError;
use super::render;
use crate::node::config::NodeConfig;

/// The version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What `--version` prints behind the name.
pub(super) const LONG: &str = concat!("version ", env!("CARGO_PKG_VERSION"));

/// The commit that was built, where the build said so.
const COMMIT: Option<&str> = option_env!("MATCHLOCK_COMMIT");

/// When it was built, where the build said so.
const BUILT: Option<&str> = option_env!("MATCHLOCK_BUILT");

/// The arguments of `version`.
#[derive(Debug, Args)]
pub(super) struct VersionArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What is missing is `null`, and why stands in `problems`.
#[derive(Debug, Serialize)]
struct Said {
    version: &'static str,
    commit: &'static str,
    built: &'static str,
    guest_bundle: Option<String>,
    guest_kernel: Option<String>,
    hypervisor: Option<String>,
    problems: Vec<String>,
}

/// Prints the version. What is missing is said and no failure: see `diagnose`.
pub(super) fn version(
    args: &VersionArgs,
    config: Result<NodeConfig, CliError>,
) -> Result<u8, CliError> {
    let unknown = "unknown";
    let mut said = Said {
        version: VERSION,
        commit: COMMIT.unwrap_or(unknown),
        built: BUILT.unwrap_or(unknown),
        guest_bundle: None,
        guest_kernel: None,
        hypervisor: None,
        problems: Vec::new(),
    };
    let bundle = config.map_err(|error| error.to_string()).and_then(|config| {
        GuestBundle::find(&config.cache, config.kernel).map_err(|error| chain(&error))
    });
    match bundle {
        Ok(bundle) => {
            said.guest_bundle = Some(bundle.version);
            said.guest_kernel = Some(bundle.kernel_release);
        }
        Err(why) => said.problems.push(why),
    }
    match hypervisor() {
        Check { status: Status::Pass, message, .. } => said.hypervisor = Some(message),
        Check { message, .. } => said.problems.push(message),
    }
    if args.json {
        render::json(&said)?;
        return Ok(0);
    }
    let none = || "none".to_owned();
    let Said { commit, built, guest_bundle, guest_kernel, hypervisor, problems, .. } = said;
    let mut lines = vec![
        format!("matchlock {VERSION} (commit: {commit}, built: {built})"),
        format!("guest bundle: {}", guest_bundle.unwrap_or_else(none)),
        format!("guest kernel: {}", guest_kernel.unwrap_or_else(none)),
        format!("hypervisor:   {}", hypervisor.unwrap_or_else(none)),
    ];
    lines.extend(problems.into_iter().map(|why| format!("problem:      {why}")));
    render::lines(lines)?;
    Ok(0)
}
