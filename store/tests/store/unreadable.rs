//! Rows that cannot be read: they hide no other, and can be removed.

use matchlock_model::phase::Phase;
use matchlock_store::{WriteError, WriteOp, WriteOutcome};

use super::support::{EPOCH, Home, apply_one, at, clean, insert, new_vm, set_phase, vm};

/// VMs 1 and 2, where this was done to the second.
fn home_with(damage: &str) -> Home {
    let home = Home::new();
    let mut conn = home.writer();
    for number in [1, 2] {
        apply_one(&mut conn, insert(vm(number))).unwrap();
    }
    home.plain().execute_batch(damage).unwrap();
    home
}

const LATEST: &str = "WHERE vm_id = 'vm-00000002'";

#[tokio::test]
async fn the_others_are_listed_and_the_bad_one_is_named_with_its_column() {
    let cases = [
        (
            "UPDATE vm_lifecycle SET phase = 'brokn' WHERE vm_id = 'vm-00000002'",
            "vm_lifecycle.phase of vm-00000002",
        ),
        ("UPDATE vms SET image = x'ff00' WHERE id = 'vm-00000002'", "vms.image of vm-00000002"),
        (
            "PRAGMA foreign_keys = OFF; UPDATE vms SET id = 'vm-XYZ' WHERE id = 'vm-00000002'",
            "vms.id of vm-XYZ",
        ),
    ];
    for (damage, named) in cases {
        let home = home_with(damage);
        let vms = home.reader().vms().await.unwrap();
        assert_eq!(vms[0].as_ref().unwrap().id, vm(1), "{damage}");
        let told = vms[1].as_ref().unwrap_err().to_string();
        assert!(told.starts_with(&format!("{named} cannot be read: ")), "{told}");
    }
    // A list does not need what it does not show.
    let home = home_with("UPDATE vms SET config_json = x'ff00'");
    assert!(home.reader().vms().await.unwrap().iter().all(Result::is_ok));
    let told = home.reader().vm(vm(2)).await.unwrap_err().to_string();
    assert!(told.starts_with("vms.config_json of vm-00000002"), "{told}");
}

#[tokio::test]
async fn a_vm_with_an_unreadable_row_is_cleaned_and_removed_and_nothing_else() {
    for set in ["phase = 'brokn'", "resources_json = '{'", "cleanup_json = '['", "backend = x'ff'"]
    {
        let home = home_with(&format!("UPDATE vm_lifecycle SET {set} {LATEST}"));
        let mut conn = home.writer();
        let refused = apply_one(&mut conn, set_phase(vm(2), Phase::Created));
        assert!(matches!(refused, Err(WriteError::Row(_))), "{set}: {refused:?}");
        let remains = home.reader().remains(vm(2)).await.unwrap().unwrap();
        assert_eq!(remains.phase, Phase::Creating);
        assert!(remains.had_network, "{set}: nobody knows that it had none");
        for (phase, version) in [(Phase::Cleaning, 2), (Phase::Cleaned, 3)] {
            let answer = apply_one(&mut conn, set_phase(vm(2), phase));
            assert_eq!(answer, Ok(WriteOutcome::Version(version)), "{set}");
        }
        let remove = WriteOp::RemoveVm { vm: vm(2), epoch: EPOCH };
        assert_eq!(apply_one(&mut conn, remove), Ok(WriteOutcome::Removed), "{set}");
        let prune = WriteOp::PruneHistory { before: at(1_000) };
        assert_eq!(
            apply_one(&mut conn, prune),
            Ok(WriteOutcome::Pruned { vms: 1, unreadable: 0 }),
            "{set}"
        );
    }
}

#[tokio::test]
async fn what_says_cleaning_already_but_cannot_be_read_is_followed_by_what_can() {
    let home = home_with("");
    let mut conn = home.writer();
    apply_one(&mut conn, set_phase(vm(2), Phase::Cleaning)).unwrap();
    home.plain()
        .execute(&format!("UPDATE vm_lifecycle SET resources_json = '{{' {LATEST}"), [])
        .unwrap();
    let again = apply_one(&mut conn, set_phase(vm(2), Phase::Cleaning));
    assert_eq!(again, Ok(WriteOutcome::Version(3)));
}

#[tokio::test]
async fn a_hypervisor_that_cannot_be_read_is_not_nobody() {
    let home = home_with("UPDATE vm_nodes SET hypervisor_json = '{' WHERE vm_id = 'vm-00000002'");
    let told = home.reader().remains(vm(2)).await.unwrap_err().to_string();
    assert!(told.starts_with("vm_nodes.hypervisor_json of vm-00000002 cannot be read"), "{told}");
}

#[test]
fn a_time_that_cannot_be_read_keeps_its_own_history_only() {
    let home = home_with("");
    let mut conn = home.writer();
    for number in [1, 2] {
        clean(&mut conn, vm(number));
        apply_one(&mut conn, WriteOp::RemoveVm { vm: vm(number), epoch: EPOCH }).unwrap();
    }
    home.plain()
        .execute(&format!("UPDATE vm_lifecycle SET updated_at = 'soon' {LATEST}"), [])
        .unwrap();
    let prune = WriteOp::PruneHistory { before: at(1_000) };
    let pruned = apply_one(&mut conn, prune);
    assert_eq!(pruned, Ok(WriteOutcome::Pruned { vms: 1, unreadable: 1 }));
    let kept: String = home
        .plain()
        .query_row("SELECT group_concat(DISTINCT vm_id) FROM vm_lifecycle", [], |row| row.get(0))
        .unwrap();
    assert_eq!(kept, "vm-00000002");
}

#[tokio::test]
async fn a_network_is_remembered_as_long_as_history_and_one_that_cannot_be_read_counts() {
    let home = Home::new();
    let mut conn = home.writer();
    let any = async || home.reader().any_network().await.unwrap();
    assert!(!any().await, "nothing was ever stored");
    let mut without = new_vm(vm(1));
    without.resources.tap_name = None;
    apply_one(&mut conn, WriteOp::InsertVm { record: Box::new(without) }).unwrap();
    assert!(!any().await, "its only VM has none");
    let text = "UPDATE vm_lifecycle SET resources_json = ?1";
    for (json, expected) in [("{", true), ("{}", false)] {
        home.plain().execute(text, [json]).unwrap();
        assert_eq!(any().await, expected, "{json}");
    }
    apply_one(&mut conn, insert(vm(2))).unwrap();
    clean(&mut conn, vm(2));
    apply_one(&mut conn, WriteOp::RemoveVm { vm: vm(2), epoch: EPOCH }).unwrap();
    assert!(any().await, "its row is gone, its history is not");
    apply_one(&mut conn, WriteOp::PruneHistory { before: at(1_000) }).unwrap();
    assert!(!any().await);
}
