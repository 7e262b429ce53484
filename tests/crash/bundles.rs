//! Guest bundles of a case's own.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use matchlock_test_support::put_bundle;

use super::case::{PATIENCE, Stage};

impl Stage<'_> {
    /// Removes the guest bundles of the case's own cache. Each must be whole, one of them the default, and
    /// there must be nothing beside them: what is wrong.
    pub(crate) fn remove_bundles(&self) -> Result<Vec<String>> {
        let guest = self.cache().join("guest");
        if !guest.try_exists()? {
            return Ok(Vec::new());
        }
        let listed = self.start("", &["guest", "ls", "--json"])?.wait(PATIENCE)?;
        ensure!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        let bundles: serde_json::Value = serde_json::from_slice(&listed.stdout)?;
        let bundles = bundles.as_array().context("guest ls --json printed no array")?;
        let mut wrong = Vec::new();
        if bundles.iter().any(|bundle| bundle["status"] != "ok")
            || bundles.iter().filter(|bundle| bundle["default"] == true).count() != 1
        {
            wrong.push(format!("guest bundles: {bundles:?}"));
        }
        let names = fs::read_dir(&guest)?.map(|entry| Ok(entry?.file_name()));
        let names: Vec<_> = names.collect::<Result<_>>()?;
        if names.len() != bundles.len() + 1 {
            wrong.push(format!("bundles {bundles:?}, and in guest/ {names:?}"));
        }
        fs::remove_dir_all(&guest)?;
        Ok(wrong)
    }

    /// Gives the case a cache of its own with two guest bundles.
    pub(crate) fn own_bundles(&self) -> Result<()> {
        self.own_cache()?;
        for version in ["1-default", "1-other"] {
            put_bundle(&self.cache(), version)?;
        }
        std::os::unix::fs::symlink("1-default", self.cache().join("guest/default"))?;
        // With a state to look at afterwards.
        let output = self.start("", &["gc"])?.wait(PATIENCE)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
