//! Help texts, as users see them. They change only on purpose.

use matchlock_test_support::Installation;

fn help(args: &[&str]) -> String {
    let output = Installation::bare().unwrap().output(args).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "help goes to stdout");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn help_of_everything() {
    let verbs: &[&[&str]] = &[
        &["--help"],
        &["run", "--help"],
        &["exec", "--help"],
        &["list", "--help"],
        &["kill", "--help"],
        &["rm", "--help"],
        &["log", "--help"],
        &["prune", "--help"],
        &["get", "--help"],
        &["inspect", "--help"],
        &["gc", "--help"],
        &["rpc", "--help"],
        &["serve", "--help"],
        &["image", "--help"],
        &["image", "import", "--help"],
        &["image", "ls", "--help"],
        &["image", "inspect", "--help"],
        &["image", "tag", "--help"],
        &["image", "rm", "--help"],
        &["image", "gc", "--help"],
        &["guest", "--help"],
        &["warm", "--help"],
    ];
    for args in verbs {
        insta::assert_snapshot!(args.join("_").replace("--", ""), help(args));
    }
}

#[test]
fn version_says_which() {
    let output = Installation::bare().unwrap().output(&["version"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with(&format!("matchlock {} (commit: ", env!("CARGO_PKG_VERSION"))),
        "{text}"
    );
}
