//! The cases of images: each makes them in a cache of its own.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::registry::FakeRegistry;
use matchlock_test_support::{Running, busybox_archive};

use super::case::{Case, PATIENCE, Stage};
use super::host;
use super::scenario::{Scenario, scenario};

impl Stage<'_> {
    /// A cache of the case's own, where it has one: images are made in it, and the shared one is others'
    /// too.
    pub(crate) fn cache(&self) -> std::path::PathBuf {
        self.installation.home().with_file_name("cache")
    }

    /// Gives the case a cache of its own.
    pub(super) fn own_cache(&self) -> Result<()> {
        fs::create_dir(self.cache())?;
        self.has_own_cache.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// `image import`, begun.
    fn import(&self, failpoints: &str) -> Result<Running> {
        let mut command = self.command(failpoints, &["image", "import", "again"]);
        command.stdin(fs::File::open(busybox_archive()?)?);
        Running::start(&mut command)
    }

    /// `pull`, begun.
    fn pull(&self, registry: &FakeRegistry, failpoints: &str) -> Result<Running> {
        let name = registry.name("a:1");
        self.start(failpoints, &["pull", "--insecure-registry", &registry.host(), &name])
    }

    /// `image import` of a root filesystem of one file, to its end.
    fn import_files(&self, tag: &str) -> Result<()> {
        let place = self.installation.home().with_file_name("files.tar");
        let mut packed = Command::new("tar");
        packed.arg("-cf").arg(&place).args(["-C", "/etc", "passwd"]);
        ensure!(packed.status()?.success(), "tar");
        let mut command = self.command("", &["image", "import", tag]);
        command.stdin(fs::File::open(&place)?);
        let ended = Running::start(&mut command)?.wait(PATIENCE)?;
        fs::remove_file(&place)?;
        ensure!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        Ok(())
    }

    /// Removes the images of the case's own cache. Each must be whole, and there must be nothing beside
    /// them: what is wrong.
    pub(super) fn remove_images(&self) -> Result<Vec<String>> {
        let cache = self.cache();
        if !self.has_own_cache.load(Ordering::Relaxed) {
            return Ok(Vec::new());
        }
        let listed = self.start("", &["image", "ls", "--json"])?.wait(PATIENCE)?;
        ensure!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        let images: serde_json::Value = serde_json::from_slice(&listed.stdout)?;
        let images = images.as_array().context("image ls --json printed no array")?;
        let blobs = host::blobs(&cache)?;
        let mut wrong = Vec::new();
        // Two tags of one image have one blob.
        let distinct: std::collections::BTreeSet<String> =
            images.iter().map(|image| image["digest"].to_string()).collect();
        if blobs.len() != distinct.len() {
            wrong.push(format!("images {images:?}, and blobs {blobs:?}"));
        }
        for image in images {
            let tag = image["tag"].as_str().context("an image without a tag")?;
            let removed = self.start("", &["image", "rm", tag])?.wait(PATIENCE)?;
            if !removed.status.success() {
                wrong.push(format!("image rm: {}", String::from_utf8_lossy(&removed.stderr)));
            }
        }
        Ok(wrong)
    }
}

/// A registry in the case's namespace with an image of two empty layers.
fn filled(net: &Namespace) -> Result<FakeRegistry> {
    let registry = FakeRegistry::inside(net)?;
    registry.image("a", "1", "amd64", &[vec![0; 10_240], vec![0; 20_480]]);
    Ok(registry)
}

/// Leads to the point and lets it fire; how the process ended that had it.
pub(super) fn lead(stage: &Stage<'_>, case: &Case) -> Result<(ExitStatus, String)> {
    let armed = case.failpoints();
    let finish = |running| stage.finish(running, case);
    stage.own_cache()?;
    let imported = || -> Result<()> {
        let ended = stage.import("")?.wait(PATIENCE)?;
        ensure!(ended.status.success(), "it cannot be imported");
        Ok(())
    };
    let tag = |failpoints| stage.start(failpoints, &["image", "tag", "again", "second"]);
    match scenario(&case.point) {
        Scenario::ImageRemove => {
            imported()?;
            finish(stage.start(&armed, &["image", "rm", "again"])?)
        }
        Scenario::ImageUntag => {
            imported()?;
            ensure!(tag("")?.wait(PATIENCE)?.status.success(), "it cannot be tagged");
            finish(stage.start(&armed, &["image", "rm", "again"])?)
        }
        Scenario::ImageTag => {
            imported()?;
            stage.import_files("second")?;
            finish(tag(&armed)?)
        }
        Scenario::ImageSweep => {
            let left = stage.import("image.build.after=return(kill)")?.wait(PATIENCE)?;
            ensure!(left.status.signal() == Some(9), "{}", String::from_utf8_lossy(&left.stderr));
            finish(stage.start(&armed, &["gc"])?)
        }
        Scenario::Pull => {
            let registry = filled(stage.net)?;
            finish(stage.pull(&registry, &armed)?)
        }
        Scenario::ContentSweep => {
            let registry = filled(stage.net)?;
            let left = stage.pull(&registry, "image.build.before=return(kill)")?.wait(PATIENCE)?;
            ensure!(left.status.signal() == Some(9), "{}", String::from_utf8_lossy(&left.stderr));
            finish(stage.start(&armed, &["gc"])?)
        }
        _ => finish(stage.import(&armed)?),
    }
}
