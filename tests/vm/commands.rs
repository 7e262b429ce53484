//! What a command sees, and what comes back of it.

use std::io::Write as _;
use std::process::Stdio;

use matchlock_test_support::{Installation, Running};
use sha2::{Digest as _, Sha256};

use super::{PATIENCE, stderr, stdout};

#[test]
fn output_exit_code_and_history() {
    let installation = Installation::new().unwrap();
    let script = "uname -s; . /etc/os-release; echo $ID; echo oops >&2; exit 7";
    let output = installation.run(&["--hostname", "box"], &["sh", "-c", script]).unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!(stdout(&output), "Linux\nbusybox\n");
    assert_eq!(stderr(&output), "oops\n");
    installation.assert_nothing_left().unwrap();

    let vm = installation.sql("select distinct vm_id from vm_lifecycle").unwrap();
    let phases = installation.phases(vm.trim()).unwrap();
    let expected =
        ["creating", "created", "starting", "running", "stopping", "cleaning", "cleaned"];
    assert_eq!(phases, expected);
    let runbook = format!(
        "select vm_id,version,phase,updated_at,last_error from vm_lifecycle where vm_id=\"{}\" order by version;",
        vm.trim()
    );
    assert!(installation.sql(&runbook).unwrap().lines().count() >= expected.len());
    assert!(installation.sql("select id,status,pid from vms;").unwrap().is_empty());
}

/// Everything that a command can see of how it was started, in one boot.
#[test]
fn what_a_command_sees() {
    let installation = Installation::new().unwrap();
    let script = r#"
        echo "host $(hostname)"; echo "who $WHO"; echo "file $FROM_FILE"; echo "home $HOME"
        echo "ids $(id -u):$(id -g)"; echo "dir $(pwd)"; echo "arg $1|$2"
        grep -c '^10.9.8.7[[:space:]]*db$' /etc/hosts; head -1 /etc/hosts
        for d in /proc/self /sys/class /dev/null /dev/pts /dev/shm /tmp /run /sys/fs/cgroup/cgroup.procs; do
            [ -e $d ] || echo "missing $d"
        done
        ls /sys/class/net; stat -c %a /tmp; cat /proc/1/comm >/dev/null && echo proc
        touch /tmp/x /dev/shm/x && echo writable
        read line && echo "stdin $line" || echo "no stdin"
    "#;
    let env_file = installation.home().with_file_name("env");
    std::fs::write(&env_file, "# comment\n\nFROM_FILE=yes\nWHO=file\n").unwrap();
    let flags = [
        "--hostname",
        "box.example",
        "-e",
        "WHO=world",
        "--env-file",
        env_file.to_str().unwrap(),
        "-u",
        "user",
        "-w",
        "/made/up",
        "--add-host",
        "db:10.9.8.7",
        "--entrypoint",
        "/bin/sh",
    ];
    let output = installation.run(&flags, &["-c", script, "name", "a b", ""]).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let expected = "host box.example\nwho world\nfile yes\nhome /home/user\nids 1000:1000\n\
         dir /made/up\narg a b|\n1\n127.0.0.1 localhost localhost.localdomain box.example\n\
         lo\n1777\nproc\nwritable\nno stdin\n";
    let shown = stdout(&output).replace('\t', " ");
    assert_eq!(shown, expected);
    installation.assert_nothing_left().unwrap();
}

#[test]
fn what_cannot_be_executed_has_its_own_exit_code() {
    let installation = Installation::new().unwrap();
    let cases: [(&[&str], &[&str], i32, &str); 4] = [
        (&[], &["/no/such/program"], 127, "/no/such/program"),
        (&[], &["nosuchprogram"], 127, "nosuchprogram"),
        (&[], &["/etc/passwd"], 126, "/etc/passwd"),
        (&["-u", "nobodyatall"], &["true"], 125, "nobodyatall"),
    ];
    for (flags, command, code, named) in cases {
        let output = installation.run(flags, command).unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
        assert!(said.contains(named) && said.lines().count() == 1, "{command:?}: {said}");
    }
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_command_that_a_signal_ends_has_128_and_its_number() {
    let installation = Installation::new().unwrap();
    let output = installation.run(&[], &["sh", "-c", "kill -KILL $$"]).unwrap();
    assert_eq!(output.status.code(), Some(128 + 9), "{}", stderr(&output));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_hundred_megabytes_come_back_as_they_went() {
    let installation = Installation::new().unwrap();
    let mut command = installation
        .command(&["run", "-i", "--no-network", "--image", "busybox", "--", "cat"])
        .unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(&mut command).unwrap();
    let mut stdin = running.stdin().unwrap();
    let writer = std::thread::spawn(move || {
        let mut sent = Sha256::new();
        let mut block = vec![0_u8; 1 << 20];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..100 {
            for word in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            sent.update(&block);
            stdin.write_all(&block).unwrap();
        }
        hex::encode(sent.finalize())
    });
    let output = running.wait(PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(output.stdout.len(), 100 << 20);
    assert_eq!(hex::encode(Sha256::digest(&output.stdout)), writer.join().unwrap());
    installation.assert_nothing_left().unwrap();
}

#[test]
fn nobody_reading_ends_the_run() {
    let installation = Installation::new().unwrap();
    let mut command =
        installation.command(&["run", "--no-network", "--image", "busybox", "--", "yes"]).unwrap();
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 4];
    let mut output = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut output, &mut first).unwrap();
    assert_eq!(&first, b"y\ny\n");
    drop(output);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn ten_runs_at_once() {
    let installation = Installation::new().unwrap();
    let runs: Vec<Running> = (0..10)
        .map(|number| {
            let script = format!("echo {number}; exit {number}");
            installation.start_run(&["--memory", "128"], &["sh", "-c", &script]).unwrap()
        })
        .collect();
    for (number, run) in runs.into_iter().enumerate() {
        let output = run.wait(PATIENCE * 2).unwrap();
        assert_eq!(
            output.status.code(),
            Some(i32::try_from(number).unwrap()),
            "{}",
            stderr(&output)
        );
        assert_eq!(stdout(&output), format!("{number}\n"));
    }
    installation.assert_nothing_left().unwrap();
    let cleaned = "select count(*) from vm_lifecycle where phase='cleaned'";
    assert_eq!(installation.sql(cleaned).unwrap().trim(), "10");
}
