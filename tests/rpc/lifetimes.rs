//! However a session ends, its VMs end with it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Stdio};

use matchlock_test_support::{Installation, Session, small_vm, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{PATIENCE, rpc};

/// A session with a VM, and a command in it that does not end.
fn with_a_command(installation: &Installation) -> (Session, u64) {
    let mut session = rpc(installation, &[]);
    session.create_vm().unwrap();
    let params = json!({ "command": "echo up; trap '' TERM; while :; do sleep 1; done" });
    let id = session.send("exec_stream", &params).unwrap();
    session.message("its output", |m| m["method"] == "exec_stream.stdout").unwrap();
    (session, id)
}

#[test]
fn close_cancels_what_is_in_flight_and_answers_last() {
    let installation = Installation::new().unwrap();
    let (mut session, id) = with_a_command(&installation);
    // One that is still on its way is taken down too.
    let coming = session.send("create", &small_vm()).unwrap();
    let piped = session.send("exec_pipe", &json!({ "command": "cat" })).unwrap();
    let closing = session.send("close", &json!({ "timeout_seconds": 60 })).unwrap();
    session.send("list", &json!({})).unwrap();
    for in_flight in [id, coming, piped] {
        assert_eq!(session.answer(in_flight).unwrap().unwrap_err(), (-32003, "cancelled".into()));
    }
    assert_eq!(session.answer(closing).unwrap().unwrap(), json!({}));
    let answered = session.seen().into_iter().filter(|message| message.get("id").is_some());
    assert_eq!(answered.count(), 0, "nothing is read after `close`");
    assert!(session.wait(PATIENCE).unwrap().unwrap().success());
    installation.assert_nothing_left().unwrap();
}

#[test]
fn the_end_of_the_input_ends_it() {
    let installation = Installation::new().unwrap();
    let (mut session, id) = with_a_command(&installation);
    session.close_input();
    assert_eq!(session.answer(id).unwrap().unwrap_err().0, -32003);
    assert!(session.wait(PATIENCE).unwrap().unwrap().success());
    installation.assert_nothing_left().unwrap();
}

#[test]
fn sigterm_ends_it() {
    let installation = Installation::new().unwrap();
    let (mut session, id) = with_a_command(&installation);
    let pid = Pid::from_raw(session.pid().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(session.answer(id).unwrap().unwrap_err().0, -32003);
    assert!(session.wait(PATIENCE).unwrap().unwrap().success());
    installation.assert_nothing_left().unwrap();
}

/// A session of which only the test decides what is read.
fn unread(installation: &Installation, flags: &[&str]) -> Child {
    let mut args = vec!["rpc"];
    args.extend(flags);
    let mut command = installation.command(&args).unwrap();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(child: &mut Child, id: u64, method: &str, params: &Value) {
    let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
    writeln!(child.stdin.as_mut().unwrap(), "{request}").unwrap();
}

/// Reads up to a message; what is read then.
fn read_until(child: &mut Child, words: &str) -> usize {
    let mut output = BufReader::with_capacity(1, child.stdout.as_mut().unwrap());
    let (mut line, mut read) = (String::new(), 0);
    while !line.contains(words) {
        line.clear();
        let length = output.read_line(&mut line).unwrap();
        assert!(length > 0, "its output ended");
        read += length;
    }
    read
}

fn resident_kb(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Its exit code, and what it said on stderr.
fn ended(mut child: Child) -> (Option<i32>, String) {
    let mut status = None;
    wait_until(PATIENCE, "the end of the session", || {
        status = child.try_wait()?;
        Ok(status.is_some())
    })
    .unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.unwrap().code(), said)
}

const FLOOD: &str = "while :; do echo 0123456789012345678901234567890123456789; done";

#[test]
fn a_client_that_does_not_read_makes_nothing_grow_and_counts_as_gone_in_the_end() {
    let installation = Installation::new().unwrap();
    let mut child = unread(&installation, &["--stall-timeout", "4"]);
    send(&mut child, 1, "create", &small_vm());
    read_until(&mut child, r#""id":1,"#);
    let before = resident_kb(&child);
    for id in 2..10 {
        send(&mut child, id, "exec_stream", &json!({ "command": FLOOD }));
    }
    // Read slowly for a while: it goes on, and holds a bounded amount.
    let mut read = 0;
    while read < 2 << 20 {
        read += read_until(&mut child, "exec_stream.stdout");
        let now = resident_kb(&child);
        assert!(now < before + 64 * 1024, "{before} kB have grown to {now} kB");
    }
    // Then not at all.
    let (code, said) = ended(child);
    assert_eq!(code, Some(1));
    assert!(said.contains("the client has read nothing for 4s"), "{said}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_client_that_is_gone_ends_it_with_its_output_unread() {
    let installation = Installation::new().unwrap();
    let mut child = unread(&installation, &[]);
    send(&mut child, 1, "create", &small_vm());
    read_until(&mut child, r#""id":1,"#);
    for id in 2..6 {
        send(&mut child, id, "exec_stream", &json!({ "command": FLOOD }));
    }
    read_until(&mut child, "exec_stream.stdout");
    // Nobody reads, and the queue is full: the end of the input is seen all the same, also after what
    // the reader answers itself.
    for id in 6..100 {
        send(&mut child, id, "cancel", &json!({ "id": 1_000 }));
    }
    drop(child.stdin.take());
    let (code, _) = {
        let mut status = None;
        wait_until(PATIENCE, "the end of the session", || {
            status = child.try_wait()?;
            Ok(status.is_some())
        })
        .unwrap();
        (status.unwrap().code(), ())
    };
    assert_eq!(code, Some(0));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn a_client_that_asks_without_end_and_reads_nothing_is_gone() {
    let installation = Installation::new().unwrap();
    let mut child = unread(&installation, &["--stall-timeout", "3"]);
    let mut input = child.stdin.take().unwrap();
    let mut sent = 0;
    // Each answer repeats what was sent: the pipe is full soon.
    let line = format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"nothing"}}"#, "x".repeat(200));
    while writeln!(input, "{line}").is_ok() {
        sent += 1;
        assert!(sent < 1_000_000, "it is read for ever");
    }
    let (code, said) = ended(child);
    assert_eq!(code, Some(1));
    assert!(said.contains("the client has read nothing for 3s"), "{said}");
    installation.assert_nothing_left().unwrap();
}

#[test]
fn input_that_waits_for_a_command_holds_up_nothing_and_is_not_lost() {
    const PIECE: usize = 1 << 20;
    const PIECES: usize = 40;

    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    session.create_vm().unwrap();
    let piped = |session: &mut Session, command: &str| {
        let id = session.send("exec_pipe", &json!({ "command": command })).unwrap();
        let ready = |m: &Value| m["method"] == "exec_pipe.ready" && m["params"]["id"] == json!(id);
        session.message("its start", ready).unwrap();
        for _ in 0..PIECES {
            let data = json!({ "id": id, "data": super::encoded(&[b'x'; PIECE]) });
            session.send("exec_pipe.stdin", &data).unwrap();
        }
        session.send("exec_pipe.stdin_eof", &json!({ "id": id })).unwrap();
        id
    };
    // One that reads when it is told to, and one that never does.
    let late = piped(&mut session, "while ! [ -e /go ]; do sleep 0.1; done; wc -c");
    let never = piped(&mut session, "sleep 1000");
    let spooled = spooled(&session);
    assert_eq!(spooled.len(), 2, "a file for each: {spooled:?}");
    session.call("list", &json!({})).unwrap();
    session.call("exec", &json!({ "command": "touch /go" })).unwrap();
    let told = session.message("its output", |m| m["method"] == "exec_pipe.stdout").unwrap();
    assert_eq!(super::text(&told["params"]["data"]).trim(), (PIECE * PIECES).to_string());
    assert_eq!(session.answer(late).unwrap().unwrap()["exit_code"], 0);
    let cancelled = session.call("cancel", &json!({ "id": never })).unwrap();
    assert_eq!(cancelled, json!({ "cancelled": true }));
    assert_eq!(session.answer(never).unwrap().unwrap_err().0, -32003);
    assert_eq!(self::spooled(&session), Vec::<String>::new());
    super::close(session, &installation);
}

/// The files without a name that the session's process has open below its home.
fn spooled(session: &Session) -> Vec<String> {
    let directory = format!("/proc/{}/fd", session.pid().unwrap());
    let files = std::fs::read_dir(directory).unwrap();
    // One that was closed meanwhile is none.
    files
        .filter_map(|file| std::fs::read_link(file.unwrap().path()).ok())
        .map(|path| path.display().to_string())
        .filter(|path| path.contains("/home/") && path.ends_with("(deleted)"))
        .collect()
}

#[test]
fn a_commands_time_runs_while_nobody_takes_its_output() {
    let installation = Installation::new().unwrap();
    let mut child = unread(&installation, &[]);
    let mut params = small_vm();
    params["resources"]["timeout_seconds"] = json!(2);
    send(&mut child, 1, "create", &params);
    read_until(&mut child, r#""id":1,"#);
    send(&mut child, 2, "exec_stream", &json!({ "command": FLOOD }));
    read_until(&mut child, "exec_stream.stdout");
    let (vm, _) = installation.list().unwrap().remove(0);
    wait_until(PATIENCE, "the command's end", || {
        let output = installation.output(&["exec", &vm, "--", "ps", "-o", "args"])?;
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::ensure!(output.status.success() && listed.contains("ps -o args"), "{output:?}");
        Ok(!listed.contains("0123456789"))
    })
    .unwrap();
    read_until(&mut child, "took longer than 2 s");
    drop(child.stdin.take());
    assert_eq!(ended(child).0, Some(0));
    installation.assert_nothing_left().unwrap();
}

#[test]
fn thousands_of_lines_in_one_write_are_answered_each() {
    const LINES: u64 = 3000;

    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    session.create_vm().unwrap();
    let line = |id: u64, method: &str| {
        let params = if method == "cancel" { json!({ "id": 5 }) } else { json!({}) };
        json!({ "jsonrpc": "2.0", "id": 1000 + id, "method": method, "params": params }).to_string()
    };
    let methods = ["cancel", "nothing", "list"];
    let lines: Vec<String> =
        (0..LINES).zip(methods.iter().cycle()).map(|(n, m)| line(n, m)).collect();
    session.send_line(lines.join("\n").as_bytes()).unwrap();
    for n in 0..LINES {
        match (n % 3, session.answer(1000 + n).unwrap()) {
            (0, answer) => assert_eq!(answer, Ok(json!({ "cancelled": false }))),
            (1, answer) => assert_eq!(answer.unwrap_err().0, -32601),
            // More at once than a session may have are refused.
            (_, answer) => assert!(answer.map_or_else(|e| e.0 == -32004, |v| v["vms"].is_array())),
        }
    }
    let done = session.call("exec", &json!({ "command": "echo up" })).unwrap();
    assert_eq!(super::text(&done["stdout"]), "up\n");
    super::close(session, &installation);
}
