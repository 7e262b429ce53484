//! Bad input: one line, the documented exit code, nothing made.

use std::process::Output;

use matchlock_test_support::Installation;

fn refused(args: &[&str]) -> (Option<i32>, String) {
    let installation = Installation::bare().unwrap();
    let output = installation.output(args).unwrap();
    let made = installation.home().join("vms").read_dir().map_or(0, Iterator::count);
    assert_eq!(made, 0, "{args:?} made something");
    (output.status.code(), one_line(&output))
}

fn one_line(output: &Output) -> String {
    assert!(output.stdout.is_empty(), "an error goes to stderr");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "not one line: {text}");
    text.trim_end().to_owned()
}

#[test]
fn usage_errors_of_run_exit_with_125_and_of_others_with_2() {
    let cases: &[(&[&str], i32)] = &[
        (&["run"], 125),
        (&["run", "--image", "x", "--cpus", "zero"], 125),
        (&["run", "--image", "x", "--no-such-flag", "--", "true"], 125),
        (&["run", "--image", "x", "--rm=maybe", "--", "true"], 125),
        (&["exec"], 125),
        (&["exec", "not-an-id", "--", "true"], 125),
        (&["list", "--no-such-flag"], 2),
        (&["gc", "not-an-id"], 2),
        (&["rm"], 2),
        (&["kill"], 2),
        (&["no-such-verb"], 2),
        (&["image", "import", "bad tag"], 2),
        (&[], 2),
    ];
    for (args, code) in cases {
        let (got, line) = refused(args);
        assert_eq!(got, Some(*code), "{args:?}: {line}");
        assert!(line.starts_with("matchlock: "), "{line}");
    }
}

#[test]
fn bad_values_are_named_with_what_is_allowed() {
    let cases: &[(&[&str], &str)] = &[
        (&["--cpus", "0"], "--cpus 0"),
        (&["--cpus", "100000"], "CPUs of this host"),
        (&["--memory", "1"], "--memory 1"),
        (&["--disk-size", "0"], "--disk-size 0"),
        (&["--timeout", "0"], "--timeout 0"),
        (&["--hostname", "a b"], "--hostname"),
        (&["--add-host", "nonsense"], "invalid add-host mapping"),
        (&["--workdir", "relative"], "--workdir"),
        (&["--user", "a:b:c"], "--user"),
        (&["-e", "=x"], "invalid environment variable"),
        (&["-e", "MATCHLOCK_TEST_SURELY_UNSET"], "not set in your environment"),
        (&["--env-file", "/nonexistent"], "--env-file /nonexistent"),
        (&["--hypervisor", "firecracker"], "firecracker is not available"),
        (&["--graceful-shutdown", "soon"], "--graceful-shutdown"),
        (&["--mtu", "1200"], "--mtu cannot be combined with --no-network"),
        (&["--allow-private"], "--allow-private cannot be combined with --no-network"),
    ];
    for (flags, expected) in cases {
        let mut args = vec!["run", "--no-network", "--image", "busybox"];
        args.extend(*flags);
        args.extend(["--", "true"]);
        let (code, line) = refused(&args);
        assert_eq!(code, Some(125), "{flags:?}: {line}");
        assert!(line.contains(expected), "{flags:?}: {line}");
    }
}

#[test]
fn flags_and_verbs_of_later_versions_are_refused_by_name() {
    for flag in ["--detach", "-t", "-v=/a:/b", "--disk=/a:/b", "-p=80", "--secret=A=b@c", "--pull"]
    {
        let (code, line) = refused(&["run", "--image", "busybox", flag, "--", "true"]);
        assert_eq!(code, Some(125), "{flag}: {line}");
        assert!(line.contains("is not available in this version yet"), "{flag}: {line}");
    }
    for verb in
        ["pull", "build", "rpc", "prune", "log", "volume", "port-forward", "allow-list", "diagnose"]
    {
        let (code, line) = refused(&[verb, "--whatever", "x"]);
        assert_eq!(code, Some(2), "{verb}: {line}");
        assert!(line.contains(&format!("`matchlock {verb}` is not available")), "{line}");
    }
}

#[test]
fn an_unknown_image_says_what_to_do() {
    let (code, line) = refused(&["run", "--no-network", "--image", "nothere", "--", "true"]);
    assert_eq!(code, Some(125));
    assert!(
        line.contains("image not found: \"nothere\"") && line.contains("image import"),
        "{line}"
    );
}

#[test]
fn unknown_vms_are_named() {
    for args in [
        &["exec", "vm-00000001", "--", "true"][..],
        &["kill", "vm-00000001"],
        &["rm", "vm-00000001"],
        &["gc", "vm-00000001"],
    ] {
        let (code, line) = refused(args);
        assert_eq!(code, Some(if args[0] == "exec" { 125 } else { 1 }), "{line}");
        assert!(line.contains("VM vm-00000001 not found"), "{line}");
    }
}

#[test]
fn looking_makes_nothing() {
    let installation = Installation::bare().unwrap();
    for args in [&["list"][..], &["list", "--json"], &["image", "ls"], &["version"]] {
        assert_eq!(installation.output(args).unwrap().status.code(), Some(0));
    }
    assert!(!installation.home().try_exists().unwrap());
    assert!(!installation.cache().try_exists().unwrap());
}

#[test]
fn a_state_directory_that_is_none_is_named() {
    let installation = Installation::bare().unwrap();
    std::fs::write(installation.home(), "a file").unwrap();
    let output = installation.output(&["gc"]).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(line.contains(installation.home().to_str().unwrap()), "{line}");
    let relative =
        installation.command(&["list"]).unwrap().env("MATCHLOCK_HOME", "x").output().unwrap();
    assert!(one_line(&relative).contains("MATCHLOCK_HOME"));
}
