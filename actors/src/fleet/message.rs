//! What Fleet is asked and told.

use std::fmt;
use std::sync::Arc;

use matchlock_host::guest_link::GuestLink;
use matchlock_model::failure::Failure;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::vm::StopMode;
use ractor::RpcReplyPort;

use super::register::RegisteredVm;
use super::registry::VmHandle;
use crate::vm::{CreateVm, VmContext};

pub(super) type Reply<T> = RpcReplyPort<Result<T, Failure>>;

/// What Fleet is asked and told.
pub enum FleetMsg {
    /// Bring a VM up. Answered once its row is there; the view says what comes then.
    CreateVm {
        /// What it is to be.
        create: Box<CreateVm>,
        /// Its handle.
        reply: Reply<VmHandle>,
    },
    /// A VM's lock is held and its row is there (or not).
    Registered {
        /// The VM.
        result: Box<Result<RegisteredVm, Failure>>,
        /// Who asked for it.
        reply: Reply<VmHandle>,
    },
    /// Take a VM down. Answered at once; the view says what comes then.
    StopVm {
        /// Which.
        id: VmId,
        /// How.
        mode: StopMode,
        /// Its handle.
        reply: Reply<VmHandle>,
    },
    /// Take all VMs down and admit no more.
    StopAll {
        /// How.
        mode: StopMode,
        /// Their handles.
        reply: RpcReplyPort<Vec<VmHandle>>,
    },
    /// The link to a running guest.
    OpenLink {
        /// Which VM's.
        id: VmId,
        /// The link, and what the VM was asked to be.
        reply: Reply<RunningVm>,
    },
    /// The effects of a failed life have ended (or not).
    ScopeClosed {
        /// Whose.
        id: VmId,
        /// What is so now.
        outcome: ScopeOutcome,
    },
    /// The reconciler has done what it could for a VM that used up its budget.
    Compensated {
        /// Which.
        id: VmId,
        /// Why it was given up.
        cause: Failure,
    },
}

impl fmt::Debug for FleetMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CreateVm { .. } => "CreateVm",
            Self::Registered { .. } => "Registered",
            Self::StopVm { .. } => "StopVm",
            Self::StopAll { .. } => "StopAll",
            Self::OpenLink { .. } => "OpenLink",
            Self::ScopeClosed { .. } => "ScopeClosed",
            Self::Compensated { .. } => "Compensated",
        })
    }
}

/// A VM whose guest answers.
#[derive(Clone)]
pub struct RunningVm {
    /// The link to its guest.
    pub link: Arc<dyn GuestLink>,
    /// What it was asked to be.
    pub context: Arc<VmContext>,
}

/// What became of a failed life's effects.
#[derive(Debug, Clone)]
pub struct ScopeOutcome {
    /// Why the life ended.
    pub(super) cause: Failure,
    /// The phase in the row, once all effects have ended; or why there is none.
    pub(super) phase: Result<Phase, Failure>,
    /// Whether the VM's budget allows another life.
    pub(super) may_restart: bool,
}
