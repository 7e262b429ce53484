//! The decision.

use super::{Denied, Effect, Heard, Op, OpResult, StopMode, VmEvent, VmState};
use crate::failure::{Failure, FailureKind};
use crate::phase::Phase;

/// What a VM becomes by an event, and what is to be done.
///
/// The effects are one operation, to be carried out in order, unless they are `Cancel` or
/// `Settle`, which stand alone.
///
/// # Errors
/// When the event cannot happen in this state.
pub fn step(state: VmState, event: VmEvent) -> Result<(VmState, Vec<Effect>), Denied> {
    match event {
        VmEvent::Begin => begin(state),
        VmEvent::Recover { phase, cause } => recover(state, phase, cause),
        VmEvent::OpDone { recorded, result } => op_done(state, recorded, result),
        VmEvent::OpStuck { recorded, effect } => op_stuck(state, recorded, effect),
        VmEvent::Stop(mode) => Ok(stop(state, mode)),
        VmEvent::MachineExited(cause) => Ok(ended(state, cause)),
        VmEvent::LinkLost(cause) => Ok(link_lost(state, cause)),
        VmEvent::Heard(heard) => Ok(note(state, heard)),
    }
}

fn denied(state: &VmState, event: &'static str) -> Denied {
    Denied { event, phase: state.phase, op: state.op }
}

fn begin(state: VmState) -> Result<(VmState, Vec<Effect>), Denied> {
    if state.phase != Phase::Creating || state.op.is_some() || state.settled {
        return Err(denied(&state, "begin"));
    }
    Ok((
        VmState { op: Some(Op::Create), ..state },
        vec![
            Effect::CreateDir,
            Effect::ServeOwner,
            Effect::CreateDisk,
            Effect::CreateTap,
            Effect::ApplyFirewall,
            record(Phase::Created),
        ],
    ))
}

fn recover(state: VmState, phase: Phase, cause: Failure) -> Result<(VmState, Vec<Effect>), Denied> {
    if state.op.is_some() || state.settled {
        return Err(denied(&state, "recover"));
    }
    if phase == Phase::Running {
        return Ok(reattach(VmState { phase, ..state }, cause));
    }
    let state = VmState { phase, cause: Some(cause), ..state };
    Ok(match phase {
        Phase::Creating
        | Phase::Created
        | Phase::Stopped
        | Phase::Cleaning
        | Phase::CreateFailed
        | Phase::StartFailed
        | Phase::StopFailed
        | Phase::CleanupFailed => clean(state, Vec::new()),
        Phase::Starting | Phase::Running | Phase::Stopping => take_down(state, StopMode::Force),
        Phase::Cleaned => forget_or_settle(state),
    })
}

fn stop(state: VmState, mode: StopMode) -> (VmState, Vec<Effect>) {
    match state.op {
        None if state.phase == Phase::Running => take_down(state, mode),
        // Not begun, or settled: there is nothing to cancel; a stop before Begin is kept for it.
        None => (VmState { stop: Some(mode), ..state }, Vec::new()),
        Some(Op::Create | Op::Boot | Op::Reattach | Op::Note) => {
            let first = state.stop.is_none();
            let effects = if first { vec![Effect::Cancel] } else { Vec::new() };
            (VmState { stop: Some(mode), ..state }, effects)
        }
        Some(Op::Stop(StopMode::Graceful(_)))
            if mode == StopMode::Force && state.stop != Some(StopMode::Force) =>
        {
            (VmState { stop: Some(mode), ..state }, vec![Effect::Cancel])
        }
        Some(Op::Stop(_) | Op::Clean | Op::Forget | Op::Conclude) => (state, Vec::new()),
    }
}

fn ended(state: VmState, cause: Failure) -> (VmState, Vec<Effect>) {
    if state.op.is_none() && state.phase == Phase::Running {
        let state = VmState { cause: Some(cause), ..state };
        return take_down(state, StopMode::Force);
    }
    // During Boot and Reattach the operation itself fails with the cause; after a Note the machine
    // is watched anew; during a stop it is expected.
    (state, Vec::new())
}

fn link_lost(state: VmState, cause: Failure) -> (VmState, Vec<Effect>) {
    if state.op.is_none() && state.phase == Phase::Running {
        return reattach(state, cause);
    }
    (state, Vec::new())
}

/// Only written down: a guest that is busy, or that its user stopped, may come back. The last word
/// counts, also when it comes while an earlier one is being written.
fn note(state: VmState, heard: Heard) -> (VmState, Vec<Effect>) {
    match (state.op, state.phase) {
        (None, Phase::Running) => {
            let cause = match heard {
                Heard::Silence(cause) => Some(cause),
                Heard::Answer => None,
            };
            (VmState { op: Some(Op::Note), ..state }, vec![Effect::Note { cause }])
        }
        (Some(Op::Reattach | Op::Note), _) => {
            (VmState { unnoted: Some(heard), ..state }, Vec::new())
        }
        _ => (state, Vec::new()),
    }
}

fn op_done(
    state: VmState,
    recorded: Phase,
    result: OpResult,
) -> Result<(VmState, Vec<Effect>), Denied> {
    let Some(op) = state.op else {
        return Err(denied(&state, "op_done"));
    };
    let state = VmState { op: None, phase: recorded, ..state };
    Ok(match (op, result) {
        (Op::Create, result) => created(state, result),
        (Op::Boot, result) => booted(state, result),
        (Op::Reattach, result) => went_on(state, result),
        (Op::Note, result) => noted(state, result),
        (Op::Stop(_), Ok(())) => clean(state, Vec::new()),
        (Op::Stop(StopMode::Graceful(_)), Err(_)) => take_down(state, StopMode::Force),
        (Op::Stop(StopMode::Force), Err(cause)) => conclude(state, Phase::StopFailed, cause),
        (Op::Clean, Ok(())) => forget_or_settle(state),
        (Op::Clean, Err(cause)) => conclude(state, Phase::CleanupFailed, cause),
        (Op::Forget, Ok(())) => settle(VmState { forgotten: true, ..state }),
        (Op::Conclude, Ok(())) => settle(state),
        (Op::Forget, Err(cause)) => conclude(state, Phase::Cleaned, cause),
        (Op::Conclude, Err(cause)) => {
            settle(VmState { cause: state.cause.or(Some(cause)), ..state })
        }
    })
}

fn created(state: VmState, result: OpResult) -> (VmState, Vec<Effect>) {
    match (result, state.stop) {
        (Ok(()), None) => boot(state),
        (_, Some(_)) => clean(state, Vec::new()),
        (Err(cause), None) => fail_and_clean(state, Phase::CreateFailed, cause),
    }
}

fn booted(state: VmState, result: OpResult) -> (VmState, Vec<Effect>) {
    match (result, state.stop) {
        // It has been saved: that was all.
        (Ok(()), None) if state.template => take_down(state, StopMode::Force),
        (Ok(()), None) => (state, Vec::new()),
        (Ok(()), Some(mode)) => take_down(state, mode),
        // The guest may be half up: there is nobody in it who could be asked.
        (Err(_), Some(_)) => take_down(state, StopMode::Force),
        (Err(cause), None) => fail_and_clean(state, Phase::StartFailed, cause),
    }
}

/// After what a running VM may go on from.
fn went_on(state: VmState, result: OpResult) -> (VmState, Vec<Effect>) {
    match (result, state.stop) {
        (Ok(()), None) => match state.unnoted {
            Some(heard) => note(VmState { unnoted: None, ..state }, heard),
            None => (state, Vec::new()),
        },
        (_, Some(mode)) => take_down(state, mode),
        (Err(cause), None) => take_down(VmState { cause: Some(cause), ..state }, StopMode::Force),
    }
}

/// That something could not be noted is no reason to end a VM that runs; that it has another owner
/// is.
fn noted(state: VmState, result: OpResult) -> (VmState, Vec<Effect>) {
    match result {
        Err(failure) if failure.kind == FailureKind::Fenced => went_on(state, Err(failure)),
        Ok(()) | Err(_) => went_on(state, Ok(())),
    }
}

fn op_stuck(
    state: VmState,
    recorded: Phase,
    effect: &'static str,
) -> Result<(VmState, Vec<Effect>), Denied> {
    let Some(op) = state.op else {
        return Err(denied(&state, "op_stuck"));
    };
    let cause = Failure::new(FailureKind::Internal, format!("effect {effect} still running"));
    let state = VmState { op: None, phase: recorded, ..state };
    Ok(match op {
        Op::Create => conclude(state, Phase::CreateFailed, cause),
        Op::Boot => conclude(state, Phase::StartFailed, cause),
        // Nothing of it ends a running VM but a stop, and for that the hypervisor is there to kill.
        Op::Reattach | Op::Note => {
            let mode = state.stop.unwrap_or(StopMode::Force);
            take_down(VmState { cause: Some(cause), ..state }, mode)
        }
        Op::Stop(_) => conclude(state, Phase::StopFailed, cause),
        Op::Clean => conclude(state, Phase::CleanupFailed, cause),
        Op::Forget | Op::Conclude => settle(VmState { cause: Some(cause), ..state }),
    })
}

fn boot(state: VmState) -> (VmState, Vec<Effect>) {
    let mut effects = vec![record(Phase::Starting), Effect::Launch];
    if state.template {
        effects.push(Effect::SaveSnapshot);
    } else {
        effects.extend([Effect::ConnectGuest, Effect::ConfigureGuest, record(Phase::Running)]);
    }
    (VmState { phase: Phase::Starting, op: Some(Op::Boot), ..state }, effects)
}

/// The cause is no cause of the VM's end, unless the operation fails; then its failure says it too.
fn reattach(state: VmState, cause: Failure) -> (VmState, Vec<Effect>) {
    (VmState { op: Some(Op::Reattach), ..state }, vec![Effect::Reattach { cause }])
}

fn take_down(state: VmState, mode: StopMode) -> (VmState, Vec<Effect>) {
    let mut effects = vec![Effect::Record { phase: Phase::Stopping, cause: state.cause.clone() }];
    if let StopMode::Graceful(grace) = mode {
        effects.push(Effect::ShutdownGuest { grace });
    }
    effects.push(Effect::CloseMachine);
    let state =
        VmState { phase: Phase::Stopping, op: Some(Op::Stop(mode)), stop: Some(mode), ..state };
    (state, effects)
}

/// Law 7: the hypervisor first, then TAP, tables, sockets and disk, the subnet last. `before` is
/// recorded first.
fn clean(state: VmState, before: Vec<Effect>) -> (VmState, Vec<Effect>) {
    let cause = state.cause.clone();
    let mut effects = before;
    effects.extend([
        Effect::Record { phase: Phase::Cleaning, cause: cause.clone() },
        Effect::CloseMachine,
        Effect::RemoveTap,
        Effect::RemoveFirewall,
        Effect::RemoveSockets,
        Effect::RemoveDisk,
        Effect::ReleaseSubnet,
        Effect::Record { phase: Phase::Cleaned, cause },
    ]);
    (VmState { phase: Phase::Cleaning, op: Some(Op::Clean), ..state }, effects)
}

/// A failure while the row still says the phase before (its write itself failed) goes straight to
/// cleaning.
fn fail_and_clean(state: VmState, failed: Phase, cause: Failure) -> (VmState, Vec<Effect>) {
    let before = if state.phase.may_become(failed) {
        vec![Effect::Record { phase: failed, cause: Some(cause.clone()) }]
    } else {
        Vec::new()
    };
    clean(VmState { cause: Some(cause), ..state }, before)
}

fn forget_or_settle(state: VmState) -> (VmState, Vec<Effect>) {
    if !state.ephemeral {
        return settle(state);
    }
    (VmState { op: Some(Op::Forget), ..state }, vec![Effect::RemoveDir, Effect::RemoveRow])
}

/// Records a failure and ends. Where the row cannot say it (the write before it failed too), the
/// phase in the row is left as it is, and the reconciler takes it from there.
fn conclude(state: VmState, failed: Phase, cause: Failure) -> (VmState, Vec<Effect>) {
    if !state.phase.may_become(failed) {
        return settle(VmState { cause: Some(cause), ..state });
    }
    let effects = vec![Effect::Record { phase: failed, cause: Some(cause.clone()) }];
    let state = VmState { phase: failed, op: Some(Op::Conclude), cause: Some(cause), ..state };
    (state, effects)
}

fn settle(state: VmState) -> (VmState, Vec<Effect>) {
    (VmState { settled: true, op: None, ..state }, vec![Effect::Settle])
}

const fn record(phase: Phase) -> Effect {
    Effect::Record { phase, cause: None }
}

#[cfg(test)]
mod tests;
