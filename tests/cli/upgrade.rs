//! A state directory that the version before wrote (the program of commit d9bcb42), used on by this one.
//!
//! What lies in `fixtures/previous` is what that program left after: a `run` (removed, its history
//! stays), a VM in the background that was killed and kept (`vm-5410722a`), one with a network whose
//! owner was ended by SIGKILL (`vm-9eec2976`), and one that was to go with its command (`--rm`) and
//! whose owner was ended so (`vm-d8a9c6fe`). The database is a dump of it; disks and sockets, which are
//! large or cannot be kept, are made in their places.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Output;

use matchlock_test_support::Installation;
use serde_json::Value;

const STATE: &str = include_str!("fixtures/previous/state.sql");
const KEPT: &str = "vm-5410722a";
const CRASHED: &str = "vm-9eec2976";
const EPHEMERAL: &str = "vm-d8a9c6fe";

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

fn previous() -> Installation {
    let installation = Installation::bare().unwrap();
    let home = installation.home();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/fixtures/previous");
    copy(&fixture, &home);
    fs::remove_file(home.join("state.sql")).unwrap();
    installation.sql(STATE).unwrap();
    for vm in [CRASHED, EPHEMERAL] {
        let dir = home.join("vms").join(vm);
        fs::File::create(dir.join("rootfs.ext4")).unwrap().set_len(5 << 30).unwrap();
        for socket in ["owner.sock", "link.sock", "qmp.sock"] {
            drop(UnixListener::bind(dir.join(socket)).unwrap());
        }
    }
    installation
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn ok(installation: &Installation, args: &[&str]) -> String {
    let output: Output = installation.output(args).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn statuses(installation: &Installation) -> Vec<(String, String)> {
    let mut listed = installation.list().unwrap();
    listed.sort();
    listed
}

#[test]
fn looking_leaves_it_as_it_is_and_says_what_migrates_it() {
    let installation = previous();
    let db = installation.home().join("state.db");
    let before = fs::read(&db).unwrap();
    for args in [&["list"][..], &["get", KEPT], &["log", KEPT], &["inspect", KEPT]] {
        let output = installation.output(args).unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("older matchlock") && said.contains("`matchlock gc`"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(fs::read(&db).unwrap(), before);
}

#[test]
fn it_is_migrated_cleaned_and_used_on() {
    let installation = previous();
    let histories =
        "select vm_id, version, phase, updated_at, last_error, resources_json, cleanup_json
                     from vm_lifecycle order by vm_id, version";
    let before = installation.sql(histories).unwrap();
    let collected = ok(&installation, &["gc"]);
    assert!(collected.ends_with("Reconciled 2 VMs\n"), "{collected}");
    let known = |vm: &str, status: &str| (vm.to_owned(), status.to_owned());
    assert_eq!(statuses(&installation), [known(KEPT, "stopped"), known(CRASHED, "stopped")]);
    assert!(!installation.home().join("state.db.premigrate.bak").try_exists().unwrap());
    // Its subnet is free, disks and sockets are gone, logs are there.
    assert_eq!(installation.sql("select count(*) from subnet_allocations").unwrap(), "0\n");
    for (vm, names) in [(KEPT, 2), (CRASHED, 2)] {
        let left = fs::read_dir(installation.home().join("vms").join(vm)).unwrap();
        assert_eq!(left.count(), names, "{vm}: hypervisor.json and logs");
    }
    // What was written is as it was; what came is added.
    let after = installation.sql(histories).unwrap();
    for line in before.lines() {
        assert!(after.contains(line), "lost: {line}");
    }

    let kept: Value = serde_json::from_str(&ok(&installation, &["get", KEPT])).unwrap();
    assert_eq!((&kept["status"], &kept["image"]), (&"stopped".into(), &"busybox".into()));
    assert_eq!(kept["config"]["env"]["A"], "b", "{kept}");
    let gone: Value = serde_json::from_str(&ok(&installation, &["inspect", EPHEMERAL])).unwrap();
    assert_eq!((&gone["vm"], &gone["lifecycle"]["phase"]), (&Value::Null, &"cleaned".into()));
    // It had no log of that kind yet.
    assert_eq!(ok(&installation, &["log", KEPT]), "");
    assert!(ok(&installation, &["log", "--console", KEPT]).len() > 10);
    assert_eq!(ok(&installation, &["rm", KEPT]), format!("Removed {KEPT}\n"));
    assert_eq!(ok(&installation, &["prune"]), format!("Pruned {CRASHED}\nPruned 1 VMs\n"));
    installation.assert_nothing_left().unwrap();
    let removed = installation.sql("select count(distinct vm_id) from vm_lifecycle").unwrap();
    assert_eq!(removed, "4\n", "the history of all of them is kept");
}

/// The first that writes may be any verb.
#[test]
fn removing_migrates_it_as_well() {
    let installation = previous();
    let pruned = ok(&installation, &["prune"]);
    assert!(pruned.ends_with("Pruned 3 VMs\n"), "{pruned}");
    installation.assert_nothing_left().unwrap();
    let installation = previous();
    assert_eq!(ok(&installation, &["rm", KEPT]), format!("Removed {KEPT}\n"));
}

/// An owner of the older version may live on: who asks it for something must not be refused for the
/// database alone.
#[test]
fn asking_an_owner_migrates_it_as_well() {
    for args in [&["kill", CRASHED][..], &["exec", CRASHED, "--", "true"]] {
        let installation = previous();
        let output = installation.output(args).unwrap();
        let said = text(&output.stderr);
        assert!(said.contains(&format!("VM {CRASHED} is not running")), "{args:?}: {said}");
        assert_eq!(statuses(&installation).len(), 3, "it can be listed now");
    }
}

/// As the version before this one left it, with a wish and without exit codes.
#[test]
fn what_was_written_with_the_step_before_is_kept() {
    let installation = previous();
    let step = "alter table vm_nodes add column removal_wanted_at TEXT;
        insert into schema_migrations values ('node', 2, 'removal_intent', '2026-11-26T00:00:00Z');
        insert into schema_checksums values ('node', 2,
            '18eb20db3dac3ded1f3fc289678666c57ed46d8b5ad9b0eb5b27ea0f17ae27ca');
        update vm_nodes set removal_wanted_at = '2026-11-26T00:00:00Z' where vm_id = 'vm-9eec2976'";
    installation.sql(step).unwrap();
    ok(&installation, &["gc"]);
    let known = (KEPT.to_owned(), "stopped".to_owned());
    assert_eq!(statuses(&installation), [known], "the wish was kept, and fulfilled");
    let kept: Value = serde_json::from_str(&ok(&installation, &["get", KEPT])).unwrap();
    assert_eq!(kept["exit_code"], Value::Null, "nobody knows it");
}
