//! Where the benchmarks leave things for each other.

use std::path::PathBuf;

/// The directory of everything that is built.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from)
}

/// What `network` writes, and `scenarios` puts into docs/PERFORMANCE.md.
pub(crate) fn network_section() -> PathBuf {
    target().join("bench/network.md")
}
