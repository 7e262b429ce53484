//! What counts as a secret is nowhere but in the guest: not in rows, logs, argv, `inspect`, and not
//! in what a killed owner leaves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use matchlock_test_support::{Installation, Running, wait_until};
use rustix::process::Signal;

use super::{PATIENCE, stderr, stdout};

const SECRET: &str = "s3cr3t-value-of-the-environment";
const EXEC_SECRET: &str = "s3cr3t-value-of-an-exec";
const PLAIN: &str = "plain-value-that-is-documented-to-be-stored";

fn holds(content: &[u8], text: &str) -> bool {
    content.windows(text.len()).any(|part| part == text.as_bytes())
}

/// The files below this directory that hold the text.
fn files_with(dir: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let (path, kind) = entry.map(|e| (e.path(), e.file_type().unwrap())).unwrap();
        if kind.is_dir() {
            found.extend(files_with(&path, text));
        } else if kind.is_file() && holds(&fs::read(&path).unwrap(), text) {
            found.push(path);
        }
    }
    found
}

fn of_process(pid: i32, file: &str) -> Vec<u8> {
    fs::read(format!("/proc/{pid}/{file}")).unwrap()
}

#[test]
fn a_secret_of_the_environment_reaches_the_guest_and_nothing_else() {
    let installation = Installation::new().unwrap();
    // What a command prints is in its log: this one tells the length alone.
    let script = "echo ${#TOKEN}; read go; sleep 1000";
    let args = [
        "run",
        "--no-network",
        "--image",
        "busybox",
        "--rm=false",
        "--disk-size",
        "64",
        "-i",
        "-e",
        "TOKEN",
        "-e",
        &format!("PLAIN={PLAIN}"),
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut command = installation.command(&args).unwrap();
    command.env("TOKEN", SECRET).env("MATCHLOCK_LOG", "trace");
    let log = installation.home().with_file_name("log");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(&log).unwrap());
    let run = Running::start(&mut command).unwrap();
    let vm = installation.wait_for_status("running").unwrap();

    let mut exec = installation
        .command(&["exec", "-e", "TOKEN2", &vm, "--", "sh", "-c", "echo $TOKEN $TOKEN2"])
        .unwrap();
    let exec = exec.env("TOKEN2", EXEC_SECRET).env("MATCHLOCK_LOG", "trace").output().unwrap();
    assert_eq!(stdout(&exec), format!("{SECRET} {EXEC_SECRET}\n"), "{}", stderr(&exec));
    assert!(!stderr(&exec).contains(EXEC_SECRET), "{}", stderr(&exec));

    let printed = || {
        let log = installation.output(&["log", &vm])?;
        Ok(stdout(&log) == format!("{}\n", SECRET.len()))
    };
    wait_until(PATIENCE, "the secret's length", printed).unwrap();

    let home = installation.home();
    let nowhere = || {
        // What is stored on purpose is found: then so would the others be.
        assert!(!files_with(&home, PLAIN).is_empty());
        for secret in [SECRET, EXEC_SECRET] {
            assert_eq!(files_with(&home, secret), [] as [PathBuf; 0]);
            for verb in ["get", "inspect"] {
                let shown = stdout(&installation.output(&[verb, &vm]).unwrap());
                assert!(shown.contains(PLAIN) || verb == "inspect", "{shown}");
                assert!(!shown.contains(secret), "{verb}: {shown}");
            }
        }
        assert!(!holds(&fs::read(&log).unwrap(), SECRET), "the log has it");
    };
    nowhere();
    let shown = stdout(&installation.output(&["get", &vm]).unwrap());
    assert!(shown.contains("TOKEN"), "its name is told: {shown}");
    let hypervisors = installation.remains().unwrap().processes;
    let (hypervisor, _) = hypervisors.iter().find(|(_, line)| line.contains("qemu")).unwrap();
    let owner = run.pid().unwrap().as_raw_nonzero().get();
    for pid in [*hypervisor, owner] {
        assert!(!holds(&of_process(pid, "cmdline"), SECRET));
    }
    assert!(!holds(&of_process(*hypervisor, "environ"), SECRET));
    assert!(holds(&of_process(owner, "environ"), SECRET), "the test looks at the wrong process");
    let limits = String::from_utf8(of_process(owner, "limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let soft = core.split_whitespace().nth(4).unwrap();
    assert!(soft == "0" || soft == "1", "it may leave a core dump: {core}");

    run.signal(Signal::KILL).unwrap();
    drop(run.wait(PATIENCE).unwrap());
    nowhere();
    assert_eq!(installation.output(&["gc"]).unwrap().status.code(), Some(0));
    nowhere();
    assert_eq!(installation.output(&["rm", &vm]).unwrap().status.code(), Some(0));
    assert_eq!(files_with(&home, SECRET), [] as [PathBuf; 0]);
    installation.assert_nothing_left().unwrap();
}
