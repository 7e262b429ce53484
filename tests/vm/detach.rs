//! `run -d`: who asks gets an id of a VM whose command runs, or the owner's own error; whoever dies
//! meanwhile, nothing is left.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::{Pid, Signal, getsid, kill_process};

use super::{PATIENCE, stderr, stdout};

fn owner(installation: &Installation, vm: &str) -> Pid {
    let pid = installation.sql(&format!("select pid from vms where id='{vm}'")).unwrap();
    Pid::from_raw(pid.trim().parse().unwrap()).unwrap()
}

fn descriptor(pid: Pid, number: u32) -> PathBuf {
    let pid = pid.as_raw_nonzero();
    std::fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap()
}

/// A VM that ends by itself, and keeps its record.
fn wait_and_remove(installation: &Installation) {
    let stopped = || Ok(installation.list()?.iter().all(|(_, status)| status == "stopped"));
    wait_until(PATIENCE, "the end of the VM", stopped).unwrap();
    for (vm, _) in installation.list().unwrap() {
        let removed = installation.output(&["rm", &vm]).unwrap();
        assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_detached_vm_lives_on_without_whoever_asked_for_it() {
    let installation = Installation::new().unwrap();
    let script = "echo up > /tmp/up; exec sleep 1000";
    let asked = installation.run(&["-d"], &["sh", "-c", script]).unwrap();
    assert_eq!((asked.status.code(), stderr(&asked).as_str()), (Some(0), ""));
    let vm = stdout(&asked).trim_end().to_owned();
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "running".to_owned())]);

    let owner = owner(&installation, &vm);
    assert_eq!(getsid(Some(owner)).unwrap(), owner, "a session of its own");
    let name = std::fs::read_to_string(format!("/proc/{}/comm", owner.as_raw_nonzero())).unwrap();
    assert_eq!(name, "matchlock\n");
    let log = installation.home().join("vms").join(&vm).join("logs/owner.log");
    let null = PathBuf::from("/dev/null");
    let descriptors = [0, 1, 2].map(|number| descriptor(owner, number));
    assert_eq!(descriptors, [null.clone(), null, log.clone()]);

    // The command has started; its first step may still be ahead.
    let up = || {
        let output = installation.output(&["exec", &vm, "--", "cat", "/tmp/up"])?;
        Ok(stdout(&output) == "up\n")
    };
    wait_until(PATIENCE, "the command's first step", up).unwrap();
    let killed = installation.output(&["kill", &vm]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    assert!(log.try_exists().unwrap(), "what its owner said is kept with the VM");
    wait_and_remove(&installation);
}

#[test]
fn a_detached_vm_goes_with_its_command_if_it_is_to() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d", "--rm"], &["sleep", "1"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    assert!(stdout(&asked).starts_with("vm-"));
    let gone = || Ok(installation.list()?.is_empty());
    wait_until(PATIENCE, "the VM's removal", gone).unwrap();
    installation.assert_nothing_left().unwrap();
}

#[test]
fn what_keeps_a_detached_command_from_starting_is_told_with_its_exit_code() {
    let installation = Installation::new().unwrap();
    let missing = installation.run(&["-d"], &["nosuchprogram"]).unwrap();
    assert_eq!(missing.status.code(), Some(127), "{}", stderr(&missing));
    assert_eq!(stdout(&missing), "");
    assert!(stderr(&missing).contains("nosuchprogram"), "{}", stderr(&missing));
    wait_and_remove(&installation);

    let kernel = installation.home().join("not-a-kernel");
    std::fs::write(&kernel, "\x7fELF, and nothing").unwrap();
    let args = ["run", "-d", "--no-network", "--image", "busybox", "--", "true"];
    let mut command = installation.command(&args).unwrap();
    let output = command.env("MATCHLOCK_KERNEL", &kernel).output().unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(125), ""));
    assert!(stderr(&output).starts_with("matchlock: "), "{}", stderr(&output));
    wait_and_remove(&installation);
}

fn ask(installation: &Installation) -> (Running, String) {
    let asking = installation.start_run(&["-d"], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("starting").unwrap();
    (asking, vm)
}

#[test]
fn a_signal_reaches_the_owner_before_the_id_is_told() {
    let installation = Installation::new().unwrap();
    let (asking, _) = ask(&installation);
    asking.signal(Signal::TERM).unwrap();
    let output = asking.wait(PATIENCE).unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(143), ""));
    wait_and_remove(&installation);
}

#[test]
fn an_owner_that_nobody_waits_for_any_more_cleans_up() {
    let installation = Installation::new().unwrap();
    let (asking, vm) = ask(&installation);
    let owner = owner(&installation, &vm);
    asking.signal(Signal::KILL).unwrap();
    drop(asking.wait(PATIENCE).unwrap());
    wait_and_remove(&installation);
    let gone = || Ok(rustix::process::test_kill_process(owner).is_err());
    wait_until(Duration::from_secs(30), "the owner's end", gone).unwrap();
}

#[test]
fn an_owner_that_is_killed_before_its_command_starts_is_told() {
    let installation = Installation::new().unwrap();
    let (asking, vm) = ask(&installation);
    kill_process(owner(&installation, &vm), Signal::KILL).unwrap();
    let output = asking.wait(PATIENCE).unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(125), ""));
    assert!(stderr(&output).contains("killed by signal 9; run `matchlock gc`"), "{output:?}");
    let collected = installation.output(&["gc"]).unwrap();
    assert_eq!(collected.status.code(), Some(0), "{}", stderr(&collected));
    wait_and_remove(&installation);
}

#[test]
fn a_vm_whose_id_cannot_be_printed_is_taken_down() {
    let installation = Installation::new().unwrap();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (reader, nobody) = std::io::pipe().unwrap();
    drop(reader);
    for stdout in [Stdio::from(full()), Stdio::from(nobody)] {
        let args = ["run", "-d", "--no-network", "--image", "busybox", "--", "sleep", "1000"];
        let mut command = installation.command(&args).unwrap();
        let output = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("it was taken down again"), "{said}");
        let (vm, status) = installation.list().unwrap().remove(0);
        assert!(said.contains(&vm) && status == "stopped", "{said}: {status}");
        assert!(installation.output(&["rm", &vm]).unwrap().status.success());
    }
    installation.assert_nothing_left().unwrap();
}
