//! The tables `vms` and `vm_nodes`.

use jiff::Timestamp;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::ProcessIdentity;
use matchlock_model::phase::Phase;
use matchlock_model::record::{Resources, VmRecord, VmRemains, VmSummary};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{Reading, each, lifecycle, readable, stored, subnets};
use crate::error::{BadRow, WriteError};
use crate::op::{NewVm, WriteOutcome};

const FIRST_EPOCH: OwnerEpoch = OwnerEpoch(1);

const SELECT: &str = "
    SELECT v.id, v.pid, v.status, v.image, v.config_json, v.created_at, v.updated_at,
           coalesce(n.owner_epoch, 0) AS owner_epoch, n.owner_json, n.hypervisor_json,
           n.namespaces_json, coalesce(n.ephemeral, 0) AS ephemeral,
           coalesce((SELECT l.phase FROM vm_lifecycle AS l WHERE l.vm_id = v.id
                     ORDER BY l.version DESC LIMIT 1), 'creating') AS phase,
           EXISTS (SELECT 1 FROM subnet_allocations AS s WHERE s.vm_id = v.id) AS holds_subnet
    FROM vms AS v LEFT JOIN vm_nodes AS n ON n.vm_id = v.id";

/// The VM's row.
pub(crate) fn find(conn: &Connection, vm: VmId) -> rusqlite::Result<Option<VmRecord>> {
    conn.prepare_cached(&format!("{SELECT} WHERE v.id = ?1"))?
        .query_row([vm.to_string()], read)
        .optional()
}

const SUMMARY: &str = "
    SELECT v.id, v.pid, v.image, v.created_at,
           coalesce((SELECT l.phase FROM vm_lifecycle AS l WHERE l.vm_id = v.id
                     ORDER BY l.version DESC LIMIT 1), 'creating') AS phase
    FROM vms AS v";

const REMAINS: &str = "
    SELECT v.id, n.owner_json, n.hypervisor_json, n.namespaces_json,
           coalesce(n.ephemeral, 0) AS ephemeral,
           coalesce(l.phase, 'creating') AS phase, l.resources_json,
           EXISTS (SELECT 1 FROM subnet_allocations AS s WHERE s.vm_id = v.id) AS holds_subnet
    FROM vms AS v
    LEFT JOIN vm_nodes AS n ON n.vm_id = v.id
    LEFT JOIN vm_lifecycle AS l ON l.vm_id = v.id
         AND l.version = (SELECT max(version) FROM vm_lifecycle WHERE vm_id = v.id)
    WHERE v.id = ?1";

/// The ids of all rows.
pub(crate) fn ids(conn: &Connection) -> rusqlite::Result<Vec<Result<VmId, BadRow>>> {
    let mut query = conn.prepare_cached("SELECT id FROM vms ORDER BY id")?;
    each(query.query_map([], |row| Reading::new(row, "vms", "id")?.parsed("id"))?)
}

/// All VMs, newest first, those that cannot be read last.
pub(crate) fn all(conn: &Connection) -> rusqlite::Result<Vec<Result<VmSummary, BadRow>>> {
    let mut query = conn.prepare_cached(SUMMARY)?;
    let mut vms = each(query.query_map([], summarize)?)?;
    vms.sort_by(|a, b| match (a, b) {
        (Ok(a), Ok(b)) => b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)),
        (a, b) => a.is_err().cmp(&b.is_err()),
    });
    Ok(vms)
}

fn summarize(row: &Row<'_>) -> rusqlite::Result<VmSummary> {
    let row = Reading::new(row, "vms", "id")?;
    Ok(VmSummary {
        id: row.parsed("id")?,
        pid: row.number("pid")?,
        phase: row.of("vm_lifecycle").parsed("phase")?,
        image: row.text("image")?,
        created_at: row.parsed("created_at")?,
    })
}

/// What cleaning the VM up needs to know.
pub(crate) fn remains(conn: &Connection, vm: VmId) -> rusqlite::Result<Option<VmRemains>> {
    conn.prepare_cached(REMAINS)?
        .query_row([vm.to_string()], |row| {
            let row = Reading::new(row, "vms", "id")?;
            let (node, latest) = (row.of("vm_nodes"), row.of("vm_lifecycle"));
            let held = readable(latest.json::<Resources>("resources_json"))?;
            let holds_subnet = row.number::<i64>("holds_subnet")? != 0;
            Ok(VmRemains {
                phase: readable(latest.parsed("phase"))?.unwrap_or(Phase::Creating),
                owner: readable(node.json("owner_json"))?.flatten(),
                hypervisor: node.json("hypervisor_json")?,
                namespaces: node.json("namespaces_json")?,
                ephemeral: node.number::<i64>("ephemeral")? != 0,
                holds_subnet,
                had_network: holds_subnet
                    || held.is_none_or(|held| held.is_some_and(|held| held.tap_name.is_some())),
            })
        })
        .optional()
}

fn read(row: &Row<'_>) -> rusqlite::Result<VmRecord> {
    let row = Reading::new(row, "vms", "id")?;
    let node = row.of("vm_nodes");
    Ok(VmRecord {
        id: row.parsed("id")?,
        pid: row.number("pid")?,
        status: row.text("status")?,
        phase: row.of("vm_lifecycle").parsed("phase")?,
        image: row.text("image")?,
        config_json: row.text("config_json")?,
        created_at: row.parsed("created_at")?,
        updated_at: row.parsed("updated_at")?,
        owner_epoch: OwnerEpoch(node.number("owner_epoch")?),
        owner: node.json("owner_json")?,
        hypervisor: node.json("hypervisor_json")?,
        namespaces: node.json("namespaces_json")?,
        ephemeral: node.number::<i64>("ephemeral")? != 0,
        holds_subnet: row.number::<i64>("holds_subnet")? != 0,
    })
}

/// Makes a VM with its owner and its first lifecycle row.
pub(crate) fn insert(conn: &Connection, new: &NewVm) -> Result<WriteOutcome, WriteError> {
    let id = new.id.to_string();
    let at = stored(new.created_at);
    let taken: bool = conn
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM vms WHERE id = ?1)
                 OR EXISTS (SELECT 1 FROM vm_lifecycle WHERE vm_id = ?1)",
        )?
        .query_row([&id], |row| row.get(0))?;
    if taken {
        return Err(WriteError::VmExists { id: new.id });
    }
    conn.prepare_cached(
        "INSERT INTO vms (id, pid, status, image, config_json, created_at, updated_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6)",
    )?
    .execute(params![
        id,
        new.owner.pid,
        status(Phase::Creating),
        new.image,
        new.config_json,
        at
    ])?;
    conn.prepare_cached(
        "INSERT INTO vm_nodes (vm_id, owner_epoch, owner_json, namespaces_json, ephemeral)
         VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![
        id,
        FIRST_EPOCH.0,
        super::to_json("owner", &new.owner)?,
        super::to_json("namespaces", &new.namespaces)?,
        new.ephemeral
    ])?;
    let change = lifecycle::Change {
        phase: Some(Phase::Creating),
        backend: Some(new.backend.clone()),
        resources: Some(lifecycle::ResourceChange::All(Box::new(new.resources.clone()))),
        ..lifecycle::Change::default()
    };
    lifecycle::append(conn, new.id, change, new.created_at)
}

/// Refuses a write of anybody but the VM's present owner.
pub(crate) fn check_epoch(
    conn: &Connection,
    vm: VmId,
    epoch: OwnerEpoch,
) -> Result<(), WriteError> {
    let current = epoch_of(conn, vm)?;
    if current == epoch || matchlock_failpoints::mutated("ignore_epoch") {
        return Ok(());
    }
    Err(WriteError::Fenced { vm, epoch, current })
}

fn epoch_of(conn: &Connection, vm: VmId) -> Result<OwnerEpoch, WriteError> {
    owner_epoch(conn, vm)?.ok_or(WriteError::NotFound { vm })
}

/// Which owner the VM has; `None` when it has no row.
pub(crate) fn owner_epoch(conn: &Connection, vm: VmId) -> rusqlite::Result<Option<OwnerEpoch>> {
    conn.prepare_cached(
        "SELECT coalesce(n.owner_epoch, 0)
         FROM vms AS v LEFT JOIN vm_nodes AS n ON n.vm_id = v.id WHERE v.id = ?1",
    )?
    .query_row([vm.to_string()], |row| row.get(0).map(OwnerEpoch))
    .optional()
}

/// Takes the VM over.
pub(crate) fn raise_epoch(
    conn: &Connection,
    vm: VmId,
    owner: &ProcessIdentity,
    at: Timestamp,
) -> Result<WriteOutcome, WriteError> {
    let id = vm.to_string();
    let rows = conn
        .prepare_cached("UPDATE vms SET pid = ?2, updated_at = ?3 WHERE id = ?1")?
        .execute(params![id, owner.pid, stored(at)])?;
    if rows == 0 {
        return Err(WriteError::NotFound { vm });
    }
    let epoch = conn
        .prepare_cached(
            "INSERT INTO vm_nodes (vm_id, owner_epoch, owner_json) VALUES (?1, ?2, ?3)
             ON CONFLICT (vm_id) DO UPDATE
                 SET owner_epoch = owner_epoch + 1, owner_json = excluded.owner_json
             RETURNING owner_epoch",
        )?
        .query_row(params![id, FIRST_EPOCH.0, super::to_json("owner", owner)?], |row| row.get(0))?;
    Ok(WriteOutcome::Epoch(OwnerEpoch(epoch)))
}

/// Records the hypervisor beside the VM.
pub(crate) fn set_hypervisor(
    conn: &Connection,
    vm: VmId,
    hypervisor: &ProcessIdentity,
) -> Result<(), WriteError> {
    conn.prepare_cached(
        "INSERT INTO vm_nodes (vm_id, owner_epoch, hypervisor_json) VALUES (?1, 0, ?2)
         ON CONFLICT (vm_id) DO UPDATE SET hypervisor_json = excluded.hypervisor_json",
    )?
    .execute(params![vm.to_string(), super::to_json("hypervisor", hypervisor)?])?;
    Ok(())
}

/// Writes the status that a phase means, and lets go of the pid with the last phases.
pub(crate) fn set_status(
    conn: &Connection,
    vm: VmId,
    phase: Phase,
    at: Timestamp,
) -> Result<(), WriteError> {
    let ownerless = matches!(phase, Phase::Stopped | Phase::Cleaned);
    let rows = conn
        .prepare_cached(
            "UPDATE vms SET status = ?2, pid = CASE WHEN ?3 THEN 0 ELSE pid END, updated_at = ?4
             WHERE id = ?1",
        )?
        .execute(params![vm.to_string(), status(phase), ownerless, stored(at)])?;
    if rows == 0 {
        return Err(WriteError::NotFound { vm });
    }
    Ok(())
}

/// Removes a cleaned VM.
pub(crate) fn remove(conn: &Connection, vm: VmId) -> Result<WriteOutcome, WriteError> {
    let id = vm.to_string();
    let phase = lifecycle::latest_phase(conn, vm)?.unwrap_or(Phase::Creating);
    if phase != Phase::Cleaned {
        return Err(WriteError::NotCleaned { vm, phase });
    }
    if subnets::is_held(conn, vm)? {
        return Err(WriteError::SubnetHeld { vm });
    }
    conn.prepare_cached("DELETE FROM vms WHERE id = ?1")?.execute([&id])?;
    Ok(WriteOutcome::Removed)
}

/// The status in `vms` that a phase means.
const fn status(phase: Phase) -> &'static str {
    match phase {
        Phase::Creating => "creating",
        Phase::Created | Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Stopping | Phase::Cleaning => "stopping",
        Phase::Stopped | Phase::Cleaned => "stopped",
        Phase::CreateFailed | Phase::StartFailed | Phase::StopFailed | Phase::CleanupFailed => {
            "failed"
        }
    }
}
