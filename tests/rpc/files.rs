//! Files of any size, in pieces, and what else a file can be.

use matchlock_test_support::{Installation, Session};
use serde_json::{Value, json};

use super::{close, decoded, encoded, rpc, text};

const PIECE: usize = 1024 * 1024;

fn refusal(session: &mut Session, method: &str, params: &Value) -> String {
    let (code, message) = session.ask(method, params).unwrap().unwrap_err();
    assert_eq!(code, -32002, "{message}");
    message
}

#[test]
fn files_of_any_size_go_in_pieces_and_what_is_no_file_is_refused() {
    let installation = Installation::new().unwrap();
    let mut session = rpc(&installation, &[]);
    session.create_vm().unwrap();

    // Larger than any frame, window or queue on the way.
    let bytes: Vec<u8> = (0..9 * PIECE + 12_345).map(|n| (n * 7 / 3).to_le_bytes()[0]).collect();
    for (index, piece) in bytes.chunks(PIECE).enumerate() {
        let mut params = json!({ "path": "/big/file", "content": encoded(piece) });
        if index > 0 {
            params["offset"] = json!(index * PIECE);
        }
        let written = session.call("write_file", &params).unwrap();
        assert_eq!(written["size"], index * PIECE + piece.len());
    }
    let mut read = Vec::new();
    loop {
        let params = json!({ "path": "/big/file", "offset": read.len(), "length": 2 * PIECE });
        let piece = session.call("read_file", &params).unwrap();
        read.extend(decoded(&piece["content"]));
        if piece["eof"] == json!(true) {
            break;
        }
    }
    assert!(read == bytes, "{} of {} bytes", read.len(), bytes.len());
    let whole = session.call("read_file", &json!({ "path": "/big/file" })).unwrap();
    assert!(decoded(&whole["content"]) == bytes);

    let beyond = json!({ "path": "/big/file", "content": "", "offset": bytes.len() + 1 });
    assert!(refusal(&mut session, "write_file", &beyond).contains("beyond its end"));
    let replaced = json!({ "path": "/big/file", "content": encoded(b"short") });
    assert_eq!(session.call("write_file", &replaced).unwrap()["size"], 5);
    let short = session.call("read_file", &json!({ "path": "/big/file" })).unwrap();
    assert_eq!((text(&short["content"]).as_str(), &short["eof"]), ("short", &json!(true)));

    // Nothing that would wait for somebody, and nothing without an end.
    let command = json!({ "command": "mkfifo /fifo; truncate -s 40M /large; chmod 600 /large" });
    session.call("exec", &command).unwrap();
    for (method, path, words) in [
        ("read_file", "/fifo", "not a regular file"),
        ("write_file", "/fifo", "/fifo"),
        ("read_file", "/dev/zero", "not a regular file"),
        ("read_file", "/big", "it is a directory"),
        ("write_file", "/big", "directory"),
        ("list_files", "/big/file", "Not a directory"),
        ("read_file", "/large", "in pieces"),
        ("write_file", "/proc/none", "/proc/none"),
    ] {
        let mut params = json!({ "path": path });
        if method == "write_file" {
            params["content"] = json!("");
        }
        let message = refusal(&mut session, method, &params);
        assert!(message.contains(words), "{method} {path}: {message}");
    }
    let (code, message) =
        session.ask("read_file", &json!({ "path": "etc/passwd" })).unwrap().unwrap_err();
    assert!(code == -32602 && message.contains("absolute"), "{message}");
    // A file that says that it has no bytes.
    let version = session.call("read_file", &json!({ "path": "/proc/version" })).unwrap();
    assert!(text(&version["content"]).starts_with("Linux version"));
    let listed = session.call("list_files", &json!({ "path": "/" })).unwrap();
    let large = listed["files"].as_array().unwrap().iter().find(|f| f["name"] == "large").unwrap();
    assert_eq!((&large["size"], &large["mode"]), (&json!(40 << 20), &json!(0o600)));
    assert!(large["mod_time"].as_str().unwrap().starts_with("20"));

    full_disk(&mut session);
    close(session, &installation);
}

/// A write that fails half-way says so.
fn full_disk(session: &mut Session) {
    let piece = encoded(&vec![7; 8 * PIECE]);
    let mut failed = None;
    for index in 0..12_usize {
        let offset = (index > 0).then_some(index * 8 * PIECE);
        let params = json!({ "path": "/fill", "content": piece, "offset": offset });
        if let Err((code, message)) = session.ask("write_file", &params).unwrap() {
            failed = Some((code, message));
            break;
        }
    }
    let (code, message) = failed.expect("a disk of 64 MB takes no 96 MB");
    assert!(code == -32002 && message.contains("No space left"), "{code} {message}");
    session.call("exec", &json!({ "command": "rm /fill" })).unwrap();
}
