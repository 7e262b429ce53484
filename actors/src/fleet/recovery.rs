//! What becomes of a VM whose actor ended without having settled it.
//!
//! ```text
//!  close_scope ─► (task) effects ended, backoff, phase read ─► recover ─► another life
//!                                                                   ├─► compensate ─► publish_end
//!                                                                   └─► give_up
//! ```

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use matchlock_host::owner_lock::HeldLock;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use ractor::{ActorProcessingErr, ActorRef};
use tokio::time::Instant;

use super::actor::{FleetState, panicked};
use super::compensate::compensate;
use super::message::{FleetMsg, ScopeOutcome};
use super::registry::Release;
use crate::deps::Deps;
use crate::vm::{EffectScope, StartAs, VmArgs};

impl FleetState {
    /// An actor that ended without a fault has settled its VM, unless it was killed.
    pub(super) fn actor_ended(
        &self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        reason: Option<String>,
    ) {
        let settled = self
            .registry
            .lock()
            .get(&id)
            .is_some_and(|entry| entry.context.watch().borrow().settled);
        if settled {
            self.registry.retire(id, Release::Abandon);
            return;
        }
        let reason = reason.unwrap_or_else(|| "no reason".to_owned());
        tracing::error!(vm_id = %id, %reason, "a VM's actor was ended");
        let text = format!("the VM's actor was ended: {reason}");
        self.close_scope(myself, id, Failure::new(FailureKind::Internal, text));
    }

    /// Ends what a failed life left running, then reads where the VM stands.
    pub(super) fn close_scope(&self, myself: &ActorRef<FleetMsg>, id: VmId, cause: Failure) {
        let Some((scope, wait)) = self.registry.lock().get_mut(&id).map(|entry| {
            entry.actor = None;
            (entry.scope.clone(), entry.budget.spend(Instant::now()))
        }) else {
            return;
        };
        let (deps, myself) = (self.deps.clone(), myself.clone());
        tokio::spawn(async move {
            let phase = match scope.close(deps.limits.cancel).await {
                Ok(()) => {
                    tokio::time::sleep(wait.unwrap_or_default()).await;
                    // A VM without an actor would never settle if this did not come back.
                    AssertUnwindSafe(recorded_phase(&deps, id))
                        .catch_unwind()
                        .await
                        .unwrap_or_else(|panic| Err(panicked("the recovery", &*panic)))
                }
                Err(stuck) => Err(Failure::from_error(FailureKind::Internal, &stuck)),
            };
            let outcome = ScopeOutcome { cause, phase, may_restart: wait.is_some() };
            if myself.cast(FleetMsg::ScopeClosed { id, outcome }).is_err() {
                tracing::error!(vm_id = %id, "the fleet was gone before a VM was recovered");
            }
        });
    }

    pub(super) async fn recover(
        &mut self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        outcome: ScopeOutcome,
    ) -> Result<(), ActorProcessingErr> {
        let phase = match outcome.phase {
            Ok(phase) => phase,
            Err(failure) => {
                self.give_up(id, outcome.cause.context(failure));
                return Ok(());
            }
        };
        let mut restart = None;
        let mut lock = None;
        if let Some(entry) = self.registry.lock().get_mut(&id) {
            if outcome.may_restart {
                entry.scope = EffectScope::default();
                restart = Some(VmArgs {
                    context: Arc::clone(&entry.context),
                    scope: entry.scope.clone(),
                    generation: entry.context.generation().next(),
                    start: StartAs::Recover {
                        phase,
                        cause: outcome.cause.clone(),
                        stop: entry.stop,
                    },
                });
            } else {
                lock = entry.lock.take();
            }
        }
        match restart {
            Some(args) => {
                // Published first: the effects of the new life look at it.
                args.context.publish(|view| view.generation = args.generation);
                args.context.note_phase(phase, Some(outcome.cause));
                self.spawn_actor(myself, id, args).await
            }
            None => {
                self.compensate(myself, id, lock, outcome.cause);
                Ok(())
            }
        }
    }

    /// The VM's actor has used up its budget: the reconciler cleans up, with the lock we hold.
    fn compensate(
        &self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        lock: Option<HeldLock>,
        cause: Failure,
    ) {
        let (reconciler, myself) = (self.reconciler.clone(), myself.clone());
        let context = self.registry.lock().get(&id).map(|entry| Arc::clone(&entry.context));
        let deps = self.deps.clone();
        tokio::spawn(async move {
            let compensated = compensate(&deps, &reconciler, context, id, lock, cause.clone());
            // Whoever waits for the VM's end is told it, also where that panics.
            let compensated = AssertUnwindSafe(compensated).catch_unwind().await;
            let cause = compensated
                .unwrap_or_else(|panic| panicked("cleaning up", &*panic).context(&cause));
            if myself.cast(FleetMsg::Compensated { id, cause }).is_err() {
                tracing::error!(vm_id = %id, "the fleet was gone before a VM was given up");
            }
        });
    }

    /// Gives up a VM that has no actor any more and cannot get one: ends its hypervisor, and leaves
    /// the rest to the reconciler.
    fn give_up(&self, id: VmId, cause: Failure) {
        self.publish_end(id, cause, Release::Abandon);
    }

    /// Publishes the end of a VM that has no actor any more, and forgets it.
    pub(super) fn publish_end(&self, id: VmId, cause: Failure, release: Release) {
        let Some(context) = self.registry.lock().get(&id).map(|entry| Arc::clone(&entry.context))
        else {
            return;
        };
        tracing::error!(vm_id = %id, %cause, "a VM was given up");
        context.publish(|view| {
            view.cause = Some(cause);
            view.settled = true;
        });
        self.registry.retire(id, release);
    }
}

async fn recorded_phase(deps: &Deps, id: VmId) -> Result<Phase, Failure> {
    let head =
        deps.reader.lifecycle_head(id).await.map_err(|e| {
            Failure::from_error(FailureKind::Host, &e).context("could not read the VM")
        })?;
    head.map(|record| record.phase)
        .ok_or_else(|| Failure::new(FailureKind::NotFound, format!("VM {id} has no row")))
}
