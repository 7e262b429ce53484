//! What is done for a VM that has used up its budget: the reconciler cleans up, and whatever it could
//! not do is written where people look for it, in the VM's rows and in its cause.

use std::sync::Arc;
use std::time::Duration;

use matchlock_host::owner_lock::HeldLock;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::{Goal, after_given_up};
use matchlock_store::WriteOp;

use crate::deps::Deps;
use crate::handle::ServiceHandle;
use crate::reconciler::{Outcome, ReconcilerMsg, Target, VmReport};
use crate::vm::{VmContext, abandon};

/// How long the reconciler may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Has a VM cleaned up, with the lock that its owner holds. Returns why it was given up, and what
/// could not be done.
pub(super) async fn compensate(
    deps: &Deps,
    reconciler: &ServiceHandle<ReconcilerMsg>,
    context: Option<Arc<VmContext>>,
    id: VmId,
    lock: Option<HeldLock>,
    cause: Failure,
) -> Failure {
    if let Some(context) = &context {
        abandon(context).await;
    }
    let message = |reply| ReconcilerMsg::Reconcile {
        target: Target::Owned { vm: id, lock, cause: cause.clone() },
        goal: Goal::Clean,
        progress: None,
        reply,
    };
    let answer = reconciler.call(message, LIMIT).await;
    let answer = answer.map_err(Failure::from).flatten();
    tracing::warn!(vm_id = %id, report = ?answer, "a VM whose actor kept failing was compensated");
    let left = match answer {
        // What it did not do stands in the rows.
        Ok(reports) => reports.iter().find_map(not_done),
        Err(failure) => {
            let text = left(id, failure);
            if let Some(context) = context {
                record(deps, &context, &format!("{cause}; {text}")).await;
            }
            Some(text)
        }
    };
    match left {
        Some(left) => Failure { message: format!("{}; {left}", cause.message), ..cause },
        None => cause,
    }
}

fn left(id: VmId, why: impl std::fmt::Display) -> String {
    format!("it was not cleaned up: {why}; run `matchlock gc {id}`")
}

fn not_done(report: &VmReport) -> Option<String> {
    match &report.outcome {
        Outcome::Failed { step, error, .. } => {
            Some(left(report.vm, format_args!("{step}: {error}")))
        }
        Outcome::Running | Outcome::BeingCleaned => {
            Some(left(report.vm, "another matchlock works on it"))
        }
        Outcome::Unknown | Outcome::Planned | Outcome::Cleaned { .. } => None,
    }
}

/// Writes into the rows what nobody else has written.
async fn record(deps: &Deps, context: &VmContext, last_error: &str) {
    let head = match deps.reader.lifecycle_head(context.id).await {
        Ok(head) => head.map_or(Phase::Creating, |head| head.phase),
        Err(error) => {
            return tracing::error!(vm_id = %context.id, %error, "a failed compensation is not recorded");
        }
    };
    let phases = match after_given_up(head) {
        [] => std::slice::from_ref(&head),
        phases => phases,
    };
    for phase in phases {
        let op = WriteOp::SetPhase {
            vm: context.id,
            epoch: context.epoch,
            phase: *phase,
            last_error: Some(last_error.to_owned()),
            backend: None,
            resources: None,
            cleanup: Vec::new(),
            at: (deps.now)(),
        };
        match deps.db.write(op).await.map_err(Failure::from) {
            Ok(_) => {}
            Err(failure) if failure.kind == FailureKind::Fenced => {
                return tracing::debug!(vm_id = %context.id, "somebody else records what comes now");
            }
            Err(failure) => {
                let vm_id = context.id;
                return tracing::error!(%vm_id, %failure, "a failed compensation is not recorded");
            }
        }
    }
}
