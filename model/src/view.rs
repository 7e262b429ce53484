//! What others may see of a VM while its actor lives, and the status that people read.

use std::time::Duration;

use crate::failure::Failure;
use crate::id::{Generation, VmId};
use crate::phase::Phase;

/// A VM as its actor publishes it. The last view of a VM says how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmView {
    /// The VM.
    pub id: VmId,
    /// Which life of its actor published this.
    pub generation: Generation,
    /// Its phase.
    pub phase: Phase,
    /// Why it ended or failed, if it was not simply asked to end.
    pub cause: Option<Failure>,
    /// Whether the actor has done all it will do for it.
    pub settled: bool,
    /// Whether everything that should be gone once it is settled is gone.
    pub cleaned_up: bool,
    /// How long its steps took.
    pub timings: Timings,
}

/// How long the steps of a VM's life took; `None` for those that have not happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// Making the directory and the writable disk.
    pub disk: Option<Duration>,
    /// Taking a subnet, making TAP and firewall tables.
    pub network: Option<Duration>,
    /// Starting the hypervisor's process.
    pub spawn: Option<Duration>,
    /// From there until the guest kernel started `/init`, by the guest's clock.
    pub kernel: Option<Duration>,
    /// From the start of the hypervisor until the agent answered.
    pub agent_ready: Option<Duration>,
    /// From the request to stop until the hypervisor was gone.
    pub stop: Option<Duration>,
    /// Removing what the VM held.
    pub clean: Option<Duration>,
}

/// The status that people read in `list`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its owner lives and brings it up.
    Starting,
    /// Its owner lives and its agent has answered.
    Running,
    /// Its owner lives and takes it down.
    Stopping,
    /// It has no owner and needs none: it holds nothing.
    Stopped,
    /// Its owner is gone and it may still hold something: `matchlock gc` is to finish.
    Crashed,
    /// Something could not be done; `matchlock gc` is to try again.
    Failed,
}

impl Status {
    /// Derives the status from the phase in the row and whether the owner lives.
    #[must_use]
    pub const fn derive(phase: Phase, owner_lives: bool) -> Self {
        match (phase, owner_lives) {
            (Phase::Cleaned, _) => Self::Stopped,
            (Phase::Creating | Phase::Created | Phase::Starting, true) => Self::Starting,
            (Phase::Running, true) => Self::Running,
            (Phase::Stopping | Phase::Stopped | Phase::Cleaning, true) => Self::Stopping,
            (
                Phase::CreateFailed | Phase::StartFailed | Phase::StopFailed | Phase::CleanupFailed,
                _,
            ) => Self::Failed,
            (
                Phase::Creating
                | Phase::Created
                | Phase::Starting
                | Phase::Running
                | Phase::Stopping
                | Phase::Stopped
                | Phase::Cleaning,
                false,
            ) => Self::Crashed,
        }
    }

    /// The word in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_whose_owner_died_is_never_shown_as_running() {
        for phase in Phase::ALL {
            let shown = Status::derive(phase, false);
            assert!(
                matches!(shown, Status::Crashed | Status::Failed | Status::Stopped),
                "{phase} without an owner is shown as {}",
                shown.name()
            );
        }
    }
}
