//! What is there, told truthfully without writing anything: the rows, and who lives.
//!
//! # Invariants
//! * Row and lock are two looks: a VM whose owner ends between them would seem to have crashed.
//!   Whoever finds no owner reads the row again, which then says how it ended.
//! * A row that cannot be read keeps no other VM from being told.

use std::collections::HashMap;
use std::sync::Arc;

use matchlock_host::owner_lock::OwnerLocks;
use matchlock_host::process::Processes;
use matchlock_model::id::VmId;
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::record::{LifecycleRecord, VmRecord, VmSummary};
use matchlock_model::view::{Sighting, Status};
use matchlock_store::{BadRow, OpenError, ReadError, ReadPool};

use super::error::CliError;
use crate::node::boot::Opened;
use crate::node::config::NodeConfig;
use crate::node::wiring;

/// What a status is derived from.
pub(super) trait Row {
    fn id(&self) -> VmId;
    fn pid(&self) -> i32;
    fn phase(&self) -> Phase;
    fn last_error(&self) -> &str;
    fn removal_wanted(&self) -> bool;
    fn hypervisor(&self) -> Option<&ProcessIdentity>;
    fn namespaces(&self) -> Option<&Namespaces>;
}

/// The columns that both kinds of rows have.
macro_rules! row {
    ($row:ty $(, $part:tt)?) => {
        impl Row for $row {
            fn id(&self) -> VmId {
                self$(.$part)?.id
            }

            fn pid(&self) -> i32 {
                self$(.$part)?.pid
            }

            fn phase(&self) -> Phase {
                self$(.$part)?.phase
            }

            fn last_error(&self) -> &str {
                &self$(.$part)?.last_error
            }

            fn removal_wanted(&self) -> bool {
                self$(.$part)?.removal_wanted
            }

            fn hypervisor(&self) -> Option<&ProcessIdentity> {
                self$(.$part)?.hypervisor.as_ref()
            }

            fn namespaces(&self) -> Option<&Namespaces> {
                self$(.$part)?.namespaces.as_ref()
            }
        }
    };
}

row!(VmRecord);
row!(VmSummary);
// A row and the history of the same moment.
row!((VmRecord, Vec<LifecycleRecord>), 0);

/// A VM as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown<R> {
    pub(super) status: Status,
    /// Whether its owner lives, and has something left to own.
    pub(super) is_owned: bool,
    pub(super) record: R,
}

impl<R: Row> Shown<R> {
    /// The owner's pid while there is an owner, 0 otherwise.
    pub(super) fn pid(&self) -> i32 {
        if self.is_owned { self.record.pid() } else { 0 }
    }
}

/// All VMs, as far as they can be told.
#[derive(Debug, Default)]
pub(super) struct AllVms {
    /// Newest first.
    pub(super) shown: Vec<Shown<VmSummary>>,
    /// The rows that cannot be read.
    pub(super) unreadable: Vec<BadRow>,
}

/// The rows, and who lives. Writes nothing.
pub(super) struct Looking {
    reader: ReadPool,
    host: Host,
}

/// Who lives on this host.
struct Host {
    locks: Arc<dyn OwnerLocks>,
    processes: Arc<dyn Processes>,
    /// The namespace that our process ids are of.
    pid_namespace: String,
}

impl Host {
    fn new(config: &NodeConfig) -> Result<Self, CliError> {
        let processes = wiring::processes()?;
        let namespaces = processes.own_namespaces().map_err(|e| CliError::failure(&e))?;
        Ok(Self { locks: wiring::owner_locks(config)?, processes, pid_namespace: namespaces.pid })
    }

    fn is_held(&self, vm: VmId) -> Result<bool, CliError> {
        self.locks.is_held(vm).map_err(|e| CliError::failure(&e))
    }

    /// Whether the VM's hypervisor was looked for and is gone. One of another pid namespace cannot be
    /// looked for.
    fn hypervisor_gone(&self, row: &impl Row) -> bool {
        let Some(hypervisor) = row.hypervisor() else { return false };
        if row.namespaces().is_none_or(|recorded| recorded.pid != self.pid_namespace) {
            return false;
        }
        match self.processes.is_alive(hypervisor) {
            Ok(lives) => !lives,
            // What its owner says is shown then; one that cannot be looked at hides no other.
            Err(error) => {
                tracing::warn!(vm_id = %row.id(), %error, "its hypervisor could not be looked at");
                false
            }
        }
    }

    /// The VM of this row with the status that is true now.
    fn shown<R: Row>(&self, record: R, owner_lives: bool) -> Shown<R> {
        let phase = record.phase();
        let is_up = owner_lives && phase == Phase::Running;
        let status = Status::derive(Sighting {
            phase,
            last_error: record.last_error(),
            removal_wanted: record.removal_wanted(),
            owner_lives,
            hypervisor_gone: is_up && self.hypervisor_gone(&record),
        });
        let failed = matches!(
            phase,
            Phase::CreateFailed | Phase::StartFailed | Phase::StopFailed | Phase::CleanupFailed
        );
        let is_owned = owner_lives && phase != Phase::Cleaned && !failed;
        Shown { status, is_owned, record }
    }
}

/// Migrates what an older version stored; makes nothing where nothing was stored.
pub(super) fn migrate(config: &NodeConfig) -> Result<(), CliError> {
    match ReadPool::open(&config.home) {
        Err(OpenError::Older { .. }) => drop(Opened::open(config.clone())?),
        Err(error) => return Err(CliError::failure(&error)),
        Ok(_) => {}
    }
    Ok(())
}

fn failed(error: ReadError) -> CliError {
    CliError::failure(&error)
}

impl Looking {
    /// `None` if nothing was ever stored.
    pub(super) fn begin(config: &NodeConfig) -> Result<Option<Self>, CliError> {
        let reader = ReadPool::open(&config.home).map_err(|e| CliError::failure(&e))?;
        let Some(reader) = reader else { return Ok(None) };
        Ok(Some(Self { reader, host: Host::new(config)? }))
    }

    /// The same for whoever is going to change something.
    pub(super) fn begin_to_write(config: &NodeConfig) -> Result<Option<Self>, CliError> {
        migrate(config)?;
        Self::begin(config)
    }

    /// This VM with the status that is true now, if it has a row.
    pub(super) async fn at(&self, id: VmId) -> Result<Option<Shown<VmRecord>>, CliError> {
        let Some(record) = self.reader.vm(id).await.map_err(failed)? else { return Ok(None) };
        settled(&self.host, record, self.reader.vm(id)).await
    }

    /// All VMs with the status that is true now.
    pub(super) async fn at_all(&self) -> Result<AllVms, CliError> {
        let mut all = AllVms::default();
        let mut rows = Vec::new();
        let (vms, look) = self.reader.look_at_vms().await.map_err(failed)?;
        for row in vms {
            match row {
                Ok(row) => rows.push(row),
                Err(bad) => all.unreadable.push(bad),
            }
        }
        let ids: Vec<VmId> = rows.iter().map(|row| row.id).collect();
        let held = self.host.locks.are_held(&ids).map_err(|e| CliError::failure(&e))?;
        // One more look at all rows, after the last lock: not one for each that has no owner.
        let unsure = |row: &VmSummary, held: bool| !held && row.phase != Phase::Cleaned;
        let later = if rows.iter().zip(&held).any(|(row, held)| unsure(row, *held)) {
            look.again().await.map_err(failed)?
        } else {
            None
        };
        let mut later: Option<HashMap<VmId, VmSummary>> =
            later.map(|rows| rows.into_iter().flatten().map(|row| (row.id, row)).collect());
        for (row, held) in rows.into_iter().zip(held) {
            let record = match &mut later {
                // One that is not there any more was removed meanwhile.
                Some(later) if unsure(&row, held) => later.remove(&row.id),
                _ => Some(row),
            };
            all.shown.extend(record.map(|record| self.host.shown(record, held)));
        }
        Ok(all)
    }

    /// This VM and what happened to it, both of one moment; a removed VM has its history alone.
    pub(super) async fn with_history(
        &self,
        id: VmId,
    ) -> Result<(Option<Shown<VmRecord>>, Vec<LifecycleRecord>), CliError> {
        let (record, history) = self.reader.vm_and_history(id).await.map_err(failed)?;
        let Some(record) = record else { return Ok((None, history)) };
        let again = async {
            let (record, history) = self.reader.vm_and_history(id).await?;
            Ok(record.map(|record| (record, history)))
        };
        match settled(&self.host, (record, history), again).await? {
            Some(Shown { status, is_owned, record: (record, history) }) => {
                Ok((Some(Shown { status, is_owned, record }), history))
            }
            // Removed for good: its history is all there is to read.
            None => Ok((None, self.reader.history(id).await.map_err(failed)?)),
        }
    }

    /// Whether a VM was ever there, as far as its history is kept.
    async fn has_history(&self, id: VmId) -> Result<bool, CliError> {
        Ok(self.reader.lifecycle_head(id).await.map_err(failed)?.is_some())
    }

    /// The VMs that have a row, whatever the row says; and the rows of which nobody can tell which VM
    /// they are of.
    pub(super) async fn ids(&self) -> Result<(Vec<VmId>, Vec<BadRow>), CliError> {
        let (mut ids, mut bad) = (Vec::new(), Vec::new());
        for row in self.reader.vm_ids().await.map_err(failed)? {
            match row {
                Ok(id) => ids.push(id),
                Err(row) => bad.push(row),
            }
        }
        Ok((ids, bad))
    }

    /// Whether somebody wants a VM removed that is still there.
    pub(super) async fn wants_removals(&self) -> Result<bool, CliError> {
        Ok(!self.reader.vms_to_remove().await.map_err(failed)?.is_empty())
    }

    /// Whether the VM's owner lives.
    pub(super) fn is_held(&self, vm: VmId) -> Result<bool, CliError> {
        self.host.is_held(vm)
    }

    /// The rows of which nobody can tell which VM they are of.
    pub(super) async fn without_id(&self) -> Result<Vec<BadRow>, CliError> {
        Ok(self.ids().await?.1)
    }
}

/// The VM with its status, by its row as it was read and as it is when it is read again; `None` when
/// it is gone by then.
async fn settled<R: Row>(
    host: &Host,
    row: R,
    again: impl Future<Output = Result<Option<R>, ReadError>>,
) -> Result<Option<Shown<R>>, CliError> {
    let owner_lives = host.is_held(row.id())?;
    let row = if owner_lives || row.phase() == Phase::Cleaned {
        Some(row)
    } else {
        again.await.map_err(failed)?
    };
    Ok(row.map(|record| host.shown(record, owner_lives)))
}

/// All VMs with the status that is true now. Writes nothing.
pub(super) async fn statuses(config: &NodeConfig) -> Result<AllVms, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.at_all().await,
        None => Ok(AllVms::default()),
    }
}

/// This VM with the status that is true now, if it has a row. Writes nothing.
pub(super) async fn status_of(
    config: &NodeConfig,
    id: VmId,
) -> Result<Option<Shown<VmRecord>>, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.at(id).await,
        None => Ok(None),
    }
}

/// A VM of which nothing is known.
pub(super) fn not_found(id: VmId) -> CliError {
    CliError::message(format_args!("VM {id} not found; see `matchlock list`"))
}

/// A VM that has no row: never had one, or has none any more.
pub(super) async fn not_there(config: &NodeConfig, id: VmId) -> CliError {
    let was_there = match Looking::begin(config) {
        Ok(Some(looking)) => looking.has_history(id).await,
        Ok(None) => Ok(false),
        Err(error) => Err(error),
    };
    match was_there {
        Ok(true) => CliError::message(format_args!(
            "VM {id} was removed; `matchlock inspect {id}` shows its history"
        )),
        Ok(false) => not_found(id),
        Err(error) => error,
    }
}

/// A VM that would have to run for what was asked.
pub(super) fn not_running(id: VmId, status: Status) -> CliError {
    match status {
        Status::Crashed => CliError::message(format_args!(
            "VM {id} is not running: its owner died; run `matchlock gc`"
        )),
        status => {
            CliError::message(format_args!("VM {id} is not running (status: {})", status.name()))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use matchlock_host::owner_lock::{HeldLock, OwnerLockError};
    use matchlock_host::process::FakeProcesses;

    use super::*;

    /// The owner's row, and an owner that finishes its VM just before its lock is looked at.
    #[derive(Debug)]
    struct EndsMeanwhile {
        row: Arc<Mutex<Option<VmSummary>>>,
        end: Option<Phase>,
    }

    impl OwnerLocks for EndsMeanwhile {
        fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
            Err(OwnerLockError::Held { vm })
        }

        fn try_acquire_cleaner(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
            Err(OwnerLockError::Held { vm })
        }

        fn is_being_cleaned(&self, _vm: VmId) -> Result<bool, OwnerLockError> {
            Ok(false)
        }

        fn is_held(&self, _vm: VmId) -> Result<bool, OwnerLockError> {
            let mut row = self.row.lock().unwrap();
            let before = row.take();
            *row = self.end.and_then(|phase| before.map(|row| VmSummary { phase, ..row }));
            Ok(false)
        }
    }

    fn row(phase: Phase) -> VmSummary {
        let created_at = jiff::Timestamp::UNIX_EPOCH;
        VmSummary {
            id: VmId::new(1),
            pid: 7,
            phase,
            image: "i".into(),
            created_at,
            last_error: String::new(),
            hypervisor: None,
            namespaces: None,
            removal_wanted: false,
            exit_code: None,
        }
    }

    async fn seen(phase: Phase, end: Option<Phase>) -> Option<Status> {
        let stored = Arc::new(Mutex::new(Some(row(phase))));
        let host = Host {
            locks: Arc::new(EndsMeanwhile { row: stored.clone(), end }),
            processes: Arc::new(FakeProcesses::default()),
            pid_namespace: "4:1".into(),
        };
        let again = async { Ok(stored.lock().unwrap().clone()) };
        settled(&host, row(phase), again).await.unwrap().map(|shown| shown.status)
    }

    #[tokio::test]
    async fn an_owner_that_ends_cleanly_between_the_looks_has_not_crashed() {
        for phase in [Phase::Starting, Phase::Running, Phase::Stopping, Phase::Cleaning] {
            assert_eq!(seen(phase, Some(Phase::Cleaned)).await, Some(Status::Stopped), "{phase}");
            assert_eq!(seen(phase, None).await, None, "{phase}: removed with its command");
            assert_eq!(seen(phase, Some(phase)).await, Some(Status::Crashed), "{phase}");
        }
        assert_eq!(seen(Phase::StopFailed, Some(Phase::Cleaned)).await, Some(Status::Stopped));
    }
}
