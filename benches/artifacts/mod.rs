//! Where the benchmarks leave things for each other.

use std::path::PathBuf;

/// The directory of everything that is built.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from)
}

/// What the bench of this name writes (`network`, `fleet`), and `scenarios` puts into
/// docs/PERFORMANCE.md.
pub(crate) fn section(bench: &str) -> PathBuf {
    target().join("bench").join(bench).with_extension("md")
}
