//! The cases of snapshots: each has its own, with the guest and the images of all.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use matchlock_test_support::Running;

use super::case::{PATIENCE, RUN, Stage};
use super::scenario::{Scenario, scenario};

impl Stage<'_> {
    /// The cache of a case that has snapshots.
    pub(crate) fn warm_cache(&self) -> PathBuf {
        self.installation.home().with_file_name("warm")
    }

    /// What has the point, begun.
    pub(crate) fn start_warm(&self, point: &str, armed: &str) -> Result<Running> {
        fs::create_dir(self.warm_cache())?;
        for part in ["guest", "images"] {
            symlink(self.installation.cache().join(part), self.warm_cache().join(part))?;
        }
        match scenario(point) {
            Scenario::Warm => self.start(armed, &["warm"]),
            Scenario::WarmAgain => {
                self.make_warm()?;
                self.start(armed, &["warm"])
            }
            Scenario::WarmRun => {
                self.make_warm()?;
                self.start(armed, RUN)
            }
            Scenario::WarmSweep => {
                let killed = "snapshot.publish.before=return(kill)";
                let left = self.start(killed, &["warm"])?.wait(PATIENCE)?;
                let said = String::from_utf8_lossy(&left.stderr);
                ensure!(left.status.signal() == Some(9), "{said}");
                self.start(armed, &["gc"])
            }
            other => bail!("{point} is reached by {other:?}"),
        }
    }

    fn make_warm(&self) -> Result<()> {
        let made = self.start("", &["warm"])?.wait(PATIENCE)?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Ok(())
    }

    /// Every snapshot must be whole, and there must be nothing beside them: what is wrong.
    pub(crate) fn look_at_snapshots(&self) -> Result<Vec<String>> {
        let dir = self.warm_cache().join("snapshots");
        let mut wrong = Vec::new();
        if !dir.try_exists()? {
            return Ok(wrong);
        }
        let mut is_there = false;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let record = fs::read(path.join("snapshot.json")).unwrap_or_default();
            let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_default();
            let size = fs::metadata(path.join("memory")).map_or(0, |found| found.len());
            if record["bytes"] != size || size == 0 {
                wrong.push(format!("snapshot {}: {size} bytes, {record}", path.display()));
            }
            is_there = true;
        }
        // One that is shown is one to start from.
        if is_there {
            let mut command = self.command("", RUN);
            let run = Running::start(command.env("MATCHLOCK_LOG", "info"))?.wait(PATIENCE)?;
            let said = String::from_utf8_lossy(&run.stderr);
            if !run.status.success() || !said.contains("started from a snapshot") {
                wrong.push(format!("run from a snapshot: {}: {said}", run.status));
            }
        }
        Ok(wrong)
    }
}
