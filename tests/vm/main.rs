//! The real program with real virtual machines. Needs the environment of `make test`.
//!
//! Each test has an installation of its own and looks at the end at what is left on the host.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod auto_warm;
mod commands;
mod detach;
mod errors;
mod exit_code;
mod guest_bundles;
mod image_config;
mod image_use;
mod images;
mod inside;
mod lifecycle;
mod log;
mod network;
mod network_end;
mod relink;
mod secrets;
mod signals;
mod terminal;
mod verbs;
mod warm;
mod warm_tcp;

use std::process::Output;
use std::time::Duration;

/// How long a run may take on a loaded machine with software emulation before a test gives up.
/// Not a measure of speed: a boot takes seconds.
const PATIENCE: Duration = Duration::from_secs(180);

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
