//! The guest kernels that are built: Debian's, and our own after `make kernel`.

use anyhow::{Context as _, Result};
use matchlock_test_support::Installation;

use crate::artifacts;

/// A guest kernel.
pub(crate) struct GuestKernel {
    /// `stock` or `own`.
    pub(crate) name: &'static str,
    /// What it says of itself.
    pub(crate) release: String,
    /// With this kernel's bundle alone.
    pub(crate) installation: Installation,
}

impl GuestKernel {
    /// For a table.
    pub(crate) fn title(&self) -> String {
        format!("{} ({})", self.name, self.release)
    }
}

/// What is said where our own kernel is not measured; empty where it is.
pub(crate) fn not_measured<'a>(kernels: impl IntoIterator<Item = &'a GuestKernel>) -> &'static str {
    if kernels.into_iter().any(|kernel| kernel.name == "own") {
        return "";
    }
    "\nOur own kernel was not built, and is not measured: `make kernel`.\n"
}

/// Those that are installed where the tests find theirs.
pub(crate) fn built() -> Result<Vec<GuestKernel>> {
    let shared = Installation::new()?.bundles()?;
    let mut kernels = Vec::new();
    for name in ["stock", "own"] {
        // Bundles of earlier builds are there too.
        let current = artifacts::target().join("guest-bundle").join(format!("current-{name}"));
        let Ok(current) = std::fs::read_to_string(current) else { continue };
        let installed = shared.iter().find(|(version, ..)| version == current.trim());
        let (version, release, _) = installed.with_context(|| format!("no bundle {current}"))?;
        let installation = Installation::with_own_bundle(version)?;
        kernels.push(GuestKernel { name, release: release.clone(), installation });
    }
    Ok(kernels)
}
