//! The log of what a VM's command prints: complete, cut, followed.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::Stdio;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::Signal;

use super::{PATIENCE, stderr, stdout};

fn logs(installation: &Installation, vm: &str) -> PathBuf {
    installation.home().join("vms").join(vm).join("logs")
}

fn log(installation: &Installation, args: &[&str], vm: &str) -> String {
    let args: Vec<&str> = ["log"].iter().chain(args).chain([&vm]).copied().collect();
    let output = installation.output(&args).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn kill_and_remove(installation: &Installation, vm: &str) {
    for verb in ["kill", "rm"] {
        let output = installation.output(&[verb, vm]).unwrap();
        assert_eq!(output.status.code(), Some(0), "{verb}: {}", stderr(&output));
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn what_a_command_prints_is_in_the_log_until_the_vm_is_removed() {
    let installation = Installation::new().unwrap();
    let script = "echo one; echo two >&2; echo three; exit 5";
    let owner = installation.start_run(&["--rm=false"], &["sh", "-c", script]).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    // Two streams of one guest: each in its order.
    let whole = || Ok(log(&installation, &[], &vm).lines().count() == 3);
    wait_until(PATIENCE, "the log", whole).unwrap();
    let printed = log(&installation, &[], &vm);
    let mut lines: Vec<&str> = printed.lines().collect();
    lines.retain(|line| *line != "two");
    assert_eq!(lines, ["one", "three"], "{printed}");
    assert_eq!(log(&installation, &["--tail", "0"], &vm), "");
    assert_eq!(log(&installation, &["-n", "2"], &vm).lines().count(), 2);
    // What others run in the VM is theirs.
    let exec = installation.output(&["exec", &vm, "--", "echo", "of exec"]).unwrap();
    assert_eq!(stdout(&exec), "of exec\n");
    assert_eq!(log(&installation, &[], &vm), printed);
    assert_eq!(log(&installation, &["--owner"], &vm), "");
    log(&installation, &["--hypervisor"], &vm);

    let killed = installation.output(&["kill", &vm]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    let owner = owner.wait(PATIENCE).unwrap();
    assert_eq!(owner.status.code(), Some(5), "{}", stderr(&owner));
    assert_eq!(stdout(&owner), "one\nthree\n");
    assert_eq!(log(&installation, &["-f"], &vm), printed, "there is nothing to wait for any more");
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    let gone = installation.output(&["log", &vm]).unwrap();
    assert_eq!(gone.status.code(), Some(1));
    assert!(stderr(&gone).contains("was removed"), "{}", stderr(&gone));
    installation.assert_nothing_left().unwrap();
}

/// Limits of 1 MB and two files.
fn with_limits(installation: &Installation, args: &[&str]) -> std::process::Command {
    let mut command = installation.command(args).unwrap();
    command
        .env("MATCHLOCK_VM_LOG_SIZE_MB", "1")
        .env("MATCHLOCK_VM_LOG_FILES", "2")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Nobody reads a VM in the background but its log.
#[test]
fn a_flood_in_the_background_is_cut_and_a_follower_sees_its_end() {
    let installation = Installation::new().unwrap();
    let script = "echo begins; while [ ! -e /tmp/go ]; do sleep 0.1; done; \
        i=0; while [ $i -lt 60 ]; do head -c 65536 /dev/zero | tr '\\0' x >&2; i=$((i+1)); done; \
        echo >&2; echo ends >&2";
    let args = ["run", "-d", "--no-network", "--image", "busybox", "--", "sh", "-c", script];
    let asked = with_limits(&installation, &args).output().unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();

    let following = installation.start(&["log", "-f", &vm]).unwrap();
    let go = installation.output(&["exec", &vm, "--", "touch", "/tmp/go"]).unwrap();
    assert_eq!(go.status.code(), Some(0), "{}", stderr(&go));
    let ended = || Ok(log(&installation, &["-n", "1"], &vm) == "ends\n");
    wait_until(PATIENCE, "the end of the flood", ended).unwrap();
    let dir = logs(&installation, &vm);
    for (name, most) in [("vm.log", 1 << 20), ("vm.log.1", 1 << 20), ("owner.log", 1_000)] {
        let size = std::fs::metadata(dir.join(name)).unwrap().len();
        assert!(size <= most, "{name}: {size}");
    }
    assert!(!dir.join("vm.log.2").try_exists().unwrap());
    kill_and_remove(&installation, &vm);
    // It ends with the VM, and has seen every byte: it was fast enough.
    let followed = following.wait(PATIENCE).unwrap();
    assert_eq!(followed.status.code(), Some(0), "{}", stderr(&followed));
    let seen = stdout(&followed);
    assert!(seen.starts_with("begins\n") && seen.ends_with("\nends\n"), "{}", seen.len());
    assert_eq!(seen.matches('x').count(), 60 * 65_536);
}

fn following(installation: &Installation, vm: &str) -> Running {
    let mut command = installation.command(&["log", "-f", vm]).unwrap();
    Running::start(command.stdout(Stdio::null()).stderr(Stdio::piped())).unwrap()
}

#[test]
fn following_ends_with_a_signal_or_its_reader_and_never_in_a_panic() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d"], &["sh", "-c", "echo up; exec sleep 1000"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();
    let up = || Ok(log(&installation, &[], &vm) == "up\n");
    wait_until(PATIENCE, "the first line", up).unwrap();
    for (signal, code) in [(Signal::INT, 0), (Signal::TERM, 143)] {
        // Until its handlers are there a signal ends it as any program.
        let mut command = installation.command(&["log", "-f", &vm]).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(code), ""));
    }
    // Nobody reads any more, and nothing is printed any more: it ends all the same.
    let mut command = installation.command(&["log", "-f", &vm]).unwrap();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut unread = child.stdout.take().unwrap();
    let mut first = [0; 3];
    unread.read_exact(&mut first).unwrap();
    drop(unread);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    // It ends with its VM, whoever ends that.
    let following = following(&installation, &vm);
    kill_and_remove(&installation, &vm);
    let output = following.wait(PATIENCE).unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

/// The disk under the state directory is full: one warning, and the command's own streams are whole.
#[test]
fn a_full_disk_costs_the_log_and_not_the_command() {
    let installation = Installation::new().unwrap();
    let small = installation.home().with_file_name("small");
    std::fs::create_dir(&small).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=24m", "tmpfs"];
    let mounted = std::process::Command::new("mount").args(mount).arg(&small).status().unwrap();
    assert!(mounted.success());
    // Its log is to be larger than the disk.
    let script = "i=0; while [ $i -lt 40 ]; do head -c 1048576 /dev/zero; i=$((i+1)); done; exit 3";
    let home = small.join("home");
    let args = ["run", "--no-network", "--image", "busybox", "--", "sh", "-c", script];
    let mut command = installation.command(&args).unwrap();
    command
        .env("MATCHLOCK_HOME", &home)
        .env("MATCHLOCK_VM_LOG_SIZE_MB", "100")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = Running::start(&mut command).unwrap().wait(PATIENCE).unwrap();
    let left = std::fs::read_dir(home.join("vms")).unwrap().count();
    let unmounted = std::process::Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success());
    assert_eq!(output.stdout.len(), 40 << 20, "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let said = stderr(&output);
    assert_eq!(said.matches("the VM's log is not written, or not all of it").count(), 1, "{said}");
    assert_eq!(left, 0, "{said}");
}
