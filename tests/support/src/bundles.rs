//! Guest bundles in a cache of a test's own.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::Result;

/// The sums of what [`put_bundle`] writes.
const KERNEL: (&str, &str) =
    ("a kernel", "4fff0d3e643b3894c17a0738fbdc591953aa722c9d42774425090accc4377126");
const INITRAMFS: (&str, &str) =
    ("an initramfs", "3bc41abf071fe2c48d78331091e4bcf4538df91632d5fbb2d949572b5ec545f0");

/// Puts a bundle into a cache, whole, and made of a few bytes that boot nothing.
///
/// # Errors
/// When it cannot be written.
pub fn put_bundle(cache: &Path, version: &str) -> Result<()> {
    let dir = cache.join("guest").join(version);
    fs::create_dir_all(&dir)?;
    let manifest = serde_json::json!({
        "format": 1,
        "version": version,
        "kernel_release": "6.1.0-none",
        "kernel_package": "none=1",
        "kernel_sha256": KERNEL.1,
        "initramfs_sha256": INITRAMFS.1,
    });
    fs::write(dir.join("kernel"), KERNEL.0)?;
    fs::write(dir.join("initramfs"), INITRAMFS.0)?;
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    Ok(())
}

/// Puts a bundle of one cache into another, and makes it the default there if it has none.
///
/// # Errors
/// When it is not there or cannot be copied.
pub fn copy_bundle(from: &Path, to: &Path, version: &str) -> Result<()> {
    let (source, guest) = (from.join("guest").join(version), to.join("guest"));
    let target = guest.join(version);
    fs::create_dir_all(&target)?;
    for file in ["kernel", "initramfs", "manifest.json"] {
        fs::copy(source.join(file), target.join(file))?;
    }
    match std::os::unix::fs::symlink(version, guest.join("default")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.into()),
        _ => Ok(()),
    }
}
