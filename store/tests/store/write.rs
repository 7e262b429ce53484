//! Every op, and every way in which it is refused.

use jiff::Timestamp;
use matchlock_model::id::OwnerEpoch;
use matchlock_model::phase::{InvalidTransition, Phase};
use matchlock_model::record::{CleanupEntry, CleanupStatus, Resources, Started};
use matchlock_store::{WriteConn, WriteError, WriteOp, WriteOutcome};

use crate::support::{
    EPOCH, Home, apply_one, at, clean, insert, namespaces, new_vm, process, resources, set_phase,
    set_phase_as, vm,
};

fn home_with_vm() -> (Home, WriteConn) {
    let home = Home::new();
    let mut writer = home.writer();
    assert_eq!(apply_one(&mut writer, insert(vm(1))), Ok(WriteOutcome::Version(1)));
    (home, writer)
}

#[tokio::test]
async fn a_new_vm_has_all_its_rows() {
    let (home, _writer) = home_with_vm();
    let reader = home.reader();
    let found = reader.vm(vm(1)).await.unwrap().unwrap();
    let new = new_vm(vm(1));
    assert_eq!(found.id, new.id);
    assert_eq!((found.pid, found.status.as_str()), (4_000, "creating"));
    assert_eq!((found.image, found.config_json), (new.image, new.config_json));
    assert_eq!((found.created_at, found.updated_at), (at(0), at(0)));
    assert_eq!(found.owner_epoch, EPOCH);
    assert_eq!(found.owner, Some(process(4_000)));
    assert_eq!(found.hypervisor, None);
    assert_eq!(found.namespaces, Some(namespaces()));
    assert!(found.ephemeral);
    let head = reader.lifecycle_head(vm(1)).await.unwrap().unwrap();
    assert_eq!((head.version, head.phase), (1, Phase::Creating));
    assert_eq!((head.backend.as_str(), head.last_error.as_str()), ("fake", ""));
    assert_eq!((head.resources, head.updated_at), (resources(), at(0)));
    assert!(head.cleanup.is_empty());
    assert_eq!(reader.vm(vm(2)).await.unwrap(), None);
    assert_eq!(reader.lifecycle_head(vm(2)).await.unwrap(), None);
}

#[tokio::test]
async fn an_id_is_given_once_even_after_removal() {
    let (home, mut writer) = home_with_vm();
    let taken = Err(WriteError::VmExists { id: vm(1) });
    let mut second = new_vm(vm(1));
    second.image = "other".to_owned();
    let second = WriteOp::InsertVm { record: Box::new(second) };
    assert_eq!(apply_one(&mut writer, second), taken);
    assert_eq!(home.reader().vm(vm(1)).await.unwrap().unwrap().image, "tools:1.2");
    clean(&mut writer, vm(1));
    let remove = WriteOp::RemoveVm { vm: vm(1), epoch: EPOCH };
    assert_eq!(apply_one(&mut writer, remove), Ok(WriteOutcome::Removed));
    assert_eq!(apply_one(&mut writer, insert(vm(1))), taken);
}

#[tokio::test]
async fn phases_are_appended_and_shown_as_status() {
    let (home, mut writer) = home_with_vm();
    let life = [
        (Phase::Created, "starting", 4_000),
        (Phase::Starting, "starting", 4_000),
        (Phase::Running, "running", 4_000),
        (Phase::Stopping, "stopping", 4_000),
        (Phase::StopFailed, "failed", 4_000),
        (Phase::Cleaning, "stopping", 4_000),
        (Phase::CleanupFailed, "failed", 4_000),
        (Phase::Cleaning, "stopping", 4_000),
        (Phase::Cleaned, "stopped", 0),
    ];
    let reader = home.reader();
    for (version, (phase, status, pid)) in (2..).zip(life) {
        assert_eq!(
            apply_one(&mut writer, set_phase(vm(1), phase)),
            Ok(WriteOutcome::Version(version))
        );
        let row = reader.vm(vm(1)).await.unwrap().unwrap();
        assert_eq!((row.status.as_str(), row.pid), (status, pid), "{phase}");
        assert_eq!(row.updated_at, at(10));
    }
    let phases: Vec<_> =
        reader.history(vm(1)).await.unwrap().into_iter().map(|r| r.phase).collect();
    let expected: Vec<_> = std::iter::once(Phase::Creating).chain(life.map(|l| l.0)).collect();
    assert_eq!(phases, expected);
}

#[tokio::test]
async fn a_change_that_is_not_allowed_is_refused_by_name() {
    let (home, mut writer) = home_with_vm();
    let refused = apply_one(&mut writer, set_phase(vm(1), Phase::Running)).unwrap_err();
    assert_eq!(
        refused,
        WriteError::Transition(InvalidTransition { from: Phase::Creating, to: Phase::Running })
    );
    assert_eq!(
        refused.to_string(),
        "invalid lifecycle phase transition \"creating\" -> \"running\""
    );
    assert!(!refused.retryable());
    assert_eq!(home.reader().history(vm(1)).await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_not_given_stays_and_what_is_given_replaces() {
    let (home, mut writer) = home_with_vm();
    let entry = |status, millis| CleanupEntry { status, error: None, updated_at: at(millis) };
    let other = Resources { guest_ip: Some("192.168.100.2".to_owned()), ..resources() };
    let write = |last_error: Option<&str>, resources: Option<Resources>, cleanup: Vec<_>| {
        WriteOp::SetPhase {
            vm: vm(1),
            epoch: EPOCH,
            phase: Phase::Creating,
            last_error: last_error.map(str::to_owned),
            backend: None,
            resources: resources.map(Box::new),
            cleanup,
            at: at(20),
        }
    };
    let ops = vec![
        write(Some("no space"), None, vec![("a".to_owned(), entry(CleanupStatus::Error, 1))]),
        write(None, Some(other.clone()), vec![("b".to_owned(), entry(CleanupStatus::Ok, 2))]),
        write(Some(""), None, vec![("a".to_owned(), entry(CleanupStatus::Ok, 3))]),
    ];
    assert_eq!(writer.apply(ops), [2, 3, 4].map(|v| Ok(WriteOutcome::Version(v))));
    let history = home.reader().history(vm(1)).await.unwrap();
    let told: Vec<_> = history.iter().map(|r| r.last_error.as_str()).collect();
    assert_eq!(told, ["", "no space", "no space", ""]);
    assert_eq!((&history[1].resources, &history[2].resources), (&resources(), &other));
    assert_eq!((&history[3].resources, history[3].backend.as_str()), (&other, "fake"));
    let steps: Vec<_> = history[3].cleanup.iter().map(|(n, e)| (n.as_str(), e.status)).collect();
    assert_eq!(steps, [("a", CleanupStatus::Ok), ("b", CleanupStatus::Ok)]);
    assert_eq!(history[2].cleanup["a"].status, CleanupStatus::Error);
}

#[tokio::test]
async fn a_row_that_would_say_the_same_is_not_appended() {
    let (home, mut writer) = home_with_vm();
    let same = |millis| WriteOp::SetPhase {
        vm: vm(1),
        epoch: EPOCH,
        phase: Phase::Cleaning,
        last_error: Some("x".to_owned()),
        backend: Some("fake".to_owned()),
        resources: Some(Box::new(resources())),
        cleanup: vec![(
            "machine_close".to_owned(),
            CleanupEntry { status: CleanupStatus::Ok, error: None, updated_at: at(millis) },
        )],
        at: at(millis),
    };
    for millis in [1, 2, 3] {
        assert_eq!(apply_one(&mut writer, same(millis)), Ok(WriteOutcome::Version(2)));
    }
    let history = home.reader().history(vm(1)).await.unwrap();
    assert_eq!(history.len(), 2);
    assert_eq!(history[1].updated_at, at(1));
}

#[tokio::test]
async fn the_hypervisor_is_known_beside_the_vm_and_in_its_history() {
    let (home, mut writer) = home_with_vm();
    let set = |epoch| WriteOp::SetHypervisor {
        vm: vm(1),
        epoch,
        hypervisor: process(5_000),
        started: Started::Restored,
        at: at(30),
    };
    assert_eq!(apply_one(&mut writer, set(EPOCH)), Ok(WriteOutcome::Version(2)));
    assert_eq!(apply_one(&mut writer, set(EPOCH)), Ok(WriteOutcome::Version(2)));
    assert!(matches!(apply_one(&mut writer, set(OwnerEpoch(0))), Err(WriteError::Fenced { .. })));
    let reader = home.reader();
    let row = reader.vm(vm(1)).await.unwrap().unwrap();
    assert_eq!((row.hypervisor, row.started), (Some(process(5_000)), Some(Started::Restored)));
    let head = reader.lifecycle_head(vm(1)).await.unwrap().unwrap();
    assert_eq!(
        head.resources,
        Resources {
            hypervisor: Some(process(5_000)),
            started: Some(Started::Restored),
            ..resources()
        }
    );
    assert_eq!(head.phase, Phase::Creating);
    // What a later build has for it, an older one does not know, nor hide anything of the VM.
    let later =
        "UPDATE vm_lifecycle SET resources_json = json_set(resources_json, '$.started', 'sent')";
    home.plain().execute(later, []).unwrap();
    assert_eq!(reader.vm(vm(1)).await.unwrap().unwrap().started, None);
}

#[tokio::test]
async fn an_exit_code_stays_through_all_phases_until_the_vm_is_removed() {
    let (home, mut writer) = home_with_vm();
    let reader = home.reader();
    let code = async || reader.vm(vm(1)).await.unwrap().unwrap().exit_code;
    assert_eq!(code().await, None, "it has not ended");
    for number in [0, 143] {
        let set = WriteOp::SetExit { vm: vm(1), epoch: EPOCH, code: number };
        assert_eq!(apply_one(&mut writer, set), Ok(WriteOutcome::ExitNoted));
        assert_eq!(code().await, Some(number));
    }
    let raise = WriteOp::RaiseEpoch { vm: vm(1), pid: 6_000, at: at(40) };
    apply_one(&mut writer, raise).unwrap();
    for phase in [Phase::Cleaning, Phase::Cleaned] {
        apply_one(&mut writer, set_phase_as(vm(1), OwnerEpoch(2), phase)).unwrap();
        assert_eq!(code().await, Some(143), "{phase}");
    }
    let all = reader.vms().await.unwrap();
    assert_eq!(all[0].as_ref().unwrap().exit_code, Some(143));
    // One that nobody can read hides nothing in the list.
    home.plain().execute("UPDATE vm_nodes SET exit_code = 'seven'", []).unwrap();
    assert_eq!(reader.vms().await.unwrap()[0].as_ref().unwrap().exit_code, None);
    let unreadable = reader.vm(vm(1)).await.unwrap_err().to_string();
    assert!(unreadable.contains("vm_nodes.exit_code of vm-00000001"), "{unreadable}");
}

#[tokio::test]
async fn a_take_over_fences_the_owner_before() {
    let (home, mut writer) = home_with_vm();
    let raise = WriteOp::RaiseEpoch { vm: vm(1), pid: 6_000, at: at(40) };
    let second = OwnerEpoch(2);
    assert_eq!(apply_one(&mut writer, raise.clone()), Ok(WriteOutcome::Epoch(second)));
    let fenced = WriteError::Fenced { vm: vm(1), epoch: EPOCH, current: second };
    let late = vec![
        set_phase(vm(1), Phase::Created),
        WriteOp::RemoveVm { vm: vm(1), epoch: EPOCH },
        WriteOp::SetHypervisor {
            vm: vm(1),
            epoch: EPOCH,
            hypervisor: process(1),
            started: Started::Booted,
            at: at(41),
        },
        WriteOp::SetExit { vm: vm(1), epoch: EPOCH, code: 7 },
    ];
    assert_eq!(writer.apply(late), vec![Err(fenced); 4]);
    assert_eq!(
        apply_one(&mut writer, set_phase_as(vm(1), second, Phase::Cleaning)),
        Ok(WriteOutcome::Version(2))
    );
    let row = home.reader().vm(vm(1)).await.unwrap().unwrap();
    // What it holds was made by the first, which may still be there.
    assert_eq!((row.owner_epoch, row.owner, row.pid), (second, Some(process(4_000)), 6_000));
    let remains = home.reader().remains(vm(1)).await.unwrap().unwrap();
    assert_eq!(remains.maker, Some(process(4_000)));
    assert_eq!(apply_one(&mut writer, raise), Ok(WriteOutcome::Epoch(OwnerEpoch(3))));
}

#[tokio::test]
async fn who_made_a_vm_stays_whoever_takes_it_over() {
    let (home, mut writer) = home_with_vm();
    let made = Resources { owner: Some(process(5)), ..resources() };
    let named = WriteOp::SetPhase {
        vm: vm(1),
        epoch: EPOCH,
        phase: Phase::Creating,
        last_error: None,
        backend: None,
        resources: Some(Box::new(made)),
        cleanup: Vec::new(),
        at: at(30),
    };
    apply_one(&mut writer, named).unwrap();
    let raise = WriteOp::RaiseEpoch { vm: vm(1), pid: 6_000, at: at(40) };
    apply_one(&mut writer, raise).unwrap();
    let remains = home.reader().remains(vm(1)).await.unwrap().unwrap();
    assert_eq!(remains.maker, Some(process(5)));
}

#[test]
fn a_vm_that_is_not_there_is_told() {
    let home = Home::new();
    let mut writer = home.writer();
    let missing = vec![
        set_phase(vm(9), Phase::Created),
        WriteOp::SetHypervisor {
            vm: vm(9),
            epoch: EPOCH,
            hypervisor: process(1),
            started: Started::Booted,
            at: at(0),
        },
        WriteOp::SetExit { vm: vm(9), epoch: EPOCH, code: 7 },
        WriteOp::RaiseEpoch { vm: vm(9), pid: 1, at: at(0) },
        WriteOp::RemoveVm { vm: vm(9), epoch: EPOCH },
    ];
    let not_found = WriteError::NotFound { vm: vm(9) };
    assert_eq!(writer.apply(missing), vec![Err(not_found); 5]);
    let rows: i64 = home
        .plain()
        .query_row(
            "SELECT (SELECT count(*) FROM vm_nodes) + (SELECT count(*) FROM vm_lifecycle)
                  + (SELECT count(*) FROM vm_lifecycle_head)",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(rows, 0);
}

#[tokio::test]
async fn only_a_cleaned_vm_without_a_subnet_is_removed_and_its_history_stays() {
    let (home, mut writer) = home_with_vm();
    let remove = || WriteOp::RemoveVm { vm: vm(1), epoch: EPOCH };
    assert_eq!(
        apply_one(&mut writer, remove()),
        Err(WriteError::NotCleaned { vm: vm(1), phase: Phase::Creating })
    );
    clean(&mut writer, vm(1));
    let subnet = "INSERT INTO subnet_allocations VALUES ('vm-00000001', 100, 'g', 'v', 's', 't')";
    home.plain().execute(subnet, []).unwrap();
    assert_eq!(apply_one(&mut writer, remove()), Err(WriteError::SubnetHeld { vm: vm(1) }));
    home.plain().execute("DELETE FROM subnet_allocations", []).unwrap();
    assert_eq!(apply_one(&mut writer, remove()), Ok(WriteOutcome::Removed));
    let reader = home.reader();
    assert_eq!(reader.vm(vm(1)).await.unwrap(), None);
    assert!(reader.vms().await.unwrap().is_empty());
    assert_eq!(reader.history(vm(1)).await.unwrap().len(), 3);
}

#[tokio::test]
async fn only_old_history_of_removed_vms_is_pruned() {
    let home = Home::new();
    let mut writer = home.writer();
    for number in 1..=3 {
        apply_one(&mut writer, insert(vm(number))).unwrap();
        clean(&mut writer, vm(number));
    }
    // The second was last written half a second later: as text, "…05.51Z" is before "…05Z".
    let mut last_word = set_phase(vm(2), Phase::Cleaned);
    if let WriteOp::SetPhase { last_error, at: when, .. } = &mut last_word {
        *last_error = Some("late".to_owned());
        *when = at(510);
    }
    apply_one(&mut writer, last_word).unwrap();
    for number in [1, 2] {
        let remove = WriteOp::RemoveVm { vm: vm(number), epoch: EPOCH };
        apply_one(&mut writer, remove).unwrap();
    }
    let prune = |before: Timestamp| WriteOp::PruneHistory { before };
    let pruned = |vms| Ok(WriteOutcome::Pruned { vms, unreadable: 0 });
    assert_eq!(apply_one(&mut writer, prune(at(10))), pruned(0));
    assert_eq!(apply_one(&mut writer, prune(at(500))), pruned(1));
    let reader = home.reader();
    assert!(reader.history(vm(1)).await.unwrap().is_empty());
    assert_eq!(reader.history(vm(2)).await.unwrap().len(), 4);
    assert_eq!(apply_one(&mut writer, prune(at(511))), pruned(1));
    assert_eq!(reader.history(vm(3)).await.unwrap().len(), 3, "it has a row in vms");
    assert_eq!(apply_one(&mut writer, prune(at(1_000_000))), pruned(0));
    // With its history the id is free again.
    assert_eq!(apply_one(&mut writer, insert(vm(1))), Ok(WriteOutcome::Version(1)));
}

#[tokio::test]
async fn a_refused_op_leaves_the_others_of_its_batch_alone() {
    let (home, mut writer) = home_with_vm();
    let batch = vec![
        insert(vm(2)),
        set_phase(vm(1), Phase::Created),
        insert(vm(2)),
        set_phase(vm(1), Phase::Running),
        set_phase(vm(1), Phase::Starting),
        set_phase(vm(2), Phase::Created),
    ];
    let answers = writer.apply(batch);
    let version = |v| Ok(WriteOutcome::Version(v));
    let transition = InvalidTransition { from: Phase::Created, to: Phase::Running };
    assert_eq!(
        answers,
        [
            version(1),
            version(2),
            Err(WriteError::VmExists { id: vm(2) }),
            Err(transition.into()),
            version(3),
            version(2),
        ]
    );
    let reader = home.reader();
    for (number, latest, phase) in [(1, 3, Phase::Starting), (2, 2, Phase::Created)] {
        let head = reader.lifecycle_head(vm(number)).await.unwrap().unwrap();
        assert_eq!((head.version, head.phase), (latest, phase));
        assert_eq!(reader.vm(vm(number)).await.unwrap().unwrap().phase, phase);
    }
    assert!(writer.apply(Vec::new()).is_empty());
}

#[tokio::test]
async fn times_are_written_with_the_digits_they_need() {
    let home = Home::new();
    let mut writer = home.writer();
    let times =
        ["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.5Z", "2026-01-02T03:04:05.000000001Z"];
    for (number, time) in (1..).zip(times) {
        let mut new = new_vm(vm(number));
        new.created_at = time.parse().unwrap();
        let op = WriteOp::InsertVm { record: Box::new(new) };
        apply_one(&mut writer, op).unwrap();
        let stored: String = home
            .plain()
            .query_row(
                "SELECT created_at FROM vms WHERE id = ?1",
                [vm(number).to_string()],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(stored, time);
    }
    // Newest first, which as text they are not.
    let order: Vec<_> =
        home.reader().vms().await.unwrap().into_iter().map(|v| v.unwrap().id).collect();
    assert_eq!(order, [vm(2), vm(3), vm(1)]);
}
