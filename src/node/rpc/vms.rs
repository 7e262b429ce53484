//! The VMs of a session.
//!
//! # Invariants
//! 1. A session reaches its own VMs only, each by its id; the first one also without. An id never
//!    leads to another VM: one that has ended says so, with the reason, as long as it is remembered.
//! 2. At most [`MAX_VMS`] live in this process at once, those on their way included; [`MAX_ENDED`] that
//!    have ended, or are detached, are remembered, the latest, and the first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use matchlock_actors::fleet::VmHandle;
use matchlock_model::id::VmId;
use matchlock_model::view::VmView;
use serde::Deserialize;
use serde_json::{Value, json};

use super::protocol::{Code, RpcError};

/// How many VMs a session may have at once.
pub(super) const MAX_VMS: usize = 64;

/// How many VMs that have ended, or are detached, a session remembers.
pub(super) const MAX_ENDED: usize = 1024;

/// The parameters that every method takes: which VM is meant.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Which {
    /// The VM; the session's first if it is not given.
    pub(super) vm_id: Option<String>,
    /// The life of it that is meant; whichever it is in if it is not given.
    pub(super) generation: Option<u64>,
}

/// A VM of a session.
#[derive(Debug, Clone)]
pub(super) enum SessionVm {
    /// It lives in this process.
    Own { handle: VmHandle, image: Arc<str>, timeout: Option<Duration> },
    /// It has an owner of its own, and outlives the session.
    Detached { id: VmId, image: Arc<str> },
}

impl SessionVm {
    pub(super) const fn id(&self) -> VmId {
        match self {
            Self::Own { handle, .. } => handle.id,
            Self::Detached { id, .. } => *id,
        }
    }

    /// What its actor says of it; a detached VM's is another process.
    pub(super) fn view(&self) -> Option<VmView> {
        match self {
            Self::Own { handle, .. } => Some(handle.view.borrow().clone()),
            Self::Detached { .. } => None,
        }
    }

    /// A detached one takes none of this process's room, whether it has ended or not.
    fn takes_no_room(&self) -> bool {
        self.view().is_none_or(|view| view.settled)
    }
}

/// What a VM that has ended is refused with.
pub(super) fn ended(view: &VmView) -> RpcError {
    let why = view.cause.as_ref().map_or("it was stopped", |cause| &cause.message);
    let text = format!("VM {} has ended (phase {}): {why}", view.id, view.phase);
    RpcError::new(Code::Vm, text)
}

/// The VMs of a session.
#[derive(Debug, Clone, Default)]
pub(super) struct SessionVms(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// In the order of their creation.
    vms: Vec<SessionVm>,
    coming: usize,
}

/// A VM that is on its way. Dropping it makes its place free.
#[derive(Debug)]
pub(super) struct Coming(SessionVms);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.state().coming -= 1;
    }
}

impl Coming {
    /// It is there.
    pub(super) fn arrived(self, vm: SessionVm) {
        self.0.state().vms.push(vm);
    }
}

impl SessionVms {
    // A poisoned lock holds whole values.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new VM.
    ///
    /// # Errors
    /// When there are as many as there may be.
    pub(super) fn coming(&self) -> Result<Coming, RpcError> {
        let mut state = self.state();
        let live = state.vms.iter().filter(|vm| !vm.takes_no_room()).count();
        if live + state.coming >= MAX_VMS {
            let text = format!("this session has {MAX_VMS} VMs already, its limit");
            return Err(RpcError::new(Code::Busy, text));
        }
        state.coming += 1;
        // The first stays: it is the one that is meant without an id.
        while state.vms.iter().skip(1).filter(|vm| vm.takes_no_room()).count() > MAX_ENDED {
            let Some(oldest) = state.vms.iter().skip(1).position(SessionVm::takes_no_room) else {
                break;
            };
            state.vms.remove(oldest + 1);
        }
        drop(state);
        Ok(Coming(self.clone()))
    }

    /// Forgets a VM that has not come up.
    pub(super) fn forget(&self, id: VmId) {
        self.state().vms.retain(|vm| vm.id() != id);
    }

    /// The VM that is meant, whether it has ended or not.
    ///
    /// # Errors
    /// When the session has no such VM, or it is in another life.
    pub(super) fn find(&self, which: &Which) -> Result<SessionVm, RpcError> {
        let state = self.state();
        let vm = match &which.vm_id {
            None => {
                let first = state.vms.first();
                first.ok_or_else(|| RpcError::new(Code::Vm, "VM not created"))?
            }
            Some(text) => {
                let id: VmId = text.parse().map_err(|e| RpcError::params(format!("vm_id: {e}")))?;
                let found = state.vms.iter().find(|vm| vm.id() == id);
                let text = || format!("VM {id} is not one of this session; see list");
                found.ok_or_else(|| RpcError::new(Code::Vm, text()))?
            }
        };
        if let (Some(asked), Some(view)) = (which.generation, vm.view())
            && asked != view.generation.0
        {
            let (id, now) = (view.id, view.generation.0);
            let text = if asked < now {
                format!(
                    "VM {id} is in generation {now} by now, not {asked}: its actor was restarted"
                )
            } else {
                format!("VM {id} is in generation {now}; there is no {asked} yet")
            };
            return Err(RpcError::new(Code::Vm, text));
        }
        Ok(vm.clone())
    }

    /// The VM that is meant, which has not ended.
    ///
    /// # Errors
    /// As [`Self::find`], and why it has ended.
    pub(super) fn living(&self, which: &Which) -> Result<SessionVm, RpcError> {
        let vm = self.find(which)?;
        match vm.view() {
            Some(view) if view.settled => Err(ended(&view)),
            _ => Ok(vm),
        }
    }

    /// Those that live in this process and have not ended.
    pub(super) fn own(&self) -> Vec<VmHandle> {
        let state = self.state();
        let own = state.vms.iter().filter_map(|vm| match vm {
            SessionVm::Own { handle, .. } if !vm.takes_no_room() => Some(handle.clone()),
            _ => None,
        });
        own.collect()
    }

    /// All of them, in the order of their creation.
    pub(super) fn all(&self) -> Vec<SessionVm> {
        self.state().vms.clone()
    }

    /// The one that is meant without an id.
    pub(super) fn first(&self) -> Option<VmId> {
        self.state().vms.first().map(SessionVm::id)
    }
}

/// What is told of a VM.
pub(super) fn told(view: &VmView) -> Value {
    json!({
        "id": view.id,
        "phase": view.phase,
        "generation": view.generation.0,
        "ended": view.settled,
        "cleaned_up": view.cleaned_up,
        "cause": view.cause.as_ref().map(|cause| &cause.message),
    })
}
