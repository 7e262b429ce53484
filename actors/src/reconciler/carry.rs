//! Carries out the plan for one VM whose locks are held.

use std::time::Duration;

use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::ProcessIdentity;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::{Action, after_failed_removal, after_given_up};
use matchlock_model::record::{CleanupEntry, CleanupStatus, CleanupStep};
use matchlock_store::{WriteOp, WriteOutcome};

use super::network;
use super::report::Outcome;
use super::sight::host;
use crate::deps::Deps;
use crate::points::{self, GC, TAKE_OVER};

/// The store answered something that it never answers to this.
pub(super) fn unexpected(what: &str, outcome: WriteOutcome) -> Failure {
    Failure::new(FailureKind::Internal, format!("the store answered {what} with {outcome:?}"))
}

/// How long to wait before a removal that failed is tried again, each time.
const RETRIES: &[Duration] = &[Duration::from_millis(100), Duration::from_millis(400)];

pub(super) async fn raise_epoch(deps: &Deps, vm: VmId) -> Result<OwnerEpoch, Failure> {
    let pid = deps.processes.own_identity().map_err(|e| host(&e))?.pid;
    let op = WriteOp::RaiseEpoch { vm, pid, at: (deps.now)() };
    match deps.db.write(op).await? {
        WriteOutcome::Epoch(epoch) => Ok(epoch),
        other => Err(unexpected("a take-over", other)),
    }
}

/// The carrying out of one VM's plan.
pub(super) struct Work<'a> {
    deps: &'a Deps,
    vm: VmId,
    has_row: bool,
    /// `None` as long as the take-over could not be written because the disk is full: what is removed
    /// may be what fills it. The lock is held all the same.
    pub(super) epoch: Option<OwnerEpoch>,
    /// Who made what the VM holds, and may still hold some of it.
    pub(super) maker: Option<ProcessIdentity>,
    /// The phase in the row.
    phase: Phase,
    removed: Vec<String>,
    /// Why the VM's owner gave it up; the rows say it from then on.
    cause: Option<String>,
    /// How the VM was found, where nobody was left to say why its life ended.
    found: Option<String>,
    cleanup: Vec<(String, CleanupEntry)>,
}

impl<'a> Work<'a> {
    pub(super) fn new(deps: &'a Deps, vm: VmId, recorded: Option<Phase>) -> Self {
        Self {
            deps,
            vm,
            has_row: recorded.is_some(),
            epoch: None,
            maker: None,
            phase: recorded.unwrap_or(Phase::Creating),
            removed: Vec::new(),
            cause: None,
            found: None,
            cleanup: Vec::new(),
        }
    }

    /// Raises the epoch, so that no earlier owner can write any more.
    pub(super) async fn take_over(&mut self) -> Result<(), Failure> {
        GC.before(TAKE_OVER).map_err(points::injected)?;
        match raise_epoch(self.deps, self.vm).await {
            Ok(epoch) => {
                self.epoch = Some(epoch);
                GC.after(TAKE_OVER).map_err(points::injected)?;
            }
            Err(failure) if failure.kind == FailureKind::Host => {
                tracing::warn!(vm_id = %self.vm, %failure, "the take-over is written later");
            }
            Err(failure) => return Err(failure),
        }
        Ok(())
    }

    /// Records how the VM's life failed. What cannot be written is no reason to leave it lying.
    pub(super) async fn give_up(&mut self, cause: Failure) {
        self.cause = Some(cause.message);
        for phase in after_given_up(self.phase) {
            if let Err(failure) = self.record(*phase, None).await {
                tracing::warn!(vm_id = %self.vm, %failure, "why a VM was given up is not recorded");
                return;
            }
        }
    }

    /// Says in the next record how the life of a VM ended that nobody ended: its owner is gone, or
    /// did not answer. What an owner has recorded on its way down says more, and stays.
    pub(super) fn found_without_owner(&mut self, by_force: bool) {
        if !matches!(
            self.phase,
            Phase::Creating | Phase::Created | Phase::Starting | Phase::Running
        ) {
            return;
        }
        let owner = self.maker.as_ref().map(|maker| format!(" (process {})", maker.pid));
        let (owner, phase) = (owner.unwrap_or_default(), self.phase);
        self.found = Some(if by_force {
            format!("it was taken by force from its owner{owner}, which did not answer")
        } else {
            format!("its owner{owner} was gone; the VM was {phase}")
        });
    }

    /// After a removal that failed the others are tried all the same, so that as much as possible is
    /// released; but nothing after a hypervisor that may still be there, and no record that would tell
    /// of an end.
    pub(super) async fn carry_out(mut self, actions: &[Action]) -> Outcome {
        let mut failed: Option<(&str, Failure)> = None;
        for action in actions {
            if failed.is_some() && !goes_on(action) {
                break;
            }
            let result = self.act_again(action).await;
            let Some(step) = cleanup_step(action) else {
                match result {
                    Ok(()) => continue,
                    Err(failure) if failure.kind == FailureKind::Busy => {
                        return self.stopped("record", failure);
                    }
                    // Written with the next record, after the removals.
                    Err(failure) if *action == Action::RecordCleaning => {
                        tracing::warn!(vm_id = %self.vm, %failure, "cleaning is recorded later");
                        continue;
                    }
                    Err(failure) => return self.fail("record", failure).await,
                }
            };
            self.note(step, &result);
            match result {
                Ok(()) => self.removed.push(step.name().to_owned()),
                Err(failure)
                    if goes_on(action)
                        && !matches!(failure.kind, FailureKind::Busy | FailureKind::Fenced) =>
                {
                    failed.get_or_insert((step.name(), failure));
                }
                Err(failure) => return self.fail(step.name(), failure).await,
            }
        }
        match failed {
            Some((step, failure)) => self.fail(step, failure).await,
            None => Outcome::Cleaned { removed: self.removed },
        }
    }

    /// What fails may be on its way out: a process that the kernel is still taking down, a mount that
    /// is just being left.
    async fn act_again(&mut self, action: &Action) -> Result<(), Failure> {
        let step = points::of_action(action);
        for pause in RETRIES {
            match points::around(GC, step, self.act(action)).await {
                // Another process has to do with it; whoever asks may try again.
                Err(failure) if matches!(failure.kind, FailureKind::Busy | FailureKind::Fenced) => {
                    return Err(failure);
                }
                Err(failure) if cleanup_step(action).is_some() => {
                    tracing::debug!(vm_id = %self.vm, step, %failure, "tried again");
                    tokio::time::sleep(*pause).await;
                }
                result => return result,
            }
        }
        points::around(GC, step, self.act(action)).await
    }

    /// Sees, just before something of the VM is removed, that nobody has taken it over since: a
    /// cleaner that was overruled must not do what it was about to do. Writes carry the epoch.
    async fn see_epoch(&self, action: &Action) -> Result<(), Failure> {
        let touches = match action {
            Action::RemoveTap
            | Action::RemoveFirewall
            | Action::RemoveSockets
            | Action::RemoveDisk
            | Action::RemoveDir => true,
            Action::RecordCleaning
            | Action::RecordCleaned
            | Action::CloseMachine(_)
            | Action::ReleaseSubnet
            | Action::RemoveRow => false,
        };
        let Some(ours) = self.epoch.filter(|_| touches) else { return Ok(()) };
        let current = self.deps.reader.owner_epoch(self.vm).await.map_err(|e| host(&e))?;
        if current == Some(ours) {
            return Ok(());
        }
        let text = format!("{} was taken over by another matchlock", self.vm);
        Err(Failure::new(FailureKind::Fenced, text))
    }

    async fn act(&mut self, action: &Action) -> Result<(), Failure> {
        self.see_epoch(action).await?;
        let paths = self.deps.paths(self.vm);
        let rootfs = &self.deps.rootfs;
        match action {
            Action::RecordCleaning => self.record(Phase::Cleaning, self.found.clone()).await,
            Action::RecordCleaned => {
                if !self.phase.may_become(Phase::Cleaned) {
                    self.record(Phase::Cleaning, self.found.clone()).await?;
                }
                self.record(Phase::Cleaned, None).await
            }
            Action::CloseMachine(process) => {
                let limit = self.deps.limits.kill;
                self.deps.processes.kill(process, limit).await.map_err(|e| host(&e))
            }
            Action::RemoveTap => network::remove_tap(self.deps, self.vm).await,
            Action::RemoveFirewall => {
                network::remove_firewall(self.deps, self.vm, self.maker.as_ref()).await
            }
            Action::ReleaseSubnet => {
                let Some(epoch) = self.epoch().await? else { return Ok(()) };
                self.deps.subnets.release(self.vm, epoch).await
            }
            Action::RemoveSockets => rootfs.remove_sockets(&paths).await.map_err(|e| host(&e)),
            Action::RemoveDisk => rootfs.remove_disk(&paths).await.map_err(|e| host(&e)),
            Action::RemoveDir => rootfs.remove_dir(&paths).await.map_err(|e| host(&e)),
            Action::RemoveRow => {
                let Some(epoch) = self.epoch().await? else { return Ok(()) };
                self.deps.db.remove_vm(self.vm, epoch).await.map_err(Failure::from)
            }
        }
    }

    /// The epoch to write with; `None` for a VM without a row: nothing is recorded.
    async fn epoch(&mut self) -> Result<Option<OwnerEpoch>, Failure> {
        if self.has_row && self.epoch.is_none() {
            self.epoch = Some(raise_epoch(self.deps, self.vm).await?);
        }
        Ok(self.epoch)
    }

    fn note(&mut self, step: CleanupStep, result: &Result<(), Failure>) {
        let entry = CleanupEntry {
            status: if result.is_ok() { CleanupStatus::Ok } else { CleanupStatus::Error },
            error: result.as_ref().err().map(|failure| failure.message.clone()),
            updated_at: (self.deps.now)(),
        };
        self.cleanup.push((step.name().to_owned(), entry));
    }

    async fn record(&mut self, phase: Phase, last_error: Option<String>) -> Result<(), Failure> {
        let Some(epoch) = self.epoch().await? else { return Ok(()) };
        let op = WriteOp::SetPhase {
            vm: self.vm,
            epoch,
            phase,
            last_error: last_error.or_else(|| self.cause.clone()),
            backend: None,
            resources: None,
            cleanup: self.cleanup.clone(),
            at: (self.deps.now)(),
        };
        self.deps.db.write(op).await?;
        self.phase = phase;
        Ok(())
    }

    /// The end, where nothing more can be recorded.
    pub(super) fn stopped(self, step: &str, failure: Failure) -> Outcome {
        Outcome::Failed { removed: self.removed, step: step.to_owned(), error: failure.message }
    }

    /// Records the failure in the row, if there is one and it can be written.
    pub(super) async fn fail(mut self, step: &str, failure: Failure) -> Outcome {
        if failure.kind == FailureKind::Busy {
            return self.stopped(step, failure);
        }
        let mut error = failure.message;
        let text = format!("{step}: {error}");
        for phase in after_failed_removal(self.phase) {
            if let Err(unwritten) = self.record(*phase, Some(text.clone())).await {
                error = format!("{error} (and it could not be recorded: {unwritten})");
                break;
            }
        }
        Outcome::Failed { removed: self.removed, step: step.to_owned(), error }
    }
}

/// A removal that waits for no other, and keeps none waiting but those of the directory and the row.
const fn goes_on(action: &Action) -> bool {
    matches!(
        action,
        Action::RemoveTap
            | Action::RemoveFirewall
            | Action::RemoveSockets
            | Action::RemoveDisk
            // It sees for itself that the TAP is gone.
            | Action::ReleaseSubnet
    )
}

const fn cleanup_step(action: &Action) -> Option<CleanupStep> {
    match action {
        Action::CloseMachine(_) => Some(CleanupStep::MachineClose),
        Action::RemoveTap => Some(CleanupStep::TapDelete),
        Action::RemoveFirewall => Some(CleanupStep::NftablesCleanup),
        Action::ReleaseSubnet => Some(CleanupStep::SubnetRelease),
        Action::RemoveSockets => Some(CleanupStep::SocketsRemove),
        Action::RemoveDisk => Some(CleanupStep::RootfsRemove),
        Action::RemoveDir => Some(CleanupStep::StateDirRemove),
        Action::RecordCleaning | Action::RecordCleaned | Action::RemoveRow => None,
    }
}
