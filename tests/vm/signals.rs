//! Signals and limits: whenever they come, the guest's command gets them first and nothing is
//! left.

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::Signal;

use super::{PATIENCE, stderr, stdout};

#[test]
fn a_signal_reaches_the_command_first() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let installation = Installation::new().unwrap();
        let script = "trap 'echo got it; exit 0' INT TERM; echo ready; while :; do sleep 1; done";
        let run = installation.start_run(&[], &["sh", "-c", script]).unwrap();
        installation.wait_for_status("running").unwrap();
        // The command itself is a moment behind its VM.
        wait_for_command(&installation);
        run.signal(signal).unwrap();
        let output = run.wait(PATIENCE).unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert_eq!(stdout(&output), "ready\ngot it\n");
        installation.assert_nothing_left().unwrap();
    }
}

/// Waits until a shell loop in the guest has had time to set its traps: a second command in the
/// same guest answers after it.
fn wait_for_command(installation: &Installation) {
    let (vm, _) = installation.list().unwrap().pop().unwrap();
    for _ in 0..3 {
        let output = installation.output(&["exec", &vm, "--", "sleep", "0.3"]).unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
}

#[test]
fn signals_at_any_moment_leave_nothing() {
    // From before anything exists, through the boot, to the command.
    for delay_ms in [0_u64, 5, 15, 30, 60, 150, 600, 1500, 2500, 3500] {
        let installation = Installation::new().unwrap();
        let run = installation.start_run(&[], &["sleep", "1000"]).unwrap();
        let started = std::time::Instant::now();
        wait_until(PATIENCE, "the moment", || {
            Ok(started.elapsed() >= Duration::from_millis(delay_ms))
        })
        .unwrap();
        run.signal(Signal::TERM).unwrap();
        let output = run.wait(PATIENCE).unwrap();
        // A signal that comes before its handler is there, and so before anything is made, ends the
        // process as signals do.
        let by_default = rustix_signal(&output) == Some(15) && !has_state(&installation);
        let code = output.status.code();
        assert!(
            by_default || code == Some(143),
            "after {delay_ms} ms: {code:?} {}",
            stderr(&output)
        );
        if has_state(&installation) {
            installation.assert_nothing_left().unwrap();
        }
    }
}

fn has_state(installation: &Installation) -> bool {
    installation.home().join("state.db").try_exists().unwrap()
}

fn rustix_signal(output: &std::process::Output) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt as _;
    output.status.signal()
}

#[test]
fn a_command_that_ignores_the_signal_is_given_up_after_the_grace() {
    let installation = Installation::new().unwrap();
    let script = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let run =
        installation.start_run(&["--graceful-shutdown", "1s"], &["sh", "-c", script]).unwrap();
    installation.wait_for_status("running").unwrap();
    wait_for_command(&installation);
    run.signal(Signal::TERM).unwrap();
    let output = run.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_second_signal_does_not_wait_for_the_grace() {
    let installation = Installation::new().unwrap();
    let script = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let run =
        installation.start_run(&["--graceful-shutdown", "1h"], &["sh", "-c", script]).unwrap();
    installation.wait_for_status("running").unwrap();
    run.signal(Signal::TERM).unwrap();
    run.signal(Signal::INT).unwrap();
    let output = run.wait(PATIENCE).unwrap();
    // Two signals at once arrive in either order; the first to arrive names the exit code.
    let code = output.status.code();
    assert!(matches!(code, Some(130 | 143)), "{code:?} {}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_command_that_takes_too_long_ends_with_124() {
    let installation = Installation::new().unwrap();
    let output = installation.run(&["--timeout", "1"], &["sleep", "1000"]).unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", stderr(&output));
    assert_eq!(stderr(&output), "matchlock: the command took longer than --timeout 1s\n");
    installation.assert_nothing_left().unwrap();
}

/// Nobody reads our stderr, and the command fills it.
#[test]
fn a_blocked_stderr_blocks_neither_the_timeout_nor_the_clean_up() {
    use std::process::Stdio;
    let installation = Installation::new().unwrap();
    let mut command = installation
        .command(&[
            "run",
            "--no-network",
            "--timeout",
            "2",
            "--graceful-shutdown",
            "1s",
            "--image",
            "busybox",
            "--",
            "sh",
            "-c",
            "yes >&2",
        ])
        .unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let unread = child.stderr.take().unwrap();
    let mut status = None;
    wait_until(PATIENCE, "the end of the run", || {
        status = child.try_wait()?;
        Ok(status.is_some())
    })
    .unwrap();
    assert_eq!(status.unwrap().code(), Some(124));
    drop(unread);
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_vm_that_is_kept_after_its_command_took_too_long_says_so() {
    let installation = Installation::new().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let said = file.path();
    let args = ["run", "--no-network", "--rm=false", "--timeout", "1", "--image", "busybox", "--"];
    let mut command = installation.command(&[&args[..], &["sleep", "1000"]].concat()).unwrap();
    command.stderr(file.reopen().unwrap());
    let run = Running::start(&mut command).unwrap();
    wait_until(PATIENCE, "the note", || {
        Ok(fs::read_to_string(said)?.contains("is kept until a signal or `matchlock kill vm-"))
    })
    .unwrap();
    assert!(fs::read_to_string(said).unwrap().contains("took longer than --timeout 1s"));
    run.signal(Signal::TERM).unwrap();
    assert_eq!(run.wait(PATIENCE).unwrap().status.code(), Some(124));
    let removed = installation.output(&["prune"]).unwrap();
    assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_limit_on_file_sizes_is_one_clear_line() {
    let installation = Installation::new().unwrap();
    let program = matchlock_test_support::program().unwrap();
    let script = "ulimit -f 2000; exec \"$0\" run --no-network --image busybox -- true";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).arg(program);
    command.env("MATCHLOCK_HOME", installation.home()).env("MATCHLOCK_CACHE", installation.cache());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

/// Waits until this much time has passed.
fn pass(delay: Duration) {
    let started = std::time::Instant::now();
    wait_until(PATIENCE, "the moment", || Ok(started.elapsed() >= delay)).unwrap();
}

/// Whether this process, and so what it starts, ignores a signal.
fn is_ignored_here(signal: Signal) -> bool {
    is_in_mask("/proc/self/status", "SigIgn:", signal)
}

fn is_in_mask(status: &str, name: &str, signal: Signal) -> bool {
    let status = std::fs::read_to_string(status).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
    (mask >> (signal.as_raw() - 1)) & 1 == 1
}

#[test]
fn a_signal_at_any_moment_of_an_exec_ends_it_and_not_its_vm() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d"], &["sleep", "1000"]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        // From before its handlers are there to where the command runs.
        for delay_ms in [0_u64, 3, 8, 15, 30, 80, 300, 1000] {
            // A shell starts background jobs so; until our handlers are there, it stays so.
            if delay_ms < 300 && is_ignored_here(signal) {
                continue;
            }
            let script = "while :; do echo x >> /tmp/beats; sleep 0.1; done";
            let exec = installation.start(&["exec", &vm, "--", "sh", "-c", script]).unwrap();
            pass(Duration::from_millis(delay_ms));
            exec.signal(signal).unwrap();
            let output = exec.wait(PATIENCE).unwrap();
            // Before its handlers are there.
            let by_default = rustix_signal(&output) == Some(code - 128);
            let text = stderr(&output);
            assert!(by_default || output.status.code() == Some(code), "{delay_ms} ms: {text}");
        }
    }
    // None of them goes on in the guest, which goes on.
    let look = "a=$(wc -c < /tmp/beats || echo 0); sleep 2; b=$(wc -c < /tmp/beats || echo 0); \
                [ $a = $b ] && echo silent";
    let silent = || {
        let output = installation.output(&["exec", &vm, "--", "sh", "-c", look])?;
        Ok(stdout(&output) == "silent\n")
    };
    wait_until(PATIENCE, "the end of all commands", silent).unwrap();
    assert_eq!(installation.list().unwrap(), [(vm.clone(), "running".to_owned())]);
    for verb in ["kill", "rm"] {
        assert_eq!(installation.output(&[verb, &vm]).unwrap().status.code(), Some(0));
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_second_signal_ends_an_exec_whose_command_ignores_the_first() {
    let installation = Installation::new().unwrap();
    let asked = installation.run(&["-d"], &["sleep", "1000"]).unwrap();
    let vm = stdout(&asked).trim_end().to_owned();
    let script = "trap '' TERM; touch /tmp/ready; while :; do sleep 1; done";
    let exec = installation.start(&["exec", &vm, "--", "sh", "-c", script]).unwrap();
    let ready = || {
        let output = installation.output(&["exec", &vm, "--", "test", "-e", "/tmp/ready"])?;
        Ok(output.status.code() == Some(0))
    };
    wait_until(PATIENCE, "the trap", ready).unwrap();
    exec.signal(Signal::TERM).unwrap();
    exec.signal(Signal::INT).unwrap();
    let output = exec.wait(PATIENCE).unwrap();
    let code = output.status.code();
    assert!(matches!(code, Some(130 | 143)), "{code:?} {}", stderr(&output));
    assert_eq!(installation.output(&["rm", "-f", &vm]).unwrap().status.code(), Some(0));
    installation.assert_nothing_left().unwrap();
}

/// Whoever asks either gets the id of a VM that runs, or leaves none that does.
#[test]
fn a_signal_at_any_moment_of_a_detached_run_leaves_its_vm_or_nothing() {
    for delay_ms in [0_u64, 5, 15, 30, 60, 150, 600, 1500, 2500, 3500] {
        let installation = Installation::new().unwrap();
        let asking = installation.start_run(&["-d"], &["sleep", "1000"]).unwrap();
        pass(Duration::from_millis(delay_ms));
        // It may have answered and ended.
        let sent = asking.signal(Signal::TERM).is_ok();
        let output = asking.wait(PATIENCE).unwrap();
        let vm = stdout(&output).trim_end().to_owned();
        let code = output.status.code();
        if vm.is_empty() {
            let by_default = rustix_signal(&output) == Some(15) && !has_state(&installation);
            assert!(
                sent && (by_default || code == Some(143)),
                "{delay_ms} ms: {}",
                stderr(&output)
            );
        } else {
            assert_eq!(code, Some(0), "{delay_ms} ms: {}", stderr(&output));
            assert_eq!(installation.list().unwrap(), [(vm.clone(), "running".to_owned())]);
            assert_eq!(installation.output(&["kill", &vm]).unwrap().status.code(), Some(0));
        }
        if !has_state(&installation) {
            continue;
        }
        // An owner that lost whoever asked cleans up by itself; its record is kept.
        let settled = || Ok(installation.list()?.iter().all(|(_, status)| status == "stopped"));
        wait_until(PATIENCE, "the end of the owner", settled).unwrap();
        let removed = installation.output(&["rm", "--stopped"]).unwrap();
        assert_eq!(removed.status.code(), Some(0), "{delay_ms} ms: {}", stderr(&removed));
        installation.assert_nothing_left().unwrap();
    }
}

/// A VM in the background ends with its owner, in order.
#[test]
fn a_signal_to_the_owner_of_a_detached_vm_takes_it_down_in_order() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let installation = Installation::new().unwrap();
        let script = "trap 'echo got it; exit 0' TERM INT HUP; echo up; while :; do sleep 1; done";
        let asked = installation.run(&["-d"], &["sh", "-c", script]).unwrap();
        let vm = stdout(&asked).trim_end().to_owned();
        let log = || stdout(&installation.output(&["log", &vm]).unwrap());
        wait_until(PATIENCE, "the trap", || Ok(log() == "up\n")).unwrap();
        let pid = installation.sql(&format!("select pid from vms where id='{vm}'")).unwrap();
        let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        let stopped = || Ok(installation.list()? == [(vm.clone(), "stopped".to_owned())]);
        wait_until(PATIENCE, "the end", stopped).unwrap();
        // Its shell may say what became of the sleep.
        assert!(log().ends_with("got it\n"), "the command got it first: {}", log());
        assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
        installation.assert_nothing_left().unwrap();
    }
}

/// Another process has the database; nothing is made yet that would have to be waited for.
#[test]
fn a_run_that_waits_for_the_database_ends_with_the_first_signal() {
    let installation = Installation::new().unwrap();
    installation.output(&["list"]).unwrap();
    assert!(installation.output(&["gc"]).unwrap().status.success());
    let database = installation.home().join("state.db");
    let mut holder = std::process::Command::new("sqlite3")
        .arg(&database)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    // The look whether it has it is another one's lock for a moment.
    input.write_all(b".timeout 60000\nbegin exclusive;\n").unwrap();
    let held = || Ok(installation.sql("begin immediate; rollback").is_err());
    wait_until(PATIENCE, "the lock", held).unwrap();
    let run = installation.start_run(&[], &["true"]).unwrap();
    let pid = run.pid().unwrap().as_raw_nonzero();
    let waits = || Ok(is_in_mask(&format!("/proc/{pid}/status"), "SigCgt:", Signal::TERM));
    wait_until(PATIENCE, "its handlers", waits).unwrap();
    run.signal(Signal::TERM).unwrap();
    let output = run.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert!(holder.try_wait().unwrap().is_none(), "the database is held still");
    drop(input);
    holder.wait().unwrap();
    installation.assert_nothing_left().unwrap();
}
