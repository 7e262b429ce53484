//! Locks, looks, decides; [`carry`](super::carry) acts.

use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use matchlock_host::owner_lock::{HeldLock, OwnerLockError};
use matchlock_host::process::MarkedProcess;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::reconcile::{Finding, Goal, Observed};
use matchlock_store::{WriteOp, WriteOutcome};
use tokio::sync::watch;
use tokio::time::Instant;

use super::actor::Target;
use super::carry::{Work, raise_epoch, unexpected};
use super::report::{OBSERVE, Outcome, VmReport};
use super::sight::{AT_ONCE, Sight, host};
use crate::deps::Deps;
use crate::points;

pub(super) async fn reconcile(
    deps: &Deps,
    target: Target,
    goal: Goal,
    progress: Option<watch::Sender<(u64, u64)>>,
) -> Result<Vec<VmReport>, Failure> {
    let sight = deps.sight();
    let (ids, mut given) = match target {
        Target::One(vm) => (vec![vm], Given::default()),
        Target::Owned { vm, lock, cause } => {
            (vec![vm], Given { lock, cause: Some(cause), ..Given::default() })
        }
        Target::TakeOver(vm) => (vec![vm], Given { from_owner: true, ..Given::default() }),
        Target::Wanted => {
            let rows = deps.reader.vms_to_remove().await.map_err(|e| host(&e))?;
            (rows.into_iter().flatten().collect(), Given::default())
        }
        Target::All => (sight.all_ids().await?.into_iter().collect(), Given::default()),
    };
    let tell = |change: &dyn Fn(&mut (u64, u64))| {
        if let Some(progress) = &progress {
            progress.send_modify(change);
        }
    };
    tell(&|(_, of)| *of = ids.len() as u64);
    let mut reports = Vec::with_capacity(ids.len());
    for some in ids.chunks(AT_ONCE) {
        let entering = some.iter().map(|vm| enter(deps, *vm, std::mem::take(&mut given)));
        let entered = join_all(entering).await;
        // Listed once for all of them, with their locks held: nobody can begin another meanwhile.
        let marked = sight.marked();
        let working = some.iter().zip(entered).map(|(vm, entered)| async {
            let report = reconcile_one(deps, &sight, *vm, goal, entered, &marked).await;
            tell(&|(done, _)| *done += 1);
            report
        });
        reports.extend(join_all(working).await);
    }
    Ok(reports)
}

/// Notes that a VM is to be removed.
pub(super) async fn want_removal(deps: &Deps, vm: VmId) -> Result<(), Failure> {
    match deps.db.write(WriteOp::WantRemoval { vm, at: (deps.now)() }).await? {
        WriteOutcome::RemovalWanted => Ok(()),
        other => Err(unexpected("a wish for removal", other)),
    }
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

/// The right to clean a VM up.
struct Entered {
    given: Given,
    // The owner's goes first: who then gets the cleaner's finds no owner.
    _owner: Option<HeldLock>,
    _cleaner: Option<HeldLock>,
}

/// How often a cleaner's lock is looked at: nobody can be told when it is released.
const CLEANER_POLL: Duration = Duration::from_millis(10);

/// Takes the VM's locks, or says who has them.
async fn enter(
    deps: &Deps,
    vm: VmId,
    mut given: Given,
) -> Result<Result<Entered, Outcome>, Failure> {
    let locks = &deps.locks;
    if given.lock.is_none() && !given.from_owner && is_owned(deps, vm)? {
        // Not even the cleaner's lock is taken: somebody may want it at this moment to overrule the
        // owner.
        return Ok(Err(Outcome::Running));
    }
    let deadline = Instant::now() + deps.limits.cleaner;
    let cleaner = loop {
        match locks.try_acquire_cleaner(vm) {
            Ok(lock) => break Some(lock),
            Err(OwnerLockError::Held { .. }) if Instant::now() < deadline => {
                tokio::time::sleep(CLEANER_POLL).await;
            }
            // A cleaner that is stopped, or hangs, is overruled like an owner. When it goes on, it
            // records nothing more, and what it removes by then is gone or still garbage: a VM's
            // objects carry its id, which no other VM gets.
            Err(OwnerLockError::Held { .. }) if given.from_owner => break None,
            Err(OwnerLockError::Held { .. }) => return Ok(Err(Outcome::BeingCleaned)),
            Err(error) => return Err(host(&error)),
        }
    };
    let owner = match (given.lock.take(), locks.try_acquire(vm)) {
        (Some(lock), _) | (None, Ok(lock)) => Some(lock),
        // It is stopped, or hangs. It is fenced by the epoch, and so are we if it was not.
        (None, Err(OwnerLockError::Held { .. })) if given.from_owner => None,
        (None, Err(OwnerLockError::Held { .. })) => return Ok(Err(Outcome::Running)),
        (None, Err(error)) => return Err(host(&error)),
    };
    Ok(Ok(Entered { given, _owner: owner, _cleaner: cleaner }))
}

/// Whether it is an owner that holds the VM's lock, and not one who cleans up: who has come or gone
/// between two looks is seen by the third.
fn is_owned(deps: &Deps, vm: VmId) -> Result<bool, Failure> {
    let is_being_cleaned = || deps.locks.is_being_cleaned(vm).map_err(|e| host(&e));
    Ok(!is_being_cleaned()?
        && deps.locks.is_held(vm).map_err(|e| host(&e))?
        && !is_being_cleaned()?)
}

type Marked = Result<Vec<MarkedProcess>, Failure>;

/// One VM that cannot be looked at keeps no other from being cleaned.
async fn reconcile_one(
    deps: &Deps,
    sight: &Sight,
    vm: VmId,
    goal: Goal,
    entered: Result<Result<Entered, Outcome>, Failure>,
    marked: &Marked,
) -> VmReport {
    let mut entered = match entered {
        Ok(Ok(entered)) => entered,
        Ok(Err(outcome)) => return VmReport { vm, outcome, finding: None },
        Err(failure) => return VmReport { vm, outcome: Outcome::not_seen(failure), finding: None },
    };
    let given = std::mem::take(&mut entered.given);
    let cause = given.cause.clone();
    match clean(deps, sight, vm, goal, given, marked).await {
        Ok((outcome, finding)) => VmReport { vm, outcome, finding },
        Err(failure) => {
            let outcome = match cause {
                Some(cause) => record_unseen(deps, vm, cause, failure).await,
                None => Outcome::not_seen(failure),
            };
            VmReport { vm, outcome, finding: None }
        }
    }
}

/// Cleans a VM up whose locks we hold.
async fn clean(
    deps: &Deps,
    sight: &Sight,
    vm: VmId,
    goal: Goal,
    given: Given,
    marked: &Marked,
) -> Result<(Outcome, Option<Finding>), Failure> {
    let marked = marked.as_ref().map_err(Clone::clone)?;
    // Looked at with the lock held: what was seen before may have changed.
    let mut row = deps.reader.remains(vm).await.map_err(|e| host(&e))?;
    let mut epoch = None;
    let mut again = None;
    if given.from_owner && row.is_none() {
        // Without a row nothing keeps the owner from going on.
        let is_there = sight.observe(vm, None, marked).await? != Observed::default();
        return Ok((if is_there { Outcome::Running } else { Outcome::Unknown }, None));
    }
    if given.from_owner {
        // Whoever cannot look (from another namespace, say) could not clean up either, and the
        // owner would be fenced for nothing.
        sight.observe(vm, row.as_ref(), marked).await?;
        // Nothing else keeps the owner from going on: it is fenced before what counts is looked at.
        epoch = Some(raise_epoch(deps, vm).await?);
        row = deps.reader.remains(vm).await.map_err(|e| host(&e))?;
        again = Some(sight.marked()?);
    }
    let observed = sight.observe(vm, row.as_ref(), again.as_ref().unwrap_or(marked)).await?;
    if row.is_none() && observed == Observed::default() {
        return Ok((Outcome::Unknown, None));
    }
    let finding = Finding::new(vm, goal, row.as_ref(), observed)
        .map_err(|refusal| Failure::from_error(FailureKind::Internal, &refusal))?;
    let finding = Finding { owner_lives: given.from_owner, ..finding };
    let mut actions = finding.plan.clone();
    points::disturb(&mut actions);
    let mut work = Work::new(deps, vm, finding.recorded);
    work.epoch = epoch;
    work.maker = row.as_ref().and_then(|row| row.maker.clone());
    if row.is_some() && !actions.is_empty() && work.epoch.is_none() {
        // Whoever waited for the database in vain would wait again for each further record.
        match work.take_over().await {
            Err(failure) if failure.kind == FailureKind::Busy => {
                return Ok((work.stopped("record", failure), Some(finding)));
            }
            taken => taken?,
        }
    }
    if let Some(cause) = given.cause {
        work.give_up(cause).await;
    } else {
        work.found_without_owner(given.from_owner);
    }
    Ok((work.carry_out(&actions).await, Some(finding)))
}

/// A VM that its owner gave up and that could not be looked at: nobody else will say so.
async fn record_unseen(deps: &Deps, vm: VmId, cause: Failure, failure: Failure) -> Outcome {
    let recorded = match deps.reader.remains(vm).await {
        Ok(Some(row)) => row.phase,
        Ok(None) => return Outcome::not_seen(failure),
        Err(error) => return Outcome::not_seen(failure.context(error)),
    };
    let mut work = Work::new(deps, vm, Some(recorded));
    if let Err(untaken) = work.take_over().await {
        return Outcome::not_seen(failure.context(untaken));
    }
    work.give_up(cause).await;
    work.fail(OBSERVE, failure).await
}
