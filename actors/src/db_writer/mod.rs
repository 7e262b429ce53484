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
//! 3. At most one thread writes: a restarted actor joins the old thread first.
//!
//! # Failure
//! A panic of the thread gives its callers [`DbError::Lost`]: what they wrote may or may not be
//! there. The actor notices at the next write and fails, which restarts it with a new thread.
//! Draining the actor answers everything that was sent before.

mod actor;

pub use actor::{DbWriter, DbWriterArgs, DbWriterMsg, OpenStore, ThreadSlot, join_thread};

use std::time::Duration;

use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_store::{WriteError, WriteOp, WriteOutcome};

use crate::handle::{CallError, ServiceHandle};

/// How many operations may wait for the thread: some hundred VMs changing phase at once.
pub const QUEUE_OPS: usize = 1024;

/// How many operations are committed at once at most.
pub const BATCH_OPS: usize = 256;

/// How long a caller waits: longer than the store's own wait for a lock held by another process.
pub const WRITE_LIMIT: Duration = Duration::from_secs(20);

/// Why a write was not confirmed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DbError {
    /// The store refused or failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Too many writes wait.
    #[error("the database writer is overloaded: {QUEUE_OPS} operations wait")]
    Overloaded,
    /// The writer died with the operation; it may or may not be there.
    #[error("the database writer failed: whether the change was written is unknown")]
    Lost,
    /// The writer gave no answer; the operation may or may not be there.
    #[error("the database writer gave no answer")]
    Call(#[from] CallError),
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        let kind = match &error {
            DbError::Write(WriteError::Fenced { .. }) => FailureKind::Fenced,
            DbError::Write(WriteError::NotFound { .. }) => FailureKind::NotFound,
            DbError::Call(CallError::Timeout { .. }) => FailureKind::Timeout,
            DbError::Write(_) | DbError::Overloaded => FailureKind::Host,
            DbError::Lost | DbError::Call(_) => FailureKind::Internal,
        };
        Self::from_error(kind, &error).context("could not write the VM's state")
    }
}

/// Writes to `state.db`.
#[derive(Debug, Clone)]
pub struct DbHandle(pub ServiceHandle<DbWriterMsg>);

impl DbHandle {
    /// Writes one operation; returns after it was committed.
    ///
    /// # Errors
    /// When it was refused, or its fate is unknown ([`DbError::Lost`], [`DbError::Call`]).
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
