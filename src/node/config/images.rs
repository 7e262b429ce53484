//! What `config.toml` says of how much an image may take.
//!
//! ```toml
//! [image]
//! max_size_mb = 65536          # of an archive, of the layers unpacked, of the files
//! max_files = 1000000          # in all layers of an image
//! max_build_memory_mb = 4096   # that mkfs.erofs may take, about 4.7 KB a file
//! ```

use matchlock_host::image::ImportLimits;
use serde::Deserialize;

use super::{CONFIG_FILE, ConfigError, MEGABYTES, Sources, number, parsed};

/// What is counted in the number of files.
const FILES: &str = "files, at least 1";

/// The section of the file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Section {
    #[serde(deserialize_with = "number")]
    max_size_mb: Option<u64>,
    #[serde(deserialize_with = "number")]
    max_files: Option<u64>,
    #[serde(deserialize_with = "number")]
    max_build_memory_mb: Option<u64>,
}

/// Checks them.
pub(super) fn limits(from: &Sources<'_>, section: &Section) -> Result<ImportLimits, ConfigError> {
    let file = from.home.join(CONFIG_FILE);
    let get = |key: &str, value: Option<u64>, unit| {
        let setting = format!("{key} in [image] in {}", file.display());
        let checked = |value: u64| {
            parsed(setting, value.to_string().into(), unit, |number: &u64| *number > 0)
        };
        value.map(checked).transpose()
    };
    let bytes = |mb: u64| mb.saturating_mul(1 << 20);
    let default = ImportLimits::default();
    Ok(ImportLimits {
        max_bytes: get("max_size_mb", section.max_size_mb, MEGABYTES)?
            .map_or(default.max_bytes, bytes),
        max_entries: get("max_files", section.max_files, FILES)?.unwrap_or(default.max_entries),
        max_build_memory: get("max_build_memory_mb", section.max_build_memory_mb, MEGABYTES)?
            .map_or(default.max_build_memory, bytes),
        ..default
    })
}
