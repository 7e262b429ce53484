//! The one connection of this process that writes `state.db`.
//!
//! ```text
//! apply([op, op, op]):  BEGIN IMMEDIATE
//!                         SAVEPOINT · op · RELEASE      refused: ROLLBACK TO, the others go on
//!                         …
//!                       COMMIT                          failed: everybody gets the error
//! ```
//!
//! # Invariants
//! * An answer is given after the commit that it tells of.
//! * When the transaction is lost, every answer is that error, refusals included: a refusal may have
//!   been due to an op that is now undone.
//!
//! # On a panic
//! A panic of an op undoes the whole transaction; each answer is [`WriteError::Panicked`], which
//! may be tried again, and the connection goes on.
//!
//! # On a crash
//! A batch without its commit is gone; nobody was told that it was written.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use matchlock_model::failure::panic_text;
use matchlock_model::phase::Phase;
use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::error::WriteError;
use crate::op::{WriteOp, WriteOutcome};
use crate::points::{self, DB};
use crate::rows::{lifecycle, subnets, vms};

type Answer = Result<WriteOutcome, WriteError>;

/// The one connection of this process that writes `state.db`; made by
/// [`open_state`](crate::open_state).
#[derive(Debug)]
pub struct WriteConn {
    conn: Connection,
    path: PathBuf,
}

impl WriteConn {
    pub(crate) fn new(conn: Connection, path: PathBuf) -> Self {
        Self { conn, path }
    }

    /// Writes these ops in order in one transaction, and answers each once they are committed.
    ///
    /// A refused op leaves the others alone. When the transaction cannot be begun or committed,
    /// nothing is written and each answer is that error.
    pub fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Answer> {
        let count = ops.len();
        if count == 0 {
            return Vec::new();
        }
        let answers = self.apply_all(ops, run).unwrap_or_else(|error| vec![Err(error); count]);
        answers.into_iter().map(|answer| answer.map_err(|e| e.in_file(&self.path))).collect()
    }

    fn apply_all(&mut self, ops: Vec<WriteOp>, run: Run) -> Result<Vec<Answer>, WriteError> {
        for op in &ops {
            DB.before(points::step(op))?;
        }
        let mut tx = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // What a panic leaves half done is in the transaction, which is then rolled back.
        let answers = catch_unwind(AssertUnwindSafe(|| {
            let write = |op| {
                let step = points::step(&op);
                apply_one(&mut tx, op, run).map(|answer| (step, answer))
            };
            ops.into_iter().map(write).collect::<Result<Vec<_>, _>>()
        }))
        .map_err(|panic| WriteError::Panicked { message: panic_text(&*panic).to_owned() })??;
        tx.commit()?;
        let committed = |(step, answer): (&str, Answer)| {
            // What a test makes fail here was written all the same: a lost answer.
            DB.after(step)?;
            answer
        };
        Ok(answers.into_iter().map(committed).collect())
    }
}

/// Writes one op.
type Run = fn(&Connection, WriteOp) -> Answer;

/// One op in its savepoint. The inner result is the op's answer; the outer error means that the
/// transaction is lost.
fn apply_one(tx: &mut Transaction<'_>, op: WriteOp, run: Run) -> Result<Answer, WriteError> {
    let mut savepoint = tx.savepoint()?;
    let error = match run(&savepoint, op) {
        Ok(outcome) => {
            savepoint.commit()?;
            return Ok(Ok(outcome));
        }
        Err(error) => error,
    };
    // On a full disk and the like SQLite gives the whole transaction up by itself.
    if savepoint.is_autocommit() {
        return Err(error);
    }
    savepoint.rollback()?;
    savepoint.commit()?;
    Ok(Err(error))
}

fn run(conn: &Connection, op: WriteOp) -> Answer {
    match op {
        WriteOp::InsertVm { record } => vms::insert(conn, &record),
        WriteOp::SetPhase { vm, epoch, phase, last_error, backend, resources, cleanup, at } => {
            vms::check_epoch(conn, vm, epoch)?;
            let change = lifecycle::Change {
                phase: Some(phase),
                last_error,
                backend,
                resources: resources.map(lifecycle::ResourceChange::All),
                cleanup,
            };
            lifecycle::append(conn, vm, change, at)
        }
        WriteOp::SetHypervisor { vm, epoch, hypervisor, started, at } => {
            vms::check_epoch(conn, vm, epoch)?;
            vms::set_hypervisor(conn, vm, &hypervisor)?;
            let change = lifecycle::Change {
                resources: Some(lifecycle::ResourceChange::Hypervisor(hypervisor, started)),
                ..lifecycle::Change::default()
            };
            lifecycle::append(conn, vm, change, at)
        }
        WriteOp::SetExit { vm, epoch, code } => {
            vms::check_epoch(conn, vm, epoch)?;
            vms::set_exit(conn, vm, code)
        }
        WriteOp::RaiseEpoch { vm, pid, at } => vms::raise_epoch(conn, vm, pid, at),
        WriteOp::AllocateSubnet { vm, epoch, pool, avoid, at } => {
            vms::check_epoch(conn, vm, epoch)?;
            // Asked for by an effect that was cancelled since, it would outlive its VM.
            let phase = lifecycle::latest_phase(conn, vm)?.unwrap_or(Phase::Creating);
            if phase != Phase::Creating {
                return Err(WriteError::NotCreating { vm, phase });
            }
            let subnet = subnets::allocate(conn, vm, &pool, &avoid, at)?;
            let change = lifecycle::Change {
                resources: Some(lifecycle::ResourceChange::Subnet(subnet)),
                ..lifecycle::Change::default()
            };
            lifecycle::append(conn, vm, change, at)?;
            Ok(WriteOutcome::Subnet(subnet))
        }
        WriteOp::ReleaseSubnet { vm, epoch } => {
            vms::check_epoch(conn, vm, epoch)?;
            let held = subnets::release(conn, vm)?;
            Ok(WriteOutcome::Released { held })
        }
        WriteOp::WantRemoval { vm, at } => vms::want_removal(conn, vm, at),
        WriteOp::RemoveVm { vm, epoch } => {
            vms::check_epoch(conn, vm, epoch)?;
            vms::remove(conn, vm)
        }
        WriteOp::PruneHistory { before } => lifecycle::prune(conn, before),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use jiff::Timestamp;
    use matchlock_model::id::{OwnerEpoch, VmId};
    use matchlock_model::identity::{Namespaces, ProcessIdentity};
    use matchlock_model::phase::Phase;
    use matchlock_model::record::Resources;
    use tempfile::TempDir;

    use super::*;
    use crate::busy;
    use crate::child::{self, Child};
    use crate::connect::{self, Access};
    use crate::error::DbFault;
    use crate::op::NewVm;
    use crate::open_state;

    fn insert(number: u32, config_json: String) -> WriteOp {
        WriteOp::InsertVm {
            record: Box::new(NewVm {
                id: VmId::new(number),
                image: String::new(),
                config_json,
                owner: ProcessIdentity { pid: 1, start_ticks: 1, boot_id: String::new() },
                namespaces: Namespaces { net: String::new(), pid: String::new() },
                ephemeral: false,
                backend: "fake".to_owned(),
                resources: Resources::default(),
                created_at: Timestamp::UNIX_EPOCH,
            }),
        }
    }

    fn illegal(number: u32) -> WriteOp {
        WriteOp::SetPhase {
            vm: VmId::new(number),
            epoch: OwnerEpoch(1),
            phase: Phase::Running,
            last_error: None,
            backend: None,
            resources: None,
            cleanup: Vec::new(),
            at: Timestamp::UNIX_EPOCH,
        }
    }

    fn vms(writer: &WriteConn) -> i64 {
        let count = "SELECT count(*) FROM vms";
        writer.conn.query_row(count, [], |row| row.get(0)).unwrap()
    }

    fn fault(answer: &Answer) -> DbFault {
        match answer {
            Err(WriteError::Database { fault, .. }) => *fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn when_the_commit_fails_everybody_gets_the_error_and_nothing_is_written() {
        let home = TempDir::new().unwrap();
        let mut writer = open_state(home.path()).unwrap();
        writer.conn.commit_hook(Some(|| true)).unwrap();
        let batch = || vec![insert(1, String::new()), illegal(1), insert(2, String::new())];
        let answers = writer.apply(batch());
        assert_eq!(answers.len(), 3);
        for answer in &answers {
            assert_eq!(fault(answer), DbFault::Other);
            assert_eq!(*answer, answers[0]);
        }
        assert_eq!(vms(&writer), 0);
        writer.conn.commit_hook(None::<fn() -> bool>).unwrap();
        let answers = writer.apply(batch());
        assert_eq!(answers[0], Ok(WriteOutcome::Version(1)));
        assert!(matches!(answers[1], Err(WriteError::Transition(_))));
        assert_eq!(vms(&writer), 2);
    }

    #[test]
    fn a_panic_undoes_the_batch_and_may_be_tried_again() {
        let home = TempDir::new().unwrap();
        let mut writer = open_state(home.path()).unwrap();
        let batch = || vec![insert(1, String::new()), insert(2, String::new())];
        let second_panics: Run = |conn, op| match &op {
            WriteOp::InsertVm { record } if record.id == VmId::new(2) => {
                run(conn, op).unwrap();
                panic!("on purpose")
            }
            _ => run(conn, op),
        };
        let lost = writer.apply_all(batch(), second_panics).unwrap_err();
        assert_eq!(lost, WriteError::Panicked { message: "on purpose".to_owned() });
        assert!(lost.retryable());
        assert_eq!(vms(&writer), 0);
        for answer in writer.apply(batch()) {
            assert_eq!(answer, Ok(WriteOutcome::Version(1)));
        }
    }

    #[test]
    fn a_full_disk_fails_only_what_does_not_fit_and_may_be_retried() {
        let home = TempDir::new().unwrap();
        let mut writer = open_state(home.path()).unwrap();
        let pages = |writer: &WriteConn, most: i64| {
            let set = format!("PRAGMA max_page_count = {most}");
            let now: i64 = writer.conn.query_row(&set, [], |row| row.get(0)).unwrap();
            now
        };
        // Less than there are pages means as many as there are.
        let used = pages(&writer, 1);
        pages(&writer, used + 8);
        let big = "x".repeat(200_000);
        let answers = writer.apply(vec![
            insert(1, String::new()),
            insert(2, big.clone()),
            insert(3, String::new()),
        ]);
        assert_eq!(fault(&answers[1]), DbFault::Full);
        assert!(answers[1].as_ref().unwrap_err().retryable());
        // SQLite may keep the rest of the batch or give it up; what is told is what is so.
        let told = answers.iter().filter(|answer| answer.is_ok()).count();
        assert_eq!(vms(&writer), i64::try_from(told).unwrap());
        pages(&writer, 1_000_000);
        let again = writer.apply(vec![insert(2, big)]);
        assert_eq!(again, [Ok(WriteOutcome::Version(1))]);
    }

    /// Begins to write, and does not end it until it is told to go.
    #[test]
    #[ignore = "a helper process of the test below"]
    fn holds_the_lock() {
        let Some(home) = child::task() else { return };
        let writer = open_state(home.as_ref()).unwrap();
        writer.conn.execute_batch("BEGIN IMMEDIATE").unwrap();
        child::tell("locked");
        child::await_go();
    }

    #[test]
    fn a_database_that_another_process_locks_for_too_long_is_retryable() {
        const CAP_MILLIS: u64 = 30;
        let home = TempDir::new().unwrap();
        let mut writer = open_state(home.path()).unwrap();
        let path = home.path().display().to_string();
        let mut other = Child::start("write::tests::holds_the_lock", &path);
        assert_eq!(other.hear().unwrap(), "locked");
        writer.conn.busy_handler(Some(busy::handler::<CAP_MILLIS>)).unwrap();
        let began = Instant::now();
        let answers = writer.apply(vec![insert(1, String::new()), insert(2, String::new())]);
        assert!(began.elapsed() >= Duration::from_millis(CAP_MILLIS), "it did not wait");
        for answer in &answers {
            assert_eq!(fault(answer), DbFault::Busy);
            let error = answer.as_ref().unwrap_err();
            assert!(error.retryable());
            let line = error.to_string();
            assert!(
                line.contains("another process held its lock for too long, try again"),
                "{line}"
            );
            assert!(line.starts_with(&format!("{path}/state.db could not be written: ")), "{line}");
            assert!(error.is_busy());
        }
        // It waits as long as it takes when the cap allows, and gets its turn.
        connect::prepare(&writer.conn, Access::ReadWrite).unwrap();
        other.go();
        assert!(writer.apply(vec![insert(1, String::new())])[0].is_ok());
        assert!(other.end());
    }
}
