//! Observe, plan, act.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use matchlock_failpoints::mutated;
use matchlock_host::owner_lock::{HeldLock, OwnerLockError};
use matchlock_host::process::MarkedProcess;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::{
    Action, Goal, Observed, after_failed_removal, after_given_up, plan,
};
use matchlock_model::record::{CleanupEntry, CleanupStatus, CleanupStep, VmRemains};
use matchlock_store::{WriteOp, WriteOutcome};

use super::actor::Target;
use super::network;
use super::report::{Outcome, VmReport};
use crate::deps::Deps;
use crate::points::{self, GC, TAKE_OVER};

pub(super) async fn reconcile(
    deps: &Deps,
    target: Target,
    goal: Goal,
) -> Result<Vec<VmReport>, Failure> {
    let (ids, mut given) = match target {
        Target::One(vm) => (BTreeSet::from([vm]), Given::default()),
        Target::Owned { vm, lock, cause } => {
            (BTreeSet::from([vm]), Given { lock, cause: Some(cause), ..Given::default() })
        }
        Target::TakeOver(vm) => {
            (BTreeSet::from([vm]), Given { from_owner: true, ..Given::default() })
        }
        Target::All => (all_ids(deps).await?, Given::default()),
    };
    let mut reports = Vec::with_capacity(ids.len());
    for vm in ids {
        // One VM that cannot be looked at keeps no other from being cleaned.
        let outcome = reconcile_one(deps, vm, goal, std::mem::take(&mut given))
            .await
            .unwrap_or_else(|failure| Outcome::Failed {
                removed: Vec::new(),
                step: "observe".into(),
                error: failure.message,
            });
        reports.push(VmReport { vm, outcome });
    }
    Ok(reports)
}

/// Drops the history of VMs that were removed before this moment; of how many.
pub(super) async fn prune_history(deps: &Deps, before: Timestamp) -> Result<usize, Failure> {
    match deps.db.write(WriteOp::PruneHistory { before }).await? {
        WriteOutcome::Pruned { vms, unreadable } => {
            if unreadable > 0 {
                tracing::warn!(
                    vms = unreadable,
                    "history is kept for ever: vm_lifecycle.updated_at of its latest row cannot be read"
                );
            }
            Ok(vms)
        }
        other => Err(unexpected("a prune", other)),
    }
}

/// The store answered something that it never answers to this.
fn unexpected(what: &str, outcome: WriteOutcome) -> Failure {
    Failure::new(FailureKind::Internal, format!("the store answered {what} with {outcome:?}"))
}

fn host(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error)
}

/// Processes that carry our installation's mark; those of others are not ours to see.
fn marked(deps: &Deps) -> Result<Vec<MarkedProcess>, Failure> {
    let mut marked = deps.processes.find_marked().map_err(|e| host(&e))?;
    if !mutated("anybodys_processes") {
        marked.retain(|process| process.mark.install == deps.install);
    }
    Ok(marked)
}

async fn all_ids(deps: &Deps) -> Result<BTreeSet<VmId>, Failure> {
    let marked = marked(deps)?;
    let rows = deps.reader.vm_ids().await.map_err(|e| host(&e))?;
    let dirs = deps.rootfs.list_dirs(&deps.vms_dir).map_err(|e| host(&e))?;
    // Without its id a row belongs to no VM that could be looked for; `gc` tells which those are.
    let of_rows = rows.into_iter().flatten();
    let of_processes = marked.iter().map(|process| process.mark.vm);
    let of_network = network::marked_ids(deps).await?;
    Ok(of_rows.chain(dirs).chain(of_processes).chain(of_network).collect())
}

/// How long to wait before a removal that failed is tried again, each time.
const RETRIES: &[Duration] = &[Duration::from_millis(100), Duration::from_millis(400)];

/// What a reconciliation starts with.
#[derive(Default)]
struct Given {
    /// The owner's lock, handed over.
    lock: Option<HeldLock>,
    /// Whether the VM is taken from an owner that holds its lock and does not answer.
    from_owner: bool,
    /// Why the VM's owner gave it up.
    cause: Option<Failure>,
}

async fn reconcile_one(
    deps: &Deps,
    vm: VmId,
    goal: Goal,
    given: Given,
) -> Result<Outcome, Failure> {
    // Held until the VM is done: nobody else cleans it up meanwhile.
    let _cleaner = match deps.locks.try_acquire_cleaner(vm) {
        Ok(lock) => lock,
        Err(OwnerLockError::Held { .. }) => return Ok(Outcome::Running),
        Err(error) => return Err(host(&error)),
    };
    let _owner = match (given.lock, deps.locks.try_acquire(vm)) {
        (Some(lock), _) | (None, Ok(lock)) => Some(lock),
        // It is stopped, or hangs. It is fenced by the epoch, and so are we if it was not.
        (None, Err(OwnerLockError::Held { .. })) if given.from_owner => None,
        (None, Err(OwnerLockError::Held { .. })) => return Ok(Outcome::Running),
        (None, Err(error)) => return Err(host(&error)),
    };
    // Looked at with the lock held: what was seen before may have changed.
    let mut row = deps.reader.remains(vm).await.map_err(|e| host(&e))?;
    let mut epoch = None;
    if given.from_owner && row.is_some() {
        // Nothing else keeps the owner from going on: it is fenced before anything is looked at.
        epoch = Some(raise_epoch(deps, vm).await?);
        row = deps.reader.remains(vm).await.map_err(|e| host(&e))?;
    }
    let observed = observe(deps, vm, row.as_ref()).await?;
    if row.is_none() && observed == Observed::default() {
        return Ok(Outcome::Unknown);
    }
    // A VM that was to go with its command goes altogether: that is what its user asked for.
    let goal = if row.as_ref().is_some_and(|row| row.ephemeral) { Goal::Remove } else { goal };
    let recorded = row.as_ref().map(|row| row.phase);
    let mut actions = plan(vm, goal, recorded, &observed)
        .map_err(|refusal| Failure::from_error(FailureKind::Internal, &refusal))?;
    points::disturb(&mut actions);
    let mut work = Work { epoch, ..Work::new(deps, vm, recorded) };
    if row.is_some() && !actions.is_empty() && work.epoch.is_none() {
        // Whoever waited for the database in vain would wait again for each further record.
        match work.take_over().await {
            Err(failure) if failure.kind == FailureKind::Busy => {
                return Ok(work.stopped("record", failure));
            }
            taken => taken?,
        }
    }
    if let Some(cause) = given.cause {
        work.give_up(cause).await;
    }
    Ok(work.carry_out(&actions).await)
}

async fn observe(deps: &Deps, vm: VmId, row: Option<&VmRemains>) -> Result<Observed, Failure> {
    let mut hypervisors: Vec<_> = marked(deps)?
        .iter()
        .filter(|process| process.mark.vm == vm)
        .map(|process| process.identity.clone())
        .collect();
    if let Some(recorded) = row.and_then(|row| row.hypervisor.as_ref())
        && !hypervisors.contains(recorded)
        && in_our_pid_namespace(deps, row)?
        && deps.processes.is_alive(recorded).map_err(|e| host(&e))?
    {
        hypervisors.push(recorded.clone());
    }
    let files = deps.rootfs.observe(&deps.paths(vm)).map_err(|e| host(&e))?;
    let (tap, firewall) = network::observe(deps, vm, row).await?;
    Ok(Observed {
        owner_lives: false,
        hypervisors,
        tap,
        firewall,
        subnet: row.is_some_and(|row| row.holds_subnet),
        sockets: files.sockets,
        rootfs: files.rootfs,
        dir: files.dir,
    })
}

/// A pid that was recorded in another pid namespace means nothing here: that is "could not look",
/// unless this host was booted since, or we see the processes of all namespaces: then its mark has
/// found it.
fn in_our_pid_namespace(deps: &Deps, row: Option<&VmRemains>) -> Result<bool, Failure> {
    let Some(row) = row else { return Ok(true) };
    let Some(recorded) = row.namespaces.as_ref() else { return Ok(true) };
    let ours = deps.processes.own_namespaces().map_err(|e| host(&e))?;
    let boot_id = deps.processes.own_identity().map_err(|e| host(&e))?.boot_id;
    let booted_since = row.hypervisor.as_ref().is_some_and(|recorded| recorded.boot_id != boot_id);
    if recorded.pid == ours.pid || booted_since {
        return Ok(true);
    }
    if deps.processes.sees_all_processes().map_err(|e| host(&e))? {
        return Ok(false);
    }
    let text = format!(
        "could not look at the hypervisor: it was started in another pid namespace ({}, here {})",
        recorded.pid, ours.pid
    );
    Err(Failure::new(FailureKind::Host, text))
}

async fn raise_epoch(deps: &Deps, vm: VmId) -> Result<OwnerEpoch, Failure> {
    let owner = deps.processes.own_identity().map_err(|e| host(&e))?;
    let op = WriteOp::RaiseEpoch { vm, owner, at: (deps.now)() };
    match deps.db.write(op).await? {
        WriteOutcome::Epoch(epoch) => Ok(epoch),
        other => Err(unexpected("a take-over", other)),
    }
}

/// The carrying out of one VM's plan.
struct Work<'a> {
    deps: &'a Deps,
    vm: VmId,
    has_row: bool,
    /// `None` as long as the take-over could not be written because the disk is full: what is removed
    /// may be what fills it. The lock is held all the same.
    epoch: Option<OwnerEpoch>,
    /// The phase in the row.
    phase: Phase,
    removed: Vec<String>,
    /// Why the VM's owner gave it up; the rows say it from then on.
    cause: Option<String>,
    cleanup: Vec<(String, CleanupEntry)>,
}

impl<'a> Work<'a> {
    fn new(deps: &'a Deps, vm: VmId, recorded: Option<Phase>) -> Self {
        Self {
            deps,
            vm,
            has_row: recorded.is_some(),
            epoch: None,
            phase: recorded.unwrap_or(Phase::Creating),
            removed: Vec::new(),
            cause: None,
            cleanup: Vec::new(),
        }
    }

    /// Raises the epoch, so that no earlier owner can write any more.
    async fn take_over(&mut self) -> Result<(), Failure> {
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
    async fn give_up(&mut self, cause: Failure) {
        self.cause = Some(cause.message);
        for phase in after_given_up(self.phase) {
            if let Err(failure) = self.record(*phase, None).await {
                tracing::warn!(vm_id = %self.vm, %failure, "why a VM was given up is not recorded");
                return;
            }
        }
    }

    async fn carry_out(mut self, actions: &[Action]) -> Outcome {
        for action in actions {
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
                Err(failure) => return self.fail(step.name(), failure).await,
            }
        }
        Outcome::Cleaned { removed: self.removed }
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

    async fn act(&mut self, action: &Action) -> Result<(), Failure> {
        let paths = self.deps.paths(self.vm);
        let rootfs = &self.deps.rootfs;
        match action {
            Action::RecordCleaning => self.record(Phase::Cleaning, None).await,
            Action::RecordCleaned => {
                if !self.phase.may_become(Phase::Cleaned) {
                    self.record(Phase::Cleaning, None).await?;
                }
                self.record(Phase::Cleaned, None).await
            }
            Action::CloseMachine(process) => {
                let limit = self.deps.limits.kill;
                self.deps.processes.kill(process, limit).await.map_err(|e| host(&e))
            }
            Action::RemoveTap => network::remove_tap(self.deps, self.vm).await,
            Action::RemoveFirewall => network::remove_firewall(self.deps, self.vm).await,
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
    fn stopped(self, step: &str, failure: Failure) -> Outcome {
        Outcome::Failed { removed: self.removed, step: step.to_owned(), error: failure.message }
    }

    /// Records the failure in the row, if there is one and it can be written.
    async fn fail(mut self, step: &str, failure: Failure) -> Outcome {
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
