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
           n.namespaces_json, n.exit_code, coalesce(n.ephemeral, 0) AS ephemeral,
           n.removal_wanted_at IS NOT NULL AS removal_wanted,
           coalesce(l.phase, 'creating') AS phase, l.last_error, l.resources_json,
           EXISTS (SELECT 1 FROM subnet_allocations AS s WHERE s.vm_id = v.id) AS holds_subnet
    FROM vms AS v
    LEFT JOIN vm_nodes AS n ON n.vm_id = v.id
    LEFT JOIN vm_lifecycle AS l ON l.vm_id = v.id
         AND l.version = (SELECT max(version) FROM vm_lifecycle WHERE vm_id = v.id)";

/// The VM's row.
pub(crate) fn find(conn: &Connection, vm: VmId) -> rusqlite::Result<Option<VmRecord>> {
    conn.prepare_cached(&format!("{SELECT} WHERE v.id = ?1"))?
        .query_row([vm.to_string()], read)
        .optional()
}

const SUMMARY: &str = "
    SELECT v.id, v.pid, v.image, v.created_at, n.hypervisor_json, n.namespaces_json, n.exit_code,
           n.removal_wanted_at IS NOT NULL AS removal_wanted,
           coalesce(l.phase, 'creating') AS phase, l.last_error
    FROM vms AS v
    LEFT JOIN vm_nodes AS n ON n.vm_id = v.id
    LEFT JOIN vm_lifecycle AS l ON l.vm_id = v.id
         AND l.version = (SELECT max(version) FROM vm_lifecycle WHERE vm_id = v.id)";

const REMAINS: &str = "
    SELECT v.id, n.owner_json, n.hypervisor_json, n.namespaces_json,
           coalesce(n.ephemeral, 0) AS ephemeral,
           n.removal_wanted_at IS NOT NULL AS removal_wanted,
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

/// The VMs that somebody wants removed.
pub(crate) fn to_remove(conn: &Connection) -> rusqlite::Result<Vec<Result<VmId, BadRow>>> {
    let mut query = conn.prepare_cached(
        "SELECT vm_id FROM vm_nodes WHERE removal_wanted_at IS NOT NULL ORDER BY vm_id",
    )?;
    each(query.query_map([], |row| Reading::new(row, "vm_nodes", "vm_id")?.parsed("vm_id"))?)
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
    let (node, latest) = (row.of("vm_nodes"), row.of("vm_lifecycle"));
    Ok(VmSummary {
        id: row.parsed("id")?,
        pid: row.number("pid")?,
        phase: latest.parsed("phase")?,
        image: row.text("image")?,
        created_at: row.parsed("created_at")?,
        last_error: readable(latest.text("last_error"))?.unwrap_or_default(),
        hypervisor: readable(node.json("hypervisor_json"))?.flatten(),
        namespaces: readable(node.json("namespaces_json"))?.flatten(),
        removal_wanted: node.number::<i64>("removal_wanted")? != 0,
        exit_code: readable(node.number_or_null("exit_code"))?.flatten(),
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
            let owner = readable(node.json("owner_json"))?.flatten();
            let maker = held.as_ref().and_then(|held| held.as_ref()?.owner.clone());
            Ok(VmRemains {
                phase: readable(latest.parsed("phase"))?.unwrap_or(Phase::Creating),
                // A VM of the reference names none.
                maker: maker.or(owner),
                hypervisor: node.json("hypervisor_json")?,
                namespaces: node.json("namespaces_json")?,
                ephemeral: node.number::<i64>("ephemeral")? != 0,
                removal_wanted: node.number::<i64>("removal_wanted")? != 0,
                holds_subnet,
                had_network: holds_subnet
                    || held.is_none_or(|held| held.is_some_and(|held| held.tap_name.is_some())),
            })
        })
        .optional()
}

fn read(row: &Row<'_>) -> rusqlite::Result<VmRecord> {
    let row = Reading::new(row, "vms", "id")?;
    let (node, latest) = (row.of("vm_nodes"), row.of("vm_lifecycle"));
    let held = readable(latest.json::<Resources>("resources_json"))?.flatten();
    Ok(VmRecord {
        id: row.parsed("id")?,
        pid: row.number("pid")?,
        status: row.text("status")?,
        phase: latest.parsed("phase")?,
        last_error: readable(latest.text("last_error"))?.unwrap_or_default(),
        image: row.text("image")?,
        config_json: row.text("config_json")?,
        created_at: row.parsed("created_at")?,
        updated_at: row.parsed("updated_at")?,
        owner_epoch: OwnerEpoch(node.number("owner_epoch")?),
        owner: node.json("owner_json")?,
        hypervisor: node.json("hypervisor_json")?,
        namespaces: node.json("namespaces_json")?,
        ephemeral: node.number::<i64>("ephemeral")? != 0,
        removal_wanted: node.number::<i64>("removal_wanted")? != 0,
        holds_subnet: row.number::<i64>("holds_subnet")? != 0,
        exit_code: node.number_or_null("exit_code")?,
        started: held.and_then(|held| held.started),
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
    pid: i32,
    at: Timestamp,
) -> Result<WriteOutcome, WriteError> {
    let id = vm.to_string();
    let rows = conn
        .prepare_cached("UPDATE vms SET pid = ?2, updated_at = ?3 WHERE id = ?1")?
        .execute(params![id, pid, stored(at)])?;
    if rows == 0 {
        return Err(WriteError::NotFound { vm });
    }
    let epoch = conn
        .prepare_cached(
            "INSERT INTO vm_nodes (vm_id, owner_epoch) VALUES (?1, ?2)
             ON CONFLICT (vm_id) DO UPDATE SET owner_epoch = owner_epoch + 1
             RETURNING owner_epoch",
        )?
        .query_row(params![id, FIRST_EPOCH.0], |row| row.get(0))?;
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

/// Notes how the VM's own command ended.
pub(crate) fn set_exit(conn: &Connection, vm: VmId, code: u8) -> Result<WriteOutcome, WriteError> {
    conn.prepare_cached(
        "INSERT INTO vm_nodes (vm_id, owner_epoch, exit_code) VALUES (?1, 0, ?2)
         ON CONFLICT (vm_id) DO UPDATE SET exit_code = excluded.exit_code",
    )?
    .execute(params![vm.to_string(), code])?;
    Ok(WriteOutcome::ExitNoted)
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

/// Notes that the VM is to be removed; the first wish counts.
pub(crate) fn want_removal(
    conn: &Connection,
    vm: VmId,
    at: Timestamp,
) -> Result<WriteOutcome, WriteError> {
    epoch_of(conn, vm)?;
    conn.prepare_cached(
        "INSERT INTO vm_nodes (vm_id, owner_epoch, removal_wanted_at) VALUES (?1, 0, ?2)
         ON CONFLICT (vm_id) DO UPDATE
             SET removal_wanted_at = coalesce(removal_wanted_at, excluded.removal_wanted_at)",
    )?
    .execute(params![vm.to_string(), stored(at)])?;
    Ok(WriteOutcome::RemovalWanted)
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
