//! The only writer of `state.db` in this process.
//!
//! ```text
//!   callers ──Write──► DbWriter (actor) ──bounded queue──► thread "db-writer", owns the WriteConn
//!      ▲                                                     takes all that is queued, commits once
//!      └──────────────────── outcome, after the commit ◄─────────┘
//! ```
//!
//! # Invariants
//! 1. An answer is given after the commit, never before.
//! 2. At most [`QUEUE_OPS`] operations wait; more are refused, retryably.
//! 3. A write that has waited for longer than [`QUEUE_WAIT`] is refused, so that an answer comes
//!    within [`WRITE_LIMIT`] and tells what is so.
//! 4. At most one thread writes: a restarted actor joins the old thread first.
//!
//! # Failure
//! * A panic of an op is the store's to undo: the callers of its batch are told that nothing was
//!   written, and the thread goes on.
//! * Any other panic of the thread ends this life, and the root starts the next. The callers whose
//!   batch it had get [`CallError::Died`]: what they asked for may be there or not. Those whose ops
//!   still waited get [`DbError::Ended`]: theirs is not there.
//! * Draining the actor, and then joining the thread, answers everything that was sent before.

mod actor;
mod runner;

pub use actor::{DbWriter, DbWriterArgs, DbWriterMsg, OpenStore, Store};
pub use runner::{Moment, Pace, Runner, ThreadSlot, join_thread};

use std::time::Duration;

use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_store::{WriteError, WriteOp, WriteOutcome};

use crate::handle::{CallError, ServiceHandle};

/// How many operations may wait for the thread: some hundred VMs changing phase at once.
pub const QUEUE_OPS: usize = 1024;

/// How many operations are committed at once at most.
pub const BATCH_OPS: usize = 256;

/// How long a caller waits: longer than a write may wait for the thread, and then for a lock that
/// another process holds ([`matchlock_store::LOCK_WAIT`]), so that it is told what came of it.
pub const WRITE_LIMIT: Duration = Duration::from_secs(22);

/// How long a write may wait for the thread; then it is refused, not written.
pub const QUEUE_WAIT: Duration = Duration::from_secs(5);

/// Why a write was not confirmed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DbError {
    /// The store refused or failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Too many writes wait; this one was not taken.
    #[error("the database writer is overloaded, try again: {QUEUE_OPS} operations wait")]
    Overloaded,
    /// The writer came to the operation too late, and did not write it.
    #[error("the database writer was held up for too long, nothing was changed, try again")]
    Delayed,
    /// The writer failed before it took the operation: it was not written.
    #[error("the database writer failed before it wrote this, nothing was changed, try again")]
    Ended,
    /// The writer's last thread failed with what it had; that may or may not be there.
    #[error("the database writer failed: whether the last change was written is unknown")]
    Lost,
    /// The writer gave no answer; the operation may or may not be there.
    #[error("the database writer gave no answer, whether the change was written is unknown")]
    Call(#[from] CallError),
}

impl DbError {
    /// Whether nothing was written and the same write may succeed if it is tried again.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Write(error) => error.retryable(),
            Self::Overloaded | Self::Delayed | Self::Ended => true,
            Self::Lost | Self::Call(_) => false,
        }
    }
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        let kind = match &error {
            DbError::Write(WriteError::Fenced { .. }) => FailureKind::Fenced,
            DbError::Write(WriteError::NotFound { .. }) => FailureKind::NotFound,
            DbError::Call(CallError::Timeout { .. }) => FailureKind::Timeout,
            DbError::Write(WriteError::Panicked { .. }) => FailureKind::Internal,
            DbError::Write(error) if error.is_busy() => FailureKind::Busy,
            DbError::Write(_) | DbError::Overloaded | DbError::Delayed => FailureKind::Host,
            DbError::Ended | DbError::Lost | DbError::Call(_) => FailureKind::Internal,
        };
        let failure = Self::from_error(kind, &error);
        match &error {
            // It is not about writing.
            DbError::Write(WriteError::NoFreeSubnet { .. }) => failure,
            _ => failure.context("could not write the VM's state"),
        }
    }
}

/// Writes to `state.db`.
#[derive(Debug, Clone)]
pub struct DbHandle(pub ServiceHandle<DbWriterMsg>);

impl DbHandle {
    /// Writes one operation; returns after it was committed.
    ///
    /// # Errors
    /// When it was refused, was not taken ([`DbError::retryable`]), or its fate is unknown
    /// ([`DbError::Call`]).
    pub async fn write(&self, op: WriteOp) -> Result<WriteOutcome, DbError> {
        self.0.call(|reply| DbWriterMsg::Write { op: Box::new(op), reply }, WRITE_LIMIT).await?
    }

    /// Removes a VM's row; one that is gone already is fine.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn remove_vm(&self, vm: VmId, epoch: OwnerEpoch) -> Result<(), DbError> {
        match self.write(WriteOp::RemoveVm { vm, epoch }).await {
            Ok(_) | Err(DbError::Write(WriteError::NotFound { .. })) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
