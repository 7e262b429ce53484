//! A VM that crashes, or whose actor panics, is no other's matter.

use std::process::Stdio;

use matchlock_test_support::{Installation, Session};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{close, rpc, text};

/// Kills a VM's hypervisor.
fn crash(installation: &Installation, vm: &str) {
    let remains = installation.remains().unwrap();
    let mine = remains.processes.iter().find(|(_, line)| line.contains(vm)).unwrap();
    kill_process(Pid::from_raw(mine.0).unwrap(), Signal::KILL).unwrap();
}

/// A command in a VM that ends when it is told to.
fn waiting(session: &mut Session, vm: &str) -> u64 {
    let id = session.send("exec_pipe", &json!({ "vm_id": vm, "command": "cat; exit 5" })).unwrap();
    let ready = |m: &Value| m["method"] == "exec_pipe.ready" && m["params"]["id"] == json!(id);
    session.message("its start", ready).unwrap();
    id
}

fn finish(session: &mut Session, id: u64) {
    session.send("exec_pipe.stdin_eof", &json!({ "id": id })).unwrap();
    assert_eq!(session.answer(id).unwrap().unwrap()["exit_code"], 5);
}

#[test]
fn a_crashed_vm_says_why_and_leaves_the_others_alone() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    let (doomed, healthy) = (session.create_vm().unwrap(), session.create_vm().unwrap());
    let lost = waiting(&mut session, &doomed);
    let unharmed = waiting(&mut session, &healthy);
    crash(&installation, &doomed);
    let (code, message) = session.answer(lost).unwrap().unwrap_err();
    assert!(code == -32000 && message.contains(&format!("VM {doomed} has ended")), "{message}");
    assert!(message.contains("SIGKILL"), "the reason: {message}");
    let told = |m: &Value| {
        m["method"] == "event"
            && m["params"]["vm_id"] == json!(doomed)
            && m["params"]["ended"] == json!(true)
    };
    let event = session.message("its end", told).unwrap();
    assert!(event["params"]["cause"].as_str().unwrap().contains("SIGKILL"), "{event}");
    assert_eq!(event["params"]["cleaned_up"], json!(true));
    let (code, again) = session.ask("exec", &json!({ "command": "true" })).unwrap().unwrap_err();
    assert!(code == -32000 && again.contains("SIGKILL"), "{again}");
    finish(&mut session, unharmed);
    // Its place can be another's; its name stays its own.
    session.create_vm().unwrap();
    let result = session.ask("exec", &json!({ "vm_id": doomed, "command": "true" })).unwrap();
    assert!(result.unwrap_err().1.contains(&doomed));
    close(session, &installation);
}

#[test]
fn a_panic_of_a_vms_actor_interrupts_nothing() {
    let binary = std::env::var_os("MATCHLOCK_TEST_FAILPOINTS_BIN")
        .expect("MATCHLOCK_TEST_FAILPOINTS_BIN is not set: run the tests with `make test`");
    let installation = Installation::new().unwrap();
    let mut command = std::process::Command::new(binary);
    // The first message that ends a VM makes its actor panic.
    installation
        .prepare(command.arg("rpc"))
        .env("FAILPOINTS", "actor.vm.stop.before=1*return(panic)")
        .stderr(Stdio::null());
    let mut session = Session::start(&mut command).unwrap();
    let (one, other) = (session.create_vm().unwrap(), session.create_vm().unwrap());
    let unharmed = waiting(&mut session, &other);
    let killed = session.call("kill", &json!({ "vm_id": one, "force": true })).unwrap();
    assert_eq!((&killed["ended"], &killed["cleaned_up"]), (&json!(true), &json!(true)));
    // Another life of its actor has done it.
    let next_life = |m: &Value| {
        m["method"] == "event"
            && m["params"]["vm_id"] == json!(one)
            && m["params"]["generation"] == json!(1)
    };
    let event = session.message("another life", next_life).unwrap();
    assert!(event["params"]["cause"].as_str().unwrap().contains("actor failed"), "{event}");
    finish(&mut session, unharmed);
    let list = session.call("list", &json!({})).unwrap();
    assert_eq!(list["vms"][1]["generation"], json!(0), "the other has not noticed");
    let result = session.call("exec", &json!({ "vm_id": other, "command": "echo on" })).unwrap();
    assert_eq!(text(&result["stdout"]), "on\n");
    close(session, &installation);
}
