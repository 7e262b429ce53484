//! What is inside a guest: commands apart from each other, their end with all that they have
//! started, their share of the CPU.

use std::process::Stdio;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::Signal;

use super::{PATIENCE, stderr, stdout};

/// A shell that has a child in the foreground and others elsewhere, none of which wants to go.
pub(super) const STUBBORN: &str = "trap '' HUP TERM INT QUIT; setsid sleep 1000 & \
     (sleep 1001 &); (setsid sh -c 'sleep 1002; true' &); echo up; sleep 1003; true";

/// A VM whose own command only waits; to be ended with [`end`].
pub(super) fn waiting_vm(installation: &Installation) -> String {
    let asked = installation.run(&["-d", "--rm"], &["sleep", "100000"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    stdout(&asked).trim_end().to_owned()
}

/// Ends such a VM; nothing is left.
pub(super) fn end(installation: &Installation, vm: &str) {
    let killed = installation.output(&["kill", vm]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    let gone = || Ok(installation.list()?.is_empty());
    wait_until(PATIENCE, "the VM's removal", gone).unwrap();
    installation.assert_nothing_left().unwrap();
}

/// What `exec` prints.
pub(super) fn exec(installation: &Installation, vm: &str, script: &str) -> String {
    let output = installation.output(&["exec", vm, "--", "sh", "-c", script]).unwrap();
    assert_eq!(output.status.code(), Some(0), "{script}: {}", stderr(&output));
    stdout(&output)
}

/// How many processes the commands of a guest are, this question's own included.
pub(super) fn processes(installation: &Installation, vm: &str) -> usize {
    // Those of other namespaces are listed too, as 0.
    let count = exec(installation, vm, "wc -l < /sys/fs/cgroup/jobs/cgroup.procs");
    count.trim().parse().unwrap()
}

/// Waits until the guest has no more processes than when it was idle.
pub(super) fn all_gone(installation: &Installation, vm: &str, idle: usize) {
    let gone = || Ok(processes(installation, vm) == idle);
    wait_until(PATIENCE, "the end of what was cancelled", gone).unwrap();
}

#[test]
fn commands_that_nobody_follows_die_with_all_their_children() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let idle = processes(&installation, &vm);
    // The client vanishes; is told twice to go; has nobody who reads it.
    for way in ["killed", "interrupted", "unread"] {
        let script = match way {
            "unread" => STUBBORN.replace("sleep 1003", "yes"),
            _ => STUBBORN.to_owned(),
        };
        let mut command = installation.command(&["exec", &vm, "--", "sh", "-c", &script]).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(&mut stdout, &mut up).unwrap();
        assert_eq!(&up, b"up\n");
        assert!(processes(&installation, &vm) > idle + 3, "its children are there");
        let pid = rustix::process::Pid::from_child(&child);
        let signal = |signal| rustix::process::kill_process(pid, signal).unwrap();
        match way {
            "killed" => signal(Signal::KILL),
            "interrupted" => {
                signal(Signal::INT);
                signal(Signal::TERM);
            }
            _ => drop(stdout),
        }
        child.wait().unwrap();
        all_gone(&installation, &vm, idle);
    }
    end(&installation, &vm);
}

#[test]
fn a_command_that_ends_takes_its_children_with_it() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let idle = processes(&installation, &vm);
    let script = STUBBORN.replace("sleep 1003; true", "exit 3");
    let output = installation.output(&["exec", &vm, "--", "sh", "-c", &script]).unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(3), "up\n"));
    assert_eq!(processes(&installation, &vm), idle, "they were gone before it was told");
    end(&installation, &vm);
}

#[test]
fn each_command_has_processes_and_mounts_of_its_own() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let mut command = installation.command(&["exec", "-i", &vm, "--", "sh"]).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut other = Running::start(&mut command).unwrap();
    let mut typed = other.stdin().unwrap();
    let namespaces = "readlink /proc/self/ns/pid; readlink /proc/self/ns/mnt";
    let script = format!(
        "mkdir /apart; mount -t tmpfs none /apart; echo secret > /apart/file; ({namespaces}) > /tmp/namespaces; \
         echo shared > /tmp/shared\n"
    );
    std::io::Write::write_all(&mut typed, script.as_bytes()).unwrap();
    let shared = || Ok(exec(&installation, &vm, "cat /tmp/shared || true") == "shared\n");
    wait_until(PATIENCE, "the other command's file", shared).unwrap();
    // Its files are shared, its mount is not, and neither are the processes.
    assert_eq!(exec(&installation, &vm, "ls -A /apart; set -- /proc/[0-9]*; echo $# $$"), "2 2\n");
    let both = exec(&installation, &vm, &format!("cat /tmp/namespaces; {namespaces}"));
    let mut kinds: Vec<&str> = both.lines().collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), 4, "{both}");
    let script = "cat /apart/file; exit 6\n";
    std::io::Write::write_all(&mut typed, script.as_bytes()).unwrap();
    let output = other.wait(PATIENCE).unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(6), "secret\n"));
    end(&installation, &vm);
}

#[test]
fn half_a_cpu_is_half_a_cpu() {
    let installation = Installation::new().unwrap();
    // Longer than it may run at once, so it must have been held back.
    let script = "cat /proc/self/cgroup /sys/fs/cgroup/jobs/cpu.max; nproc; \
         i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; \
         grep -E '^(nr_throttled|throttled_usec) ' /sys/fs/cgroup/jobs/cpu.stat";
    let run = |cpus: &str| {
        let output = installation.run(&["--cpus", cpus], &["sh", "-c", script]).unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    let numbers = |text: &str| -> Vec<u64> {
        text.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
    };
    let half = run("0.5");
    let stat = half.strip_prefix("0::/jobs\n50000 100000\n1\n").expect(&half);
    assert!(numbers(stat).iter().all(|number| *number > 0), "{stat}");
    // A whole one needs no limit: there is no more of it.
    let whole = run("1");
    let stat = whole.strip_prefix("0::/jobs\nmax 100000\n1\n").expect(&whole);
    assert!(numbers(stat).iter().all(|number| *number == 0), "{stat}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_privileged_vm_is_like_any_other_for_now() {
    let installation = Installation::new().unwrap();
    let script = "grep -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status";
    let seen: Vec<String> = [&["--privileged", "--rm=false"][..], &["--rm=false"]]
        .into_iter()
        .map(|flags| {
            let run = installation.start_run(flags, &["sh", "-c", script]).unwrap();
            let vm = installation.wait_for_status("running").unwrap();
            let shown = installation.output(&["get", &vm]).unwrap();
            let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
            let privileged = flags.len() == 2;
            assert_eq!(shown["config"]["privileged"], privileged, "{shown}");
            let status = exec(&installation, &vm, script);
            let killed = installation.output(&["kill", &vm]).unwrap();
            assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
            assert_eq!(stdout(&run.wait(PATIENCE).unwrap()), status);
            let removed = installation.output(&["rm", &vm]).unwrap();
            assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
            status
        })
        .collect();
    assert_eq!(seen[0], seen[1]);
    installation.assert_nothing_left().unwrap();
}

/// What a program may expect to be mounted, each once, whatever way the guest has started.
pub(super) const MOUNTS: [&str; 9] = [
    "/ overlay",
    "/dev devtmpfs",
    "/dev/mqueue mqueue",
    "/dev/pts devpts",
    "/dev/shm tmpfs",
    "/run tmpfs",
    "/sys sysfs",
    "/sys/fs/cgroup cgroup2",
    "/tmp tmpfs",
];

/// Prints them. `/proc` is there twice: each command has one of its own above.
pub(super) const PRINT_MOUNTS: &str = "awk '$2 != \"/proc\" {print $2, $3}' /proc/mounts | sort; ls -d /proc/self/fd /dev/fd >/dev/null";

#[test]
fn the_usual_file_systems_are_mounted_and_the_console_reaches_the_host() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let mounts = exec(&installation, &vm, PRINT_MOUNTS);
    assert_eq!(mounts.lines().collect::<Vec<_>>(), MOUNTS);
    // Where the guest says why it cannot go on.
    exec(&installation, &vm, "echo said on the console > /dev/console");
    let log = installation.home().join("vms").join(&vm).join("logs/console.log");
    let said = || Ok(std::fs::read_to_string(&log)?.contains("said on the console"));
    wait_until(PATIENCE, "the line on the console", said).unwrap();
    end(&installation, &vm);
}
