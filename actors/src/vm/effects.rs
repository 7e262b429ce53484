//! One function per effect. Each may run twice; each is dropped at its next await when its
//! operation is cancelled, unless it takes something down.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::phase::Phase;
use matchlock_model::record::CleanupStep;
use matchlock_model::vm::{Effect, OpResult};
use matchlock_store::WriteOp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::context::VmContext;
use super::watch;
use super::{machine, network, snapshot};
use crate::points;

/// How far an operation has come.
#[derive(Debug)]
pub(super) struct Progress {
    /// The phase that was committed last.
    pub(super) recorded: Phase,
    /// The effect that is being carried out.
    pub(super) effect: &'static str,
}

impl Progress {
    pub(super) const fn new(recorded: Phase) -> Self {
        Self { recorded, effect: "none" }
    }
}

/// Carries out the effects of an operation in order.
///
/// Building up stops at the first failure. Taking down goes on after a failed removal, so that as
/// much as possible is released, but not after a hypervisor that may still be there; and a failed
/// removal keeps the records after it from being written.
///
/// A record on the way down that cannot be written (a full disk, a locked database) does not keep
/// anything from being released: the row names what the VM holds already, and what is released may
/// be what fills the disk. It is written with the last record. Only a new owner stops us.
///
/// A closed fence ends the operation before its next effect, whatever that is: whoever closed it has
/// told others, or another life, that nothing more is begun.
pub(super) async fn run(
    context: &Arc<VmContext>,
    effects: &[Effect],
    cancel: &CancellationToken,
    fence: &CancellationToken,
    progress: &Mutex<Progress>,
) -> OpResult {
    let mut failed: Option<Failure> = None;
    for effect in effects {
        if fence.is_cancelled() {
            return Err(given_up(effect));
        }
        if failed.is_some() && !is_removal(effect) {
            break;
        }
        progress.lock().unwrap_or_else(PoisonError::into_inner).effect = effect.name();
        let started = Instant::now();
        let recorded = progress.lock().unwrap_or_else(PoisonError::into_inner).recorded;
        let work = async {
            match check_fence(context, effect).await {
                // Given up while it looked.
                Ok(()) if fence.is_cancelled() => (false, Err(given_up(effect))),
                Ok(()) => {
                    let work = carry_out(context, effect, recorded, cancel);
                    (true, points::effect(effect, work).await)
                }
                Err(failure) => (false, Err(failure)),
            }
        };
        let (begun, result) = if is_cancellable(effect) {
            tokio::select! {
                biased;
                () = cancel.cancelled() => (true, Err(cancelled(effect))),
                result = work => result,
            }
        } else {
            work.await
        };
        tracing::debug!(
            vm_id = %context.id, %effect, took_us = started.elapsed().as_micros(), ok = result.is_ok(),
            "effect"
        );
        note(context, effect, &result, started.elapsed());
        match (result, effect) {
            (Ok(()), Effect::Record { phase, .. }) => {
                progress.lock().unwrap_or_else(PoisonError::into_inner).recorded = *phase;
            }
            (Ok(()), _) => {}
            // Without a row it was taken over and removed.
            (Err(failure), _)
                if matches!(failure.kind, FailureKind::Fenced | FailureKind::NotFound) =>
            {
                abandon(context).await;
                return Err(taken_over(context));
            }
            // Whoever cannot see that the VM is its own touches nothing more of it.
            (Err(failure), _) if !begun => return Err(failure),
            (Err(failure), effect) if is_removal(effect) => {
                failed.get_or_insert(failure);
            }
            (Err(failure), effect) if may_be_recorded_later(effect) => {
                tracing::warn!(vm_id = %context.id, %failure, "a phase is recorded later");
            }
            (Err(failure), _) => {
                // What was taken from under it failed for that reason, whatever it saw itself.
                let Some(taken) = overtaken(context).await else { return Err(failure) };
                tracing::info!(vm_id = %context.id, %effect, %failure, "failed beside a take-over");
                abandon(context).await;
                return Err(taken);
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// That the VM is known to be somebody else's by now. Who cannot look does not know.
pub(super) async fn overtaken(context: &VmContext) -> Option<Failure> {
    see_epoch(context).await.err().filter(|failure| failure.kind == FailureKind::Fenced)
}

pub(super) fn cancelled(effect: &Effect) -> Failure {
    Failure::new(FailureKind::Cancelled, format!("{effect} was cancelled by a stop"))
}

fn given_up(effect: &Effect) -> Failure {
    Failure::new(
        FailureKind::Cancelled,
        format!("{effect} was not begun: its operation was given up"),
    )
}

/// A record of the way down but the last.
const fn may_be_recorded_later(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Record {
            phase: Phase::Stopping | Phase::Cleaning | Phase::CreateFailed | Phase::StartFailed,
            ..
        }
    )
}

/// Sees, just before an effect touches this host, that nobody has taken the VM over: an owner that
/// was stopped and goes on again must not do what it was about to do.
///
/// Writes carry the epoch themselves. Talking to the guest and ending our own hypervisor harm
/// nobody: whoever took the VM over has ended it.
async fn check_fence(context: &VmContext, effect: &Effect) -> OpResult {
    match effect {
        Effect::CreateDir
        | Effect::ServeOwner
        | Effect::CreateDisk
        | Effect::CreateTap
        | Effect::ApplyFirewall
        | Effect::Launch
        | Effect::SaveSnapshot
        | Effect::RemoveTap
        | Effect::RemoveFirewall
        | Effect::RemoveSockets
        | Effect::RemoveDisk
        | Effect::RemoveDir => see_epoch(context).await,
        Effect::CloseMachine if context.machine().is_none() => see_epoch(context).await,
        Effect::CloseMachine
        | Effect::Record { .. }
        | Effect::ConnectGuest
        | Effect::ConfigureGuest
        | Effect::Reattach { .. }
        | Effect::Note { .. }
        | Effect::ShutdownGuest { .. }
        | Effect::ReleaseSubnet
        | Effect::RemoveRow
        | Effect::Cancel
        | Effect::Settle => Ok(()),
    }
}

pub(super) async fn see_epoch(context: &VmContext) -> OpResult {
    let current = context.deps.reader.owner_epoch(context.id).await.map_err(|e| host(&e))?;
    match current {
        Some(epoch) if epoch == context.epoch => Ok(()),
        _ => Err(taken_over(context)),
    }
}

fn taken_over(context: &VmContext) -> Failure {
    let text = format!("{} was taken over by another matchlock", context.id);
    Failure::new(FailureKind::Fenced, text)
}

/// Lets go of a VM that is somebody else's to clean up: ends what is our own child, closes our
/// descriptors (with which the kernel takes links and tables along), and touches nothing else.
pub(crate) async fn abandon(context: &VmContext) {
    context.set_link(None);
    context.set_server(None);
    drop(context.take_tap());
    drop(context.take_firewall());
    drop(context.take_draft());
    if let Some(machine) = context.machine()
        && machine.wait_exit().now_or_never().is_none()
        && let Err(error) = machine.kill(context.deps.limits.kill).await
    {
        tracing::error!(vm_id = %context.id, %error, "the hypervisor of a VM that is let go of");
    }
}

/// What follows it may be done even if it failed.
const fn is_removal(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::RemoveTap
            | Effect::RemoveFirewall
            | Effect::RemoveSockets
            | Effect::RemoveDisk
            // It sees for itself that the TAP is gone.
            | Effect::ReleaseSubnet
    )
}

/// Taking down is never cancelled; only the wait for the guest is. Saving a snapshot sees to it itself.
const fn is_cancellable(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::CreateDir
            | Effect::ServeOwner
            | Effect::CreateDisk
            | Effect::CreateTap
            | Effect::ApplyFirewall
            | Effect::Launch
            | Effect::ConnectGuest
            | Effect::ConfigureGuest
            | Effect::Reattach { .. }
            | Effect::ShutdownGuest { .. }
    )
}

async fn carry_out(
    context: &Arc<VmContext>,
    effect: &Effect,
    recorded: Phase,
    cancel: &CancellationToken,
) -> OpResult {
    match effect {
        Effect::Record { phase, cause } => {
            // Phases whose record failed are caught up with.
            if *phase == Phase::Cleaned && !recorded.may_become(Phase::Cleaned) {
                record(context, Phase::Cleaning, cause.as_ref()).await?;
            }
            record(context, *phase, cause.as_ref()).await
        }
        Effect::CreateDir => {
            context.deps.rootfs.create_dir(&context.paths).await.map_err(|e| host(&e))
        }
        Effect::ServeOwner => serve_owner(context).await,
        Effect::CreateDisk => context
            .deps
            .rootfs
            .create_disk(&context.paths, context.create.spec.disk_size_mb)
            .await
            .map_err(|e| host(&e)),
        Effect::CreateTap => network::create_tap(context).await,
        Effect::ApplyFirewall => network::apply_firewall(context).await,
        Effect::Launch => machine::launch(context).await,
        Effect::ConnectGuest => machine::connect_guest(context).await,
        Effect::SaveSnapshot => snapshot::save(context, cancel).await,
        Effect::ConfigureGuest => machine::configure_guest(context).await,
        Effect::Reattach { cause } => watch::reattach(context, cause).await,
        Effect::Note { cause } => watch::note(context, cause.as_ref()).await,
        Effect::ShutdownGuest { grace } => machine::shutdown_guest(context, *grace).await,
        Effect::CloseMachine => machine::close_machine(context).await,
        Effect::RemoveTap => network::remove_tap(context).await,
        Effect::RemoveFirewall => network::remove_firewall(context).await,
        Effect::ReleaseSubnet => network::release_subnet(context).await,
        Effect::RemoveSockets => {
            context.set_server(None);
            context.deps.rootfs.remove_sockets(&context.paths).await.map_err(|e| host(&e))
        }
        Effect::RemoveDisk => {
            context.deps.rootfs.remove_disk(&context.paths).await.map_err(|e| host(&e))
        }
        Effect::RemoveDir => {
            context.deps.rootfs.remove_dir(&context.paths).await.map_err(|e| host(&e))
        }
        Effect::RemoveRow => {
            context.deps.db.remove_vm(context.id, context.epoch).await.map_err(Failure::from)
        }
        Effect::Cancel | Effect::Settle => Err(Failure::new(
            FailureKind::Internal,
            format!("{effect} is not part of an operation"),
        )),
    }
}

pub(super) fn host(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error)
}

/// Notes what a step took, and how a step of cleaning up ended.
fn note(context: &VmContext, effect: &Effect, result: &OpResult, took: Duration) {
    let add = |sum: &mut Option<Duration>| *sum = Some(sum.unwrap_or_default() + took);
    let cleanup = match effect {
        Effect::CreateDir | Effect::CreateDisk => {
            context.time(|timings| add(&mut timings.disk));
            None
        }
        Effect::CreateTap | Effect::ApplyFirewall => {
            context.time(|timings| add(&mut timings.network));
            None
        }
        Effect::Launch => {
            context.time(|timings| add(&mut timings.spawn));
            None
        }
        // It notes its own entry: its failure is not the operation's.
        Effect::ShutdownGuest { .. } => {
            context.time(|timings| add(&mut timings.stop));
            None
        }
        Effect::CloseMachine => {
            context.time(|timings| add(&mut timings.stop));
            Some(CleanupStep::MachineClose)
        }
        Effect::RemoveTap => network_step(context, took, CleanupStep::TapDelete),
        Effect::RemoveFirewall => network_step(context, took, CleanupStep::NftablesCleanup),
        Effect::ReleaseSubnet => network_step(context, took, CleanupStep::SubnetRelease),
        Effect::RemoveSockets => {
            context.time(|timings| add(&mut timings.clean));
            Some(CleanupStep::SocketsRemove)
        }
        Effect::RemoveDisk => {
            context.time(|timings| add(&mut timings.clean));
            Some(CleanupStep::RootfsRemove)
        }
        Effect::RemoveDir => {
            context.time(|timings| add(&mut timings.clean));
            Some(CleanupStep::StateDirRemove)
        }
        Effect::Record { .. }
        | Effect::ServeOwner
        | Effect::ConnectGuest
        | Effect::SaveSnapshot
        | Effect::ConfigureGuest
        | Effect::Reattach { .. }
        | Effect::Note { .. }
        | Effect::RemoveRow
        | Effect::Cancel
        | Effect::Settle => None,
    };
    if let Some(step) = cleanup {
        context.note_cleanup(step, result);
    }
}

/// A step of a VM that has a network; the others have no such step.
fn network_step(context: &VmContext, took: Duration, step: CleanupStep) -> Option<CleanupStep> {
    context.create.spec.network.as_ref()?;
    context.time(|timings| timings.clean = Some(timings.clean.unwrap_or_default() + took));
    Some(step)
}

async fn record(context: &VmContext, phase: Phase, cause: Option<&Failure>) -> OpResult {
    write_phase(context, phase, cause.map(|failure| failure.message.clone())).await?;
    context.note_phase(phase, cause.cloned());
    Ok(())
}

/// Commits a phase; `None` leaves the last error in the row as it is, an empty one ends it.
pub(super) async fn write_phase(
    context: &VmContext,
    phase: Phase,
    last_error: Option<String>,
) -> OpResult {
    let cleanup = context.noted_cleanup();
    let op = WriteOp::SetPhase {
        vm: context.id,
        epoch: context.epoch,
        phase,
        last_error,
        backend: None,
        resources: None,
        cleanup: cleanup.clone().into_iter().collect(),
        at: (context.deps.now)(),
    };
    context.deps.db.write(op).await.map_err(Failure::from)?;
    context.cleanup_written(&cleanup);
    Ok(())
}

async fn serve_owner(context: &VmContext) -> OpResult {
    let guard = context.deps.owner_server.serve(context.id, &context.paths).await?;
    context.set_server(Some(guard));
    Ok(())
}
