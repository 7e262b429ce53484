//! Sessions (`matchlock rpc`, `matchlock serve`): the real program, and real virtual machines where it
//! takes them. Needs the environment of `make test`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod files;
mod image_config;
mod lifetimes;
mod protocol;
mod sdk;
mod served;
mod soak;
mod supervision;
mod vms;
mod warm;

use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use matchlock_test_support::{Installation, Session};
use serde_json::Value;

/// How long something may take on a loaded machine with software emulation before a test gives up.
const PATIENCE: Duration = Duration::from_secs(180);

/// Starts `rpc` with these flags.
fn rpc(installation: &Installation, flags: &[&str]) -> Session {
    let mut args = vec!["rpc"];
    args.extend(flags);
    Session::start(installation.command(&args).unwrap().stderr(Stdio::inherit())).unwrap()
}

fn encoded(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn decoded(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().unwrap()).unwrap()
}

fn text(value: &Value) -> String {
    String::from_utf8(decoded(value)).unwrap()
}

/// Ends a session as it should end: nothing of it is left.
fn close(mut session: Session, installation: &Installation) {
    assert_eq!(session.call("close", &serde_json::json!({})).unwrap(), serde_json::json!({}));
    let status = session.wait(PATIENCE).unwrap();
    assert!(status.is_none_or(|status| status.success()), "{status:?}");
    installation.assert_nothing_left().unwrap();
}
