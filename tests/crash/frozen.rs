//! Owners that stand still, and wake up when somebody else was there.

use std::fs;

use anyhow::{Result, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::{Running, wait_until};
use rustix::process::Signal;

use super::case::{PATIENCE, RUN, Stage};
use super::host;

/// An owner that stands still before it launches; with everything but a hypervisor.
fn frozen(stage: &Stage<'_>) -> Result<Running> {
    let owner =
        stage.start("vm.launch.before=1*return(stop);vm.launch.after=return(error)", RUN)?;
    let stat = format!("/proc/{}/stat", owner.pid()?.as_raw_pid());
    wait_until(PATIENCE, "the stop", || Ok(fs::read_to_string(&stat)?.contains(") T ")))?;
    Ok(owner)
}

/// `gc` while an owner stands still: its VM is skipped, and loses nothing. What is wrong.
pub(crate) fn beside_gc(net: &Namespace, mutation: Option<&str>) -> Result<Vec<String>> {
    let stage = Stage::new(net, mutation)?;
    let owner = frozen(&stage)?;
    let before = host::all(net, &stage.installation)?;
    let gc = stage.start("", &["gc"])?.wait(PATIENCE)?;
    let said = String::from_utf8_lossy(&gc.stdout).into_owned();
    let mut wrong = host::difference(&before, &host::all(net, &stage.installation)?);
    if !said.contains("skipped (VM is running)") {
        wrong.push(format!("gc said: {said}"));
    }
    owner.signal(Signal::CONT)?;
    owner.wait(PATIENCE)?;
    wrong.extend(stage.recover()?.1);
    Ok(wrong)
}

/// Another owner takes the VM over while its owner stands still: that one writes nothing any more.
pub(crate) fn overtaken(net: &Namespace, mutation: Option<&str>) -> Result<Vec<String>> {
    let stage = Stage::new(net, mutation)?;
    let owner = frozen(&stage)?;
    let rows = "select count(*) from vm_lifecycle";
    let before = stage.installation.sql(rows)?;
    stage.installation.sql("update vm_nodes set owner_epoch = owner_epoch + 1")?;
    owner.signal(Signal::CONT)?;
    let ended = owner.wait(PATIENCE)?;
    let after = stage.installation.sql(rows)?;
    ensure!(!before.trim().is_empty(), "no history");
    let mut wrong = Vec::new();
    if before != after {
        wrong.push(format!("an overtaken owner wrote: {before} rows, then {after}"));
    }
    if ended.status.success() {
        wrong.push("an overtaken owner reported success".to_owned());
    }
    wrong.extend(stage.recover()?.1);
    Ok(wrong)
}

fn net() -> Namespace {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    net
}

#[test]
fn gc_leaves_the_vm_of_a_frozen_owner_alone() {
    assert_eq!(beside_gc(&net(), None).unwrap(), Vec::<String>::new());
}

#[test]
fn an_overtaken_owner_writes_nothing() {
    assert_eq!(overtaken(&net(), None).unwrap(), Vec::<String>::new());
}

/// The dead-man's switch: nobody starts Matchlock again.
#[test]
fn without_anybody_the_kernel_takes_processes_links_and_tables_along() {
    let net = net();
    for point in ["spawn.start.after", "vm.launch.after", "vm.record_running.after"] {
        let stage = Stage::new(&net, None).unwrap();
        let before = host::kernel(&net, &stage.installation).unwrap();
        let killed = stage.start(&format!("{point}=return(kill)"), RUN).unwrap();
        let killed = killed.wait(PATIENCE).unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&killed.status), Some(9));
        let mut left = Vec::new();
        let gone = wait_until(std::time::Duration::from_secs(5), "the end of it all", || {
            left = host::difference(&before, &host::kernel(&net, &stage.installation)?);
            Ok(left.is_empty())
        });
        assert!(gone.is_ok(), "{point}: {left:?}");
        assert_eq!(stage.recover().unwrap().1, Vec::<String>::new());
    }
}
