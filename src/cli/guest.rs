//! `matchlock guest`: list guest bundles, choose the one that is booted, remove others.

use clap::{Args, Subcommand};
use matchlock_host::guest_bundle::{GuestBundles, InstalledBundle};
use matchlock_model::failure::chain;
use serde::Serialize;

use super::error::CliError;
use super::render;
use super::table::{self, Cell, Column};
use crate::node::config::NodeConfig;

/// The arguments of `guest`.
#[derive(Debug, Args)]
pub(super) struct GuestArgs {
    #[command(subcommand)]
    verb: GuestVerb,
}

#[derive(Debug, Subcommand)]
enum GuestVerb {
    /// List guest bundles, and say which are damaged: each file is hashed
    #[command(visible_alias = "list")]
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Check a guest bundle and boot it from now on
    Use {
        /// Version of the bundle
        version: String,
    },
    /// Remove a guest bundle: not the default one, and none that a running microVM uses
    #[command(visible_alias = "remove")]
    Rm {
        /// Version of the bundle
        version: String,
    },
}

/// Carries `guest` out.
pub(super) fn guest(args: GuestArgs, config: &NodeConfig) -> Result<u8, CliError> {
    let bundles = GuestBundles::new(&config.cache);
    match args.verb {
        GuestVerb::Ls { json } => ls(json, &bundles),
        GuestVerb::Use { version } => {
            bundles.make_default(&version).map_err(|e| CliError::failure(&e))?;
            render::lines([format!("Default: {version}")])?;
            if config.kernel.is_some() {
                render::note(
                    "MATCHLOCK_KERNEL (or `kernel` in config.toml) is booted instead of it",
                );
            }
            Ok(0)
        }
        GuestVerb::Rm { version } => {
            bundles.remove(&version).map_err(|e| CliError::failure(&e))?;
            render::lines([format!("Removed {version}")])?;
            Ok(0)
        }
    }
}

#[derive(Debug, Serialize)]
struct JsonBundle<'a> {
    version: &'a str,
    default: bool,
    kernel_release: Option<&'a str>,
    kernel_package: Option<&'a str>,
    size: u64,
    status: &'static str,
    problem: Option<String>,
}

fn ls(json: bool, bundles: &GuestBundles) -> Result<u8, CliError> {
    let found = bundles.list().map_err(|e| CliError::failure(&e))?;
    if json {
        let shown: Vec<JsonBundle<'_>> = found.iter().map(json_bundle).collect();
        render::json(&shown)?;
        return Ok(0);
    }
    let rows: Vec<Vec<Cell>> = found.iter().map(row).collect();
    table::print(COLUMNS, &rows)?;
    for damage in found.iter().filter_map(|bundle| bundle.damage.as_ref()) {
        render::note(&chain(damage));
    }
    Ok(0)
}

fn status(bundle: &InstalledBundle) -> &'static str {
    if bundle.damage.is_some() { "damaged" } else { "ok" }
}

fn json_bundle(bundle: &InstalledBundle) -> JsonBundle<'_> {
    JsonBundle {
        version: &bundle.version,
        default: bundle.is_default,
        kernel_release: bundle.kernel_release.as_deref(),
        kernel_package: bundle.kernel_package.as_deref(),
        size: bundle.size,
        status: status(bundle),
        problem: bundle.damage.as_ref().map(|damage| chain(damage)),
    }
}

const COLUMNS: &[Column] = &[
    Column::whole("VERSION"),
    Column::cut("KERNEL", 10),
    Column::whole("SIZE"),
    Column::whole("STATUS"),
    Column::whole("DEFAULT"),
];

fn row(bundle: &InstalledBundle) -> Vec<Cell> {
    vec![
        bundle.version.clone().into(),
        bundle.kernel_release.clone().unwrap_or_else(|| "-".to_owned()).into(),
        render::megabytes(bundle.size).into(),
        status(bundle).to_owned().into(),
        (if bundle.is_default { "yes" } else { "-" }).to_owned().into(),
    ]
}
