//! The published Python SDK, unmodified.

use std::process::Command;

use matchlock_test_support::{Installation, program};

#[test]
fn the_published_sdk_works_unmodified() {
    let python = std::env::var_os("MATCHLOCK_TEST_PYTHON")
        .expect("MATCHLOCK_TEST_PYTHON is not set: run the tests with `make test`");
    let installation = Installation::new().unwrap();
    let mut command = Command::new(python);
    command.arg("-c").arg(include_str!("sdk.py")).arg(program().unwrap());
    let output = installation.prepare(&mut command).output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out == "ok\n", "{out}{err}");
    installation.assert_nothing_left().unwrap();
}
