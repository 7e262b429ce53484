//! `rm --force` where something hangs: it leaves in time, its wish stays, and whoever comes next
//! finishes.
//!
//! What hangs does so for longer than any test waits: that `rm` ends at all shows that it did not wait.

use anyhow::{Result, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::wait_until;
use rustix::process::Signal;

use super::case::{KEPT, PATIENCE, Stage, crashed};
use super::host;

const LONG_MS: &str = "sleep(600000)";

fn net() -> Namespace {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    net
}

/// Runs `rm --force`, which is to leave without having removed the VM.
fn rm_leaves(stage: &Stage<'_>, vm: &str, failpoints: &str) -> Result<()> {
    let ended = stage.start(failpoints, &["rm", "--force", vm])?.wait(PATIENCE)?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    ensure!(ended.status.success(), "{}: {said}", ended.status);
    ensure!(String::from_utf8_lossy(&ended.stdout) == format!("Removing {vm}\n"), "{ended:?}");
    ensure!(said.contains("is not removed yet"), "{said}");
    let listed = stage.installation.list()?;
    ensure!(listed == [(vm.to_owned(), "removing".to_owned())], "{listed:?}");
    Ok(())
}

#[test]
fn a_removal_whose_clean_up_hangs_is_finished_by_the_next_command() {
    for finisher in [&["gc"][..], &["prune"], &["rm", "--stopped"], &["run"]] {
        let net = net();
        let stage = Stage::new(&net, None).unwrap();
        let before = host::all(&net, &stage.installation).unwrap();
        let vm = crashed(&stage, KEPT).unwrap();
        rm_leaves(&stage, &vm, &format!("gc.remove_disk.before={LONG_MS}")).unwrap();
        let run = ["run", "--image", "busybox", "--", "true"];
        let args = if finisher == ["run"] { &run[..] } else { finisher };
        let ended = stage.start("", args).unwrap().wait(PATIENCE).unwrap();
        assert!(ended.status.success(), "{finisher:?}: {ended:?}");
        let after = host::all(&net, &stage.installation).unwrap();
        assert_eq!(host::difference(&before, &after), Vec::<String>::new(), "{finisher:?}");
    }
}

/// The owner has heard and goes on by itself, until its VM is gone altogether.
#[test]
fn an_owner_whose_clean_up_takes_its_time_removes_its_vm_at_the_end() {
    let net = net();
    let stage = Stage::new(&net, None).unwrap();
    let before = host::all(&net, &stage.installation).unwrap();
    let owner = stage.start("vm.remove_disk.before=sleep(20000)", KEPT).unwrap();
    let vm = stage.installation.wait_for_status("running").unwrap();
    rm_leaves(&stage, &vm, "").unwrap();
    owner.wait(PATIENCE).unwrap();
    let after = host::all(&net, &stage.installation).unwrap();
    assert_eq!(host::difference(&before, &after), Vec::<String>::new());
}

/// The owner has heard, and hangs: it had its time, and whoever comes next overrules it.
#[test]
fn an_owner_that_has_heard_and_hangs_is_overruled_by_the_next_command() {
    let run = ["run", "--image", "busybox", "--", "true"];
    for finisher in [&["prune"][..], &["rm", "--stopped"], &run] {
        let net = net();
        let stage = Stage::new(&net, None).unwrap();
        let before = host::all(&net, &stage.installation).unwrap();
        let owner = stage.start(&format!("vm.remove_disk.before={LONG_MS}"), KEPT).unwrap();
        let vm = stage.installation.wait_for_status("running").unwrap();
        rm_leaves(&stage, &vm, "").unwrap();
        let ended = stage.start("", finisher).unwrap().wait(PATIENCE).unwrap();
        assert!(ended.status.success(), "{finisher:?}: {ended:?}");
        assert_eq!(stage.installation.list().unwrap(), [], "{finisher:?}");
        // What is left is the owner itself.
        owner.signal(Signal::KILL).unwrap();
        drop(owner.wait(PATIENCE).unwrap());
        assert_eq!(stage.recover().unwrap().1, Vec::<String>::new());
        let after = host::all(&net, &stage.installation).unwrap();
        assert_eq!(host::difference(&before, &after), Vec::<String>::new(), "{finisher:?}");
    }
}

/// The owner hangs for good; once it was killed, `gc` finishes what was wanted.
#[test]
fn a_wish_outlives_an_owner_that_hangs() {
    let net = net();
    let stage = Stage::new(&net, None).unwrap();
    let before = host::all(&net, &stage.installation).unwrap();
    let owner = stage.start(&format!("vm.remove_disk.before={LONG_MS}"), KEPT).unwrap();
    let vm = stage.installation.wait_for_status("running").unwrap();
    rm_leaves(&stage, &vm, "").unwrap();
    owner.signal(Signal::KILL).unwrap();
    drop(owner.wait(PATIENCE).unwrap());
    assert_eq!(stage.installation.list().unwrap(), [(vm, "removing".to_owned())]);
    let gc = stage.start("", &["gc"]).unwrap().wait(PATIENCE).unwrap();
    assert!(gc.status.success(), "{gc:?}");
    let mut left = Vec::new();
    let clean = wait_until(PATIENCE, "a clean host", || {
        left = host::difference(&before, &host::all(&net, &stage.installation)?);
        Ok(left.is_empty())
    });
    assert!(clean.is_ok(), "{left:?}");
}

/// An owner that stands still is overruled at once: `rm --force` has no time to wait for it.
#[test]
fn a_frozen_owner_loses_its_vm_to_rm_by_force() {
    let net = net();
    let stage = Stage::new(&net, None).unwrap();
    let owner = stage.start("", KEPT).unwrap();
    let vm = stage.installation.wait_for_status("running").unwrap();
    owner.signal(Signal::STOP).unwrap();
    let ended = stage.start("", &["rm", "--force", &vm]).unwrap().wait(PATIENCE).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(String::from_utf8_lossy(&ended.stdout), format!("Removed {vm}\n"));
    assert_eq!(stage.installation.list().unwrap(), []);
    owner.signal(Signal::CONT).unwrap();
    let ended = owner.wait(PATIENCE).unwrap();
    assert_eq!(ended.status.code(), Some(137), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(stage.recover().unwrap().1, Vec::<String>::new());
}

/// Nothing waits for a clean-up that hangs once the user has asked three times.
#[test]
fn a_third_signal_leaves_at_once_and_gc_finishes() {
    let net = net();
    let stage = Stage::new(&net, None).unwrap();
    let before = host::all(&net, &stage.installation).unwrap();
    let run = stage.start(&format!("vm.remove_disk.before={LONG_MS}"), super::case::LONG).unwrap();
    stage.installation.wait_for_status("running").unwrap();
    // The first for the command, the second for the VM, whose clean-up then hangs.
    run.signal(Signal::TERM).unwrap();
    let at_the_disk = || stage.log_has("hit vm.remove_disk.before");
    wait_until(PATIENCE, "the clean-up", at_the_disk).unwrap();
    run.signal(Signal::INT).unwrap();
    run.signal(Signal::HUP).unwrap();
    run.signal(Signal::TERM).unwrap();
    let ended = run.wait(PATIENCE).unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(said.contains("leaving at once; run `matchlock gc`"), "{said}");
    assert!(matches!(ended.status.code(), Some(129 | 130 | 143)), "{:?}", ended.status);
    assert_eq!(stage.recover().unwrap().1, Vec::<String>::new());
    let mut left = Vec::new();
    let clean = wait_until(PATIENCE, "a clean host", || {
        left = host::difference(&before, &host::all(&net, &stage.installation)?);
        Ok(left.is_empty())
    });
    assert!(clean.is_ok(), "{left:?}");
}
