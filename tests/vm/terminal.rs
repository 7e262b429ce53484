//! `run` and `exec` with `-t` and `-i` on a real terminal: whatever ends them, the terminal is as it
//! was before and nothing is left, in the guest or on the host.

use std::process::{Command, Stdio};

use matchlock_test_support::{Installation, Running, Terminal, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use super::inside::{STUBBORN, all_gone, end, processes, waiting_vm};
use super::{PATIENCE, stderr, stdout};

/// What no shell types and no program prints, so that it is waited for.
const PROMPT: &str = "ready> ";

pub(super) fn run_args<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--no-network", "--image", "busybox"];
    args.extend(flags);
    args.push("--");
    args.extend(command);
    args
}

pub(super) fn on_terminal(installation: &Installation, args: &[&str]) -> Terminal {
    let mut command = installation.command(args).unwrap();
    Terminal::start(command.env("TERM", "vt220")).unwrap()
}

#[test]
fn a_shell_in_a_new_vm() {
    let installation = Installation::new().unwrap();
    let mut shell = on_terminal(&installation, &run_args(&["-it", "-e", "PS1=ready> "], &["sh"]));
    a_session(&mut shell);
    shell.keys("exit 7\r").unwrap();
    assert_eq!(shell.finish().unwrap(), Some(7));
    installation.assert_nothing_left().unwrap();
}

/// A command that does not end at the first Ctrl-C: whoever pressed it learns what a second one does.
#[test]
fn a_second_ctrl_c_is_named_to_whoever_waits_after_the_first() {
    let script = "trap '' INT TERM; echo up; while :; do sleep 1; done";
    let installation = Installation::new().unwrap();
    let mut run = on_terminal(&installation, &run_args(&[], &["sh", "-c", script]));
    run.expect("up\r\n").unwrap();
    run.keys("\x03").unwrap();
    run.expect("waiting for the VM to end; Ctrl-C again ends it at once\r\n").unwrap();
    run.keys("\x03").unwrap();
    assert_eq!(run.finish().unwrap(), Some(130));
    installation.assert_nothing_left().unwrap();

    let vm = waiting_vm(&installation);
    let mut exec = on_terminal(&installation, &["exec", &vm, "--", "sh", "-c", script]);
    exec.expect("up\r\n").unwrap();
    exec.keys("\x03").unwrap();
    exec.expect("Ctrl-C again leaves it at once\r\n").unwrap();
    exec.keys("\x03").unwrap();
    assert_eq!(exec.finish().unwrap(), Some(130));
    end(&installation, &vm);
}

#[test]
fn a_shell_in_a_running_vm() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let exec = ["exec", "-it", "-e", "PS1=ready> ", &vm, "--", "sh"];
    let mut shell = on_terminal(&installation, &exec);
    a_session(&mut shell);
    // The end-of-file key, on an empty line.
    shell.keys("\x04").unwrap();
    assert_eq!(shell.finish().unwrap(), Some(0));

    a_paste_of_any_bytes(&installation, &vm);
    codes_and_refusals(&installation, &vm);
    end(&installation, &vm);
}

/// Everything that a user does in a shell: sizes, signals by keys, jobs.
pub(super) fn a_session(shell: &mut Terminal) {
    shell.expect(PROMPT).unwrap();
    assert!(!shell.is_as_before().unwrap(), "it is raw meanwhile");
    shell.keys("stty size; echo $TERM; tty\r").unwrap();
    // After its prompt it may ask where the cursor is.
    let echo = shell.expect("\r\n").unwrap();
    assert_eq!(echo.trim_start_matches("\x1b[6n"), "stty size; echo $TERM; tty");
    assert_eq!(shell.expect(PROMPT).unwrap(), "24 80\r\nvt220\r\n/dev/pts/0\r\n");

    let script = "trap 'stty size' WINCH; echo $((6*7)); while :; do sleep 1; done";
    shell.keys(format!("sh -c '{}'\r", script.replace('\'', "\""))).unwrap();
    shell.expect("42\r\n").unwrap();
    for (rows, cols) in [(50, 132), (24, 80)] {
        shell.resize(rows, cols).unwrap();
        shell.expect(&format!("{rows} {cols}\r\n")).unwrap();
    }
    shell.keys("\x03").unwrap();
    shell.expect(PROMPT).unwrap();

    // Ctrl-C is for the command, not for us.
    // It says when it is in front: earlier, the keys would be the shell's.
    shell.keys("sh -c 'echo $((5*5)); exec sleep 1000'\r").unwrap();
    shell.expect("25\r\n").unwrap();
    shell.keys("\x03").unwrap();
    shell.expect(PROMPT).unwrap();
    shell.keys("echo code $?\r").unwrap();
    shell.expect("code 130\r\n").unwrap();
    shell.expect(PROMPT).unwrap();

    // Ctrl-Z stops it; it goes on in the background and in the foreground.
    shell.keys("sh -c 'echo $((5*7)); exec sleep 1001'\r").unwrap();
    shell.expect("35\r\n").unwrap();
    shell.keys("\x1a").unwrap();
    shell.expect("Stopped").unwrap();
    shell.expect(PROMPT).unwrap();
    shell.keys("bg\r").unwrap();
    shell.expect(PROMPT).unwrap();
    shell.keys("jobs\r").unwrap();
    shell.expect("Running").unwrap();
    shell.expect(PROMPT).unwrap();
    shell.keys("fg\r").unwrap();
    shell.expect("\r\n").unwrap();
    shell.expect("\r\n").unwrap();
    // The shell says what it brings to the front before it has.
    shell.keys_until("\x03", PROMPT).unwrap();

    // An editor's way with keys: one at a time, unechoed, escapes and all.
    let script = "stty -icanon -echo -isig; echo $((8*8)); head -c 6 | od -An -tx1; stty sane\r";
    shell.keys(script).unwrap();
    shell.expect("64\r\n").unwrap();
    shell.keys(b"\x1b[A\x03\xc3\xa4").unwrap();
    shell.expect(" 1b 5b 41 03 c3 a4\r\n").unwrap();
    shell.expect(PROMPT).unwrap();
}

fn a_paste_of_any_bytes(installation: &Installation, vm: &str) {
    let script =
        "stty raw -echo; echo up; head -c 600000 | tee /tmp/paste; echo; sha256sum /tmp/paste";
    let mut paste = on_terminal(installation, &["exec", "-it", vm, "--", "sh", "-c", script]);
    paste.expect("up\n").unwrap();
    let bytes: Vec<u8> =
        (0..150_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let before = paste.output().len();
    // The terminal between us is raw too, but has a buffer of its own: in pieces, read meanwhile.
    for piece in bytes.chunks(2000) {
        paste.keys(piece).unwrap();
    }
    paste.expect("  /tmp/paste\n").unwrap();
    assert_eq!(paste.finish().unwrap(), Some(0));
    let came = &paste.output()[before..];
    assert!(came.starts_with(&bytes), "{} of {} bytes", came.len(), bytes.len());
    let digest = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&bytes));
    assert!(String::from_utf8_lossy(&came[bytes.len()..]).contains(&digest));
}

fn codes_and_refusals(installation: &Installation, vm: &str) {
    let cases: [(&[&str], i32, &str); 4] = [
        (&["sh", "-c", "kill -KILL $$"], 128 + 9, ""),
        (&["sh", "-c", "exit 200"], 200, ""),
        (&["nosuchprogram"], 127, "matchlock: exec: \"nosuchprogram\""),
        (&["/etc/passwd"], 126, "matchlock: exec: \"/etc/passwd\""),
    ];
    for (command, code, said) in cases {
        let mut args = vec!["exec", "-it", vm, "--"];
        args.extend(command);
        let mut exec = on_terminal(installation, &args);
        assert_eq!(exec.finish().unwrap(), Some(code), "{command:?}");
        let printed = String::from_utf8_lossy(exec.output()).into_owned();
        assert!(printed.contains(said), "{printed:?}");
    }
}

#[test]
fn every_signal_gives_the_terminal_back() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let idle = processes(&installation, &vm);
    let cases = [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130), (Signal::QUIT, 131)];
    for (signal, code) in cases {
        let script =
            "trap 'echo got it; exit 0' INT TERM HUP QUIT; echo up; while :; do sleep 1; done";
        let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", script]);
        exec.expect("up\r\n").unwrap();
        exec.signal(signal).unwrap();
        assert_eq!(exec.finish().unwrap(), Some(code), "{signal:?}");
        exec.expect("got it\r\n").unwrap();
    }

    // The second does not wait for a command that does not care.
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", STUBBORN]);
    exec.expect("up\r\n").unwrap();
    exec.signal(Signal::TERM).unwrap();
    exec.signal(Signal::INT).unwrap();
    let code = exec.finish().unwrap();
    assert!(matches!(code, Some(130 | 143)), "{code:?}");

    // The third leaves at once. The owner is stopped, so that nothing else ends it before.
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", STUBBORN]);
    exec.expect("up\r\n").unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        exec.signal(signal).unwrap();
    }
    let code = exec.finish().unwrap();
    assert!(matches!(code, Some(130 | 131 | 143)), "{code:?}");

    all_gone(&installation, &vm, idle);
    end(&installation, &vm);
}

#[test]
fn a_lost_guest_gives_the_terminal_back() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", STUBBORN]);
    exec.expect("up\r\n").unwrap();
    let owner = installation.sql(&format!("select pid from vms where id='{vm}'")).unwrap();
    kill_process(Pid::from_raw(owner.trim().parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(exec.finish().unwrap(), Some(125));
    // Each line of our own begins on the left again.
    exec.expect("matchlock: ").unwrap();
    exec.expect("\r\n").unwrap();
    let collected = installation.output(&["gc"]).unwrap();
    assert_eq!(collected.status.code(), Some(0), "{}", stderr(&collected));

    let mut run = on_terminal(&installation, &run_args(&["-it"], &["sh", "-c", STUBBORN]));
    run.expect("up\r\n").unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let killed = installation.output(&["kill", "--force", &vm]).unwrap();
    assert_eq!(killed.status.code(), Some(0), "{}", stderr(&killed));
    assert_eq!(run.finish().unwrap(), Some(137));
}

#[test]
fn a_terminal_that_is_closed_takes_everything_with_it() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let idle = processes(&installation, &vm);
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", STUBBORN]);
    exec.expect("up\r\n").unwrap();
    exec.close();
    assert_eq!(exec.wait().unwrap().code(), Some(129));
    all_gone(&installation, &vm, idle);

    // One that prints all the time meets the end when it writes.
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "yes"]);
    exec.expect("y\r\ny\r\n").unwrap();
    exec.close();
    assert_eq!(exec.wait().unwrap().code(), Some(129));
    all_gone(&installation, &vm, idle);

    // It is told before it is killed.
    let script = "trap 'echo told > /tmp/told; exit' HUP; echo up; while :; do sleep 1; done";
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", script]);
    exec.expect("up\r\n").unwrap();
    exec.close();
    assert_eq!(exec.wait().unwrap().code(), Some(129));
    let told = installation.output(&["exec", &vm, "--", "cat", "/tmp/told"]).unwrap();
    assert_eq!(stdout(&told), "told\n");

    // A client that is killed can give nothing back, but leaves nothing running.
    let mut exec = on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", STUBBORN]);
    exec.expect("up\r\n").unwrap();
    exec.signal(Signal::KILL).unwrap();
    exec.wait().unwrap();
    assert!(!exec.is_as_before().unwrap(), "nobody is there to do it");
    all_gone(&installation, &vm, idle);
    end(&installation, &vm);
}

#[test]
fn a_terminal_that_is_closed_ends_a_run() {
    for flags in [&["-it"][..], &["-it", "--rm=false"]] {
        let installation = Installation::new().unwrap();
        let mut run = on_terminal(&installation, &run_args(flags, &["sh", "-c", STUBBORN]));
        run.expect("up\r\n").unwrap();
        run.close();
        assert_eq!(run.wait().unwrap().code(), Some(129), "{flags:?}");
        for (vm, status) in installation.list().unwrap() {
            assert_eq!(status, "stopped");
            let removed = installation.output(&["rm", &vm]).unwrap();
            assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
        }
        installation.assert_nothing_left().unwrap();
    }
}

#[test]
fn a_vm_is_kept_after_its_shell_until_a_signal() {
    let installation = Installation::new().unwrap();
    let mut run = on_terminal(&installation, &run_args(&["-it", "--rm=false"], &["sh"]));
    run.expect("connect: matchlock exec -it vm-").unwrap();
    run.expect("# ").unwrap();
    run.keys("exit 9\r").unwrap();
    run.expect("the command ended with 9; VM ").unwrap();
    run.expect("\r\n").unwrap();
    run.wait_until_as_before(true).unwrap();
    let vm = installation.wait_for_status("running").unwrap();
    let output = installation.output(&["exec", &vm, "--", "echo", "still here"]).unwrap();
    assert_eq!(stdout(&output), "still here\n");
    // The terminal is as before: this key is a signal for us.
    run.keys("\x03").unwrap();
    assert_eq!(run.finish().unwrap(), Some(9));
    let removed = installation.output(&["rm", &vm]).unwrap();
    assert_eq!(removed.status.code(), Some(0), "{}", stderr(&removed));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn until_the_command_has_started_the_keys_are_ours() {
    let installation = Installation::new().unwrap();
    // While the disk is made and while the guest boots.
    for waits_for in ["creating", "starting", "starting"] {
        let mut run = on_terminal(&installation, &run_args(&["-it"], &["sh"]));
        wait_until(PATIENCE, waits_for, || {
            let list = installation.list()?;
            Ok(list.iter().any(|(_, status)| status == waits_for || status == "starting"))
        })
        .unwrap();
        run.keys("\x03").unwrap();
        let code = run.finish().unwrap();
        let printed = String::from_utf8_lossy(run.output()).into_owned();
        assert_eq!(code, Some(130), "{waits_for}: {printed:?}");
        installation.assert_nothing_left().unwrap();
    }
}

#[test]
fn a_users_shell_stops_us_and_lets_us_go_on() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let program = matchlock_test_support::program().unwrap();
    let mut command = Command::new("bash");
    // It edits its lines without sequences for a terminal that knows none.
    command.args(["--norc", "--noprofile", "-i"]).env("PS1", "outer> ").env("TERM", "dumb");
    installation.prepare(&mut command);
    let mut user = Terminal::start(&command).unwrap();
    user.expect("outer> ").unwrap();
    // An interactive shell has modes of its own while it reads a line.
    user.keys(format!("{} exec -it -e 'PS1=ready> ' {vm} -- sh & jobs -p\r", program.display()))
        .unwrap();
    user.expect("\r\n").unwrap();
    user.expect("\n").unwrap();
    let jobs = user.expect("outer> ").unwrap();
    let pid = jobs.lines().find_map(|line| line.trim().parse().ok()).unwrap();
    let pid = Pid::from_raw(pid).unwrap();
    // It was begun in the background: nothing of the terminal is touched until it is in front.
    user.keys("echo $((40+2))\r").unwrap();
    user.expect("42\r\n").unwrap();
    user.keys("fg\r").unwrap();
    user.expect("exec -it").unwrap();
    user.keys("\recho $((50+5))\r").unwrap();
    user.expect("55\r\n").unwrap();
    user.resize(40, 90).unwrap();
    user.expect(PROMPT).unwrap();
    for (round, signal) in [Signal::TSTP, Signal::STOP].into_iter().enumerate() {
        kill_process(pid, signal).unwrap();
        user.expect("Stopped").unwrap();
        user.expect("outer> ").unwrap();
        user.keys("stty -a | grep -o '[-]*icanon'; echo\r").unwrap();
        user.expect("echo\r\n").unwrap();
        assert_eq!(user.expect("\r\n\r\n").unwrap(), "icanon", "{signal:?}");
        let rows = 30 + u16::try_from(round).unwrap();
        user.resize(rows, 90).unwrap();
        user.keys("fg\r").unwrap();
        user.expect("exec -it").unwrap();
        // Raw again: Ctrl-C is for the guest, and it has the size of now.
        user.keys("sh -c 'echo $((5*5)); exec sleep 1000'\r").unwrap();
        user.expect("25\r\n").unwrap();
        user.keys("\x03").unwrap();
        user.expect(PROMPT).unwrap();
        user.keys("stty size\r").unwrap();
        user.expect(&format!("{rows} 90\r\n")).unwrap();
        user.expect(PROMPT).unwrap();
    }
    user.keys("exit 3\r").unwrap();
    user.expect("outer> ").unwrap();
    user.keys("echo code $?\r").unwrap();
    user.expect("code 3\r\n").unwrap();
    user.keys("exit\r").unwrap();
    user.wait().unwrap();
    end(&installation, &vm);
}

#[test]
fn one_of_the_two_flags_alone() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    // A terminal where nobody types; ours keeps its modes, and Ctrl-C is for us.
    let script = "[ -t 0 ] && [ -t 1 ] && stty size; read line; echo never";
    let mut exec = on_terminal(&installation, &["exec", "-t", &vm, "--", "sh", "-c", script]);
    exec.expect("24 80\r").unwrap();
    assert!(exec.is_as_before().unwrap());
    exec.keys("typed\r").unwrap();
    exec.keys("\x03").unwrap();
    assert_eq!(exec.finish().unwrap(), Some(130));

    // Without any terminal of ours it has the usual size.
    let script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && stty size; echo err >&2";
    let output = installation.output(&["exec", "-t", &vm, "--", "sh", "-c", script]).unwrap();
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), ("24 80\r\nerr\r\n", ""));

    // Our terminal as stdin, and pipes in the guest.
    let script = "[ -t 0 ] || echo none; cat; echo end";
    let mut exec = on_terminal(&installation, &["exec", "-i", &vm, "--", "sh", "-c", script]);
    exec.expect("none\r\n").unwrap();
    assert!(exec.is_as_before().unwrap());
    exec.keys("a line\r").unwrap();
    exec.expect("a line\r\na line\r\n").unwrap();
    exec.keys("\x04").unwrap();
    exec.expect("end\r\n").unwrap();
    assert_eq!(exec.finish().unwrap(), Some(0));

    // Our output elsewhere, our keys from the terminal.
    let args = ["exec", "-it", &vm, "--", "sh", "-c", "read line; echo got $line"];
    let mut command = installation.command(&args).unwrap();
    let mut piped = None;
    let mut exec = Terminal::start_with(command.env("TERM", "vt220"), |command| {
        let (reader, writer) = std::io::pipe().unwrap();
        command.stdout(writer);
        piped = Some(reader);
    })
    .unwrap();
    exec.wait_until_as_before(false).unwrap();
    exec.keys("keys\r").unwrap();
    assert_eq!(exec.finish().unwrap(), Some(0));
    assert_eq!(std::io::read_to_string(piped.unwrap()).unwrap(), "keys\r\ngot keys\r\n");
    end(&installation, &vm);
}

#[test]
fn a_detached_command_may_have_a_terminal() {
    let installation = Installation::new().unwrap();
    let script = "stty size > /tmp/size; tty > /tmp/tty; read line";
    let asked = installation.run(&["-d", "--rm", "-t"], &["sh", "-c", script]).unwrap();
    assert_eq!(asked.status.code(), Some(0), "{}", stderr(&asked));
    let vm = stdout(&asked).trim_end().to_owned();
    let there = || {
        let output = installation.output(&["exec", &vm, "--", "cat", "/tmp/size", "/tmp/tty"])?;
        Ok(stdout(&output) == "24 80\n/dev/pts/0\n")
    };
    wait_until(PATIENCE, "the command's terminal", there).unwrap();
    end(&installation, &vm);
}

#[test]
fn many_terminals_at_once_keep_their_bytes_apart() {
    let installation = Installation::new().unwrap();
    let vm = waiting_vm(&installation);
    let mut shells: Vec<Terminal> = (0..8)
        .map(|number| {
            let script = format!("read a; seq {number}000 {number}400; stty size; exit {number}");
            on_terminal(&installation, &["exec", "-it", &vm, "--", "sh", "-c", &script])
        })
        .collect();
    for (rows, shell) in (10..).zip(&mut shells) {
        shell.wait_until_as_before(false).unwrap();
        shell.resize(rows, 99).unwrap();
    }
    for (number, shell) in shells.iter_mut().enumerate() {
        shell.keys("\r").unwrap();
        let expected: String =
            (number * 1000..=number * 1000 + 400).map(|n| format!("{n}\r\n")).collect();
        shell.expect(&expected).unwrap();
        shell.expect(&format!("{} 99\r\n", number + 10)).unwrap();
        assert_eq!(shell.finish().unwrap(), Some(i32::try_from(number).unwrap()));
    }
    end(&installation, &vm);
}

#[test]
fn a_pipe_is_no_terminal() {
    let installation = Installation::new().unwrap();
    for args in [run_args(&["-it"], &["sh"]), vec!["exec", "-it", "vm-00000001", "--", "sh"]] {
        let mut command = installation.command(&args).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = Running::start(&mut command).unwrap().wait(PATIENCE).unwrap();
        assert_eq!(output.status.code(), Some(125), "{args:?}");
        let said = stderr(&output);
        assert!(said.contains("the input device is not a TTY"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!(!installation.home().join("vms").try_exists().unwrap(), "before anything is made");
}
