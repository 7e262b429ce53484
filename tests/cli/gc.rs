//! `gc` without a VM being booted: what crashed owners left, and owners that the test plays.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use matchlock_host::owner_lock::LinuxOwnerLocks;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::cli_state::{Stored, days_ago};

type Touched = (u64, u32, i64, Option<String>);

/// Every path below a directory, with what shows that it was touched: inode and mode, time of the last
/// write, content. (Not the time of change: SQLite gives its files their owner whenever root opens them.)
fn everything(dir: &Path) -> BTreeMap<PathBuf, Touched> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let entry = fs::symlink_metadata(&path).unwrap();
            let written = entry.mtime() * 1_000_000_000 + entry.mtime_nsec();
            let content =
                entry.is_file().then(|| hex::encode(Sha256::digest(fs::read(&path).unwrap())));
            if entry.is_dir() {
                dirs.push(path.clone());
            }
            found.insert(path, (entry.ino(), entry.mode(), written, content));
        }
    }
    // What SQLite makes beside a database for its readers holds nothing: an empty -wal, and the -shm.
    found.retain(|path, _| {
        let name = path.to_string_lossy().into_owned();
        let is_empty = || fs::metadata(path).unwrap().len() == 0;
        !(name.ends_with("-shm") || (name.ends_with("-wal") && is_empty()))
    });
    found
}

/// Files as a VM that ran has them.
fn leave(stored: &Stored, number: u32) -> PathBuf {
    let dir = stored.installation.home().join("vms").join(VmId::new(number).to_string());
    fs::create_dir_all(dir.join("logs")).unwrap();
    fs::write(dir.join("rootfs.ext4"), "disk").unwrap();
    drop(UnixListener::bind(dir.join("qmp.sock")).unwrap());
    dir
}

fn run(stored: &Stored, args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = stored.installation.output(args).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// An installation with two crashed VMs, one of them ephemeral, a directory without a row, something
/// unknown, and an old history.
fn crashed() -> Stored {
    let mut stored = Stored::new();
    stored.insert(1);
    stored.insert_as(2, true);
    stored.removed(9, days_ago(40));
    // So that there is an id that a mark could carry.
    assert_eq!(run(&stored, &["rm", "vm-00000001"]).0, 0);
    stored.insert(7);
    for number in [1, 2, 7] {
        leave(&stored, number);
    }
    stored.phase(7, Phase::Created, days_ago(1));
    fs::write(stored.installation.home().join("vms/notes.txt"), "mine").unwrap();
    stored
}

#[test]
fn a_dry_run_says_what_gc_then_does_and_touches_nothing() {
    let stored = crashed();
    let home = stored.installation.home();
    let before = everything(&home);
    let (code, out, err) = run(&stored, &["gc", "--dry-run"]);
    assert_eq!(everything(&home), before);
    assert_eq!(
        (code, &*out),
        (
            0,
            "vm-00000001: would clean sockets_remove, rootfs_remove, state_dir_remove\n\
             vm-00000002: would clean sockets_remove, rootfs_remove, state_dir_remove, record_remove\n\
             vm-00000007: would clean sockets_remove, rootfs_remove\n\
             Would reconcile 3 VMs\n\
             Would forget the history of 1 removed VM\n"
        ),
        "{err}"
    );
    let stranger = format!(
        "matchlock: {}/vms/notes.txt was left alone: it is no VM's directory\n",
        home.display()
    );
    assert_eq!(err, stranger);
    let (code, out, err) = run(&stored, &["gc"]);
    assert_eq!(
        (code, &*out, err),
        (
            0,
            "vm-00000001: cleaned sockets_remove, rootfs_remove, state_dir_remove\n\
             vm-00000002: cleaned sockets_remove, rootfs_remove, state_dir_remove, record_remove\n\
             vm-00000007: cleaned sockets_remove, rootfs_remove\n\
             Reconciled 3 VMs\n\
             Forgot the history of 1 removed VM\n",
            stranger
        )
    );
    assert!(home.join("vms/notes.txt").is_file());
    // What has nothing left is told to whoever asks for it, and to nobody else.
    let idle = "vm-00000007: no resources to clean\n";
    for (args, wanted) in [
        (&["gc", "--dry-run"][..], ""),
        (&["gc"], ""),
        (&["gc", "--explain"], idle),
        (&["gc", "vm-00000007"], idle),
        (&["gc", "--dry-run", "vm-00000007"], idle),
    ] {
        let (code, out, _) = run(&stored, args);
        assert_eq!((code, &*out), (0, wanted), "{args:?}");
    }
    let (code, out, err) = run(&stored, &["gc", "--dry-run", "vm-00000001"]);
    let removed = "matchlock: VM vm-00000001 was removed; `matchlock inspect vm-00000001` shows its history\n";
    assert_eq!((code, &*out, &*err), (1, "", removed));
    let (code, out, err) = run(&stored, &["gc", "vm-00000009"]);
    let never = "matchlock: VM vm-00000009 not found; see `matchlock list`\n";
    assert_eq!((code, &*out, &*err), (1, "", never));
}

#[test]
fn a_dry_run_makes_no_installation_and_migrates_none() {
    let bare = matchlock_test_support::Installation::bare().unwrap();
    let output = bare.output(&["gc", "--dry-run", "--json"]).unwrap();
    assert_eq!(output.status.code(), Some(0));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&said["installation"], &said["vms"]), (&Value::Null, &json!([])));
    assert!(!bare.home().try_exists().unwrap());
    // One of the reference's: any command that writes would migrate it.
    fs::create_dir_all(bare.home()).unwrap();
    bare.sql(include_str!("../../store/tests/store/fixtures/reference.sql")).unwrap();
    let before = everything(&bare.home());
    let output = bare.output(&["gc", "--dry-run"]).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("older matchlock"), "{text}");
    assert_eq!(everything(&bare.home()), before);
}

#[test]
fn each_object_is_explained_before_and_after() {
    let stored = crashed();
    let install = fs::read_to_string(stored.installation.home().join("install-id")).unwrap();
    let install = install.trim();
    let of = |vm: &str| format!("of {vm}, installation {install}; garbage because ");
    for (args, done) in
        [(&["gc", "--dry-run", "--explain"][..], "would be"), (&["gc", "--explain"], "was")]
    {
        let (_, out, _) = run(&stored, args);
        let kept = of("vm-00000007")
            + "its VM's owner is gone (nobody holds its lock), in phase created; ";
        assert!(
            out.contains(&format!("  disk vms/vm-00000007/rootfs.ext4: {kept}{done} removed\n")),
            "{out}"
        );
        let orphan = of("vm-00000001")
            + "it carries our mark or lies in our directory, and no VM has a record of it; ";
        assert!(
            out.contains(&format!(
                "  directory vms/vm-00000001: {orphan}{done} removed with its logs\n"
            )),
            "{out}"
        );
        assert!(out.contains("and it was to go with its command (--rm)"), "{out}");
    }
}

#[test]
fn scripts_get_json_with_what_was_found_done_and_why() {
    let stored = crashed();
    let parse = |args: &[&str]| -> Value {
        let (code, out, err) = run(&stored, args);
        assert_eq!((code, &*err), (0, ""), "{args:?}");
        serde_json::from_str(&out).unwrap()
    };
    let seen = parse(&["gc", "--dry-run", "--json"]);
    assert_eq!(seen["dry_run"], true);
    assert_eq!(
        (&seen["reconciled"], &seen["skipped"], &seen["failed"]),
        (&json!(3), &json!(0), &json!(0))
    );
    let vm = &seen["vms"][1];
    assert_eq!(
        (&vm["id"], &vm["outcome"], &vm["phase"]),
        (&json!("vm-00000002"), &json!("would_clean"), &json!("creating"))
    );
    assert_eq!((&vm["done"], &vm["failed"]), (&json!([]), &Value::Null));
    let disk = &vm["objects"][1];
    assert_eq!(
        (&disk["step"], &disk["owner"], &disk["done"]),
        (&json!("rootfs_remove"), &json!("vm-00000002"), &json!(false))
    );
    assert!(seen["unidentified"][0]["object"].as_str().unwrap().ends_with("notes.txt"));
    let done = parse(&["gc", "--json"]);
    let vm = &done["vms"][1];
    assert_eq!(vm["outcome"], "cleaned");
    let steps = ["sockets_remove", "rootfs_remove", "state_dir_remove", "record_remove"];
    assert_eq!(vm["done"], json!(steps));
    assert!(vm["objects"].as_array().unwrap().iter().all(|object| object["done"] == true), "{vm}");
    assert_eq!(done["forgotten"], 1);
    let idle = parse(&["gc", "--json"]);
    assert_eq!((&idle["vms"][0]["outcome"], &idle["reconciled"]), (&json!("nothing"), &json!(0)));
}

/// A removal that fails: its VM says which, the others are cleaned.
#[test]
fn what_fails_is_named_and_keeps_no_other_vm() {
    let mut stored = Stored::new();
    for number in [1, 2] {
        stored.insert(number);
        leave(&stored, number);
    }
    // A directory in the place of the disk cannot be unlinked.
    let disk = stored.installation.home().join("vms/vm-00000001/rootfs.ext4");
    fs::remove_file(&disk).unwrap();
    fs::create_dir(&disk).unwrap();
    let (code, out, err) = run(&stored, &["gc"]);
    assert_eq!(
        (code, &*out),
        (
            1,
            "vm-00000001: cleaned sockets_remove\n\
             vm-00000002: cleaned sockets_remove, rootfs_remove\n\
             Reconciled 1 VMs, failed 1\n"
        ),
        "{err}"
    );
    assert!(err.starts_with("matchlock: vm-00000001: failed rootfs_remove: "), "{err}");
    // Of each object what became of it: done before the failure, failed, and never begun.
    drop(UnixListener::bind(disk.with_file_name("qmp.sock")).unwrap());
    let (code, out, _) = run(&stored, &["gc", "--explain", "vm-00000001"]);
    assert_eq!(code, 1);
    let explained = |object: &str| {
        let line = out.lines().find(|line| line.starts_with(&format!("  {object}")));
        line.unwrap_or_else(|| panic!("{object}: {out}")).to_owned()
    };
    assert!(explained("sockets in").ends_with("; was removed"), "{out}");
    assert!(explained("disk vms/").ends_with("; was to be removed"), "{out}");
    let (code, out, _) = run(&stored, &["gc", "--json"]);
    let said: Value = serde_json::from_str(&out).unwrap();
    let vm = &said["vms"][0];
    assert_eq!(
        (code, &vm["outcome"], &vm["failed"]["step"]),
        (1, &json!("failed"), &json!("rootfs_remove"))
    );
    assert_eq!(vm["objects"][0]["done"], false);
}

/// An owner that lives, holds its lock and does not listen: it ends at this moment, say.
#[test]
fn an_owner_that_is_ending_gets_its_time_before_it_is_overruled() {
    let mut stored = Stored::new();
    stored.insert(1);
    stored.phase(1, Phase::Created, days_ago(1));
    let locks = LinuxOwnerLocks::open(&stored.installation.home()).unwrap();
    let held = locks.try_acquire(VmId::new(1)).unwrap();
    let gc = stored.installation.start(&["gc", "--force-running"]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Longer than `gc` takes to find it, much shorter than its patience.
            #[expect(clippy::disallowed_methods, reason = "an owner takes its time")]
            std::thread::sleep(Duration::from_millis(1_500));
            for phase in [Phase::Cleaning, Phase::Cleaned] {
                stored.phase(1, phase, days_ago(0));
            }
            drop(held);
        });
    });
    let Output { status, stdout, stderr } = gc.wait(Duration::from_secs(60)).unwrap();
    let (out, err) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert_eq!(
        (status.code(), &*out, &*err),
        (Some(0), "vm-00000001: cleaned stop\nReconciled 1 VMs\n", "")
    );
    let epoch = stored.installation.sql("select owner_epoch from vm_nodes").unwrap();
    assert_eq!(epoch, "1\n", "it was not overruled");
}

#[test]
fn an_owner_that_never_listens_is_overruled_after_its_time_and_gc_says_why() {
    let mut stored = Stored::new();
    stored.insert(1);
    leave(&stored, 1);
    let locks = LinuxOwnerLocks::open(&stored.installation.home()).unwrap();
    let held = locks.try_acquire(VmId::new(1)).unwrap();
    let (code, out, _) = run(&stored, &["gc"]);
    assert_eq!(
        (code, &*out),
        (0, "vm-00000001: skipped (VM is running)\nReconciled 0 VMs, skipped 1\n")
    );
    let (code, _, _) = run(&stored, &["gc", "vm-00000001"]);
    assert_eq!(code, 1, "it was named");
    let (code, out, err) = run(&stored, &["gc", "--force-running"]);
    assert_eq!(
        (code, &*out),
        (0, "vm-00000001: cleaned stop, sockets_remove, rootfs_remove\nReconciled 1 VMs\n"),
        "{err}"
    );
    assert!(err.contains("the owner of vm-00000001 lives, but has not listened for 3s"), "{err}");
    assert!(err.contains("VM vm-00000001 was taken over"), "{err}");
    drop(held);
}

/// An owner that hangs while its VM is recorded as failed: nothing of it runs, and it still has it.
#[test]
fn killing_all_by_force_takes_failed_vms_from_owners_that_hang() {
    let mut stored = Stored::new();
    for number in [1, 2] {
        stored.insert(number);
        leave(&stored, number);
        stored.phase(number, Phase::CreateFailed, days_ago(1));
    }
    let locks = LinuxOwnerLocks::open(&stored.installation.home()).unwrap();
    let held = locks.try_acquire(VmId::new(1)).unwrap();
    assert_eq!(run(&stored, &["kill", "--all"]), (0, String::new(), String::new()));
    let (code, out, err) = run(&stored, &["kill", "--all", "--force"]);
    // The other has no owner: that is for `gc`.
    assert_eq!((code, &*out), (0, "Killed vm-00000001\n"), "{err}");
    assert!(err.contains("VM vm-00000001 was taken over"), "{err}");
    let phases = "select phase from vm_lifecycle group by vm_id having version = max(version)";
    assert_eq!(stored.installation.sql(phases).unwrap(), "cleaned\ncreate_failed\n");
    drop(held);
}

#[test]
fn whoever_cleans_up_is_not_said_to_run() {
    let mut stored = Stored::new();
    stored.insert(1);
    let locks: Box<dyn matchlock_host::owner_lock::OwnerLocks> =
        Box::new(LinuxOwnerLocks::open(&stored.installation.home()).unwrap());
    let cleaner =
        (locks.try_acquire_cleaner(VmId::new(1)).ok(), locks.try_acquire(VmId::new(1)).ok());
    let skipped = "vm-00000001: skipped (another matchlock is cleaning it up)\n";
    let (code, out, _) = run(&stored, &["gc", "--dry-run"]);
    assert_eq!((code, out), (0, format!("{skipped}Would reconcile 0 VMs, skip 1\n")));
    // It was waited for in vain: whether anything is left nobody knows.
    let (code, out, _) = run(&stored, &["gc"]);
    let overrule = "if it is stopped, `matchlock gc vm-00000001 --force-running` overrules it";
    let skipped = skipped.replace("up)", &format!("up; {overrule})"));
    assert_eq!((code, out), (1, format!("{skipped}Reconciled 0 VMs, skipped 1\n")));
    let (code, _, err) = run(&stored, &["rm", "vm-00000001"]);
    assert_eq!(code, 1);
    assert!(err.contains("is being cleaned up by another matchlock"), "{err}");
    drop(cleaner);
    assert_eq!(run(&stored, &["rm", "vm-00000001"]).0, 0);
}
