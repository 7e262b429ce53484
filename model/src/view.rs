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
    /// Starting it from a snapshot, until its guest went on as a machine of its own.
    pub restore: Option<Duration>,
    /// Saving it as a snapshot, until others can start from that; of a template only.
    pub saved: Option<Duration>,
    /// From there until the guest kernel started `/init`, by the guest's clock; of a boot only.
    pub kernel: Option<Duration>,
    /// From the start of the hypervisor until the agent answered.
    pub agent_ready: Option<Duration>,
    /// From the request to stop until the hypervisor was gone.
    pub stop: Option<Duration>,
    /// Removing what the VM held.
    pub clean: Option<Duration>,
}

/// What the record of a silent guest begins with, in `vm_lifecycle.last_error` of a running VM.
pub const SILENT_GUEST: &str = "the guest has not answered for";

/// The status that people read in `list`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its owner lives and brings it up.
    Starting,
    /// Its owner lives and its agent has answered.
    Running,
    /// It runs, and its guest does not answer.
    Hanging,
    /// Its owner lives and says that it runs, and its hypervisor is gone: the owner stands still, or
    /// is about to notice.
    Dead,
    /// Its owner lives and takes it down.
    Stopping,
    /// It has no owner and needs none: it holds nothing.
    Stopped,
    /// Its owner is gone and it may still hold something: `matchlock gc` is to finish.
    Crashed,
    /// Something could not be done; `matchlock gc` is to try again.
    Failed,
    /// Somebody wants it removed, and that is not done yet: `matchlock gc` is to finish.
    Removing,
}

/// What a status is derived from: a row, and two looks at this host.
#[derive(Debug, Clone, Copy)]
pub struct Sighting<'a> {
    /// The phase in the row.
    pub phase: Phase,
    /// The last error in the row.
    pub last_error: &'a str,
    /// Whether the row says that it is to be removed.
    pub removal_wanted: bool,
    /// Whether its owner lives.
    pub owner_lives: bool,
    /// Whether its hypervisor was looked for and is gone.
    pub hypervisor_gone: bool,
}

impl Status {
    /// Derives the status.
    #[must_use]
    pub fn derive(seen: Sighting<'_>) -> Self {
        if seen.removal_wanted {
            return Self::Removing;
        }
        match (seen.phase, seen.owner_lives) {
            (Phase::Cleaned, _) => Self::Stopped,
            (Phase::Creating | Phase::Created | Phase::Starting, true) => Self::Starting,
            (Phase::Running, true) if seen.hypervisor_gone => Self::Dead,
            (Phase::Running, true) if seen.last_error.starts_with(SILENT_GUEST) => Self::Hanging,
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

    /// Whether commands can be run in it, as far as its row knows.
    #[must_use]
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Hanging)
    }

    /// The word in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Hanging => "hanging",
            Self::Dead => "dead",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Failed => "failed",
            Self::Removing => "removing",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn sighting(phase: Phase, owner_lives: bool) -> Sighting<'static> {
        Sighting {
            phase,
            last_error: "",
            removal_wanted: false,
            owner_lives,
            hypervisor_gone: false,
        }
    }

    #[test]
    fn a_vm_whose_owner_died_is_never_shown_as_running() {
        for phase in Phase::ALL {
            for hypervisor_gone in [false, true] {
                let seen = Sighting { hypervisor_gone, ..sighting(phase, false) };
                let shown = Status::derive(seen);
                assert!(
                    matches!(shown, Status::Crashed | Status::Failed | Status::Stopped),
                    "{phase} without an owner is shown as {}",
                    shown.name()
                );
            }
        }
    }

    #[test]
    fn a_vm_that_is_to_be_removed_says_so_in_every_phase() {
        for phase in Phase::ALL {
            for owner_lives in [false, true] {
                let seen = Sighting { removal_wanted: true, ..sighting(phase, owner_lives) };
                assert_eq!(Status::derive(seen), Status::Removing, "{phase}");
            }
        }
    }

    #[test]
    fn a_running_vm_tells_of_a_silent_guest_and_of_a_dead_hypervisor_and_of_nothing_else() {
        let running = sighting(Phase::Running, true);
        let silent = format!("{SILENT_GUEST} 30s");
        let hanging = Sighting { last_error: &silent, ..running };
        assert_eq!(Status::derive(hanging), Status::Hanging);
        let noted = Sighting { last_error: "the VM's actor failed", ..running };
        assert_eq!(Status::derive(noted), Status::Running);
        let dead = Sighting { hypervisor_gone: true, ..hanging };
        assert_eq!(Status::derive(dead), Status::Dead);
        // Before it was launched, and while it is taken down, there is none.
        for phase in [Phase::Starting, Phase::Stopping, Phase::Cleaned] {
            let seen = Sighting { hypervisor_gone: true, ..sighting(phase, true) };
            assert_eq!(Status::derive(seen), Status::derive(sighting(phase, true)), "{phase}");
        }
    }
}
