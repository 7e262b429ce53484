//! `kill`, `rm`, `prune`, `list`, `inspect` of several VMs, of VMs in every phase, and of owners that
//! stand still.

use std::time::Duration;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use super::lifecycle::hypervisor;
use super::{PATIENCE, stderr, stdout};

fn detached(installation: &Installation, flags: &[&str]) -> String {
    let flags: Vec<&str> = ["-d"].iter().chain(flags).copied().collect();
    let asked = installation.run(&flags, &["sleep", "1000"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    stdout(&asked).trim_end().to_owned()
}

fn ok(installation: &Installation, args: &[&str]) -> String {
    let output = installation.output(args).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn owner(installation: &Installation, vm: &str) -> Pid {
    let pid = installation.sql(&format!("select pid from vms where id='{vm}'")).unwrap();
    Pid::from_raw(pid.trim().parse().unwrap()).unwrap()
}

fn status(installation: &Installation, vm: &str) -> Option<String> {
    let listed = installation.list().unwrap();
    listed.into_iter().find(|(id, _)| id == vm).map(|(_, status)| status)
}

#[test]
fn several_vms_are_killed_inspected_and_removed_by_one_command() {
    let installation = Installation::new().unwrap();
    let (kept, gone) = (detached(&installation, &[]), detached(&installation, &["--rm"]));
    let both = ok(&installation, &["inspect", &kept, &gone]);
    let both: serde_json::Value = serde_json::from_str(&both).unwrap();
    assert_eq!((&both[0]["vm"]["id"], &both[1]["vm"]["id"]), (&(&*kept).into(), &(&*gone).into()));

    // One that is not there costs the others nothing.
    let killed = installation.output(&["kill", &kept, "vm-00000001", &gone, &kept]).unwrap();
    assert_eq!(killed.status.code(), Some(1));
    let mut lines: Vec<String> = stdout(&killed).lines().map(str::to_owned).collect();
    lines.sort();
    let mut wanted = [format!("Killed {kept}"), format!("Killed {gone}")];
    wanted.sort();
    assert_eq!(lines, wanted);
    assert_eq!(stderr(&killed).lines().count(), 1, "{}", stderr(&killed));
    assert!(stderr(&killed).contains("vm-00000001 not found"), "{}", stderr(&killed));
    assert_eq!(installation.list().unwrap(), [(kept.clone(), "stopped".to_owned())]);

    let removed = installation.output(&["rm", &gone, &kept]).unwrap();
    assert_eq!((removed.status.code(), stdout(&removed)), (Some(1), format!("Removed {kept}\n")));
    assert!(stderr(&removed).contains(&format!("VM {gone} was removed")), "{}", stderr(&removed));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn all_are_killed_and_what_is_left_is_pruned() {
    let installation = Installation::new().unwrap();
    let vms = [detached(&installation, &[]), detached(&installation, &[])];
    kill_process(owner(&installation, &vms[0]), Signal::KILL).unwrap();
    let crashed = || Ok(status(&installation, &vms[0]).as_deref() == Some("crashed"));
    wait_until(PATIENCE, "the crash", crashed).unwrap();
    // Neither touches what runs.
    assert_eq!(ok(&installation, &["rm", "--stopped"]), format!("Removed {}\n", vms[0]));
    assert_eq!(ok(&installation, &["prune"]), "Pruned 0 VMs\n");
    assert_eq!(ok(&installation, &["kill", "--all"]), format!("Killed {}\n", vms[1]));
    assert_eq!(ok(&installation, &["kill", "--all"]), "");
    assert_eq!(ok(&installation, &["prune"]), format!("Pruned {}\nPruned 1 VMs\n", vms[1]));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_kill_that_does_not_wait_returns_before_the_vm_is_down() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d", "--graceful-shutdown", "1h"], &["sleep", "1000"]).unwrap();
    let vm = stdout(&asked).trim_end().to_owned();
    // The guest itself powers off when it is asked; stopped, it takes as long as it is stopped.
    let machine = hypervisor(&installation);
    kill_process(machine, Signal::STOP).unwrap();
    assert_eq!(ok(&installation, &["kill", "--no-wait", &vm]), format!("Stopping {vm}\n"));
    let stopping = || Ok(status(&installation, &vm).as_deref() == Some("stopping"));
    wait_until(PATIENCE, "the stop", stopping).unwrap();
    kill_process(machine, Signal::CONT).unwrap();
    let stopped = || Ok(status(&installation, &vm).as_deref() == Some("stopped"));
    wait_until(PATIENCE, "the end", stopped).unwrap();
    ok(&installation, &["rm", &vm]);
    installation.assert_nothing_left().unwrap();
}

/// Waits until a line was said, without waiting for the end.
fn hear(installation: &Installation, args: &[&str], wanted: &str) -> std::process::Child {
    use std::io::BufRead as _;
    use std::process::Stdio;
    let mut command = installation.command(args).unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains(wanted), "{args:?}: {line}");
    child
}

#[test]
fn nobody_waits_in_silence_for_an_owner_that_stands_still() {
    let installation = Installation::new().unwrap();
    let vm = detached(&installation, &["--graceful-shutdown", "2s"]);
    let frozen = owner(&installation, &vm);
    kill_process(frozen, Signal::STOP).unwrap();
    let wanted = format!("does not answer, still waiting; `matchlock kill --force {vm}`");
    let mut exec = hear(&installation, &["exec", &vm, "--", "true"], &wanted);
    let kill = hear(&installation, &["kill", &vm], &wanted);
    // A signal ends the waiting.
    let pid = Pid::from_child(&exec);
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(exec.wait().unwrap().code(), Some(130));
    // Looking and printing need no owner.
    assert_eq!(status(&installation, &vm).as_deref(), Some("running"));
    ok(&installation, &["log", &vm]);
    ok(&installation, &["get", &vm]);
    // It goes on, and does what it was asked meanwhile.
    kill_process(frozen, Signal::CONT).unwrap();
    let killed = kill.wait_with_output().unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    ok(&installation, &["rm", &vm]);
    installation.assert_nothing_left().unwrap();
}

#[test]
fn the_list_tells_of_dead_hypervisors_and_hanging_guests() {
    let installation = Installation::new().unwrap();
    let args = ["run", "-d", "--no-network", "--image", "busybox", "--", "sleep", "1000"];
    let mut command = installation.command(&args).unwrap();
    let asked = command.env("MATCHLOCK_HANG_TIMEOUT", "1").output().unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();
    let machine = hypervisor(&installation);
    let is = |wanted: &str| {
        wait_until(PATIENCE, wanted, || Ok(status(&installation, &vm).as_deref() == Some(wanted)))
    };
    kill_process(machine, Signal::STOP).unwrap();
    is("hanging").unwrap();
    assert!(ok(&installation, &["list", "--running"]).contains(&vm), "it does run");
    kill_process(machine, Signal::CONT).unwrap();
    is("running").unwrap();
    // Its owner stands still and cannot know.
    let frozen = owner(&installation, &vm);
    kill_process(frozen, Signal::STOP).unwrap();
    kill_process(machine, Signal::KILL).unwrap();
    is("dead").unwrap();
    let rows = installation.sql("select count(*) from vm_lifecycle").unwrap();
    ok(&installation, &["list"]);
    assert_eq!(installation.sql("select count(*) from vm_lifecycle").unwrap(), rows);
    kill_process(frozen, Signal::CONT).unwrap();
    is("stopped").unwrap();
    ok(&installation, &["rm", &vm]);
    installation.assert_nothing_left().unwrap();
}

/// `rm --force` from the first moment on, whatever the VM is just doing.
#[test]
fn a_vm_is_removed_by_force_in_every_phase() {
    for delay_ms in [0_u64, 10, 30, 80, 200, 800, 2_000, 3_500] {
        let installation = Installation::new().unwrap();
        let run = installation.start_run(&["--rm=false"], &["sleep", "1000"]).unwrap();
        let listed = || Ok(!installation.list()?.is_empty());
        wait_until(PATIENCE, "the row", listed).unwrap();
        let seen = std::time::Instant::now();
        let moment = || Ok(seen.elapsed() >= Duration::from_millis(delay_ms));
        wait_until(PATIENCE, "the moment", moment).unwrap();
        let (vm, _) = installation.list().unwrap().pop().unwrap();
        let removed = installation.output(&["rm", "-f", &vm]).unwrap();
        assert_eq!(removed.status.code(), Some(0), "{delay_ms}: {}", stderr(&removed));
        let output = run.wait(PATIENCE).unwrap();
        assert_eq!(output.status.code(), Some(137), "{delay_ms}: {}", stderr(&output));
        if stdout(&removed) != format!("Removed {vm}\n") {
            // On a busy machine it may leave first; then the owner has finished.
            assert_eq!(stdout(&removed), format!("Removing {vm}\n"));
        }
        installation.assert_nothing_left().unwrap();
    }
}

/// `kill` waits for a VM that is only coming up, too.
#[test]
fn a_vm_that_is_coming_up_is_killed() {
    let installation = Installation::new().unwrap();
    let run: Running = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    let listed = || Ok(!installation.list()?.is_empty());
    wait_until(PATIENCE, "the row", listed).unwrap();
    let (vm, _) = installation.list().unwrap().pop().unwrap();
    assert_eq!(ok(&installation, &["kill", &vm]), format!("Killed {vm}\n"));
    let output = run.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

/// Whoever ran `rm --force` may have left before the owner heard: `gc` finishes what was wanted.
#[test]
fn a_wish_that_the_owner_never_heard_is_finished_by_gc() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d"], &["sleep", "1000"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();
    let wish = "update vm_nodes set removal_wanted_at = '2026-11-26T00:00:00Z'";
    installation.sql(wish).unwrap();
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "removing".to_owned())]);
    let said = ok(&installation, &["gc"]);
    assert!(said.starts_with(&format!("{vm}: cleaned stop")), "{said}");
    installation.assert_nothing_left().unwrap();
    assert_eq!(installation.list().unwrap(), []);
}
