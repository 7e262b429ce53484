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
        (&["kill", "--all", "vm-00000001"], 2),
        (&["rm", "--stopped", "vm-00000001"], 2),
        (&["prune", "vm-00000001"], 2),
        (&["list", "--quiet", "--json"], 2),
        (&["list", "--all", "--running"], 2),
        (&["log"], 2),
        (&["log", "--console", "--owner", "vm-00000001"], 2),
        (&["inspect"], 2),
        (&["get", "vm-00000001", "vm-00000002"], 2),
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
        (&["--timeout", "0s"], "--timeout 0"),
        (&["--hostname", "a b"], "--hostname"),
        (&["--add-host", "nonsense"], "invalid add-host mapping"),
        (&["--workdir", "relative"], "--workdir"),
        (&["--user", "a:b:c"], "--user"),
        (&["-e", "=x"], "invalid environment variable"),
        (&["-e", "MATCHLOCK_TEST_SURELY_UNSET"], "not set in your environment"),
        (&["--env-file", "/nonexistent"], "--env-file /nonexistent"),
        (&["--hypervisor", "firecracker"], "firecracker is not available"),
        (&["--hypervisor", "bochs"], "--hypervisor"),
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
    for flag in ["-v=/a:/b", "--disk=/a:/b", "-p=80", "--secret=A=b@c"] {
        let (code, line) = refused(&["run", "--image", "busybox", flag, "--", "true"]);
        assert_eq!(code, Some(125), "{flag}: {line}");
        assert!(line.contains("is not available in this version yet"), "{flag}: {line}");
    }
    for verb in ["build", "volume", "port-forward", "allow-list"] {
        let (code, line) = refused(&[verb, "--whatever", "x"]);
        assert_eq!(code, Some(2), "{verb}: {line}");
        assert!(line.contains(&format!("`matchlock {verb}` is not available")), "{line}");
    }
}

/// Who comes from docker is told in one line what it is called here.
#[test]
fn words_of_other_tools_are_answered_with_ours() {
    let cases: &[(&[&str], i32, &str)] = &[
        (&["ps"], 2, "there is no `matchlock ps`; use `matchlock list`"),
        (&["ps", "-a"], 2, "use `matchlock list`"),
        (&["stop", "vm-00000001"], 2, "use `matchlock kill`"),
        (&["images"], 2, "use `matchlock image ls`"),
        (&["rmi", "busybox"], 2, "use `matchlock image rm`"),
        (&["run", "-m", "512", "--image", "b"], 125, "has no -m: use --memory MB"),
        (&["run", "--name=web", "--image", "b"], 125, "microVMs have ids, no names"),
        (&["run", "busybox"], 125, "the image is named with --image, e.g. `matchlock run --image"),
        (&["run", "-it", "busybox", "sh"], 125, "the image is named with --image"),
        (&["run", "--pull", "always", "--image", "b"], 125, "--pull=always, --pull=missing"),
        (&["image", "tag", "a"], 2, "see `matchlock image tag --help`"),
        (&["image", "rm", "-f", "a"], 2, "see `matchlock image rm --help`"),
        (
            &["image", "import", "web", "Cargo.toml"],
            2,
            "an archive is read from stdin: matchlock image import TAG < Cargo.toml",
        ),
    ];
    for (args, code, wanted) in cases {
        let (got, line) = refused(args);
        assert_eq!(got, Some(*code), "{args:?}: {line}");
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
    // What is nobody's word is answered as before.
    let (_, line) = refused(&["run", "--frobnicate", "--image", "b"]);
    assert!(line.contains("unexpected argument '--frobnicate'"), "{line}");
}

#[test]
fn what_needs_somebody_who_waits_is_refused_with_detach() {
    for flag in ["--interactive", "--timings"] {
        let (code, line) = refused(&["run", "-d", flag, "--image", "busybox", "--", "true"]);
        assert_eq!(code, Some(125), "{flag}: {line}");
        assert!(line.contains(&format!("--detach cannot be combined with {flag}")), "{line}");
    }
}

/// What the parser of a number would say by itself helps nobody.
#[test]
fn what_is_no_number_is_told_what_to_write_instead() {
    let whole = "use a whole number, without a unit";
    let cases: &[(&[&str], &str, &str)] = &[
        (&["--cpus", "half"], "'half' for '--cpus <CPUS>'", "use a number, e.g. 2 or 0.5"),
        (&["--memory", "512m"], "'512m' for '--memory <MB>'", whole),
        (&["--disk-size", "1.5"], "'1.5' for '--disk-size <MB>'", whole),
        (&["--timeout", "soon"], "'soon' for '--timeout <DURATION>'", "e.g. 10s, 1m30s, 500ms"),
        (&["--mtu", "-1"], "'-1' for '--mtu <BYTES>'", whole),
        (&["--memory", "99999999999999999999"], "--memory", "that number is too large"),
        (&["--graceful-shutdown", "soon"], "--graceful-shutdown", "e.g. 10s, 1m30s, 500ms"),
    ];
    for (flags, what, instead) in cases {
        let flags = flags.join("=");
        let (code, line) = refused(&["run", "--image", "busybox", &flags, "--", "true"]);
        assert_eq!(code, Some(125), "{flags}: {line}");
        assert!(line.contains(what) && line.contains(instead), "{flags}: {line}");
        assert!(line.ends_with("; see `matchlock run --help`"), "{line}");
    }
    let (code, line) = refused(&["log", "--tail", "few", "vm-00000001"]);
    assert_eq!(code, Some(2));
    assert!(line.contains("'few' for '--tail <N>': use a whole number of lines, or all"), "{line}");
}

#[test]
fn a_wrong_line_of_an_environment_file_is_named_with_its_number() {
    let installation = Installation::bare().unwrap();
    let file = installation.home().with_file_name("env");
    let name = file.to_str().unwrap();
    let cases: &[(&[u8], &str)] = &[
        (b"# fine\nA=1\n\n=x\n", "line 4: invalid environment variable"),
        (b"A=1\nMATCHLOCK_TEST_SURELY_UNSET\n", "line 2: "),
        (b"A=1\nB=\xff\n", "line 2: not valid UTF-8"),
    ];
    for (content, wanted) in cases {
        std::fs::write(&file, content).unwrap();
        let args = ["run", "--image", "busybox", "--env-file", name, "--", "true"];
        let output = installation.output(&args).unwrap();
        assert_eq!(output.status.code(), Some(125));
        let line = one_line(&output);
        assert!(line.contains(&format!("--env-file {name}, {wanted}")), "{line}");
    }
}

#[test]
fn a_wrong_variable_is_named_as_such() {
    let installation = Installation::bare().unwrap();
    let run = ["run", "--image", "busybox", "--", "true"];
    for (value, wanted) in
        [("bochs", "MATCHLOCK_HYPERVISOR is \"bochs\""), ("firecracker", "MATCHLOCK_HYPERVISOR")]
    {
        let mut command = installation.command(&run).unwrap();
        let output = command.env("MATCHLOCK_HYPERVISOR", value).output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        let line = one_line(&output);
        assert!(line.contains(wanted), "{line}");
    }
    // What is logged is no word of the command line either.
    for (args, code) in [(&run[..], 125), (&["list"], 1), (&["gc"], 1)] {
        let mut command = installation.command(args).unwrap();
        let output = command.env("MATCHLOCK_LOG", "loud").output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        assert!(one_line(&output).contains("MATCHLOCK_LOG is \"loud\""), "{output:?}");
        let mut command = installation.command(args).unwrap();
        let output = command.env("MATCHLOCK_BOOT_TIMEOUT", "loud").output().unwrap();
        assert_eq!(output.status.code(), Some(code), "the same: {args:?}: {output:?}");
    }
    // A flag goes first, and a verb that has no use for it is not stopped by it.
    let with_flag =
        ["run", "--pull=never", "--hypervisor", "qemu", "--image", "nothere", "--", "true"];
    for (args, code, wanted) in [(&with_flag[..], 125, "image not found"), (&["list"], 0, "")] {
        let mut command = installation.command(args).unwrap();
        let output = command.env("MATCHLOCK_HYPERVISOR", "bochs").output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(wanted), "{output:?}");
    }
}

#[test]
fn an_unknown_image_says_what_to_do() {
    let args = ["run", "--no-network", "--pull=never", "--image", "nothere", "--", "true"];
    let (code, line) = refused(&args);
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
        &["log", "vm-00000001"],
        &["get", "vm-00000001"],
        &["inspect", "vm-00000001"],
        &["kill", "--force", "vm-00000001"],
        &["rm", "--force", "vm-00000001"],
    ] {
        let (code, line) = refused(args);
        assert_eq!(code, Some(if args[0] == "exec" { 125 } else { 1 }), "{line}");
        assert!(line.contains("VM vm-00000001 not found"), "{line}");
    }
}

#[test]
fn looking_makes_nothing() {
    let installation = Installation::bare().unwrap();
    for args in [
        &["list"][..],
        &["ls", "-a"],
        &["list", "--json"],
        &["list", "-q"],
        &["image", "ls"],
        &["kill", "--all"],
        &["rm", "--stopped"],
        &["prune"],
        &["version"],
    ] {
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
