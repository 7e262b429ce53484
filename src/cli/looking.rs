//! What is there, told truthfully without writing anything: the rows, and who lives.
//!
//! # Invariants
//! * Row and lock are two looks: a VM whose owner ends between them would seem to have crashed.
//!   Whoever finds no owner reads the row again, which then says how it ended.
//! * A row that cannot be read keeps no other VM from being told.

use std::collections::HashMap;
use std::sync::Arc;

use matchlock_host::owner_lock::OwnerLocks;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::record::{LifecycleRecord, VmRecord, VmSummary};
use matchlock_model::view::Status;
use matchlock_store::{BadRow, ReadError, ReadPool};

use super::error::CliError;
use crate::node::config::NodeConfig;
use crate::node::wiring;

/// What a status is derived from.
pub(super) trait Row {
    fn id(&self) -> VmId;
    fn phase(&self) -> Phase;
    fn pid(&self) -> i32;
}

impl Row for VmRecord {
    fn id(&self) -> VmId {
        self.id
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn pid(&self) -> i32 {
        self.pid
    }
}

impl Row for VmSummary {
    fn id(&self) -> VmId {
        self.id
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn pid(&self) -> i32 {
        self.pid
    }
}

/// A row and the history of the same moment.
impl Row for (VmRecord, Vec<LifecycleRecord>) {
    fn id(&self) -> VmId {
        self.0.id
    }

    fn phase(&self) -> Phase {
        self.0.phase
    }

    fn pid(&self) -> i32 {
        self.0.pid
    }
}

/// A VM as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown<R> {
    pub(super) status: Status,
    pub(super) record: R,
}

impl<R: Row> Shown<R> {
    /// The owner's pid while there is an owner, 0 otherwise.
    pub(super) fn pid(&self) -> i32 {
        match self.status {
            Status::Starting | Status::Running | Status::Stopping => self.record.pid(),
            Status::Stopped | Status::Crashed | Status::Failed => 0,
        }
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
    locks: Arc<dyn OwnerLocks>,
}

fn failed(error: ReadError) -> CliError {
    CliError::failure(&error)
}

impl Looking {
    /// `None` if nothing was ever stored.
    pub(super) fn begin(config: &NodeConfig) -> Result<Option<Self>, CliError> {
        let reader = ReadPool::open(&config.home).map_err(|e| CliError::failure(&e))?;
        let Some(reader) = reader else { return Ok(None) };
        Ok(Some(Self { reader, locks: wiring::owner_locks(config)? }))
    }

    /// This VM with the status that is true now, if it has a row.
    pub(super) async fn at(&self, id: VmId) -> Result<Option<Shown<VmRecord>>, CliError> {
        let Some(record) = self.reader.vm(id).await.map_err(failed)? else { return Ok(None) };
        settled(&*self.locks, record, self.reader.vm(id)).await
    }

    /// All VMs with the status that is true now.
    pub(super) async fn at_all(&self) -> Result<AllVms, CliError> {
        let mut all = AllVms::default();
        let mut looked = Vec::new();
        for row in self.reader.vms().await.map_err(failed)? {
            match row {
                Ok(row) => {
                    let held = self.locks.is_held(row.id).map_err(|e| CliError::failure(&e))?;
                    looked.push((row, held));
                }
                Err(bad) => all.unreadable.push(bad),
            }
        }
        // One more look at all rows, after the last lock: not one for each that has no owner.
        let unsure = |(row, held): &(VmSummary, bool)| !held && row.phase != Phase::Cleaned;
        let later: HashMap<VmId, VmSummary> = if looked.iter().any(unsure) {
            let rows = self.reader.vms().await.map_err(failed)?;
            rows.into_iter().flatten().map(|row| (row.id, row)).collect()
        } else {
            HashMap::new()
        };
        for (row, held) in looked {
            let record =
                if unsure(&(row.clone(), held)) { later.get(&row.id).cloned() } else { Some(row) };
            // One that is not there any more was removed meanwhile.
            all.shown.extend(
                record.map(|record| Shown { status: Status::derive(record.phase, held), record }),
            );
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
        match settled(&*self.locks, (record, history), again).await? {
            Some(Shown { status, record: (record, history) }) => {
                Ok((Some(Shown { status, record }), history))
            }
            // Removed for good: its history is all there is to read.
            None => Ok((None, self.reader.history(id).await.map_err(failed)?)),
        }
    }

    /// Whether the VM has a row, whatever the row says.
    pub(super) async fn has(&self, id: VmId) -> Result<bool, CliError> {
        let ids = self.reader.vm_ids().await.map_err(failed)?;
        Ok(ids.into_iter().flatten().any(|there| there == id))
    }

    /// The rows of which nobody can tell which VM they are of.
    pub(super) async fn without_id(&self) -> Result<Vec<BadRow>, CliError> {
        let ids = self.reader.vm_ids().await.map_err(failed)?;
        Ok(ids.into_iter().filter_map(Result::err).collect())
    }
}

/// The VM with its status, by its row as it was read and as it is when it is read again; `None` when
/// it is gone by then.
async fn settled<R: Row>(
    locks: &dyn OwnerLocks,
    row: R,
    again: impl Future<Output = Result<Option<R>, ReadError>>,
) -> Result<Option<Shown<R>>, CliError> {
    let owner_lives = locks.is_held(row.id()).map_err(|e| CliError::failure(&e))?;
    let row = if owner_lives || row.phase() == Phase::Cleaned {
        Some(row)
    } else {
        again.await.map_err(failed)?
    };
    Ok(row.map(|record| Shown { status: Status::derive(record.phase(), owner_lives), record }))
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

/// A VM that has no row.
pub(super) fn not_found(id: VmId) -> CliError {
    CliError::message(format_args!("VM {id} not found; see `matchlock list`"))
}

/// A VM that would have to run for what was asked.
pub(super) fn not_running(id: VmId, status: Status) -> CliError {
    CliError::message(format_args!("VM {id} is not running (status: {})", status.name()))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use matchlock_host::owner_lock::{HeldLock, OwnerLockError};

    use super::*;

    /// The owner's row, and an owner that finishes its VM just before its lock is looked at.
    #[derive(Debug)]
    struct EndsMeanwhile<'a> {
        row: &'a Mutex<Option<VmSummary>>,
        end: Option<Phase>,
    }

    impl OwnerLocks for EndsMeanwhile<'_> {
        fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
            Err(OwnerLockError::Held { vm })
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
        VmSummary { id: VmId::new(1), pid: 7, phase, image: "i".into(), created_at }
    }

    async fn seen(phase: Phase, end: Option<Phase>) -> Option<Status> {
        let stored = Mutex::new(Some(row(phase)));
        let locks = EndsMeanwhile { row: &stored, end };
        let again = async { Ok(stored.lock().unwrap().clone()) };
        settled(&locks, row(phase), again).await.unwrap().map(|shown| shown.status)
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
