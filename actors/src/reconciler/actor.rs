//! The actor.

use std::fmt;

use jiff::Timestamp;
use matchlock_host::owner_lock::HeldLock;
use matchlock_model::failure::Failure;
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Goal;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::watch;

use super::report::VmReport;
use super::work;
use crate::deps::Deps;
use crate::points;

/// Which VMs to look at.
pub enum Target {
    /// One, by its id.
    One(VmId),
    /// Every VM that has a row, a directory or a marked process.
    All,
    /// Every VM that somebody wants removed, and that was not removed then.
    Wanted,
    /// One whose owner, or cleaner, holds its lock and does not answer: it is stopped, or hangs. What
    /// it may still record when it goes on is refused by the epoch.
    TakeOver(VmId),
    /// One whose lock the caller hands over.
    Owned {
        /// Which.
        vm: VmId,
        /// Its lock; `None` takes it.
        lock: Option<HeldLock>,
        /// Why its owner gave it up.
        cause: Failure,
    },
}

/// What the reconciler is asked.
pub enum ReconcilerMsg {
    /// Compensate.
    Reconcile {
        /// For which VMs.
        target: Target,
        /// How far.
        goal: Goal,
        /// Is told how many VMs are done, of how many, for whoever watches.
        progress: Option<watch::Sender<(u64, u64)>>,
        /// One report per VM, in the order of their ids; or why none could be made.
        reply: RpcReplyPort<Result<Vec<VmReport>, Failure>>,
    },
    /// Note that a VM is to be removed: whoever cleans it up then removes it, now or later.
    WantRemoval {
        /// Which.
        vm: VmId,
        /// Done: it is written.
        reply: RpcReplyPort<Result<(), Failure>>,
    },
    /// Drop the history of VMs that were removed before this moment.
    PruneHistory {
        /// The moment.
        before: Timestamp,
        /// The history of how many VMs was dropped.
        reply: RpcReplyPort<Result<usize, Failure>>,
    },
}

impl fmt::Debug for ReconcilerMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reconcile { goal, .. } => {
                f.debug_struct("Reconcile").field("goal", goal).finish_non_exhaustive()
            }
            Self::WantRemoval { vm, .. } => f.debug_tuple("WantRemoval").field(vm).finish(),
            Self::PruneHistory { before, .. } => {
                f.debug_struct("PruneHistory").field("before", before).finish_non_exhaustive()
            }
        }
    }
}

/// The reconciler.
#[derive(Debug)]
pub struct Reconciler;

impl Actor for Reconciler {
    type Msg = ReconcilerMsg;
    type State = Deps;
    type Arguments = Deps;

    async fn pre_start(
        &self,
        _myself: ActorRef<ReconcilerMsg>,
        deps: Deps,
    ) -> Result<Deps, ActorProcessingErr> {
        Ok(deps)
    }

    async fn handle(
        &self,
        _myself: ActorRef<ReconcilerMsg>,
        message: ReconcilerMsg,
        deps: &mut Deps,
    ) -> Result<(), ActorProcessingErr> {
        points::message(&message)?;
        let deps = deps.clone();
        tokio::spawn(async move {
            match message {
                ReconcilerMsg::Reconcile { target, goal, progress, reply } => {
                    answer(reply, work::reconcile(&deps, target, goal, progress).await);
                }
                ReconcilerMsg::WantRemoval { vm, reply } => {
                    answer(reply, work::want_removal(&deps, vm).await);
                }
                ReconcilerMsg::PruneHistory { before, reply } => {
                    answer(reply, work::prune_history(&deps, before).await);
                }
            }
        });
        Ok(())
    }
}

fn answer<T>(reply: RpcReplyPort<Result<T, Failure>>, result: Result<T, Failure>) {
    if reply.send(result).is_err() {
        tracing::debug!("nobody waits for the reconciler's report");
    }
}
