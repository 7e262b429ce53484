//! The cases of snapshots: each has its own, with the guest and the images of all.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::{Running, wait_until};
use rustix::process::Signal;

use super::case::{Case, Fault, PATIENCE, RUN, Stage, play_led};
use super::scenario::{Scenario, scenario};

impl Stage<'_> {
    /// The cache of a case that has snapshots.
    pub(crate) fn warm_cache(&self) -> PathBuf {
        self.installation.home().with_file_name("warm")
    }

    /// What has the point, begun.
    pub(crate) fn start_warm(&self, point: &str, armed: &str) -> Result<Running> {
        self.make_warm_cache()?;
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

    fn make_warm_cache(&self) -> Result<()> {
        fs::create_dir(self.warm_cache())?;
        for part in ["guest", "images"] {
            symlink(self.installation.cache().join(part), self.warm_cache().join(part))?;
        }
        Ok(())
    }

    /// A run that has no snapshot to start from, and makes one beside its command, which waits for that.
    fn first_run(&self, case: &Case) -> Result<(ExitStatus, String)> {
        self.make_warm_cache()?;
        let args = ["run", "-i", "--image", "busybox", "--", "sh", "-c", "cat; exit 7"];
        let mut command = self.command(&case.failpoints(), &args);
        command.env("MATCHLOCK_AUTO_WARM", "1").stdin(Stdio::piped());
        let mut run = Running::start(&mut command)?;
        let stdin = run.stdin().context("its stdin")?;
        let fired = format!("fired {} ", case.point);
        wait_until(PATIENCE, "the point", || self.log_has(&fired))?;
        drop(stdin);
        self.finish(run, case)
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
            let is_half = path.file_name().is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
            if is_half || record["bytes"] != size || size == 0 {
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

#[test]
fn a_stop_while_a_snapshot_is_shown_leaves_it_whole_or_not_at_all() {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    let stage = Stage::new(&net, None).unwrap();
    stage.make_warm_cache().unwrap();
    let warm = stage.start("snapshot.publish.before=sleep(4000)", &["warm"]).unwrap();
    let record = stage.warm_cache().join("snapshots/.new/snapshot.json");
    wait_until(PATIENCE, "what is to be shown", || Ok(record.try_exists()?)).unwrap();
    warm.signal(Signal::TERM).unwrap();
    let stopped = warm.wait(PATIENCE).unwrap();
    let said = String::from_utf8_lossy(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(143), "{said}");
    assert_eq!(stage.look_at_snapshots().unwrap(), Vec::<String>::new());
    stage.recover().unwrap();
}

#[test]
fn a_fault_while_a_run_makes_its_snapshot_is_nobodys_but_the_snapshots() {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    for point in ["vm.save_snapshot.before", "snapshot.publish.before", "snapshot.publish.after"] {
        for fault in [Fault::Kill, Fault::Panic, Fault::Error] {
            let case = Case::new(point, fault);
            let played = play_led(&net, &case, None, |stage, case, _| {
                let (status, said) = stage.first_run(case)?;
                // The command's own.
                ensure!(case.fault == Fault::Kill || status.code() == Some(7), "{status}: {said}");
                Ok((status, said))
            });
            let report = played.unwrap_or_else(|error| panic!("{case}: {error:#}"));
            assert_eq!(report.leaks, Vec::<String>::new(), "{case}");
        }
    }
}
