//! Saving a template, and going on from what was saved of one.
//!
//! ```text
//!   claim:    begin ─► (one that is of use is there already? then no launch) ─► launch on hold
//!   save:     guest on hold ─► the machine saves itself ─► publish
//!   restore:  find ─► launch from it ─┬─ hash it ─┬─► both well: resume, connect ─► true
//!                                     └─ record ──┘      │
//!             none, or anything wrong: kill what was launched ─► one line ─► false: boot
//!             nothing wrong, and yet no answer: withdraw it, so that another is made
//! ```
//!
//! # Invariants
//! 1. A guest goes on only after every byte that it was made of was seen to be what was saved.
//! 2. Where a restored machine is not used it is gone, seen to be gone, before another is launched; and
//!    the row's epoch was read again.
//! 3. A template is launched only by whoever has the claim: of many that want the same at once, one
//!    boots. The claim ends with the snapshot, or with the machine.
//!
//! # Failure
//! Nothing that is wrong about a snapshot fails a VM. What ends the effect is that a machine could not
//! be ended, or that the row could not be written.

use matchlock_host::hypervisor::{Machine, MachineSpec, Saved, Start};
use matchlock_host::snapshot::{Draft, POINTS, Snapshot, SnapshotError, Wanted};
use matchlock_model::failure::{Failure, FailureKind, chain};
use matchlock_model::record::Started;
use matchlock_model::vm::{Effect, OpResult};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::context::VmContext;
use super::effects::{cancelled, host, overtaken, see_epoch};
use super::machine::{
    EXIT_AFTER_LINK_LOSS, end_marked, ended_early, keep, never_ready, no_machine, starved,
};
use crate::points::around;

/// The snapshot that a machine like this makes or needs.
async fn wanted(context: &VmContext, spec: &MachineSpec) -> Result<Wanted, Failure> {
    let hypervisor = context.deps.hypervisor.fingerprint(spec).await.map_err(|e| host(&e))?;
    Ok(Wanted {
        kernel: spec.kernel.clone(),
        initramfs: spec.initramfs.clone(),
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
        nic: spec.nic.is_some(),
        hypervisor,
    })
}

/// Saves a template, once its guest is on hold. What is saved is published, whoever cancels meanwhile: a
/// half of it would be left to others.
pub(super) async fn save(context: &VmContext, cancel: &CancellationToken) -> OpResult {
    let started = Instant::now();
    let saved = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(cancelled(&Effect::SaveSnapshot)),
        saved = saved(context) => saved?,
    };
    let draft = context.take_draft().ok_or_else(no_claim)?;
    let limit = context.deps.limits.boot;
    let published = timeout(limit, context.deps.snapshots.publish(draft, saved)).await;
    let late = || Failure::new(FailureKind::Timeout, format!("it was not shown within {limit:?}"));
    published.map_err(|_| late())?.map_err(|e| host(&e))?;
    context.time(|timings| timings.saved = Some(started.elapsed()));
    Ok(())
}

/// Has the machine save itself.
async fn saved(context: &VmContext) -> Result<Saved, Failure> {
    let machine = context.machine().ok_or_else(no_machine)?;
    let limit = context.deps.limits.boot;
    let held = tokio::select! {
        biased;
        exit = machine.wait_exit() => return Err(ended_early(&*machine, &exit)),
        held = context.deps.connector.held(&*machine, limit) => held,
    };
    if let Err(error) = held {
        let starved = starved(context, &*machine);
        let mut failure = never_ready(&*machine, &error).await;
        failure.message.push_str(&starved);
        return Err(failure);
    }
    let file = context.with_draft(Draft::file).ok_or_else(no_claim)?.map_err(|e| host(&e))?;
    let saved = timeout(limit, machine.save(file)).await;
    let late = || Failure::new(FailureKind::Timeout, format!("it was not saved within {limit:?}"));
    saved.map_err(|_| late())?.map_err(|e| host(&e))
}

fn no_claim() -> Failure {
    Failure::new(FailureKind::Internal, "the snapshot of this template was not begun")
}

/// Keeps others from making a snapshot while a template makes one, before it is launched.
pub(super) async fn claim(context: &VmContext, spec: &MachineSpec, anew: bool) -> OpResult {
    let wanted = wanted(context, spec).await?;
    // One of an earlier life would keep us out ourselves.
    let_go(context).await;
    let begun = context.deps.snapshots.begin(&wanted).await;
    context.set_draft(begun.map_err(|error| match error {
        SnapshotError::Busy { .. } => Failure::from_error(FailureKind::Busy, &error),
        error => host(&error),
    })?);
    if !anew && is_there(context, &wanted).await {
        return Err(Failure::new(FailureKind::Busy, "somebody has just made this snapshot"));
    }
    Ok(())
}

/// Whether there is one that is of use, to its last byte. One that cannot be looked at is of none.
async fn is_there(context: &VmContext, wanted: &Wanted) -> bool {
    let looked = async {
        match context.deps.snapshots.find(wanted).await? {
            Some(snapshot) => context.deps.snapshots.check(&snapshot).await.map(|()| true),
            None => Ok(false),
        }
    };
    looked.await.unwrap_or_else(|error| {
        let error = chain(&error);
        tracing::debug!(vm_id = %context.id, error, "a snapshot is to be replaced");
        false
    })
}

/// Lets others make one: removes what of this one was not published.
pub(super) async fn let_go(context: &VmContext) {
    let Some(draft) = context.take_draft() else { return };
    if let Err(error) = context.deps.snapshots.discard(draft).await {
        let error = chain(&error);
        tracing::warn!(vm_id = %context.id, error, "half a snapshot is left; `matchlock gc` tries again");
    }
}

/// Launches the machine from a snapshot that fits and lets its guest go on. False where there is none,
/// or none of use: then no machine of it is left, and the VM is to boot.
pub(super) async fn restore(context: &VmContext, spec: &MachineSpec) -> Result<bool, Failure> {
    let started = Instant::now();
    let snapshot = match find(context, spec).await {
        Ok(Some(snapshot)) => snapshot,
        Ok(None) => return Ok(false),
        Err(failure) => {
            boots(context, &failure);
            return Ok(false);
        }
    };
    let start = Start::Restore(snapshot.memory.clone());
    let restored = MachineSpec { start, ..spec.clone() };
    let launched = context.deps.hypervisor.launch(&restored).await;
    drop(restored);
    let machine = match launched {
        Ok(machine) => machine,
        Err(error) => {
            boots(context, &host(&error));
            // It should have left none; but two of one VM must not be, and nobody would find the first.
            end_marked(context).await?;
            see_epoch(context).await?;
            return Ok(false);
        }
    };
    keep(context, machine.clone(), Started::Restored, started).await?;
    let mut is_whole = false;
    let resumed = around(POINTS, "restore", async {
        context.deps.snapshots.check(&snapshot).await.map_err(|e| host(&e))?;
        is_whole = true;
        resume(context, &*machine, started).await
    });
    let Err(mut failure) = resumed.await else {
        tracing::info!(vm_id = %context.id, "started from a snapshot");
        return Ok(true);
    };
    // Whoever takes a VM over ends its machine: that says nothing of the snapshot.
    if let Some(taken) = overtaken(context).await {
        return Err(taken);
    }
    // Its bytes are what they are, however busy the host is.
    let starved = if is_whole { starved(context, &*machine) } else { String::new() };
    failure.message.push_str(&starved);
    boots(context, &failure);
    context.time(|timings| timings.restore = None);
    context.set_link(None);
    let is_suspect = is_whole && starved.is_empty() && !was_killed(&*machine).await;
    machine.kill(context.deps.limits.kill).await.map_err(|e| host(&e))?;
    // It is not the VM's any more: where the next launch fails, what it left is looked for by its mark.
    context.set_machine(None, started);
    // That took a while, and another machine is about to be launched.
    see_epoch(context).await?;
    if is_suspect {
        context.set_suspect(snapshot);
    }
    Ok(false)
}

/// Whether somebody else has killed it, as the kernel does where memory runs out: that is not what it
/// went on from.
async fn was_killed(machine: &dyn Machine) -> bool {
    let ended = timeout(EXIT_AFTER_LINK_LOSS, machine.wait_exit()).await;
    ended.is_ok_and(|exit| exit.status.starts_with("signal: 9 "))
}

/// The guest has booted. What it could not go on from is of no use to the next VM either, though it is
/// whole: it is removed. Where the guest does not boot, neither says anything about the snapshot.
pub(super) async fn booted(context: &VmContext) {
    let Some(snapshot) = context.take_suspect() else { return };
    if let Err(error) = context.deps.snapshots.withdraw(snapshot).await {
        let error = chain(&error);
        tracing::warn!(vm_id = %context.id, error, "a snapshot of no use is left");
    }
}

async fn find(context: &VmContext, spec: &MachineSpec) -> Result<Option<Snapshot>, Failure> {
    let wanted = wanted(context, spec).await?;
    context.deps.snapshots.find(&wanted).await.map_err(|e| host(&e))
}

/// Has the guest go on, until its agent answers: until then it may turn out that nobody can.
async fn resume(context: &VmContext, machine: &dyn Machine, launched: Instant) -> OpResult {
    let limit = context.deps.limits.restore;
    let answered = async {
        context.deps.connector.resume(machine, limit).await?;
        context.time(|timings| timings.restore = Some(launched.elapsed()));
        context.deps.connector.connect(machine, limit).await
    };
    let link = tokio::select! {
        biased;
        exit = machine.wait_exit() => return Err(ended_early(machine, &exit)),
        link = answered => link.map_err(|e| Failure::from_error(FailureKind::Guest, &e))?,
    };
    context.set_link(Some(link));
    Ok(())
}

/// The one line about a snapshot that was of no use.
fn boots(context: &VmContext, failure: &Failure) {
    tracing::warn!(vm_id = %context.id, %failure, "boots: it could not go on from a snapshot");
}
