//! Where a test can make the actors fail: around every effect, every action and every step of an
//! allocation, and before every message.
//!
//! Names come from matches without a wildcard, so a new effect, action or message does not compile
//! until it has a name, and a test fails until the name is listed.

use std::future::Future;

use matchlock_failpoints::{Area, Injected, mutated};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Action;
use matchlock_model::vm::Effect;

use crate::db_writer::DbWriterMsg;
use crate::fleet::FleetMsg;
use crate::images::ImagesMsg;
use crate::reconciler::ReconcilerMsg;
use crate::root::RootMsg;
use crate::subnet_allocator::SubnetAllocatorMsg;
use crate::vm::VmMsg;

/// Every area of this crate.
pub const AREAS: &[Area] = &[VM, GC, SUBNET, ACTOR];

/// The effects of a VM's operations.
pub(crate) const VM: Area = Area::new(
    "vm",
    &[
        "record_created",
        "record_starting",
        "record_running",
        "record_stopping",
        "record_cleaning",
        "record_cleaned",
        "record_create_failed",
        "record_start_failed",
        "record_stop_failed",
        "record_cleanup_failed",
        "create_dir",
        "serve_owner",
        "create_disk",
        "create_tap",
        "apply_firewall",
        "launch",
        "connect_guest",
        "save_snapshot",
        "configure_guest",
        "reattach",
        "note",
        "shutdown_guest",
        "close_machine",
        "remove_tap",
        "remove_firewall",
        "remove_sockets",
        "remove_disk",
        "release_subnet",
        "remove_dir",
        "remove_row",
    ],
);

/// The reconciler's actions, and its take-over before them.
pub(crate) const GC: Area = Area::new(
    "gc",
    &[
        TAKE_OVER,
        "record_cleaning",
        "close_machine",
        "remove_tap",
        "remove_firewall",
        "remove_sockets",
        "remove_disk",
        "release_subnet",
        "record_cleaned",
        "remove_dir",
        "remove_row",
    ],
);

pub(crate) const TAKE_OVER: &str = "take_over";

/// What the subnet allocator does.
pub(crate) const SUBNET: Area = Area::new("subnet", &["reap", "lock", "row", "release"]);

/// The messages of every actor, before they are handled.
pub(crate) const ACTOR: Area = Area::before_only(
    "actor",
    &[
        "vm.stop",
        "vm.op_done",
        "vm.cancel_deadline",
        "vm.machine_exited",
        "vm.link_lost",
        "vm.heard",
        "fleet.create_vm",
        "fleet.registered",
        "fleet.stop_vm",
        "fleet.stop_all",
        "fleet.open_link",
        "fleet.scope_closed",
        "fleet.compensated",
        "reconciler.reconcile",
        "reconciler.want_removal",
        "reconciler.prune_history",
        "subnet_allocator.allocate",
        "subnet_allocator.release",
        "db_writer.write",
        "db_writer.thread_panicked",
        "images.import",
        "images.pull",
        "images.remove",
        "images.tag",
        "images.sweep",
        "root.shutdown",
        "root.start",
    ],
);

/// An injected failure as a step's own.
pub(crate) fn injected(injected: Injected) -> Failure {
    Failure::new(FailureKind::Internal, injected.to_string())
}

/// A step with its points around it. A mutation may leave the step out.
pub(crate) async fn around<T: Default>(
    area: Area,
    step: &str,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    area.before(step).map_err(injected)?;
    if area.skips(step) {
        return Ok(T::default());
    }
    let done = work.await?;
    area.after(step).map_err(injected)?;
    Ok(done)
}

/// The point of an effect; `None` for what is not part of an operation, and for phases that are
/// never recorded by one.
pub(crate) const fn of_effect(effect: &Effect) -> Option<&'static str> {
    Some(match effect {
        Effect::Record { phase, .. } => match phase {
            Phase::Created => "record_created",
            Phase::Starting => "record_starting",
            Phase::Running => "record_running",
            Phase::Stopping => "record_stopping",
            Phase::Cleaning => "record_cleaning",
            Phase::Cleaned => "record_cleaned",
            Phase::CreateFailed => "record_create_failed",
            Phase::StartFailed => "record_start_failed",
            Phase::StopFailed => "record_stop_failed",
            Phase::CleanupFailed => "record_cleanup_failed",
            // The row is inserted with the first; nothing records the second.
            Phase::Creating | Phase::Stopped => return None,
        },
        Effect::CreateDir
        | Effect::ServeOwner
        | Effect::CreateDisk
        | Effect::CreateTap
        | Effect::ApplyFirewall
        | Effect::Launch
        | Effect::ConnectGuest
        | Effect::SaveSnapshot
        | Effect::ConfigureGuest
        | Effect::Reattach { .. }
        | Effect::Note { .. }
        | Effect::ShutdownGuest { .. }
        | Effect::CloseMachine
        | Effect::RemoveTap
        | Effect::RemoveFirewall
        | Effect::RemoveSockets
        | Effect::RemoveDisk
        | Effect::ReleaseSubnet
        | Effect::RemoveDir
        | Effect::RemoveRow => effect.name(),
        Effect::Cancel | Effect::Settle => return None,
    })
}

/// An effect with its points around it.
pub(crate) async fn effect(
    effect: &Effect,
    work: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    match of_effect(effect) {
        Some(step) => around(VM, step, work).await,
        None => work.await,
    }
}

/// The point of an action.
pub(crate) const fn of_action(action: &Action) -> &'static str {
    match action {
        Action::RecordCleaning => "record_cleaning",
        Action::CloseMachine(_) => "close_machine",
        Action::RemoveTap => "remove_tap",
        Action::RemoveFirewall => "remove_firewall",
        Action::RemoveSockets => "remove_sockets",
        Action::RemoveDisk => "remove_disk",
        Action::ReleaseSubnet => "release_subnet",
        Action::RecordCleaned => "record_cleaned",
        Action::RemoveDir => "remove_dir",
        Action::RemoveRow => "remove_row",
    }
}

/// Puts a plan into a wrong order, when a mutation says so: the crash suite must see it.
pub(crate) fn disturb(actions: &mut [Action]) {
    let first = |actions: &mut [Action], wanted: Action| {
        // Behind the take-over's record, before every removal.
        let from = usize::from(actions.first() == Some(&Action::RecordCleaning));
        if let Some(at) = actions.iter().position(|action| *action == wanted)
            && let Some(part) = actions.get_mut(from..=at)
        {
            part.rotate_right(1);
        }
    };
    if mutated("release_subnet_first") {
        first(actions, Action::ReleaseSubnet);
    }
    if mutated("record_cleaned_first") {
        first(actions, Action::RecordCleaned);
    }
}

/// A message of an actor, by its name in [`ACTOR`].
pub(crate) trait Point {
    /// The name.
    fn point(&self) -> &'static str;
}

/// The point before a message is handled.
pub(crate) fn message(message: &impl Point) -> Result<(), Injected> {
    ACTOR.before(message.point())
}

impl Point for VmMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::Stop(_) => "vm.stop",
            Self::OpDone { .. } => "vm.op_done",
            Self::CancelDeadline { .. } => "vm.cancel_deadline",
            Self::MachineExited(_) => "vm.machine_exited",
            Self::LinkLost(_) => "vm.link_lost",
            Self::Heard(_) => "vm.heard",
        }
    }
}

impl Point for FleetMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::CreateVm { .. } => "fleet.create_vm",
            Self::Registered { .. } => "fleet.registered",
            Self::StopVm { .. } => "fleet.stop_vm",
            Self::StopAll { .. } => "fleet.stop_all",
            Self::OpenLink { .. } => "fleet.open_link",
            Self::ScopeClosed { .. } => "fleet.scope_closed",
            Self::Compensated { .. } => "fleet.compensated",
        }
    }
}

impl Point for ReconcilerMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::Reconcile { .. } => "reconciler.reconcile",
            Self::WantRemoval { .. } => "reconciler.want_removal",
            Self::PruneHistory { .. } => "reconciler.prune_history",
        }
    }
}

impl Point for SubnetAllocatorMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::Allocate { .. } => "subnet_allocator.allocate",
            Self::Release { .. } => "subnet_allocator.release",
        }
    }
}

impl Point for DbWriterMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::Write { .. } => "db_writer.write",
            Self::ThreadPanicked { .. } => "db_writer.thread_panicked",
        }
    }
}

impl Point for ImagesMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::Import { .. } => "images.import",
            Self::Pull { .. } => "images.pull",
            Self::Remove { .. } => "images.remove",
            Self::Tag { .. } => "images.tag",
            Self::Sweep { .. } => "images.sweep",
        }
    }
}

impl Point for RootMsg {
    fn point(&self) -> &'static str {
        match self {
            Self::Shutdown { .. } => "root.shutdown",
            Self::Start { .. } => "root.start",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use matchlock_model::identity::ProcessIdentity;

    use super::*;

    #[test]
    fn every_effect_has_its_points() {
        let grace = Duration::ZERO;
        let mut effects: Vec<_> =
            Phase::ALL.map(|phase| Effect::Record { phase, cause: None }).into();
        effects.extend([
            Effect::Cancel,
            Effect::Settle,
            Effect::CreateDir,
            Effect::ServeOwner,
            Effect::CreateDisk,
            Effect::CreateTap,
            Effect::ApplyFirewall,
            Effect::Launch,
            Effect::ConnectGuest,
            Effect::SaveSnapshot,
            Effect::ConfigureGuest,
            Effect::Reattach { cause: Failure::new(FailureKind::Guest, "") },
            Effect::Note { cause: None },
            Effect::ShutdownGuest { grace },
            Effect::CloseMachine,
            Effect::RemoveTap,
            Effect::RemoveFirewall,
            Effect::RemoveSockets,
            Effect::RemoveDisk,
            Effect::ReleaseSubnet,
            Effect::RemoveDir,
            Effect::RemoveRow,
        ]);
        let mut steps: Vec<_> = effects.iter().filter_map(of_effect).collect();
        let mut listed = VM.steps().to_vec();
        steps.sort_unstable();
        listed.sort_unstable();
        assert_eq!(steps, listed);
        // All but the two that are no part of an operation, and the two phases.
        assert_eq!(steps.len(), effects.len() - 4);
    }

    #[test]
    fn every_action_has_its_points() {
        let process = ProcessIdentity { pid: 1, start_ticks: 1, boot_id: String::new() };
        let actions = [
            Action::RecordCleaning,
            Action::CloseMachine(process),
            Action::RemoveTap,
            Action::RemoveFirewall,
            Action::RemoveSockets,
            Action::RemoveDisk,
            Action::ReleaseSubnet,
            Action::RecordCleaned,
            Action::RemoveDir,
            Action::RemoveRow,
        ];
        let steps: Vec<_> =
            std::iter::once(TAKE_OVER).chain(actions.iter().map(of_action)).collect();
        assert_eq!(steps, GC.steps());
    }
}
