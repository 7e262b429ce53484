//! How a VM's own command ended is known for as long as the VM is kept.

use std::process::Stdio;

use matchlock_test_support::{Installation, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{PATIENCE, stderr, stdout};

fn code(installation: &Installation, vm: &str) -> Value {
    let output = installation.output(&["get", vm]).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let got: Value = serde_json::from_slice(&output.stdout).unwrap();
    got["exit_code"].clone()
}

fn wait_for_code(installation: &Installation, vm: &str, wanted: u8) {
    let known = || Ok(code(installation, vm) == wanted);
    wait_until(PATIENCE, "the exit code", known).unwrap();
}

fn ok(installation: &Installation, args: &[&str]) {
    let output = installation.output(args).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
}

#[test]
fn it_is_shown_while_the_vm_is_kept_and_after_its_kill() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&["--rm=false"], &["sh", "-c", "exit 7"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    wait_for_code(&installation, &vm, 7);
    ok(&installation, &["kill", &vm]);
    let output = run.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!(code(&installation, &vm), 7);
    ok(&installation, &["rm", &vm]);
    installation.assert_nothing_left().unwrap();
}

#[test]
fn it_outlives_an_owner_that_is_killed() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d"], &["sh", "-c", "kill -9 $$"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();
    wait_for_code(&installation, &vm, 137);
    let pid = installation.sql(&format!("select pid from vms where id='{vm}'")).unwrap();
    let owner = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    kill_process(owner, Signal::KILL).unwrap();
    installation.wait_for_status("crashed").unwrap();
    assert_eq!(code(&installation, &vm), 137);
    ok(&installation, &["gc"]);
    assert_eq!(code(&installation, &vm), 137);
    // Nobody was left to say how its life ended but whoever found it.
    let why = format!("select last_error from vm_lifecycle where vm_id='{vm}' and phase='cleaned'");
    let told = installation.sql(&why).unwrap();
    assert!(told.contains("was gone; the VM was running"), "{told}");
    ok(&installation, &["rm", &vm]);
    installation.assert_nothing_left().unwrap();
}

/// The command's own, not ours: it may make of a signal what it likes. One that was not heard to its
/// end is not known.
#[test]
fn it_is_the_commands_own_when_run_is_interrupted() {
    let script = |end: &str| format!("trap '{end}' TERM; echo up; while :; do sleep 0.1; done");
    for (end, wanted) in [("exit 3", Value::from(3)), ("", Value::Null)] {
        let installation = Installation::new().unwrap();
        let flags = ["--rm=false", "--graceful-shutdown", "3s"];
        let run = installation.start_run(&flags, &["sh", "-c", &script(end)]).unwrap();
        let vm = installation.wait_for_status("running").unwrap();
        let up = || Ok(stdout(&installation.output(&["log", &vm])?) == "up\n");
        wait_until(PATIENCE, "the command", up).unwrap();
        run.signal(Signal::TERM).unwrap();
        let output = run.wait(PATIENCE).unwrap();
        assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
        assert_eq!(code(&installation, &vm), wanted, "{end}");
        ok(&installation, &["rm", &vm]);
        installation.assert_nothing_left().unwrap();
    }
}

/// It is told to have ended as by SIGPIPE, and so it is kept.
#[test]
fn it_is_known_of_a_command_whose_output_nobody_takes() {
    let installation = Installation::new().unwrap();
    let mut command = installation
        .command(&["run", "--rm=false", "--no-network", "--image", "busybox", "--", "yes"])
        .unwrap();
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    drop(run.stdout.take());
    wait_for_code(&installation, &vm, 141);
    ok(&installation, &["kill", &vm]);
    assert_eq!(run.wait().unwrap().code(), Some(141));
    ok(&installation, &["rm", &vm]);
    installation.assert_nothing_left().unwrap();
}
