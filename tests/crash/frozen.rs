//! Owners that stand still, and wake up when somebody else was there.

use std::fs;

use anyhow::{Result, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::{Running, wait_until};
use rustix::process::Signal;

use super::case::{LONG, PATIENCE, RUN, Stage, crashed};
use super::host;

/// An owner that stands still at this point; should it go on, it gets no further than a launch.
pub(crate) fn frozen(stage: &Stage<'_>, point: &str) -> Result<Running> {
    let owner = stage
        .start(&format!("{point}=1*return(stop);vm.connect_guest.before=return(error)"), RUN)?;
    let stat = format!("/proc/{}/stat", owner.pid()?.as_raw_pid());
    wait_until(PATIENCE, "the stop", || Ok(fs::read_to_string(&stat)?.contains(") T ")))?;
    Ok(owner)
}

/// `gc` while an owner stands still: its VM is skipped, and loses nothing. What is wrong.
pub(crate) fn beside_gc(net: &Namespace, mutation: Option<&str>) -> Result<Vec<String>> {
    let stage = Stage::new(net, mutation)?;
    let owner = frozen(&stage, "vm.launch.before")?;
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
    let owner = frozen(&stage, "vm.launch.before")?;
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

/// Where an owner stands still when its VM is taken from it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Where {
    /// At a point of the creation, when it still holds what keeps the tables there.
    At(&'static str),
    /// Anywhere: its guest is up.
    Running,
}

/// Takes the VM of an owner that stands still, by force; then the owner goes on.
pub(crate) fn overruled(
    net: &Namespace,
    place: Where,
    mutation: Option<&str>,
) -> Result<Vec<String>> {
    let stage = Stage::new(net, mutation)?;
    let before = host::kernel(net, &stage.installation)?;
    let owner = match place {
        Where::At(point) => frozen(&stage, point)?,
        Where::Running => {
            let owner = stage.start("", LONG)?;
            stage.installation.wait_for_status("running")?;
            owner.signal(Signal::STOP)?;
            owner
        }
    };
    let plain = stage.start("", &["gc"])?.wait(PATIENCE)?;
    let said = String::from_utf8_lossy(&plain.stdout).into_owned();
    ensure!(said.contains("skipped (VM is running)"), "gc said: {said}");
    let forced = stage.start("", &["gc", "--force-running"])?.wait(PATIENCE)?;
    ensure!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    let mut wrong = host::difference(&before, &host::kernel(net, &stage.installation)?);
    // The owner itself stands still, with the socket that it listens on.
    wrong.retain(|line| !line.contains("matchlock-failpoints") && !line.starts_with("+ socket"));
    let rows = "select count(*) from vms";
    ensure!(stage.installation.sql(rows)?.trim() == "0", "its row is there");
    let history = "select count(*) from vm_lifecycle";
    let told = stage.installation.sql(history)?;
    owner.signal(Signal::CONT)?;
    let ended = owner.wait(PATIENCE)?;
    // Killed: what its start saw of the other's work does not matter.
    ensure!(ended.status.code() == Some(137), "an overruled owner's end: {ended:?}");
    if stage.installation.sql(history)? != told {
        wrong.push("an overruled owner wrote history".to_owned());
    }
    wrong.extend(stage.recover()?.1);
    wrong.extend(host::difference(&before, &host::kernel(net, &stage.installation)?));
    Ok(wrong)
}

/// A `gc` that stands still half-way: another fails and says so, by force it is overruled, and when it
/// goes on it changes nothing.
fn cleaner_overruled(net: &Namespace, point: &str) -> Result<Vec<String>> {
    let stage = Stage::new(net, None)?;
    let before = host::kernel(net, &stage.installation)?;
    let vm = crashed(&stage, RUN)?;
    let cleaner = stage.start(&format!("{point}=1*return(stop)"), &["gc"])?;
    let stat = format!("/proc/{}/stat", cleaner.pid()?.as_raw_pid());
    wait_until(PATIENCE, "the stop", || Ok(fs::read_to_string(&stat)?.contains(") T ")))?;
    let plain = stage.start("", &["gc"])?.wait(PATIENCE)?;
    let said = String::from_utf8_lossy(&plain.stdout).into_owned();
    ensure!(plain.status.code() == Some(1), "gc beside a stopped one: {plain:?}");
    ensure!(said.contains(&format!("`matchlock gc {vm} --force-running`")), "gc said: {said}");
    let forced = stage.start("", &["gc", "--force-running"])?.wait(PATIENCE)?;
    ensure!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    ensure!(stage.installation.sql("select count(*) from vms")?.trim() == "0", "its row is there");
    let history = "select count(*) from vm_lifecycle";
    let told = stage.installation.sql(history)?;
    cleaner.signal(Signal::CONT)?;
    cleaner.wait(PATIENCE)?;
    let mut wrong = Vec::new();
    if stage.installation.sql(history)? != told {
        wrong.push("an overruled cleaner wrote history".to_owned());
    }
    wrong.extend(stage.recover()?.1);
    wrong.extend(host::difference(&before, &host::kernel(net, &stage.installation)?));
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

#[test]
fn a_frozen_owner_is_overruled_by_force_and_harms_nothing_when_it_goes_on() {
    assert_eq!(overruled(&net(), Where::Running, None).unwrap(), Vec::<String>::new());
}

/// Between the making of the tables and the end of the launch their socket is the owner's alone, or
/// its and the hypervisor's.
#[test]
fn an_owner_that_is_frozen_with_its_tables_is_overruled_all_the_same() {
    for point in ["firewall.apply.after", "vm.launch.before", "hypervisor.spawn.after"] {
        let wrong = overruled(&net(), Where::At(point), None).unwrap();
        assert_eq!(wrong, Vec::<String>::new(), "{point}");
    }
}

/// The VM's actor panics while its guest stands still: the VM goes on, and its command with it.
#[test]
fn a_vm_whose_actor_panics_goes_on_without_a_lost_or_repeated_byte() {
    let net = net();
    let stage = Stage::new(&net, None).unwrap();
    let script = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; sleep 0.2; done; exit 7";
    let args = ["run", "--image", "busybox", "--", "sh", "-c", script];
    let mut command = stage.command("actor.vm.heard.before=1*return(panic)", &args);
    command.env("MATCHLOCK_HANG_TIMEOUT", "1");
    let owner = Running::start(&mut command).unwrap();
    stage.installation.wait_for_status("running").unwrap();
    stage.signal_hypervisors(Signal::STOP).unwrap();
    let why = "select count(*) from vm_lifecycle
               where phase = 'running' and last_error like '%injected%'";
    let noted = || Ok(stage.installation.sql(why)?.trim() == "1");
    wait_until(PATIENCE, "the next life", noted).unwrap();
    stage.signal_hypervisors(Signal::CONT).unwrap();
    let ended = owner.wait(PATIENCE).unwrap();
    assert_eq!(ended.status.code(), Some(7), "{}", String::from_utf8_lossy(&ended.stderr));
    let expected: String = (1..=40).map(|i| format!("line {i}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&ended.stdout), expected);
    assert_eq!(stage.recover().unwrap().1, Vec::<String>::new());
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

#[test]
fn a_cleaner_that_stands_still_is_overruled_by_force() {
    for point in ["gc.take_over.after", "gc.remove_disk.before"] {
        assert_eq!(cleaner_overruled(&net(), point).unwrap(), Vec::<String>::new(), "{point}");
    }
}
