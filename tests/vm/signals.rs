//! Signals and limits: whenever they come, the guest's command gets them first and nothing is
//! left.

use std::time::Duration;

use matchlock_test_support::{Installation, wait_until};
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
        // A signal that comes before its handler is there ends the process as signals do.
        let by_default = rustix_signal(&output) == Some(15) && delay_ms == 0;
        let code = output.status.code();
        assert!(
            by_default || code == Some(143),
            "after {delay_ms} ms: {code:?} {}",
            stderr(&output)
        );
        if installation.home().join("state.db").try_exists().unwrap() {
            installation.assert_nothing_left().unwrap();
        }
    }
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
    assert_eq!(stderr(&output), "matchlock: the command took longer than --timeout 1\n");
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
