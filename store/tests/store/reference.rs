//! A home that the reference has used is taken over, with all that is in it.

use std::fs;

use matchlock_model::id::OwnerEpoch;
use matchlock_model::phase::Phase;
use matchlock_model::record::CleanupStatus;
use matchlock_store::{OpenError, ReadPool, STATE_DB, WriteOp, WriteOutcome};
use rusqlite::Connection;

use crate::support::{Home, apply_one, at, reference_home_in, set_phase_as, vm};

const ADOPTED: OwnerEpoch = OwnerEpoch(0);

fn reference_home() -> Home {
    let home = Home::new();
    reference_home_in(&home.path);
    home
}

#[test]
fn it_is_not_migrated_by_looking() {
    let home = reference_home();
    let before = fs::read(home.path.join(STATE_DB)).unwrap();
    let refused = ReadPool::open(&home.path).unwrap_err();
    assert!(matches!(refused, OpenError::Older { module: "node", version: 1, .. }), "{refused:?}");
    assert!(refused.to_string().contains("matchlock gc"), "{refused}");
    assert_eq!(fs::read(home.path.join(STATE_DB)).unwrap(), before);
}

#[tokio::test]
async fn its_rows_are_read() {
    let home = reference_home();
    drop(home.writer());
    let reader = home.reader();
    let order: Vec<_> = reader.vms().await.unwrap().into_iter().map(|v| v.unwrap().id).collect();
    // The last one was made by the migration, for the subnet that had no VM.
    assert_eq!(order, [vm(0xc), vm(0xd), vm(0xa), vm(0xb)]);
    let running = reader.vm(vm(0xa)).await.unwrap().unwrap();
    assert_eq!((running.pid, running.status.as_str()), (4_321, "running"));
    assert_eq!(running.config_json, r#"{"image":"alpine:latest"}"#);
    assert_eq!(running.created_at.to_string(), "2025-11-02T08:00:00.123456789Z");
    assert_eq!(running.updated_at.to_string(), "2025-11-02T08:00:01Z");
    assert_eq!((running.owner_epoch, running.owner, running.ephemeral), (ADOPTED, None, false));
    let head = reader.lifecycle_head(vm(0xa)).await.unwrap().unwrap();
    assert_eq!((head.version, head.phase), (2, Phase::Created));
    assert_eq!(head.resources.state_dir.as_deref(), Some("/h/vms/vm-0000000a"));
    let cleaned = reader.lifecycle_head(vm(0xb)).await.unwrap().unwrap();
    assert_eq!(cleaned.cleanup["vfs_stop"].status, CleanupStatus::Ok);
    assert_eq!(cleaned.cleanup["rootfs_remove"].error.as_deref(), Some("denied"));
    assert_eq!(reader.lifecycle_head(vm(0xc)).await.unwrap(), None);
    assert_eq!(reader.vm(vm(0xc)).await.unwrap().unwrap().config_json, "");
    let mut phases: Vec<_> = reader
        .vms()
        .await
        .unwrap()
        .into_iter()
        .map(Result::unwrap)
        .map(|v| (v.id, v.phase))
        .collect();
    phases.sort_unstable_by_key(|(id, _)| *id);
    let expected = [
        (vm(0xa), Phase::Created),
        (vm(0xb), Phase::Cleaned),
        (vm(0xc), Phase::Creating),
        (vm(0xd), Phase::Creating),
    ];
    assert_eq!(phases, expected);
}

#[test]
fn no_subnet_gets_lost_and_the_schema_is_the_same_as_anew() {
    let home = reference_home();
    drop(home.writer());
    let conn = home.plain();
    let subnets: String = conn
        .query_row(
            "SELECT group_concat(s.vm_id || '=' || s.octet || ' ' || v.status, ', ')
             FROM subnet_allocations AS s JOIN vms AS v ON v.id = s.vm_id ORDER BY s.octet",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(subnets, "vm-0000000a=100 running, vm-0000000d=101 crashed");
    let schema = |conn: &Connection| -> Vec<(String, String)> {
        let mut query =
            conn.prepare("SELECT name, tbl_name FROM sqlite_schema ORDER BY name").unwrap();
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
        rows.unwrap().map(Result::unwrap).collect()
    };
    let fresh = Home::new();
    drop(fresh.writer());
    assert_eq!(schema(&conn), schema(&fresh.plain()));
}

#[tokio::test]
async fn its_vms_are_cleaned_and_removed_by_a_new_owner() {
    let home = reference_home();
    let mut writer = home.writer();
    let first = OwnerEpoch(1);
    for (number, versions) in [(0xa, 3..5), (0xc, 1..3)] {
        let raise = WriteOp::RaiseEpoch { vm: vm(number), pid: 77, at: at(0) };
        assert_eq!(apply_one(&mut writer, raise), Ok(WriteOutcome::Epoch(first)));
        for (version, phase) in versions.zip([Phase::Cleaning, Phase::Cleaned]) {
            assert_eq!(
                apply_one(&mut writer, set_phase_as(vm(number), first, phase)),
                Ok(WriteOutcome::Version(version))
            );
        }
    }
    // What this version does not know of is still told.
    let kept: String = home
        .plain()
        .query_row(
            "SELECT resources_json FROM vm_lifecycle WHERE vm_id = 'vm-0000000a' AND version = 4",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert!(kept.contains(r#""vsock_path":"/h/v.sock""#), "{kept}");
    let head = home.reader().lifecycle_head(vm(0xc)).await.unwrap().unwrap();
    assert_eq!(head.backend, "unknown");
    let remove = WriteOp::RemoveVm { vm: vm(0xc), epoch: first };
    assert_eq!(apply_one(&mut writer, remove), Ok(WriteOutcome::Removed));
}

#[test]
fn its_own_statements_go_on_working() {
    let home = reference_home();
    drop(home.writer());
    let conn = home.plain();
    conn.execute_batch(
        "INSERT INTO vms (id, pid, status, image, config_json, created_at, updated_at)
         VALUES ('vm-000000ff', 1, 'running', 'x', x'7b7d', '2025-11-04T08:00:00Z', '2025-11-04T08:00:00Z')
         ON CONFLICT (id) DO UPDATE SET pid = excluded.pid;
         INSERT INTO subnet_allocations (vm_id, octet, gateway_ip, guest_ip, subnet, created_at)
         VALUES ('vm-000000ff', 102, 'g', 'v', 's', 't');
         BEGIN;
         DELETE FROM subnet_allocations WHERE vm_id = 'vm-000000ff';
         DELETE FROM vms WHERE id = 'vm-000000ff';
         COMMIT;",
    )
    .unwrap();
}

#[tokio::test]
async fn a_row_that_cannot_be_read_is_named() {
    let home = reference_home();
    drop(home.writer());
    home.plain()
        .execute("UPDATE vms SET created_at = 'yesterday' WHERE id = 'vm-0000000b'", [])
        .unwrap();
    let vms = home.reader().vms().await.unwrap();
    let told: Vec<String> =
        vms.iter().filter_map(|v| v.as_ref().err()).map(ToString::to_string).collect();
    assert_eq!((vms.len(), told.len()), (4, 1), "the others are told all the same");
    assert!(told[0].starts_with("vms.created_at of vm-0000000b cannot be read:"), "{told:?}");
}
