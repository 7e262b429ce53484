//! Guest bundles through the command line: listed, chosen, removed, and what is refused.

use std::fs;

use matchlock_test_support::{Installation, put_bundle};
use serde_json::{Value, json};

/// An installation with two bundles, of which the first is the default.
fn installed() -> Installation {
    let installation = Installation::bare().unwrap();
    put_bundle(installation.cache(), "1-one").unwrap();
    put_bundle(installation.cache(), "1-two").unwrap();
    let said = said(&installation, &["use", "1-one"]);
    assert_eq!(said, (0, "Default: 1-one\n".to_owned(), String::new()));
    installation
}

/// Exit code, stdout and stderr of `guest`.
fn said(installation: &Installation, args: &[&str]) -> (i32, String, String) {
    let args: Vec<&str> = ["guest"].iter().chain(args).copied().collect();
    let output = installation.output(&args).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn listed(installation: &Installation) -> Value {
    let (code, out, err) = said(installation, &["ls", "--json"]);
    assert_eq!((code, err.as_str()), (0, ""));
    serde_json::from_str(&out).unwrap()
}

#[test]
fn bundles_are_listed_and_chosen() {
    let none = Installation::bare().unwrap();
    assert_eq!(listed(&none), json!([]));
    assert!(!none.home().try_exists().unwrap(), "looking writes nothing");

    let installation = installed();
    let (_, table, _) = said(&installation, &["ls"]);
    assert_eq!(
        table,
        "VERSION  KERNEL      SIZE    STATUS  DEFAULT\n\
         1-one    6.1.0-none  0.0 MB  ok      yes\n\
         1-two    6.1.0-none  0.0 MB  ok      -\n"
    );
    assert_eq!(said(&installation, &["use", "1-two"]).0, 0);
    let bundles = listed(&installation);
    assert_eq!((&bundles[0]["default"], &bundles[1]["default"]), (&json!(false), &json!(true)));
    let two = &bundles[1];
    assert_eq!(two["version"], "1-two");
    assert_eq!(
        (&two["kernel_release"], &two["kernel_package"]),
        (&json!("6.1.0-none"), &json!("none=1"))
    );
    assert_eq!((&two["status"], &two["problem"]), (&json!("ok"), &Value::Null));

    // And that is the one that is used.
    let version = installation.output(&["version"]).unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    assert!(version.contains("guest bundle: 1-two\nguest kernel: 6.1.0-none\n"), "{version}");
    let diagnosed = installation.output(&["diagnose"]).unwrap();
    let diagnosed = String::from_utf8(diagnosed.stdout).unwrap();
    assert!(diagnosed.contains("guest-bundle: 1-two, kernel 6.1.0-none ("), "{diagnosed}");
}

#[test]
fn a_damaged_bundle_is_told_and_not_chosen() {
    let installation = installed();
    let kernel = installation.cache().join("guest/1-two/kernel");
    fs::write(&kernel, "another kernel").unwrap();
    let bundles = listed(&installation);
    assert_eq!((&bundles[0]["status"], &bundles[1]["status"]), (&json!("ok"), &json!("damaged")));
    let problem = bundles[1]["problem"].as_str().unwrap();
    assert!(problem.contains("is damaged: kernel has sha256 "), "{problem}");

    let (code, table, told) = said(&installation, &["ls"]);
    assert!(code == 0 && table.contains("damaged  -\n"), "{table}");
    assert_eq!(told, format!("matchlock: {problem}\n"));
    let (code, out, err) = said(&installation, &["use", "1-two"]);
    assert_eq!((code, out, err), (1, String::new(), told));
    assert_eq!(listed(&installation)[0]["default"], true, "nothing has changed");

    let (code, out, _) = said(&installation, &["rm", "1-two"]);
    assert_eq!((code, out), (0, "Removed 1-two\n".to_owned()), "it can be removed");
}

#[test]
fn the_default_stays_and_others_go_wholly() {
    let installation = installed();
    let (code, _, err) = said(&installation, &["rm", "1-one"]);
    assert_eq!(code, 1);
    let wanted = "matchlock: 1-one is the default guest bundle: make another one the default first \
                  (matchlock guest use)\n";
    assert_eq!(err, wanted);
    assert_eq!(said(&installation, &["rm", "1-two"]).0, 0);
    let guest = installation.cache().join("guest");
    let names = guest.read_dir().unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["1-one", "default"]);

    for verb in ["rm", "use"] {
        for version in ["1-two", "default", "../guest/1-one", "."] {
            let (code, out, err) = said(&installation, &[verb, version]);
            assert_eq!((code, out.as_str()), (1, ""));
            let wanted = format!(
                "matchlock: guest bundle not found: {version:?}; choose one of `matchlock guest ls`\n"
            );
            assert_eq!(err, wanted);
        }
        assert_eq!(said(&installation, &[verb]).0, 2);
    }
}

#[test]
fn gc_removes_what_a_killed_removal_left() {
    let installation = installed();
    let left = installation.cache().join("guest/.removed/1-zero");
    fs::create_dir_all(&left).unwrap();
    let output = installation.output(&["gc"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}", output = output.stderr);
    assert!(text.contains("Removed 1 leftover in the cache: "), "{text}");
    assert!(!left.try_exists().unwrap());
    assert_eq!(listed(&installation).as_array().unwrap().len(), 2);
}
