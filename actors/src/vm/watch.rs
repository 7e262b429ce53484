//! A running VM: watched, and looked at anew when its actor was restarted or its link was lost.
//!
//! ```text
//!   watch:     hypervisor's exit ──► MachineExited          (ends the watch)
//!              session's end ──────► LinkLost               (ends the watch; reattach begins anew)
//!              no answer to a ping ► Heard(Silence) … Heard(Answer) when it comes after all
//!   reattach:  hypervisor there? session there, or a new one? ──► the row says what happened
//! ```
//!
//! # Invariants
//! 1. What ends a VM is its hypervisor's exit, or a guest that cannot be reached any more; a guest
//!    that does not answer is only written down.
//! 2. A hang counts only while this process itself gets the CPU: a suspended host hangs no guest.
//! 3. A guest that broke the link's protocol, or loses its link again and again, is not connected to
//!    once more.

use std::convert::Infallible;
use std::time::Duration;

use futures::FutureExt;
use matchlock_host::guest_link::{GuestLink, LinkError};
use matchlock_host::hypervisor::{Machine, MachineExit};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::phase::Phase;
use matchlock_model::view::SILENT_GUEST;
use matchlock_model::vm::{Heard, OpResult};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::actor::VmMsg;
use super::context::VmContext;
use super::effects::write_phase;
use super::machine::{EXIT_AFTER_LINK_LOSS, no_machine};

/// So many ticks without an answer are a hang.
const HUNG_TICKS: u32 = 30;

/// How long a new session may take to begin.
const RELINK_LIMIT: Duration = Duration::from_secs(30);

fn exited(exit: &MachineExit) -> Failure {
    Failure::new(FailureKind::Guest, exit.to_string())
}

/// Watches until the machine ends or its link is lost, and says which; tells of hangs meanwhile.
pub(super) async fn watch(context: &VmContext, tell: &impl Fn(VmMsg)) -> VmMsg {
    let (Some(machine), Some(link)) = (context.machine(), context.link()) else {
        return VmMsg::MachineExited(no_machine());
    };
    let lost = tokio::select! {
        biased;
        exit = machine.wait_exit() => return VmMsg::MachineExited(exited(&exit)),
        lost = link.closed() => lost,
        never = listen(&*link, context.deps.limits.hang, tell) => match never {},
    };
    match timeout(EXIT_AFTER_LINK_LOSS, machine.wait_exit()).await {
        Ok(exit) => VmMsg::MachineExited(exited(&exit)),
        Err(_) => VmMsg::LinkLost(Failure::from_error(FailureKind::Guest, &lost)),
    }
}

/// Pings the guest for ever. A ping that fails means nothing: the link's end is seen elsewhere.
async fn listen(link: &dyn GuestLink, hang: Duration, tell: &impl Fn(VmMsg)) -> Infallible {
    let mut hung = false;
    loop {
        tokio::time::sleep(hang / 3).await;
        let mut ping = link.ping();
        let mut ticks = interval((hang / HUNG_TICKS).max(Duration::from_millis(1)));
        // However long this process was stopped, it counts as one tick.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waited = 0;
        let answer = loop {
            tokio::select! {
                biased;
                answer = &mut ping => break answer,
                _ = ticks.tick() => waited += 1,
            }
            if waited > HUNG_TICKS && !hung {
                hung = true;
                let text = format!("{SILENT_GUEST} {hang:?}");
                tell(VmMsg::Heard(Heard::Silence(Failure::new(FailureKind::Guest, text))));
            }
        };
        if answer.is_ok() && hung {
            hung = false;
            tell(VmMsg::Heard(Heard::Answer));
        }
    }
}

/// Sees that a running VM is there, connects anew where its link is lost, and records the cause.
pub(super) async fn reattach(context: &VmContext, cause: &Failure) -> OpResult {
    see_running(context).await.map_err(|failure| failure.context(cause))?;
    tracing::warn!(vm_id = %context.id, %cause, "the VM goes on");
    note(context, Some(cause)).await
}

async fn see_running(context: &VmContext) -> OpResult {
    let machine = context.machine().ok_or_else(no_machine)?;
    if let Some(exit) = machine.wait_exit().now_or_never() {
        return Err(exited(&exit));
    }
    let link = context
        .link()
        .ok_or_else(|| Failure::new(FailureKind::Internal, "the guest was not connected"))?;
    match link.closed().now_or_never() {
        Some(lost) => relink(context, &*machine, &*link, lost).await,
        None => Ok(()),
    }
}

async fn relink(
    context: &VmContext,
    machine: &dyn Machine,
    link: &dyn GuestLink,
    lost: LinkError,
) -> OpResult {
    let unreachable = |error: &LinkError| Failure::from_error(FailureKind::Guest, error);
    if matches!(lost, LinkError::Protocol { .. }) || !context.may_relink() {
        return Err(unreachable(&lost));
    }
    let again = tokio::select! {
        biased;
        exit = machine.wait_exit() => return Err(exited(&exit)),
        again = link.reconnect(machine, RELINK_LIMIT) => again,
    };
    let Err(error) = again else { return Ok(()) };
    // A machine that has ended explains it better.
    match timeout(EXIT_AFTER_LINK_LOSS, machine.wait_exit()).await {
        Ok(exit) => Err(exited(&exit)),
        Err(_) => Err(unreachable(&error)),
    }
}

/// Records what happened to a running VM. That it cannot be written ends no VM, unless another owner
/// has taken it.
pub(super) async fn note(context: &VmContext, cause: Option<&Failure>) -> OpResult {
    let last_error = cause.map_or_else(String::new, |failure| failure.message.clone());
    match write_phase(context, Phase::Running, Some(last_error)).await {
        Err(failure) if failure.kind != FailureKind::Fenced => {
            tracing::warn!(vm_id = %context.id, %failure, "what happened could not be recorded");
            Ok(())
        }
        result => result,
    }
}
