//! Kept VMs, further commands in them, and what happens when something is killed.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, stderr, stdout};

pub(crate) fn hypervisor(installation: &Installation) -> Pid {
    let processes = installation.remains().unwrap().processes;
    let (pid, _) = processes.iter().find(|(_, line)| line.contains("qemu")).expect("a hypervisor");
    Pid::from_raw(*pid).unwrap()
}

#[test]
fn a_kept_vm_takes_further_commands_until_it_is_killed() {
    let installation = Installation::new().unwrap();
    let owner =
        installation.start_run(&["--rm=false", "-e", "A=kept"], &["sh", "-c", "echo up"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();

    let script = "echo $A$B; id -u; pwd; exit 9";
    let exec = ["exec", "-e", "B=more", "-u", "1000", "-w", "/tmp", &vm, "--", "sh", "-c", script];
    let output = installation.output(&exec).unwrap();
    assert_eq!(output.status.code(), Some(9), "{}", stderr(&output));
    assert_eq!(stdout(&output), "keptmore\n1000\n/tmp\n");

    let mut command = installation.command(&["exec", "-i", &vm, "--", "wc", "-c"]).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut counting = Running::start(&mut command).unwrap();
    counting.stdin().unwrap().write_all(&vec![b'x'; 3_000_000]).unwrap();
    assert_eq!(stdout(&counting.wait(PATIENCE).unwrap()).trim(), "3000000");

    let missing = installation.output(&["exec", &vm, "--", "nosuchprogram"]).unwrap();
    assert_eq!(missing.status.code(), Some(127), "{}", stderr(&missing));

    // While it runs it is left alone.
    let all = installation.output(&["gc"]).unwrap();
    assert_eq!(all.status.code(), Some(0), "{}", stderr(&all));
    assert_eq!(
        stdout(&all),
        format!("{vm}: skipped (VM is running)\nReconciled 0 VMs, skipped 1\n")
    );
    assert_eq!(installation.output(&["gc", &vm]).unwrap().status.code(), Some(1));
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(1));

    let killed = installation.output(&["kill", &vm]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    assert_eq!(stdout(&killed), format!("Killed {vm}\n"));
    let output = owner.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stdout(&output), "up\n");

    // It holds nothing but its logs, until it is removed.
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "stopped".to_owned())]);
    assert_eq!(installation.phases(&vm).unwrap().last().unwrap(), "cleaned");
    let cleanup = format!(
        "select cleanup_json from vm_lifecycle where vm_id='{vm}' order by version desc limit 1"
    );
    let cleanup = installation.sql(&cleanup).unwrap();
    for step in ["guest_sync", "machine_close", "sockets_remove", "rootfs_remove"] {
        assert!(cleanup.contains(&format!("\"{step}\":{{\"status\":\"ok\"")), "{cleanup}");
    }
    assert_eq!(installation.output(&["exec", &vm, "--", "true"]).unwrap().status.code(), Some(125));
    assert_eq!(installation.output(&["kill", &vm]).unwrap().status.code(), Some(1));
    assert_eq!(stdout(&installation.output(&["rm", &vm]).unwrap()), format!("Removed {vm}\n"));
    installation.assert_nothing_left().unwrap();
}

/// A command that shows that it lives: it writes to a file that all commands of the VM share.
const HEARTBEAT: &str = "while :; do echo x >> /tmp/beats; sleep 0.2; done";

/// Whether the heartbeat goes on: the file grows while we look.
fn beats(installation: &Installation, vm: &str) -> bool {
    let look = "a=$(wc -c < /tmp/beats || echo 0); sleep 2; b=$(wc -c < /tmp/beats || echo 0); \
                [ $a != $b ] && echo beats || echo silent";
    let output = installation.output(&["exec", vm, "--", "sh", "-c", look]).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    stdout(&output).trim() == "beats"
}

fn exec_with(installation: &Installation, args: &[&str], stdin: Stdio) -> Running {
    let mut command = installation.command(args).unwrap();
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running::start(&mut command).unwrap()
}

fn zeros() -> Stdio {
    std::fs::File::open("/dev/zero").unwrap().into()
}

/// Also while the command does not read what it is sent.
#[test]
fn a_client_that_goes_away_takes_its_command_with_it() {
    let installation = Installation::new().unwrap();
    let owner = installation.start_run(&["--rm=false"], &["true"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let plain = ["exec", &vm, "--", "sh", "-c", HEARTBEAT];
    let flooded = ["exec", "-i", &vm, "--", "sh", "-c", HEARTBEAT];
    for (args, stdin) in [(&plain[..], Stdio::null()), (&flooded[..], zeros())] {
        let client = exec_with(&installation, args, stdin);
        wait_until(PATIENCE, "the heartbeat", || Ok(beats(&installation, &vm))).unwrap();
        client.signal(Signal::KILL).unwrap();
        drop(client);
        let silent = || Ok(!beats(&installation, &vm));
        wait_until(Duration::from_secs(30), "the end of the heartbeat", silent).unwrap();
    }
    owner.signal(Signal::TERM).unwrap();
    assert_eq!(owner.wait(PATIENCE).unwrap().status.code(), Some(0));
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_signal_overtakes_stdin_that_nobody_reads() {
    let installation = Installation::new().unwrap();
    let owner = installation.start_run(&["--rm=false"], &["sh", "-c", "exit 3"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let script = format!("trap 'echo got it; exit 0' TERM; {HEARTBEAT}");
    let args = ["exec", "-i", &vm, "--", "sh", "-c", &script];
    let client = exec_with(&installation, &args, zeros());
    wait_until(PATIENCE, "the heartbeat", || Ok(beats(&installation, &vm))).unwrap();
    client.signal(Signal::TERM).unwrap();
    let output = client.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert_eq!(stdout(&output), "got it\n");
    owner.signal(Signal::TERM).unwrap();
    // The exit code is the command's own.
    assert_eq!(owner.wait(PATIENCE).unwrap().status.code(), Some(3));
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}

/// The disk that fills the host is the one that a stop must remove.
#[test]
fn a_full_host_disk_is_an_error_of_the_command_and_is_given_back() {
    let installation = Installation::new().unwrap();
    let small = installation.home().with_file_name("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=40m", "tmpfs"])
        .arg(&small)
        .status()
        .unwrap();
    assert!(mounted.success());
    let script = "dd if=/dev/zero of=/big bs=1M count=100 conv=fsync 2>/dev/null && echo fits";
    let home = small.join("home");
    let mut command = installation
        .command(&["run", "--no-network", "--image", "busybox", "--", "sh", "-c", script])
        .unwrap();
    command.env("MATCHLOCK_HOME", &home).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Running::start(&mut command).unwrap().wait(PATIENCE).unwrap();
    let left = std::fs::read_dir(home.join("vms")).unwrap().count();
    let unmounted = std::process::Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success());
    assert!(!stdout(&output).contains("fits"), "{}", stderr(&output));
    assert_ne!(output.status.code(), Some(0));
    assert_eq!(left, 0, "{}", stderr(&output));
}

#[test]
fn a_kill_whose_owner_dies_does_not_say_killed() {
    let installation = Installation::new().unwrap();
    let script = "trap '' TERM; while :; do sleep 1; done";
    let owner =
        installation.start_run(&["--rm=false", "--graceful-shutdown", "1h"], &["sh", "-c", script]);
    let owner = owner.unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let kill = installation.start(&["kill", &vm]).unwrap();
    wait_until(PATIENCE, "the stop", || {
        Ok(installation.list()?.iter().any(|(_, status)| status == "stopping"))
    })
    .unwrap();
    owner.signal(Signal::KILL).unwrap();
    drop(owner);
    let output = kill.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    assert!(stderr(&output).contains("matchlock gc"), "{}", stderr(&output));
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_hypervisor_that_dies_under_a_command_is_one_clear_line() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    installation.wait_for_status("running").unwrap();
    kill_process(hypervisor(&installation), Signal::KILL).unwrap();
    let output = run.wait(PATIENCE).unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("the hypervisor died") && said.lines().count() == 1, "{said}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_guest_that_panics_is_one_clear_line() {
    let installation = Installation::new().unwrap();
    // The agent runs in another pid namespace; only the kernel itself can be made to panic.
    let output = installation
        .run(
            &[],
            &[
                "sh",
                "-c",
                "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 100",
            ],
        )
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("panic") && said.lines().count() == 1, "{said}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn whoever_runs_a_further_command_is_told_why_its_guest_is_gone() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 100";
    let output = installation.output(&["exec", &vm, "--", "sh", "-c", script]).unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("ended while the command ran") && said.contains("panic"), "{said}");
    assert_eq!(run.wait(PATIENCE).unwrap().status.code(), Some(125));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn an_owner_that_is_killed_leaves_what_gc_removes() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    run.signal(Signal::KILL).unwrap();
    drop(run);
    wait_until(Duration::from_secs(5), "the end of the hypervisor", || {
        Ok(installation.remains()?.processes.is_empty())
    })
    .unwrap();
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "crashed".to_owned())]);

    let collected = installation.output(&["gc"]).unwrap();
    assert_eq!(collected.status.code(), Some(0), "{}", stderr(&collected));
    let expected = format!(
        "{vm}: cleaned sockets_remove, rootfs_remove, state_dir_remove, record_remove\n\
         Reconciled 1 VMs\n"
    );
    assert_eq!(stdout(&collected), expected);
    installation.assert_nothing_left().unwrap();
    assert_eq!(installation.phases(&vm).unwrap().last().unwrap(), "cleaned", "its history stays");
}

#[test]
fn a_kept_vm_whose_owner_is_killed_keeps_its_record() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&["--rm=false"], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    run.signal(Signal::KILL).unwrap();
    drop(run);
    assert_eq!(installation.output(&["gc"]).unwrap().status.code(), Some(0));
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "stopped".to_owned())]);
    let again = installation.output(&["gc", &vm]).unwrap();
    assert_eq!(stdout(&again), format!("{vm}: no resources to clean\n"));
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}

/// Whoever read our stderr is gone: logging must not end us.
#[test]
fn a_closed_stderr_ends_nothing() {
    let installation = Installation::new().unwrap();
    let mut command = installation
        .command(&["run", "--no-network", "--image", "busybox", "--", "sh", "-c", "exit 7"])
        .unwrap();
    command.env("MATCHLOCK_LOG", "debug").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(7));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_vm_that_is_killed_while_it_comes_up_is_told_as_such() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["true"]).unwrap();
    let vm = installation.wait_for_status("starting").unwrap();
    assert_eq!(installation.output(&["kill", "--force", &vm]).unwrap().status.code(), Some(0));
    let ended = run.wait(PATIENCE).unwrap();
    assert_eq!(ended.status.code(), Some(128 + 9), "{}", stderr(&ended));
    assert_eq!(stderr(&ended), format!("matchlock: VM {vm} was stopped\n"));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn gc_takes_down_what_it_is_told_to() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    installation.wait_for_status("running").unwrap();
    let collected = installation.output(&["gc", "--force-running"]).unwrap();
    assert_eq!(collected.status.code(), Some(0), "{}", stderr(&collected));
    assert!(stdout(&collected).contains(": cleaned stop"), "{}", stdout(&collected));
    assert_eq!(run.wait(PATIENCE).unwrap().status.code(), Some(128 + 9));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn what_has_no_row_is_swept_too() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    run.signal(Signal::KILL).unwrap();
    drop(run);
    // A database that somebody deleted.
    for file in ["state.db", "state.db-wal", "state.db-shm"] {
        drop(std::fs::remove_file(installation.home().join(file)));
    }
    let collected = installation.output(&["gc"]).unwrap();
    assert_eq!(collected.status.code(), Some(0), "{}", stderr(&collected));
    assert!(stdout(&collected).contains(&vm), "{}", stdout(&collected));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn what_cannot_be_removed_keeps_its_record() {
    let installation = Installation::new().unwrap();
    let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    run.signal(Signal::KILL).unwrap();
    drop(run);
    // A directory in the place of the disk cannot be unlinked.
    let disk = installation.home().join("vms").join(&vm).join("rootfs.ext4");
    std::fs::remove_file(&disk).unwrap();
    std::fs::create_dir(&disk).unwrap();
    std::fs::write(disk.join("x"), "x").unwrap();
    for args in [["gc", &vm], ["rm", &vm]] {
        let refused = installation.output(&args).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{args:?}");
        assert!(stderr(&refused).contains("rootfs_remove"), "{}", stderr(&refused));
    }
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "failed".to_owned())]);
    assert_eq!(installation.phases(&vm).unwrap().last().unwrap(), "cleanup_failed");
    std::fs::remove_dir_all(&disk).unwrap();
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}
