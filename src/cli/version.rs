//! `matchlock version`.

use super::error::CliError;
use super::render;

/// The version, as `--version` prints it.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit that was built, where the build said so.
const COMMIT: Option<&str> = option_env!("MATCHLOCK_COMMIT");

/// When it was built, where the build said so.
const BUILT: Option<&str> = option_env!("MATCHLOCK_BUILT");

pub(super) fn version() -> Result<u8, CliError> {
    let unknown = "unknown";
    let (commit, built) = (COMMIT.unwrap_or(unknown), BUILT.unwrap_or(unknown));
    render::lines([format!("matchlock {VERSION} (commit: {commit}, built: {built})")])?;
    Ok(0)
}
