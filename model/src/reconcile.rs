//! What to do about what a VM left on the host: rows and observations in, actions out.
//!
//! # Invariants
//! 1. A VM whose owner lives is left alone.
//! 2. Removals come in the order of law 7: hypervisor, TAP, tables, sockets, disk, subnet, directory;
//!    the row last.
//! 3. What has no row is removed only if it carries our own mark and nobody owns it.
//! 4. A plan for a VM that holds nothing is empty but for its records.

use crate::id::VmId;
use crate::identity::ProcessIdentity;
use crate::phase::Phase;
use crate::record::VmRemains;

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The VM holds nothing on the host; its row and logs stay (`gc`).
    Clean,
    /// Nothing of the VM is left but its history (`rm`, `prune`).
    Remove,
}

/// What was seen of a VM on the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// Whether its owner's lock is held.
    pub owner_lives: bool,
    /// Living processes that carry its mark, or are recorded as its hypervisor.
    pub hypervisors: Vec<ProcessIdentity>,
    /// Whether a link carries its mark.
    pub tap: bool,
    /// Whether firewall tables carry its mark.
    pub firewall: bool,
    /// Whether its row says that it holds a subnet.
    pub subnet: bool,
    /// Whether its sockets exist.
    pub sockets: bool,
    /// Whether its writable disk exists.
    pub rootfs: bool,
    /// Whether its directory exists.
    pub dir: bool,
}

/// One thing to do about a VM's remains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Commit that cleaning begins.
    RecordCleaning,
    /// End this process and see that it is gone.
    CloseMachine(ProcessIdentity),
    /// Remove the TAP.
    RemoveTap,
    /// Remove the firewall tables.
    RemoveFirewall,
    /// Remove the sockets.
    RemoveSockets,
    /// Remove the writable disk.
    RemoveDisk,
    /// See that the TAP is gone, and give the subnet back.
    ReleaseSubnet,
    /// Commit that the VM holds nothing.
    RecordCleaned,
    /// Remove the directory.
    RemoveDir,
    /// Remove the row; the history stays.
    RemoveRow,
}

/// Why nothing was planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its owner lives.
    #[error("{vm} is running")]
    OwnerLives {
        /// The VM.
        vm: VmId,
    },
}

/// What to do about a VM: `recorded` is the phase in its row, `None` if it has no row.
///
/// # Errors
/// When the VM has an owner that lives.
pub fn plan(
    vm: VmId,
    goal: Goal,
    recorded: Option<Phase>,
    observed: &Observed,
) -> Result<Vec<Action>, Refusal> {
    if observed.owner_lives {
        return Err(Refusal::OwnerLives { vm });
    }
    let mut actions = Vec::new();
    let removals = [
        (observed.tap, Action::RemoveTap),
        (observed.firewall, Action::RemoveFirewall),
        (observed.sockets, Action::RemoveSockets),
        (observed.rootfs, Action::RemoveDisk),
        (observed.subnet, Action::ReleaseSubnet),
    ];
    let dirty = !observed.hypervisors.is_empty() || removals.iter().any(|(there, _)| *there);
    let unfinished = recorded.is_some_and(|phase| phase != Phase::Cleaned);
    if unfinished {
        actions.push(Action::RecordCleaning);
    }
    actions.extend(observed.hypervisors.iter().cloned().map(Action::CloseMachine));
    actions.extend(removals.into_iter().filter(|(there, _)| *there).map(|(_, action)| action));
    if unfinished || (dirty && recorded.is_some()) {
        actions.push(Action::RecordCleaned);
    }
    let sweep = recorded.is_none() || goal == Goal::Remove;
    if sweep && observed.dir {
        actions.push(Action::RemoveDir);
    }
    if recorded.is_some() && goal == Goal::Remove {
        actions.push(Action::RemoveRow);
    }
    Ok(actions)
}

/// What was found of a VM, and what was decided: everything that says why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The phase in its row; `None` if it has no row.
    pub recorded: Option<Phase>,
    /// Whether it was to be removed with its command.
    pub ephemeral: bool,
    /// Whether its owner lives and is, or would be, overruled.
    pub owner_lives: bool,
    /// What was seen on the host.
    pub observed: Observed,
    /// What to do about it.
    pub plan: Vec<Action>,
}

impl Finding {
    /// Decides. A VM that was to go with its command, or was to be removed before, goes altogether:
    /// that is what its user asked for.
    ///
    /// # Errors
    /// As [`plan`].
    pub fn new(
        vm: VmId,
        goal: Goal,
        row: Option<&VmRemains>,
        observed: Observed,
    ) -> Result<Self, Refusal> {
        let (recorded, ephemeral) =
            (row.map(|row| row.phase), row.is_some_and(|row| row.ephemeral));
        let was_wanted = row.is_some_and(|row| row.removal_wanted);
        let goal = if ephemeral || was_wanted { Goal::Remove } else { goal };
        let plan = plan(vm, goal, recorded, &observed)?;
        Ok(Self { recorded, ephemeral, owner_lives: false, observed, plan })
    }
}

/// The phases to record, in order, when a removal has failed for a VM in this phase.
#[must_use]
pub fn after_failed_removal(recorded: Phase) -> &'static [Phase] {
    match recorded {
        // Only its directory or row was left: it stays cleaned.
        Phase::Cleaned => &[Phase::Cleaned],
        phase if phase.may_become(Phase::CleanupFailed) => &[Phase::CleanupFailed],
        // That cleaning began could not be written when it did.
        _ => &[Phase::Cleaning, Phase::CleanupFailed],
    }
}

/// The phases to record, in order, for a VM in this phase that its owner gives up: how its life
/// failed, before it is cleaned up.
#[must_use]
pub fn after_given_up(recorded: Phase) -> &'static [Phase] {
    match recorded {
        Phase::Creating => &[Phase::CreateFailed],
        Phase::Created => &[Phase::Starting, Phase::StartFailed],
        Phase::Starting => &[Phase::StartFailed],
        Phase::Running => &[Phase::Stopping, Phase::StopFailed],
        Phase::Stopping => &[Phase::StopFailed],
        Phase::Cleaning => &[Phase::CleanupFailed],
        Phase::Stopped
        | Phase::Cleaned
        | Phase::CreateFailed
        | Phase::StartFailed
        | Phase::StopFailed
        | Phase::CleanupFailed => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId::new(1);

    fn process(pid: i32) -> ProcessIdentity {
        ProcessIdentity { pid, start_ticks: 1, boot_id: "b".into() }
    }

    fn everything() -> Observed {
        Observed {
            owner_lives: false,
            hypervisors: vec![process(7)],
            tap: true,
            firewall: true,
            subnet: true,
            sockets: true,
            rootfs: true,
            dir: true,
        }
    }

    #[test]
    fn a_living_owner_is_left_alone() {
        let observed = Observed { owner_lives: true, ..everything() };
        for goal in [Goal::Clean, Goal::Remove] {
            for recorded in Phase::ALL.map(Some).into_iter().chain([None]) {
                assert_eq!(
                    plan(VM, goal, recorded, &observed),
                    Err(Refusal::OwnerLives { vm: VM })
                );
            }
        }
    }

    #[test]
    fn everything_goes_in_the_order_of_law_7() {
        let actions = plan(VM, Goal::Remove, Some(Phase::Running), &everything()).unwrap();
        assert_eq!(
            actions,
            [
                Action::RecordCleaning,
                Action::CloseMachine(process(7)),
                Action::RemoveTap,
                Action::RemoveFirewall,
                Action::RemoveSockets,
                Action::RemoveDisk,
                Action::ReleaseSubnet,
                Action::RecordCleaned,
                Action::RemoveDir,
                Action::RemoveRow,
            ]
        );
    }

    #[test]
    fn cleaning_keeps_directory_and_row() {
        let actions = plan(VM, Goal::Clean, Some(Phase::Running), &everything()).unwrap();
        assert!(!actions.contains(&Action::RemoveDir) && !actions.contains(&Action::RemoveRow));
    }

    #[test]
    fn a_clean_vm_needs_nothing() {
        let observed = Observed { dir: true, ..Observed::default() };
        assert_eq!(plan(VM, Goal::Clean, Some(Phase::Cleaned), &observed).unwrap(), []);
    }

    #[test]
    fn remains_without_a_row_are_swept_without_a_record() {
        let observed = Observed { subnet: false, ..everything() };
        let actions = plan(VM, Goal::Clean, None, &observed).unwrap();
        assert_eq!(
            actions,
            [
                Action::CloseMachine(process(7)),
                Action::RemoveTap,
                Action::RemoveFirewall,
                Action::RemoveSockets,
                Action::RemoveDisk,
                Action::RemoveDir,
            ]
        );
    }

    #[test]
    fn a_vm_that_is_given_up_goes_through_legal_phases() {
        for phase in Phase::ALL {
            let mut now = phase;
            for next in after_given_up(phase) {
                now.check_transition(*next).unwrap();
                now = *next;
            }
            assert!(now.may_become(Phase::Cleaning) || now == Phase::Cleaned, "{phase}: {now}");
        }
    }

    #[test]
    fn every_recorded_phase_can_become_what_the_plan_records() {
        for phase in Phase::ALL {
            let actions = plan(VM, Goal::Remove, Some(phase), &everything()).unwrap();
            let mut now = phase;
            for action in actions {
                let next = match action {
                    Action::RecordCleaning => Phase::Cleaning,
                    Action::RecordCleaned => Phase::Cleaned,
                    Action::CloseMachine(_)
                    | Action::RemoveTap
                    | Action::RemoveFirewall
                    | Action::RemoveSockets
                    | Action::RemoveDisk
                    | Action::ReleaseSubnet
                    | Action::RemoveDir
                    | Action::RemoveRow => continue,
                };
                now.check_transition(next).unwrap();
                now = next;
            }
            assert_eq!(now, Phase::Cleaned);
        }
    }
}
