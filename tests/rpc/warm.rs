//! The snapshot that a session's first VM makes for those after it.

use std::process::Stdio;

use matchlock_test_support::{Installation, Session};
use serde_json::json;

use super::{close, text};

#[test]
fn a_sessions_first_vm_makes_a_snapshot_and_leaves_nothing_half_made() {
    let installation = Installation::with_own_cache().unwrap();
    let mut command = installation.command(&["rpc"]).unwrap();
    command.env("MATCHLOCK_AUTO_WARM", "1").stderr(Stdio::inherit());
    let mut session = Session::start(&mut command).unwrap();
    let mut cold = matchlock_test_support::small_vm();
    cold["cold"] = json!(true);
    session.call("create", &cold).unwrap();
    let first = session.create_vm().unwrap();
    installation.wait_for_snapshot().unwrap();
    let made = installation.snapshots().unwrap();
    assert_eq!(made.len(), 1, "{made:?}");
    let hostname = json!({ "vm_id": first, "command": "hostname" });
    let said = session.call("exec", &hostname).unwrap();
    assert_eq!(text(&said["stdout"]), format!("{first}\n"));
    // The template is none of the session's.
    session.create_vm().unwrap();
    let list = session.call("list", &json!({})).unwrap();
    assert_eq!(list["vms"].as_array().unwrap().len(), 3, "{list}");
    // Another kind, whose template does not come to its end.
    let mut other = matchlock_test_support::small_vm();
    other["resources"]["memory_mb"] = json!(160);
    session.call("create", &other).unwrap();
    installation.wait_for_template().unwrap();
    close(session, &installation);
    assert_eq!(installation.snapshots().unwrap(), made);
}
