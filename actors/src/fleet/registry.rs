//! The VMs of this node.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use matchlock_host::owner_lock::HeldLock;
use matchlock_model::id::VmId;
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;
use ractor::{ActorId, ActorRef};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::budget::RestartBudget;
use crate::vm::{EffectScope, PhaseFollower, VmContext, VmMsg, abandon};

/// A VM for those who asked for it.
#[derive(Debug, Clone)]
pub struct VmHandle {
    /// Which.
    pub id: VmId,
    /// What happens to it; its last value says how it ended.
    pub view: watch::Receiver<VmView>,
    /// Each phase that it comes to.
    pub phases: PhaseFollower,
}

impl VmHandle {
    pub(super) fn of(context: &VmContext) -> Self {
        Self { id: context.id, view: context.watch(), phases: context.follow_phases() }
    }
}

/// What Fleet keeps of a VM.
pub(super) struct Entry {
    pub(super) context: Arc<VmContext>,
    pub(super) scope: EffectScope,
    pub(super) actor: Option<ActorRef<VmMsg>>,
    /// What was asked last: an actor that fails before it has done it is asked again in its next
    /// life.
    pub(super) stop: Option<StopMode>,
    pub(super) budget: RestartBudget,
    /// Held for the VM's whole life; dropping it tells every process that the owner is gone.
    pub(super) lock: Option<HeldLock>,
}

/// Where the whole tree ends, entries go while effects still run: until those end, or this process
/// does, nobody else may touch what they could.
impl Drop for Entry {
    fn drop(&mut self) {
        let (Some(lock), scope) = (self.lock.take(), self.scope.clone()) else { return };
        // Without a runtime no effect runs.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                scope.ended().await;
                drop(lock);
            });
        }
    }
}

/// How a VM is let go of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    /// Nothing of it is ours any more.
    Plain,
    /// Its hypervisor may still run (its stop failed, or hangs); it is not to do so without an owner.
    Abandon,
}

/// The VMs of this node. It outlives the Fleet actor: the root keeps it.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<BTreeMap<VmId, Entry>>>);

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.ids()).finish()
    }
}

impl Registry {
    // A poisoned lock holds whole entries: they are inserted, changed and removed in one step.
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMs.
    #[must_use]
    pub fn ids(&self) -> Vec<VmId> {
        self.lock().keys().copied().collect()
    }

    /// Watches all VMs.
    #[must_use]
    pub fn handles(&self) -> Vec<VmHandle> {
        self.lock().values().map(|entry| VmHandle::of(&entry.context)).collect()
    }

    /// Forgets a VM. Its lock is released once none of its effects runs any more: until then
    /// nobody else may touch what they could.
    pub(super) fn retire(&self, id: VmId, release: Release) {
        let Some(mut entry) = self.lock().remove(&id) else { return };
        tokio::spawn(async move {
            // At once, whatever still hangs; and again, should what hung have been a launch.
            if release == Release::Abandon {
                abandon(&entry.context).await;
            }
            entry.scope.ended().await;
            if release == Release::Abandon {
                abandon(&entry.context).await;
            }
            drop(entry.lock.take());
        });
    }

    /// Whether this is the VM's actor.
    pub(super) fn has_actor(&self, id: VmId, actor: ActorId) -> bool {
        let entries = self.lock();
        let of_vm = entries.get(&id).and_then(|entry| entry.actor.as_ref());
        of_vm.is_some_and(|of_vm| of_vm.get_id() == actor)
    }
}
