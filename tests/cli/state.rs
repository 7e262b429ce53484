//! What is stored, as the commands show it: without a VM being booted, the rows are written by the
//! store itself, as an owner that was killed leaves them.

use std::fs;

use jiff::{SignedDuration, Timestamp};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::record::Resources;
use matchlock_store::{NewVm, WriteConn, WriteOp, open_state};
use matchlock_test_support::Installation;
use serde_json::{Value, json};

const CREATED: &str = "2026-01-02T03:04:05.5Z";

pub(crate) struct Stored {
    pub(crate) installation: Installation,
    conn: WriteConn,
}

impl Stored {
    pub(crate) fn new() -> Self {
        let installation = Installation::bare().unwrap();
        let conn = open_state(&installation.home()).unwrap();
        Self { installation, conn }
    }

    fn write(&mut self, op: WriteOp) {
        for answer in self.conn.apply(vec![op]) {
            answer.unwrap();
        }
    }

    /// A kept VM of an owner that is gone.
    pub(crate) fn insert(&mut self, number: u32) {
        self.insert_as(number, false);
    }

    pub(crate) fn insert_as(&mut self, number: u32, ephemeral: bool) {
        let owner = ProcessIdentity { pid: 4_000_000, start_ticks: 1, boot_id: "gone".into() };
        let resources = Resources { owner: Some(owner.clone()), ..Resources::default() };
        self.write(WriteOp::InsertVm {
            record: Box::new(NewVm {
                id: VmId::new(number),
                image: "busybox".into(),
                config_json: r#"{"image":"busybox","cpus":1}"#.into(),
                owner,
                namespaces: Namespaces { net: "0:1".into(), pid: "0:2".into() },
                ephemeral,
                backend: "qemu".into(),
                resources,
                created_at: CREATED.parse().unwrap(),
            }),
        });
    }

    pub(crate) fn phase(&mut self, number: u32, phase: Phase, at: Timestamp) {
        self.write(WriteOp::SetPhase {
            vm: VmId::new(number),
            epoch: OwnerEpoch::FIRST,
            phase,
            last_error: (phase == Phase::Cleaning).then(|| "it broke".to_owned()),
            backend: None,
            resources: None,
            cleanup: Vec::new(),
            at,
        });
    }

    /// A VM that was removed then.
    pub(crate) fn removed(&mut self, number: u32, at: Timestamp) {
        self.insert(number);
        for phase in [Phase::Cleaning, Phase::Cleaned] {
            self.phase(number, phase, at);
        }
        self.write(WriteOp::RemoveVm { vm: VmId::new(number), epoch: OwnerEpoch::FIRST });
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.installation.output(args).unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    fn refused(&self, args: &[&str]) -> (i32, String) {
        let output = self.installation.output(args).unwrap();
        assert!(output.stdout.is_empty(), "{args:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
        (output.status.code().unwrap(), text)
    }
}

pub(crate) fn days_ago(days: i64) -> Timestamp {
    Timestamp::now().checked_sub(SignedDuration::from_hours(24 * days)).unwrap()
}

#[test]
fn get_and_inspect_show_a_vm_in_the_references_shape_and_write_nothing() {
    let mut stored = Stored::new();
    stored.insert(0x0bad_cafe);
    stored.phase(0x0bad_cafe, Phase::Created, CREATED.parse().unwrap());
    let db = stored.installation.home().join("state.db");
    let before = fs::read(&db).unwrap();
    let vm = json!({
        "id": "vm-0badcafe",
        "pid": 0,
        "status": "crashed",
        "image": "busybox",
        "created_at": CREATED,
        "config": {"image": "busybox", "cpus": 1},
        "exit_code": null,
        "started": null,
    });
    let got = stored.json(&["get", "vm-0badcafe"]);
    assert_eq!(got, vm);
    let text = stored.ok(&["get", "vm-0badcafe"]);
    assert!(text.starts_with("{\n  \"id\": \"vm-0badcafe\",\n  \"pid\": 0,\n"), "{text}");
    for verb in ["inspect", "stat"] {
        let inspected = stored.json(&[verb, "vm-0badcafe"]);
        assert_eq!(inspected["vm"], vm);
        let owner = json!({"pid": 4_000_000, "start_ticks": 1, "boot_id": "gone"});
        let record = |version: i64, phase: &str| {
            json!({
                "version": version,
                "vm_id": "vm-0badcafe",
                "backend": "qemu",
                "phase": phase,
                "updated_at": CREATED,
                "resources": {"owner": owner},
            })
        };
        assert_eq!(inspected["history"], json!([record(1, "creating"), record(2, "created")]));
        assert_eq!(inspected["lifecycle"], record(2, "created"));
    }
    assert_eq!(fs::read(&db).unwrap(), before);
}

#[test]
fn an_exit_code_is_shown_by_everything_that_shows_a_vm() {
    let mut stored = Stored::new();
    stored.insert(1);
    let code = |stored: &Stored| {
        let got = stored.json(&["get", "vm-00000001"])["exit_code"].clone();
        assert_eq!(stored.json(&["inspect", "vm-00000001"])["vm"]["exit_code"], got);
        assert_eq!(stored.json(&["list", "--json"])[0]["exit_code"], got);
        got
    };
    assert_eq!(code(&stored), Value::Null);
    stored.write(WriteOp::SetExit { vm: VmId::new(1), epoch: OwnerEpoch::FIRST, code: 7 });
    assert_eq!(code(&stored), 7);
    for phase in [Phase::Cleaning, Phase::Cleaned] {
        stored.phase(1, phase, CREATED.parse().unwrap());
    }
    assert_eq!(code(&stored), 7);
}

#[test]
fn a_removed_vm_is_inspected_until_its_history_is_forgotten() {
    let mut stored = Stored::new();
    stored.removed(1, days_ago(29));
    stored.removed(2, days_ago(31));
    stored.insert(3);
    stored.phase(3, Phase::Created, days_ago(300));
    for id in ["vm-00000001", "vm-00000002"] {
        let inspected = stored.json(&["inspect", id]);
        assert_eq!(inspected["vm"], Value::Null);
        assert_eq!(inspected["lifecycle"]["phase"], "cleaned");
        assert_eq!(inspected["lifecycle"]["last_error"], "it broke");
        assert_eq!(inspected["history"].as_array().unwrap().len(), 3);
        let (code, line) = stored.refused(&["get", id]);
        assert_eq!(
            (code, &*line),
            (
                1,
                &*format!(
                    "matchlock: VM {id} was removed; `matchlock inspect {id}` shows its history\n"
                )
            )
        );
    }
    // Of one VM nothing is forgotten; of all what is older than 30 days and removed.
    stored.ok(&["gc", "vm-00000003"]);
    assert!(stored.ok(&["inspect", "vm-00000002"]).contains("cleaned"));
    let said = stored.ok(&["gc"]);
    assert!(said.contains("Forgot the history of 1 removed VM\n"), "{said}");
    assert_eq!(stored.refused(&["inspect", "vm-00000002"]).0, 1);
    assert_eq!(stored.json(&["inspect", "vm-00000001"])["vm"], Value::Null);
    // A VM that still has its row keeps its history, however old.
    assert_eq!(stored.json(&["inspect", "vm-00000003"])["history"][1]["phase"], "created");
    // As configured, and as told.
    let config = stored.installation.home().join("config.toml");
    fs::write(config, "history_days = 28\n").unwrap();
    assert!(!stored.ok(&["gc", "--history-days", "30"]).contains("Forgot"));
    assert!(stored.ok(&["gc"]).contains("Forgot the history of 1 removed VM\n"));
    assert_eq!(stored.refused(&["inspect", "vm-00000001"]).0, 1);
    let (code, line) = stored.refused(&["gc", "--history-days", "3", "vm-00000003"]);
    assert_eq!(code, 2, "{line}");
}

#[test]
fn what_became_of_a_vm_is_told_to_whoever_wants_something_of_it() {
    let mut stored = Stored::new();
    stored.removed(1, days_ago(1));
    stored.insert(2);
    stored.phase(2, Phase::Created, days_ago(1));
    let verbs = |vm: &'static str| {
        [
            vec!["kill", vm],
            vec!["kill", "--force", vm],
            vec!["exec", vm, "--", "true"],
            vec!["log", vm],
            vec!["get", vm],
            vec!["rm", vm],
        ]
    };
    for args in verbs("vm-00000001") {
        let (_, line) = stored.refused(&args);
        let wanted =
            "VM vm-00000001 was removed; `matchlock inspect vm-00000001` shows its history";
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
    for args in &verbs("vm-00000002")[..3] {
        let (_, line) = stored.refused(args);
        let wanted = "VM vm-00000002 is not running: its owner died; run `matchlock gc`";
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
}

#[test]
fn a_vm_that_was_never_there_is_named() {
    let bare = Installation::bare().unwrap();
    for verb in ["get", "inspect", "stat"] {
        let output = bare.output(&[verb, "vm-00000009"]).unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text, "matchlock: VM vm-00000009 not found; see `matchlock list`\n");
    }
    assert!(!bare.home().try_exists().unwrap(), "looking made something");
}

/// A row that cannot be read costs no other VM its listing, and can be got rid of.
#[test]
fn one_unreadable_row_hides_no_other_vm_and_can_be_removed() {
    let mut stored = Stored::new();
    for number in [1, 2, 3] {
        stored.insert(number);
    }
    stored
        .installation
        .sql(
            "UPDATE vm_lifecycle SET phase = 'brokn' WHERE vm_id = 'vm-00000002';
             UPDATE vms SET config_json = x'ff00' WHERE id = 'vm-00000003';
             UPDATE vms SET id = 'vm-XYZ' WHERE id = 'vm-00000001';
             UPDATE vms SET pid = 0;",
        )
        .unwrap();
    stored.insert(4);
    let run = |args: &[&str]| {
        let output = stored.installation.output(args).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = run(&["list"]);
    assert_eq!((code, err.lines().count()), (1, 2), "{err}");
    assert!(out.contains("vm-00000003") && out.contains("vm-00000004"), "{out}");
    let phase = "vm_lifecycle.phase of vm-00000002 cannot be read: ";
    assert!(err.contains(phase) && err.contains("`matchlock rm vm-00000002`"), "{err}");
    let id = "vms.id of vm-XYZ cannot be read: ";
    assert!(err.contains(id) && err.contains("delete that row"), "{err}");
    let (code, out, err) = run(&["kill", "--all"]);
    assert_eq!((code, &*out, err.lines().count()), (1, "", 2), "{err}");
    // Bare gc goes on with the others, those it can clean among them.
    let (code, out, err) = run(&["gc"]);
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
    assert!(out.contains("Forgot the history of 1") && err.contains(id), "{out}{err}");
    stored.installation.sql("DELETE FROM vms WHERE id = 'vm-XYZ'").unwrap();
    assert_eq!(run(&["list"]).0, 0);
    stored
        .installation
        .sql("UPDATE vm_lifecycle SET phase = 'brokn' WHERE vm_id = 'vm-00000002'")
        .unwrap();
    for id in ["vm-00000002", "vm-00000003"] {
        assert_eq!(run(&["rm", id]), (0, format!("Removed {id}\n"), String::new()));
    }
}

#[test]
fn a_wrong_setting_is_named_with_its_place() {
    let stored = Stored::new();
    let config = stored.installation.home().join("config.toml");
    fs::write(&config, "\nhistroy_days = 28\n").unwrap();
    let (code, line) = stored.refused(&["list"]);
    assert_eq!(code, 1);
    let wanted = format!("{}, line 2: unknown field `histroy_days`", config.display());
    assert!(line.contains(&wanted), "{line}");
    let (code, _) = stored.refused(&["run", "--image", "busybox", "--", "true"]);
    assert_eq!(code, 125);
}

#[test]
fn a_database_that_cannot_be_used_is_told_by_every_verb_and_stays_as_it_is() {
    let stored = Stored::new();
    let home = stored.installation.home();
    drop(stored.conn);
    let db = home.join("state.db");
    // Some of it is overwritten; all of it is something else.
    let whole = fs::read(&db).unwrap();
    let mut damaged = whole.clone();
    damaged[100..1_000].fill(0xa5);
    for content in [damaged, b"certainly not a database, but long enough".to_vec()] {
        fs::write(&db, &content).unwrap();
        for args in [&["list"][..], &["inspect", "vm-00000001"], &["gc"], &["rm", "vm-00000001"]] {
            let output = stored.installation.output(args).unwrap();
            let text = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
            let told = text.contains("state.db") && text.contains("move it away");
            assert!(told && text.lines().count() == 1, "{args:?}: {text}");
            assert_eq!(fs::read(&db).unwrap(), content, "{args:?}");
        }
    }
}

/// A database that the reference wrote.
#[test]
fn what_the_reference_left_is_migrated_by_the_first_that_writes() {
    let installation = Installation::bare().unwrap();
    fs::create_dir_all(installation.home()).unwrap();
    let fixture = include_str!("../../store/tests/store/fixtures/reference.sql");
    installation.sql(fixture).unwrap();
    let listed = installation.output(&["list"]).unwrap();
    let text = String::from_utf8(listed.stderr).unwrap();
    assert_eq!(listed.status.code(), Some(1));
    assert!(text.contains("older matchlock") && text.contains("`matchlock gc`"), "{text}");
    // What it wants gone is done as far as it can be; what matters here is what is stored.
    let collected = installation.output(&["gc"]).unwrap();
    let text = String::from_utf8(collected.stdout).unwrap();
    assert!(text.contains("Reconciled 2 VMs"), "{text}");
    // Their links are gone (or never were): so their subnets are free.
    assert_eq!(installation.sql("select count(*) from subnet_allocations").unwrap(), "0\n");
    let listed = installation.output(&["list"]).unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    for id in ["vm-0000000a", "vm-0000000b", "vm-0000000c", "vm-0000000d"] {
        assert!(text.contains(id), "{text}");
    }
    let got = installation.output(&["get", "vm-0000000a"]).unwrap();
    let got: Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!(got["config"], json!({"image": "alpine:latest"}));
    assert_eq!(got["created_at"], "2025-11-02T08:00:00.123456789Z");
}

/// A VM that is to be removed says so; whoever comes next removes it.
#[test]
fn a_vm_that_is_to_be_removed_says_so_and_the_next_command_removes_it() {
    for finisher in [&["gc"][..], &["prune"], &["rm", "-f", "--stopped"], &["rm", "vm-00000002"]] {
        let mut stored = Stored::new();
        stored.insert(1);
        stored.insert(2);
        stored.write(WriteOp::WantRemoval { vm: VmId::new(1), at: CREATED.parse().unwrap() });
        let listed = stored.json(&["list", "--json"]);
        let status = |id: &str| {
            let vms = listed.as_array().unwrap();
            vms.iter().find(|vm| vm["id"] == id).unwrap()["status"].clone()
        };
        assert_eq!(
            (status("vm-00000001"), status("vm-00000002")),
            ("removing".into(), "crashed".into())
        );
        assert_eq!(stored.json(&["get", "vm-00000001"])["status"], "removing");
        stored.ok(finisher);
        let left = stored.installation.sql("select id from vms where id = 'vm-00000001'").unwrap();
        assert_eq!(left, "", "{finisher:?}");
        assert_eq!(stored.json(&["inspect", "vm-00000001"])["vm"], Value::Null);
    }
}

/// Something that is not ours lies where the VM's directory would be: it cannot be removed.
fn obstruct(stored: &Stored, number: u32) {
    let dir = stored.installation.home().join("vms");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(VmId::new(number).to_string()), "not a directory").unwrap();
}

#[test]
fn what_cannot_be_removed_keeps_its_record_and_keeps_no_other() {
    let mut stored = Stored::new();
    for number in [1, 2, 3] {
        stored.insert(number);
    }
    obstruct(&stored, 2);
    let output = stored.installation.output(&["prune"]).unwrap();
    let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(out.unwrap(), "Pruned vm-00000001\nPruned vm-00000003\nPruned 2 VMs\n");
    let err = err.unwrap();
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(
        err.contains("VM vm-00000002 was not removed: ") && err.contains("`matchlock gc"),
        "{err}"
    );
    // By force as well, and the wish is kept.
    for args in [&["rm", "--stopped"][..], &["rm", "-f", "vm-00000002"]] {
        let (code, line) = stored.refused(args);
        assert_eq!(code, 1, "{line}");
        assert!(line.contains("VM vm-00000002 was not removed: "), "{line}");
    }
    let shown = stored.json(&["list", "--json"]);
    assert_eq!((&shown[0]["id"], &shown[0]["status"]), (&"vm-00000002".into(), &"removing".into()));
    fs::remove_file(stored.installation.home().join("vms/vm-00000002")).unwrap();
    assert_eq!(stored.ok(&["prune"]), "Pruned vm-00000002\nPruned 1 VMs\n");
    assert_eq!(stored.ok(&["list"]), "ID  STATUS  IMAGE  CREATED (UTC)  PID  EXIT\n");
}

#[test]
fn lists_for_scripts_and_for_people() {
    let mut stored = Stored::new();
    for number in [1, 2] {
        stored.insert(number);
    }
    stored.removed(3, CREATED.parse().unwrap());
    assert_eq!(stored.ok(&["list", "-q"]), "vm-00000001\nvm-00000002\n");
    assert_eq!(stored.ok(&["ls", "-aq"]), stored.ok(&["list", "--quiet"]));
    assert_eq!(stored.ok(&["list", "--running", "--quiet"]), "");
    assert_eq!(
        stored.ok(&["list"]),
        "ID           STATUS   IMAGE    CREATED (UTC)     PID  EXIT\n\
         vm-00000001  crashed  busybox  2026-01-02 03:04  -    -\n\
         vm-00000002  crashed  busybox  2026-01-02 03:04  -    -\n"
    );
    let both = stored.json(&["inspect", "vm-00000002", "vm-00000003"]);
    assert_eq!((&both[0]["vm"]["id"], &both[1]["vm"]), (&"vm-00000002".into(), &Value::Null));
    let some = stored.installation.output(&["inspect", "vm-00000009", "vm-00000001"]).unwrap();
    assert_eq!(some.status.code(), Some(1));
    let shown: Value = serde_json::from_slice(&some.stdout).unwrap();
    assert_eq!(
        (shown.as_array().unwrap().len(), &shown[0]["vm"]["id"]),
        (1, &"vm-00000001".into())
    );
    let said = String::from_utf8(some.stderr).unwrap();
    assert_eq!(said, "matchlock: VM vm-00000009 not found; see `matchlock list`\n");
}

#[test]
fn a_log_is_printed_whole_or_from_its_last_lines_and_none_is_nothing() {
    let mut stored = Stored::new();
    stored.insert(1);
    assert_eq!(stored.ok(&["log", "vm-00000001"]), "");
    assert_eq!(stored.ok(&["log", "-f", "vm-00000001"]), "", "nobody writes it any more");
    let logs = stored.installation.home().join("vms/vm-00000001/logs");
    fs::create_dir_all(&logs).unwrap();
    fs::write(logs.join("vm.log.1"), "one\ntw").unwrap();
    fs::write(logs.join("vm.log"), "o\nthree\n").unwrap();
    fs::write(logs.join("console.log"), "booted\n").unwrap();
    assert_eq!(stored.ok(&["log", "vm-00000001"]), "one\ntwo\nthree\n");
    assert_eq!(stored.ok(&["logs", "-n", "2", "vm-00000001"]), "two\nthree\n");
    assert_eq!(stored.ok(&["log", "--tail", "all", "vm-00000001"]), "one\ntwo\nthree\n");
    assert_eq!(stored.ok(&["log", "--console", "vm-00000001"]), "booted\n");
}

/// A pool is for those who need a subnet.
#[test]
fn a_wrong_pool_stops_nobody_who_needs_no_subnet() {
    let mut stored = Stored::new();
    stored.insert(1);
    let output = |args: &[&str]| {
        let mut command = stored.installation.command(args).unwrap();
        command.env("MATCHLOCK_SUBNET_POOL", "nonsense").output().unwrap()
    };
    for args in
        [&["list"][..], &["get", "vm-00000001"], &["log", "vm-00000001"], &["gc"], &["prune"]]
    {
        let output = output(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}

/// Whoever reads us may have seen enough at any moment.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut stored = Stored::new();
    for number in 1..200 {
        stored.insert(number);
    }
    let logs = stored.installation.home().join("vms/vm-00000001/logs");
    fs::create_dir_all(&logs).unwrap();
    fs::write(logs.join("vm.log"), "line\n".repeat(1 << 20)).unwrap();
    for args in [
        &["list"][..],
        &["list", "--json"],
        &["list", "-q"],
        &["inspect", "vm-00000001"],
        &["log", "vm-00000001"],
        &["log", "-f", "vm-00000001"],
        &["--help"],
        &["prune"],
    ] {
        let mut command = stored.installation.command(args).unwrap();
        let (unread, stdout) = std::io::pipe().unwrap();
        drop(unread);
        let output = command.stdout(stdout).stderr(std::process::Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}
