//! The tables `vm_lifecycle` and `vm_lifecycle_head`.
//!
//! # Invariants
//! * Rows are only added; each is one more than the one before, which the head counts.
//! * A row that would say the same as the latest one is not added. Times do not count.
//! * A row that cannot be read stays as it is, and only those of cleaning up may follow it: what it
//!   says counts as nothing, its phase as `creating`.
//! * Keys of `resources_json` that this version does not know stay until all resources are replaced.

use jiff::Timestamp;
use matchlock_model::id::VmId;
use matchlock_model::identity::ProcessIdentity;
use matchlock_model::phase::Phase;
use matchlock_model::record::{Cleanup, CleanupEntry, LifecycleRecord, Resources, Started};
use matchlock_model::subnet::Subnet;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde_json::{Map, Value};

use super::{Reading, each, readable, stored, vms};
use crate::error::WriteError;
use crate::op::WriteOutcome;

/// What the backend of a VM is called that never had a lifecycle row.
const UNKNOWN_BACKEND: &str = "unknown";

const SELECT: &str = "
    SELECT l.vm_id, l.version, l.backend, l.phase, l.updated_at, l.last_error, l.resources_json,
           l.cleanup_json
    FROM vm_lifecycle AS l";

/// What the next row says anew; whatever is not given stays.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) phase: Option<Phase>,
    pub(crate) last_error: Option<String>,
    pub(crate) backend: Option<String>,
    pub(crate) resources: Option<ResourceChange>,
    pub(crate) cleanup: Vec<(String, CleanupEntry)>,
}

/// A change of what a VM holds.
#[derive(Debug)]
pub(crate) enum ResourceChange {
    All(Box<Resources>),
    Hypervisor(ProcessIdentity, Started),
    Subnet(Subnet),
}

impl ResourceChange {
    /// What is held after it, of what was held before.
    fn apply_to(self, held: &Map<String, Value>) -> Result<Map<String, Value>, WriteError> {
        let mut held = held.clone();
        match self {
            Self::All(all) => return super::to_object("resources", &*all),
            Self::Hypervisor(hypervisor, started) => {
                let known = super::to_object("hypervisor", &hypervisor)?;
                held.insert("hypervisor".to_owned(), Value::Object(known));
                held.insert("started".to_owned(), super::to_value("started", &started)?);
            }
            Self::Subnet(subnet) => held.extend([
                ("gateway_ip".to_owned(), subnet.gateway().to_string().into()),
                ("guest_ip".to_owned(), subnet.guest().to_string().into()),
                ("subnet_cidr".to_owned(), subnet.cidr.to_string().into()),
            ]),
        }
        Ok(held)
    }
}

/// What a row says, apart from its number and time.
#[derive(Debug, Clone, PartialEq)]
struct Content {
    phase: Phase,
    backend: String,
    last_error: String,
    resources: Map<String, Value>,
    cleanup: Cleanup,
}

impl Content {
    /// A VM of which nothing has been written yet.
    fn none() -> Self {
        Self {
            phase: Phase::Creating,
            backend: UNKNOWN_BACKEND.to_owned(),
            last_error: String::new(),
            resources: Map::new(),
            cleanup: Cleanup::new(),
        }
    }

    fn changed_by(&self, change: Change) -> Result<Self, WriteError> {
        let phase = change.phase.unwrap_or(self.phase);
        self.phase.check_transition(phase)?;
        let resources = match change.resources {
            None => self.resources.clone(),
            Some(change) => change.apply_to(&self.resources)?,
        };
        let mut cleanup = self.cleanup.clone();
        cleanup.extend(change.cleanup);
        Ok(Self {
            phase,
            backend: change.backend.unwrap_or_else(|| self.backend.clone()),
            last_error: change.last_error.unwrap_or_else(|| self.last_error.clone()),
            resources,
            cleanup,
        })
    }

    fn says_the_same_as(&self, other: &Self) -> bool {
        let timeless = |content: &Self| {
            let mut content = content.clone();
            for entry in content.cleanup.values_mut() {
                entry.updated_at = Timestamp::UNIX_EPOCH;
            }
            content
        };
        timeless(self) == timeless(other)
    }
}

/// Adds the VM's next row, unless it would say the same again, and sets the status in `vms`.
pub(crate) fn append(
    conn: &Connection,
    vm: VmId,
    change: Change,
    at: Timestamp,
) -> Result<WriteOutcome, WriteError> {
    let next = match latest(conn, vm, &change)? {
        Some(before) => {
            let next = before.content.changed_by(change)?;
            if before.whole && next.says_the_same_as(&before.content) {
                return Ok(WriteOutcome::Version(before.version));
            }
            next
        }
        None => Content::none().changed_by(change)?,
    };
    vms::set_status(conn, vm, next.phase, at)?;
    let id = vm.to_string();
    let version: i64 = conn
        .prepare_cached(
            "INSERT INTO vm_lifecycle_head (vm_id, last_version)
             VALUES (?1, (SELECT coalesce(max(version), 0) + 1 FROM vm_lifecycle WHERE vm_id = ?1))
             ON CONFLICT (vm_id) DO UPDATE
                 SET last_version = max(last_version + 1, excluded.last_version)
             RETURNING last_version",
        )?
        .query_row([&id], |row| row.get(0))?;
    conn.prepare_cached(
        "INSERT INTO vm_lifecycle (vm_id, version, backend, phase, updated_at, last_error,
                                   resources_json, cleanup_json)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        id,
        version,
        next.backend,
        next.phase.name(),
        stored(at),
        next.last_error,
        super::to_json("resources", &next.resources)?,
        super::to_json("cleanup", &next.cleanup)?,
    ])?;
    Ok(WriteOutcome::Version(version))
}

/// The phase in the VM's latest row.
pub(crate) fn latest_phase(conn: &Connection, vm: VmId) -> Result<Option<Phase>, WriteError> {
    let phase = conn
        .prepare_cached(&format!("{SELECT} WHERE l.vm_id = ?1 ORDER BY l.version DESC LIMIT 1"))?
        .query_row([vm.to_string()], |row| {
            Reading::new(row, "vm_lifecycle", "vm_id")?.parsed("phase")
        })
        .optional()?;
    Ok(phase)
}

/// The VM's latest row as a change finds it.
struct Latest {
    version: i64,
    content: Content,
    /// Whether all of it could be read.
    whole: bool,
}

impl Latest {
    fn read(row: &Row<'_>, cleaning: bool) -> rusqlite::Result<Self> {
        let row = Reading::new(row, "vm_lifecycle", "vm_id")?;
        let mut whole = true;
        let content = Content {
            phase: or(row.parsed("phase"), Phase::Creating, cleaning, &mut whole)?,
            backend: or(row.text("backend"), UNKNOWN_BACKEND.to_owned(), cleaning, &mut whole)?,
            last_error: or(row.text("last_error"), String::new(), cleaning, &mut whole)?,
            resources: or(row.json("resources_json"), None, cleaning, &mut whole)?
                .unwrap_or_default(),
            cleanup: or(row.json("cleanup_json"), None, cleaning, &mut whole)?.unwrap_or_default(),
        };
        Ok(Self { version: row.number("version")?, content, whole })
    }
}

/// The value; what cannot be read counts as this when the VM is being cleaned up.
fn or<T>(
    value: rusqlite::Result<T>,
    unreadable: T,
    cleaning: bool,
    whole: &mut bool,
) -> rusqlite::Result<T> {
    if !cleaning {
        return value;
    }
    let value = readable(value)?;
    *whole &= value.is_some();
    Ok(value.unwrap_or(unreadable))
}

fn latest(conn: &Connection, vm: VmId, change: &Change) -> Result<Option<Latest>, WriteError> {
    let cleaning =
        matches!(change.phase, Some(Phase::Cleaning | Phase::Cleaned | Phase::CleanupFailed));
    let row = conn
        .prepare_cached(&format!("{SELECT} WHERE l.vm_id = ?1 ORDER BY l.version DESC LIMIT 1"))?
        .query_row([vm.to_string()], |row| Latest::read(row, cleaning))
        .optional()?;
    Ok(row)
}

/// The VM's latest row.
pub(crate) fn head(conn: &Connection, vm: VmId) -> rusqlite::Result<Option<LifecycleRecord>> {
    conn.prepare_cached(&format!("{SELECT} WHERE l.vm_id = ?1 ORDER BY l.version DESC LIMIT 1"))?
        .query_row([vm.to_string()], read)
        .optional()
}

/// All rows of a VM, oldest first.
pub(crate) fn history(conn: &Connection, vm: VmId) -> rusqlite::Result<Vec<LifecycleRecord>> {
    conn.prepare_cached(&format!("{SELECT} WHERE l.vm_id = ?1 ORDER BY l.version"))?
        .query_map([vm.to_string()], read)?
        .collect()
}

fn read(row: &Row<'_>) -> rusqlite::Result<LifecycleRecord> {
    let row = Reading::new(row, "vm_lifecycle", "vm_id")?;
    Ok(LifecycleRecord {
        version: row.number("version")?,
        vm_id: row.parsed("vm_id")?,
        backend: row.text("backend")?,
        phase: row.parsed("phase")?,
        updated_at: row.parsed("updated_at")?,
        last_error: row.text("last_error")?,
        resources: row.json("resources_json")?.unwrap_or_default(),
        cleanup: row.json("cleanup_json")?.unwrap_or_default(),
    })
}

/// The VMs without a row whose history was last added to before this moment, and of how many the time
/// cannot be read.
pub(crate) fn forgettable(
    conn: &Connection,
    before: Timestamp,
) -> rusqlite::Result<(Vec<String>, usize)> {
    let mut query = conn.prepare_cached(
        "SELECT l.vm_id, l.updated_at FROM vm_lifecycle AS l
         WHERE NOT EXISTS (SELECT 1 FROM vms WHERE vms.id = l.vm_id)
           AND l.version = (SELECT max(version) FROM vm_lifecycle WHERE vm_id = l.vm_id)",
    )?;
    let removed = each(query.query_map([], |row| {
        let row = Reading::new(row, "vm_lifecycle", "vm_id")?;
        Ok((row.text("vm_id")?, row.parsed::<Timestamp>("updated_at")?))
    })?)?;
    let unreadable = removed.iter().filter(|row| row.is_err()).count();
    let old = removed.into_iter().flatten().filter(|(_, last)| *last < before);
    Ok((old.map(|(id, _)| id).collect(), unreadable))
}

/// Whether a row of any VM, removed or not, names a link of its own; one that nobody can read may.
pub(crate) fn any_network(conn: &Connection) -> rusqlite::Result<bool> {
    conn.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM vm_lifecycle
            WHERE NOT json_valid(resources_json)
               OR json_extract(CASE WHEN json_valid(resources_json) THEN resources_json ELSE '{}' END,
                               '$.tap_name') IS NOT NULL)
             OR EXISTS (SELECT 1 FROM subnet_allocations)",
    )?
    .query_row([], |row| row.get(0))
}

/// Drops the history of VMs without a row that was last added to before this moment; one whose time
/// cannot be read stays, and is counted.
pub(crate) fn prune(conn: &Connection, before: Timestamp) -> Result<WriteOutcome, WriteError> {
    let (old, unreadable) = forgettable(conn, before)?;
    for id in &old {
        for table in ["vm_lifecycle", "vm_lifecycle_head"] {
            conn.prepare_cached(&format!("DELETE FROM {table} WHERE vm_id = ?1"))?.execute([id])?;
        }
    }
    Ok(WriteOutcome::Pruned { vms: old.len(), unreadable })
}
