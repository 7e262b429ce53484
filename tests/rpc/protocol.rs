//! JSON-RPC as it is written down in docs/RPC.md, without VMs.

use serde_json::{Value, json};

use super::{Installation, Session, rpc};

/// Sends a line; the code and the words that answer it.
fn refusal(session: &mut Session, line: &str, id: &Value) -> (i64, String) {
    session.send_line(line.as_bytes()).unwrap();
    let is_it = |message: &Value| message.get("error").is_some() && message["id"] == *id;
    let answer = session.message(line, is_it).unwrap();
    (answer["error"]["code"].as_i64().unwrap(), answer["error"]["message"].to_string())
}

fn bare() -> (Installation, Session) {
    let installation = Installation::bare().unwrap();
    let session = rpc(&installation, &[]);
    (installation, session)
}

#[test]
fn whatever_is_no_request_is_answered_and_the_next_line_is_read() {
    let (_installation, mut session) = bare();
    for (line, id, code, words) in [
        ("nonsense", Value::Null, -32700, "Parse error"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"list""#, json!(1), -32700, "Parse error"),
        ("[]", Value::Null, -32600, "batches are not supported"),
        (
            r#"[{"jsonrpc":"2.0","id":1,"method":"list"}]"#,
            Value::Null,
            -32600,
            "batches are not supported",
        ),
        (r#"{"id":2,"method":"list"}"#, json!(2), -32600, "jsonrpc"),
        (r#"{"jsonrpc":"2.0","id":3}"#, json!(3), -32600, "no method"),
        (r#"{"jsonrpc":"2.0","id":null,"method":"list"}"#, Value::Null, -32600, "an id is"),
        (r#"{"jsonrpc":"2.0","id":4,"method":"exce"}"#, json!(4), -32601, "Method not found"),
        (
            r#"{"jsonrpc":"2.0","id":5,"method":"port_forward","params":{"forwards":[]}}"#,
            json!(5),
            -32601,
            "port_forward is not available in this version yet",
        ),
        (
            r#"{"jsonrpc":"2.0","id":6,"method":"allow_list_add","params":{"hosts":["x"]}}"#,
            json!(6),
            -32601,
            "allow_list_add is not available",
        ),
        (r#"{"jsonrpc":"2.0","id":7,"method":"create"}"#, json!(7), -32602, "image is required"),
        (r#"{"jsonrpc":"2.0","id":8,"method":"exec","params":{}}"#, json!(8), -32602, "command"),
        (r#"{"jsonrpc":"2.0","id":9,"method":"exec","params":[1]}"#, json!(9), -32602, "params"),
        (
            r#"{"jsonrpc":"2.0","id":10,"method":"exec","params":{"command":7}}"#,
            json!(10),
            -32602,
            "a text for `sh -c`, or a list of words",
        ),
        (
            r#"{"jsonrpc":"2.0","id":11,"method":"exec","params":{"command":"x","comand":1}}"#,
            json!(11),
            -32602,
            "unknown field `comand`",
        ),
        (
            r#"{"jsonrpc":"2.0","id":30,"method":"list","params":{"bogus":1}}"#,
            json!(30),
            -32602,
            "unknown field `bogus`",
        ),
        (
            r#"{"jsonrpc":"2.0","id":12,"method":"exec","params":{"command":"x"}}"#,
            json!(12),
            -32000,
            "VM not created",
        ),
        (
            r#"{"jsonrpc":"2.0","id":13,"method":"exec","params":{"command":"x","vm_id":"vm-00000001"}}"#,
            json!(13),
            -32000,
            "VM vm-00000001 is not one of this session",
        ),
        (
            r#"{"jsonrpc":"2.0","id":14,"method":"exec","params":{"command":"x","vm_id":"seven"}}"#,
            json!(14),
            -32602,
            "is not a VM id",
        ),
        (
            r#"{"jsonrpc":"2.0","id":19,"method":"create","params":{"image":"x","resources":{"memory_mb":"1"}}}"#,
            json!(19),
            -32602,
            "resources.memory_mb: invalid type",
        ),
        (
            r#"{"jsonrpc":"2.0","id":20,"method":"create","params":{"image":"x","image_config":{"env":{"A\nB":"1"}}}}"#,
            json!(20),
            -32602,
            "image_config: env:",
        ),
        (r#""exec""#, json!(null), -32600, "a request is an object"),
        (r#"{"jsonrpc":"2.0","id":15,"method":"cancel"}"#, json!(15), -32602, "missing field `id`"),
        (
            r#"{"jsonrpc":"2.0","id":16,"method":"exec_pipe.stdin","params":{"id":99,"data":""}}"#,
            json!(16),
            -32602,
            "no command in flight has id 99",
        ),
        (
            r#"{"jsonrpc":"2.0","id":17,"method":"close","params":{"timeout_seconds":-1}}"#,
            json!(17),
            -32602,
            "timeout_seconds",
        ),
        (
            r#"{"jsonrpc":"2.0","id":18,"method":"create","params":{"image":"127.0.0.1:1/none-such"}}"#,
            json!(18),
            -32000,
            "could not connect to 127.0.0.1:1",
        ),
    ] {
        let (got, said) = refusal(&mut session, line, &id);
        assert_eq!(got, code, "{line}: {said}");
        assert!(said.contains(words), "{line}: {said}");
    }
    assert_eq!(session.call("list", &json!({})).unwrap(), json!({ "vms": [] }));
    assert!(session.seen().is_empty(), "each was answered once");
}

#[test]
fn notifications_and_empty_lines_are_not_answered() {
    let (_installation, mut session) = bare();
    for line in [
        "",
        "   ",
        r#"{"jsonrpc":"2.0","method":"list"}"#,
        r#"{"jsonrpc":"2.0","method":"no-such"}"#,
        r#"{"jsonrpc":"2.0","method":"create","params":{}}"#,
        r#"{"jsonrpc":"2.0","method":"cancel","params":{"id":7}}"#,
        r#"{"jsonrpc":"2.0","method":"exec_stream","params":{"command":"x"}}"#,
    ] {
        session.send_line(line.as_bytes()).unwrap();
    }
    assert_eq!(session.call("list", &json!({})).unwrap(), json!({ "vms": [] }));
    assert_eq!(session.call("close", &json!({"timeout_seconds": 1})).unwrap(), json!({}));
    assert!(session.seen().is_empty());
    assert!(session.wait(super::PATIENCE).unwrap().unwrap().success());
}

#[test]
fn ids_are_numbers_or_texts_and_come_back_as_they_were() {
    let (_installation, mut session) = bare();
    for id in [json!(0), json!(u64::MAX), json!("a text"), json!("")] {
        let line = json!({"jsonrpc": "2.0", "id": id, "method": "list"});
        session.send_line(line.to_string().as_bytes()).unwrap();
        let answer = session.message("its answer", |message| message["id"] == id).unwrap();
        assert_eq!(answer["result"], json!({ "vms": [] }));
    }
    assert_eq!(session.call("cancel", &json!({"id": 99})).unwrap(), json!({"cancelled": false}));
}

#[test]
fn a_line_over_the_limit_is_answered_under_its_id_and_the_session_goes_on() {
    let (_installation, mut session) = bare();
    let huge = "A".repeat(70 * 1024 * 1024);
    let line = format!(
        r#"{{"jsonrpc": "2.0", "method": "write_file", "id": 77, "params": {{"path": "/x", "content": "{huge}"}}}}"#
    );
    let (code, said) = refusal(&mut session, &line, &json!(77));
    assert_eq!(code, -32600);
    assert!(said.contains("over the limit of 67108864") && said.contains("offset"), "{said}");
    // Just below it is a request like any other: it fails for want of a VM.
    let line = format!(
        r#"{{"jsonrpc": "2.0", "method": "write_file", "id": 78, "params": {{"path": "/x", "content": "{}"}}}}"#,
        &huge[..60 * 1024 * 1024]
    );
    assert_eq!(refusal(&mut session, &line, &json!(78)).0, -32000);
    assert_eq!(session.call("list", &json!({})).unwrap(), json!({ "vms": [] }));
}

#[test]
fn requests_are_answered_each_once_however_they_come() {
    let (_installation, mut session) = bare();
    let mut ids = Vec::new();
    for n in 0..200 {
        ids.push(session.send("list", &json!({})).unwrap());
        if n % 3 == 0 {
            session.send_line(b"nonsense").unwrap();
        }
    }
    for id in ids.into_iter().rev() {
        assert_eq!(session.answer(id).unwrap().unwrap(), json!({ "vms": [] }));
    }
    session.close_input();
    let rest = session.seen();
    assert!(rest.iter().all(|message| message["error"]["code"] == -32700), "{rest:?}");
    assert!(session.wait(super::PATIENCE).unwrap().unwrap().success());
}
