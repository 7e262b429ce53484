//! Snapshots that a first `run` makes beside its command: that they are made, once, and that nobody is
//! the worse for it.

use std::fs;
use std::io::Write as _;
use std::process::{ChildStdin, Command, Output, Stdio};

use matchlock_test_support::netns::TestNet;
use matchlock_test_support::{Installation, Running};
use rustix::process::Signal;

use super::warm::{assert_warm, run as run_warm};
use super::{PATIENCE, network, stderr, stdout};

/// Says back what it is told, to the end of that.
const WAITS: &[&str] = &["run", "-i", "--no-network", "--image", "busybox", "--"];
const ENDS_WITH_7: &[&str] = &["sh", "-c", "cat; exit 7"];

/// As it is where nobody has said otherwise.
fn by_itself(command: &mut Command) -> &mut Command {
    command.env_remove("MATCHLOCK_AUTO_WARM").stdout(Stdio::piped()).stderr(Stdio::piped())
}

/// A run whose command waits for the end of its stdin, and then ends with 7.
fn waiting(installation: &Installation, filter: &str) -> (Running, ChildStdin) {
    let args: Vec<&str> = WAITS.iter().chain(ENDS_WITH_7).copied().collect();
    let mut command = installation.command(&args).unwrap();
    by_itself(&mut command).env("MATCHLOCK_LOG", filter).stdin(Stdio::piped());
    let mut run = Running::start(&mut command).unwrap();
    let mut stdin = run.stdin().unwrap();
    stdin.write_all(b"said\n").unwrap();
    (run, stdin)
}

fn ended(run: Running, stdin: ChildStdin) -> Output {
    drop(stdin);
    run.wait(PATIENCE).unwrap()
}

/// The command's own output and code, and not a word of ours.
fn assert_untouched(output: &Output) {
    let said = (output.status.code(), &*stdout(output), &*stderr(output));
    assert_eq!(said, (Some(7), "said\n", ""));
}

/// How many VMs there ever were.
fn vms(installation: &Installation) -> usize {
    let count = installation.sql("select count(distinct vm_id) from vm_lifecycle").unwrap();
    count.trim().parse().unwrap()
}

#[test]
fn a_first_run_makes_a_snapshot_beside_its_command_and_the_second_starts_from_it() {
    let installation = Installation::with_own_cache().unwrap();
    let (first, stdin) = waiting(&installation, "warn");
    installation.wait_for_snapshot().unwrap();
    assert_untouched(&ended(first, stdin));
    installation.assert_nothing_left().unwrap();
    let made = installation.snapshots().unwrap();
    assert_eq!((made.len(), vms(&installation)), (1, 2), "{made:?}");
    let (second, stdin) = waiting(&installation, "info");
    let second = ended(second, stdin);
    assert_eq!(second.status.code(), Some(7), "{}", stderr(&second));
    assert_warm(&second);
    // There is nothing to make any more.
    assert_eq!((installation.snapshots().unwrap(), vms(&installation)), (made, 3));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_run_that_ends_before_its_snapshot_is_made_leaves_neither() {
    let installation = Installation::with_own_cache().unwrap();
    let (run, stdin) = waiting(&installation, "warn");
    installation.wait_for_template().unwrap();
    assert_untouched(&ended(run, stdin));
    assert_eq!(vms(&installation), 2);
    let left = installation.snapshots().unwrap();
    assert!(left.is_empty(), "{left:?}");
    installation.assert_nothing_left().unwrap();
    // One that ends at once may not even have begun.
    let at_once =
        installation.command(&["run", "--no-network", "--image", "busybox", "--", "false"]);
    let at_once = by_itself(&mut at_once.unwrap()).output().unwrap();
    assert_eq!((at_once.status.code(), &*stderr(&at_once)), (Some(1), ""));
    let left = installation.snapshots().unwrap();
    assert!(left.is_empty(), "{left:?}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_signal_while_the_template_boots_leaves_nothing() {
    let installation = Installation::with_own_cache().unwrap();
    let (run, stdin) = waiting(&installation, "warn");
    installation.wait_for_template().unwrap();
    run.signal(Signal::INT).unwrap();
    let interrupted = run.wait(PATIENCE).unwrap();
    drop(stdin);
    assert_eq!(interrupted.status.code(), Some(130), "{}", stderr(&interrupted));
    assert_eq!(stderr(&interrupted), "");
    let left = installation.snapshots().unwrap();
    assert!(left.is_empty(), "{left:?}");
    installation.assert_nothing_left().unwrap();

    let (run, stdin) = waiting(&installation, "warn");
    installation.wait_for_template().unwrap();
    run.signal(Signal::KILL).unwrap();
    run.wait(PATIENCE).unwrap();
    drop(stdin);
    let gc = installation.output(&["gc"]).unwrap();
    assert_eq!(gc.status.code(), Some(0), "{}", stderr(&gc));
    let left = installation.snapshots().unwrap();
    assert!(left.is_empty(), "{left:?}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn of_two_first_runs_at_once_one_boots_a_template() {
    let installation = Installation::with_own_cache().unwrap();
    let runs = [waiting(&installation, "debug"), waiting(&installation, "debug")];
    installation.wait_for_snapshot().unwrap();
    let said = runs.map(|(run, stdin)| {
        let output = ended(run, stdin);
        assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
        stderr(&output)
    });
    let saves = said.concat().lines().filter(|line| line.contains("effect=save_snapshot")).count();
    assert_eq!(saves, 1, "{}", said.concat());
    assert_eq!(installation.snapshots().unwrap().len(), 1);
    installation.assert_nothing_left().unwrap();
}

#[test]
fn whoever_wants_none_makes_none() {
    let installation = Installation::with_own_cache().unwrap();
    let run = |flags: &[&str], variable: Option<&str>| {
        let head = ["run", "--no-network", "--image", "busybox"].into_iter();
        // As long as a template needs to be registered.
        let args: Vec<&str> =
            head.chain(flags.iter().copied()).chain(["--", "sleep", "3"]).collect();
        let mut command = installation.command(&args).unwrap();
        let output =
            by_itself(&mut command).envs(variable.map(|value| ("MATCHLOCK_AUTO_WARM", value)));
        let output = output.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    };
    run(&["--cold"], None);
    run(&[], Some("0"));
    fs::write(installation.home().join("config.toml"), "auto_warm = false\n").unwrap();
    run(&[], None);
    assert_eq!(vms(&installation), 3);
    assert!(installation.snapshots().unwrap().is_empty());
    // The environment has the last word.
    run(&[], Some("1"));
    assert_eq!(vms(&installation), 5);
    installation.assert_nothing_left().unwrap();
}

#[test]
fn one_that_is_of_no_use_is_replaced() {
    let installation = Installation::with_own_cache().unwrap();
    let made = installation.output(&["warm", "--no-network"]).unwrap();
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    let [name] = &*installation.snapshots().unwrap() else { panic!("one snapshot") };
    let snapshot = installation.cache().join("snapshots").join(name);
    let (memory, record) = (snapshot.join("memory"), snapshot.join("snapshot.json"));
    for file in [&record, &memory] {
        // What is there now: of the one before the length would tell.
        let mut content = fs::read(file).unwrap();
        if file == &record {
            let text = String::from_utf8(content).unwrap();
            content = text.replace("\"boot_id\": \"", "\"boot_id\": \"0").into_bytes();
        } else {
            *content.first_mut().unwrap() ^= 1;
        }
        fs::write(file, &content).unwrap();
        let (run, stdin) = waiting(&installation, "warn");
        matchlock_test_support::wait_until(PATIENCE, "another snapshot", || {
            // Between the old and the new one there is none.
            Ok(fs::read(file).is_ok_and(|now| now != content))
        })
        .unwrap();
        let output = ended(run, stdin);
        let said = stderr(&output);
        assert!(said.lines().count() == 1 && said.contains("boots: "), "{said}");
        assert_warm(&run_warm(&installation, &[], "true"));
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_vm_in_the_background_makes_one_too() {
    let installation = Installation::with_own_cache().unwrap();
    let detached = ["run", "-d", "--no-network", "--image", "busybox"];
    let commands: [&[&str]; 2] = [&["--", "sleep", "1000"], &["--entrypoint", ""]];
    for (number, command) in commands.into_iter().enumerate() {
        let memory = format!("--memory={}", 256 + number);
        let args: Vec<&str> =
            detached.into_iter().chain([&*memory]).chain(command.iter().copied()).collect();
        let started = by_itself(&mut installation.command(&args).unwrap()).output().unwrap();
        let vm = stdout(&started).trim().to_owned();
        assert_eq!(started.status.code(), Some(0), "{}", stderr(&started));
        matchlock_test_support::wait_until(PATIENCE, "another snapshot", || {
            let names = installation.snapshots()?;
            Ok(names.iter().filter(|name| !name.starts_with('.')).count() > number)
        })
        .unwrap();
        let exec = installation.output(&["exec", &vm, "--", "hostname"]).unwrap();
        assert_eq!(stdout(&exec), format!("{vm}\n"), "{}", stderr(&exec));
        let removed = installation.output(&["rm", "--force", &vm]).unwrap();
        assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn the_network_of_a_template_goes_with_it() {
    let (net, installation) = (TestNet::new().unwrap(), Installation::with_own_cache().unwrap());
    let start = || {
        let args = ["run", "-i", "--image", "busybox", "--", "sh", "-c", "cat; exit 7"];
        let mut command = network::command(&net, &installation, &args);
        by_itself(&mut command).env("MATCHLOCK_LOG", "info").stdin(Stdio::piped());
        let mut run = Running::start(&mut command).unwrap();
        let stdin = run.stdin().unwrap();
        (run, stdin)
    };
    // Given up half-way, and made.
    let (run, stdin) = start();
    installation.wait_for_template().unwrap();
    let given_up = ended(run, stdin);
    assert_eq!(given_up.status.code(), Some(7), "{}", stderr(&given_up));
    assert!(installation.snapshots().unwrap().is_empty());
    network::assert_nothing_left(&net, &installation);
    let (run, stdin) = start();
    installation.wait_for_snapshot().unwrap();
    assert_eq!(ended(run, stdin).status.code(), Some(7));
    network::assert_nothing_left(&net, &installation);
    let (run, stdin) = start();
    assert_warm(&ended(run, stdin));
    network::assert_nothing_left(&net, &installation);
}
