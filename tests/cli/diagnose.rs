//! `diagnose` and `version` on the real program: what a host, an environment or a state directory
//! lacks is a finding, and looking changes nothing. The checks of the host itself have their tests in
//! `host/src/diagnose`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use matchlock_model::phase::Phase;
use matchlock_test_support::Installation;
use serde_json::Value;

use super::cli_state::{Stored, days_ago};

/// The exit code, and the checks by name.
fn diagnosed(installation: &Installation, env: &[(&str, &str)]) -> (i32, Value) {
    let mut command = installation.command(&["diagnose", "--json"]).unwrap();
    command.env_remove("SUDO_USER").envs(env.iter().copied());
    let output = command.output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code().unwrap(), said)
}

fn check<'a>(said: &'a Value, name: &str) -> &'a Value {
    let checks = said["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {said}"))
}

/// A check fails, or warns, with a fix; nothing else than it and what it implies.
fn is(said: &Value, name: &str, status: &str, part: &str) {
    let check = check(said, name);
    assert_eq!(check["status"], status, "{check}");
    assert!(check["message"].as_str().unwrap().contains(part), "{check}");
    assert_eq!(check["fix"].is_string(), status != "pass", "{check}");
}

#[test]
fn this_host_passes_and_nothing_is_made() {
    let installation = Installation::without_images().unwrap();
    let (code, said) = diagnosed(&installation, &[]);
    assert_eq!((code, &said["ok"]), (0, &Value::Bool(true)), "{said:#}");
    for name in [
        "hypervisor",
        "kernel",
        "memory",
        "programs",
        "capabilities",
        "tun-device",
        "nf_tables",
        "guest-bundle",
        "state-directory",
        "database",
        "leftovers",
        "configuration",
        "disk-space-home",
        "second-installation",
    ] {
        assert_ne!(check(&said, name)["status"], "fail", "{said:#}");
    }
    assert!(check(&said, "hypervisor")["message"].as_str().unwrap().starts_with("QEMU "));
    assert!(!installation.home().try_exists().unwrap());
    let lines = installation.output(&["diagnose"]).unwrap();
    let text = String::from_utf8(lines.stdout).unwrap();
    assert!(text.contains("✓ hypervisor: QEMU "), "{text}");
    assert!(!text.contains('✗') && lines.stderr.is_empty(), "{text}");
}

#[test]
fn what_is_missing_fails_with_a_fix() {
    let installation = Installation::bare().unwrap();
    for (env, name, part) in [
        (("MATCHLOCK_QEMU", "/nowhere/qemu"), "hypervisor", "/nowhere/qemu"),
        (("MATCHLOCK_QEMU", "/bin/true"), "hypervisor", "does not run"),
        (("MATCHLOCK_KERNEL", "/nowhere/kernel"), "guest-bundle", "guest"),
        (("MATCHLOCK_SUBNET_POOL", "nonsense"), "configuration", "MATCHLOCK_SUBNET_POOL"),
        (("MATCHLOCK_HOME", "relative"), "configuration", "MATCHLOCK_HOME"),
    ] {
        let (code, said) = diagnosed(&installation, &[env]);
        assert_eq!((code, &said["ok"]), (1, &Value::Bool(false)));
        is(&said, name, "fail", part);
    }
    // No bundle in its cache.
    is(&diagnosed(&installation, &[]).1, "guest-bundle", "fail", "no guest kernel");
    let output = installation.command(&["diagnose"]).unwrap().output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("✗ guest-bundle: ") && text.contains("\n  fix: "), "{text}");
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(line, "matchlock: diagnose failed: one or more checks failed\n");
}

#[test]
fn what_is_wrong_with_the_state_directory_is_found() {
    let mut stored = Stored::new();
    stored.insert(1);
    stored.phase(1, Phase::Created, days_ago(1));
    let home = stored.installation.home();
    let (_, said) = diagnosed(&stored.installation, &[]);
    is(&said, "database", "pass", "1 VMs");
    is(&said, "leftovers", "warn", "vm-00000001");
    is(&said, "state-directory", "pass", "private");
    stored.installation.output(&["rm", "vm-00000001"]).unwrap();
    is(&diagnosed(&stored.installation, &[]).1, "leftovers", "pass", "no VM");

    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
    is(&diagnosed(&stored.installation, &[]).1, "state-directory", "warn", "mode 755");
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();

    fs::write(home.join("state.db.premigrate.bak"), "").unwrap();
    is(&diagnosed(&stored.installation, &[]).1, "database", "warn", "premigrate.bak");
    fs::remove_file(home.join("state.db.premigrate.bak")).unwrap();

    let db = home.join("state.db");
    drop(stored.installation.sql("pragma wal_checkpoint(truncate)").unwrap());
    fs::write(&db, b"certainly not a database, but long enough").unwrap();
    let (code, said) = diagnosed(&stored.installation, &[]);
    assert_eq!(code, 1);
    is(&said, "database", "fail", "state.db");

    fs::write(home.join("install-id"), "nonsense\n").unwrap();
    is(&diagnosed(&stored.installation, &[]).1, "leftovers", "fail", "install-id");
}

#[test]
fn a_database_of_the_reference_is_a_warning() {
    let installation = Installation::bare().unwrap();
    fs::create_dir_all(installation.home()).unwrap();
    installation.sql(include_str!("../../store/tests/store/fixtures/reference.sql")).unwrap();
    is(&diagnosed(&installation, &[]).1, "database", "warn", "older matchlock");
}

#[test]
fn version_says_what_it_would_run() {
    let installation = Installation::without_images().unwrap();
    let output = installation.output(&["--version"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, format!("matchlock version {}\n", env!("CARGO_PKG_VERSION")));
    let output = installation.output(&["version"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let first = format!("matchlock {} (commit: ", env!("CARGO_PKG_VERSION"));
    assert!(text.starts_with(&first) && text.contains("\nhypervisor:   QEMU "), "{text}");
    let json = |env: &[(&str, &str)]| -> Value {
        let mut command = installation.command(&["version", "--json"]).unwrap();
        let output = command.envs(env.iter().copied()).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let said = json(&[]);
    assert_eq!(said["version"], env!("CARGO_PKG_VERSION"));
    assert!(said["guest_bundle"].is_string() && said["guest_kernel"].is_string(), "{said}");
    assert_eq!(said["problems"], serde_json::json!([]));
    // What is missing is said, and is no failure.
    let said = json(&[("MATCHLOCK_QEMU", "/nowhere/qemu"), ("MATCHLOCK_CACHE", "/nowhere")]);
    assert_eq!((&said["hypervisor"], &said["guest_bundle"]), (&Value::Null, &Value::Null));
    assert_eq!(said["problems"].as_array().unwrap().len(), 2, "{said}");
    assert!(!installation.home().try_exists().unwrap());
}
