//! Many VMs in a session, and what other processes do with them.

use matchlock_test_support::{Installation, Session, wait_until};
use serde_json::{Value, json};

use super::{close, rpc, text};

fn printed(session: &mut Session, vm: Option<&str>, command: &str) -> String {
    let result = session.call("exec", &json!({ "vm_id": vm, "command": command })).unwrap();
    assert_eq!(result["exit_code"], 0, "{result}");
    text(&result["stdout"])
}

/// Sees that what was asked of a VM that has ended fails with the reason.
fn refused(session: &mut Session, vm: Option<&str>, words: &str) {
    for (method, params) in [
        ("exec", json!({ "vm_id": vm, "command": "true" })),
        ("read_file", json!({ "vm_id": vm, "path": "/etc/hostname" })),
        ("kill", json!({ "vm_id": vm })),
    ] {
        let (code, message) = session.ask(method, &params).unwrap().unwrap_err();
        assert!(code == -32000 && message.contains(words), "{method}: {code} {message}");
    }
}

#[test]
fn each_request_reaches_the_vm_that_it_names_and_no_other() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    let (first, second) = (session.create_vm().unwrap(), session.create_vm().unwrap());
    assert_eq!(printed(&mut session, None, "hostname"), format!("{first}\n"));
    assert_eq!(printed(&mut session, Some(&second), "hostname"), format!("{second}\n"));

    let list = session.call("list", &json!({})).unwrap();
    let shown: Vec<(&str, bool, &str)> = list["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| {
            let text = |key: &str| vm[key].as_str().unwrap();
            (text("id"), vm["default"].as_bool().unwrap(), text("phase"))
        })
        .collect();
    assert_eq!(shown, [(&*first, true, "running"), (&*second, false, "running")]);

    // A word is a word: no shell.
    let words = json!({ "command": ["echo", "$HOME; x"], "env": { "A": "1" } });
    assert_eq!(text(&session.call("exec", &words).unwrap()["stdout"]), "$HOME; x\n");
    let environment = json!({ "command": "echo $A", "env": { "A": "1 2" } });
    assert_eq!(text(&session.call("exec", &environment).unwrap()["stdout"]), "1 2\n");

    from_other_processes(&installation, &mut session, &first, &second);

    // The session's first VM has ended: nothing without a name goes to another.
    refused(&mut session, Some(&first), &format!("VM {first} has ended"));
    refused(&mut session, None, &format!("VM {first} has ended"));
    assert_eq!(printed(&mut session, Some(&second), "hostname"), format!("{second}\n"));
    let other_life = json!({ "vm_id": second, "generation": 9, "command": "true" });
    let (code, message) = session.ask("exec", &other_life).unwrap().unwrap_err();
    assert!(code == -32000 && message.contains("is in generation 0"), "{message}");

    let killed = session.call("kill", &json!({ "vm_id": second, "force": true })).unwrap();
    assert_eq!((&killed["ended"], &killed["phase"]), (&json!(true), &json!("cleaned")));
    refused(&mut session, Some(&second), "it was stopped");
    phases_of(&mut session, &second);
    close(session, &installation);
}

/// `list`, `exec` and `kill` of the command line.
fn from_other_processes(
    installation: &Installation,
    session: &mut Session,
    first: &str,
    second: &str,
) {
    let mut listed = installation.list().unwrap();
    listed.sort();
    let mut expected =
        [(first.to_owned(), "running".to_owned()), (second.to_owned(), "running".to_owned())];
    expected.sort();
    assert_eq!(listed, expected);
    let output = installation.output(&["exec", second, "--", "hostname"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{second}\n"));

    // A command in each; the kill of one VM ends its own alone.
    let sleep = |vm| json!({ "vm_id": vm, "command": "echo up; sleep 1000" });
    let doomed = session.send("exec_stream", &sleep(first)).unwrap();
    let unharmed =
        session.send("exec_pipe", &json!({ "vm_id": second, "command": "cat; exit 5" })).unwrap();
    let up = |message: &Value| message["method"] == "exec_stream.stdout";
    session.message("its output", up).unwrap();
    session.message("its start", |message| message["method"] == "exec_pipe.ready").unwrap();
    let waiting = session.send("wait", &json!({ "vm_id": first })).unwrap();
    let output = installation.output(&["kill", "--force", first]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (code, message) = session.answer(doomed).unwrap().unwrap_err();
    assert!(code == -32000 && message.contains(&format!("VM {first} has ended")), "{message}");
    let ended = session.answer(waiting).unwrap().unwrap();
    assert_eq!((&ended["ended"], &ended["cleaned_up"]), (&json!(true), &json!(true)));

    let data = json!({ "id": unharmed, "data": super::encoded(b"abc") });
    session.send("exec_pipe.stdin", &data).unwrap();
    session.send("exec_pipe.stdin_eof", &json!({ "id": unharmed })).unwrap();
    let told = session.message("its output", |m| m["method"] == "exec_pipe.stdout").unwrap();
    assert_eq!(text(&told["params"]["data"]), "abc");
    assert_eq!(session.answer(unharmed).unwrap().unwrap()["exit_code"], 5);
}

/// Sees that each phase of a VM's life was told, in order.
fn phases_of(session: &mut Session, vm: &str) {
    let mut phases = Vec::new();
    loop {
        let is_it = |m: &Value| m["method"] == "event" && m["params"]["vm_id"] == json!(vm);
        let told = session.message("an event", is_it).unwrap()["params"].take();
        assert_eq!((&told["type"], &told["generation"]), (&json!("vm"), &json!(0)));
        assert!(told["timestamp"].as_i64().unwrap() > 1_700_000_000_000, "milliseconds");
        if told["ended"] == json!(true) {
            break;
        }
        phases.push(told["phase"].as_str().unwrap().to_owned());
    }
    let expected =
        ["creating", "created", "starting", "running", "stopping", "cleaning", "cleaned"];
    assert_eq!(phases, expected);
}

#[test]
fn a_detached_vm_outlives_its_session() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    let mut params = matchlock_test_support::small_vm();
    params["remove"] = json!(false);
    params["detached"] = json!(true);
    params["env"] = json!({ "TOKEN": "planted-secret" });
    let created = session.call("create", &params).unwrap();
    let vm = created["id"].as_str().unwrap().to_owned();
    assert_eq!(printed(&mut session, Some(&vm), "hostname"), format!("{vm}\n"));
    assert_eq!(printed(&mut session, Some(&vm), "echo $TOKEN"), "planted-secret\n");
    // Anybody on this host may read its command line.
    let pid = installation.sql(&format!("select pid from vms where id='{vm}'")).unwrap();
    let line = std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap();
    let line = String::from_utf8(line).unwrap();
    assert!(line.contains("busybox") && !line.contains("planted-secret"), "{line}");
    let list = session.call("list", &json!({})).unwrap();
    assert_eq!(list["vms"][0]["detached"], json!(true));
    session.call("close", &json!({})).unwrap();
    assert!(session.wait(super::PATIENCE).unwrap().unwrap().success());

    assert_eq!(installation.list().unwrap(), [(vm.clone(), "running".to_owned())]);
    let output = installation.output(&["kill", "--force", &vm]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(installation.output(&["rm", &vm]).unwrap().status.success());
    installation.assert_nothing_left().unwrap();
}

fn detached() -> Value {
    let mut params = matchlock_test_support::small_vm();
    params["remove"] = json!(false);
    params["detached"] = json!(true);
    params
}

fn gone(session: &mut Session, vm: &str, words: &str) {
    for method in ["exec", "kill"] {
        let params = if method == "exec" {
            json!({ "vm_id": vm, "command": "true" })
        } else {
            json!({ "vm_id": vm })
        };
        let (code, message) = session.ask(method, &params).unwrap().unwrap_err();
        assert!(code == -32000 && message.contains(words), "{method}: {code} {message}");
    }
}

#[test]
fn the_end_of_a_detached_vm_is_told() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    let mut vm = || session.call("create", &detached()).unwrap()["id"].as_str().unwrap().to_owned();
    let (first, second) = (vm(), vm());
    let waiting = session.send("wait", &json!({ "vm_id": first })).unwrap();
    let log = session.send("log_stream", &json!({ "vm_id": first })).unwrap();
    let listed = |session: &mut Session, vm: &str| {
        let mut list = session.call("list", &json!({ "vm_id": vm })).unwrap();
        assert_eq!(list["vms"].as_array().unwrap().len(), 1);
        list["vms"][0].take()
    };
    let shown = listed(&mut session, &first);
    let told = (&shown["phase"], &shown["ended"], &shown["default"], &shown["detached"]);
    assert_eq!(told, (&json!("running"), &json!(false), &json!(true), &json!(true)));
    let output = installation.output(&["kill", "--force", &first]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ended = session.answer(waiting).unwrap().unwrap();
    assert_eq!((&ended["ended"], &ended["cleaned_up"]), (&json!(true), &json!(true)));
    assert_eq!(session.answer(log).unwrap(), Ok(json!({})));
    gone(&mut session, &first, "has ended (phase cleaned)");
    assert_eq!(listed(&mut session, &first)["phase"], json!("cleaned"));

    let killed = session.call("kill", &json!({ "vm_id": second, "force": true })).unwrap();
    assert_eq!((&killed["ended"], &killed["phase"]), (&json!(true), &json!("cleaned")));
    assert!(installation.output(&["rm", &first, &second]).unwrap().status.success());
    gone(&mut session, &second, "has ended, and was removed");
    close(session, &installation);
}

#[test]
fn a_detached_vm_whose_create_is_cancelled_leaves_nothing() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    for _ in 0..2 {
        let id = session.send("create", &detached()).unwrap();
        installation.wait_for_status("starting").unwrap();
        let cancelled = session.call("cancel", &json!({ "id": id })).unwrap();
        assert_eq!(cancelled, json!({ "cancelled": true }));
        assert_eq!(session.answer(id).unwrap().unwrap_err().0, -32003);
        wait_until(super::PATIENCE, "its end", || Ok(installation.list()?.is_empty())).unwrap();
    }
    close(session, &installation);
}

#[test]
fn a_command_whose_input_is_wrong_does_not_go_on_without_it() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    session.create_vm().unwrap();
    let wrong = [
        (json!({ "data": "***" }), "data is not base64"),
        (json!({ "data": 5 }), "data: invalid type"),
        (json!({}), "data is missing"),
        (json!({ "data": "YQ==", "x": 1 }), "unknown field `x`"),
    ];
    for (given, why) in wrong {
        let id = session.send("exec_pipe", &json!({ "command": "cat; echo end" })).unwrap();
        let is_ready = |m: &serde_json::Value| m["method"] == "exec_pipe.ready";
        session.message("its start", is_ready).unwrap();
        let mut params = given;
        params["id"] = json!(id);
        let line = json!({ "jsonrpc": "2.0", "method": "exec_pipe.stdin", "params": params });
        session.send_line(line.to_string().as_bytes()).unwrap();
        let (code, text) = session.answer(id).unwrap().unwrap_err();
        assert_eq!(code, -32602, "{text}");
        assert!(text.starts_with("its input was wrong: ") && text.contains(why), "{text}");
    }
    assert!(session.seen().iter().all(|m| m["method"] != "exec_pipe.stdout"));
    close(session, &installation);
}
