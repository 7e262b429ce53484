//! The effects on the hypervisor and on the guest in it.

use std::sync::Arc;
use std::time::Duration;

use matchlock_host::guest_link::LinkError;
use matchlock_host::hypervisor::{HypervisorError, Machine, MachineExit};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::record::{CleanupStep, Started};
use matchlock_model::vm::OpResult;
use matchlock_store::WriteOp;
use tokio::time::{Instant, timeout};

use super::context::{StartMode, VmContext};
use super::effects::host;
use super::snapshot;

/// How long a lost link may wait for the machine's own, better reason.
pub(super) const EXIT_AFTER_LINK_LOSS: Duration = Duration::from_secs(2);

/// How many lines of the console an error shows.
const CONSOLE_LINES: usize = 5;

pub(super) async fn launch(context: &VmContext) -> OpResult {
    let spec = context.machine_spec();
    match context.create.start {
        StartMode::Warm if snapshot::restore(context, &spec).await? => return Ok(()),
        StartMode::Warm | StartMode::Cold => {}
        StartMode::Template { anew } => snapshot::claim(context, &spec, anew).await?,
    }
    let started = Instant::now();
    let machine = context.deps.hypervisor.launch(&spec).await.map_err(|e| host(&e))?;
    // The hypervisor has its own descriptors now.
    drop(spec);
    keep(context, machine, Started::Booted, started).await
}

/// Keeps a machine that was launched, and records it.
pub(super) async fn keep(
    context: &VmContext,
    machine: Arc<dyn Machine>,
    began: Started,
    launched: Instant,
) -> OpResult {
    let hypervisor = machine.identity();
    // Kept before it is recorded: if the write fails, closing the machine must find it.
    context.set_machine(Some(machine), launched);
    let op = WriteOp::SetHypervisor {
        vm: context.id,
        epoch: context.epoch,
        hypervisor,
        started: began,
        at: (context.deps.now)(),
    };
    context.deps.db.write(op).await.map(drop).map_err(Failure::from)
}

pub(super) fn no_machine() -> Failure {
    Failure::new(FailureKind::Internal, "the hypervisor was not launched")
}

pub(super) async fn connect_guest(context: &VmContext) -> OpResult {
    let machine = context.machine().ok_or_else(no_machine)?;
    let limit = context.deps.limits.boot;
    let link = tokio::select! {
        biased;
        exit = machine.wait_exit() => return Err(ended_early(&*machine, &exit)),
        link = async {
            match context.link() {
                // One that was restored has answered already.
                Some(link) => Ok(link),
                None => context.deps.connector.connect(&*machine, limit).await,
            }
        } => link,
    };
    let link = match link {
        Ok(link) => link,
        Err(error) => {
            // Now: a machine that ends meanwhile tells nothing any more.
            let starved = starved(context, &*machine);
            let mut failure = never_ready(&*machine, &error).await;
            failure.message.push_str(&starved);
            return Err(failure);
        }
    };
    let agent = link.agent().clone();
    let ready = context.launched_at().map(|launched| launched.elapsed());
    context.time(|timings| {
        // The clock of a guest that goes on counts the boot of its template.
        if timings.restore.is_none() {
            timings.kernel = Some(Duration::from_micros(agent.init_started_us));
        }
        timings.agent_ready = ready;
    });
    context.set_link(Some(link));
    snapshot::booted(context).await;
    Ok(())
}

pub(super) fn ended_early(machine: &dyn Machine, exit: &MachineExit) -> Failure {
    let text = format!("the guest ended before its agent was ready: {exit}{}", console(machine));
    Failure::new(FailureKind::Guest, text)
}

/// A link that failed because the machine has ended is better explained by the machine.
pub(super) async fn never_ready(machine: &dyn Machine, error: &LinkError) -> Failure {
    if let Ok(exit) = timeout(EXIT_AFTER_LINK_LOSS, machine.wait_exit()).await {
        return ended_early(machine, &exit);
    }
    let chain = matchlock_model::failure::chain(error);
    let text = format!("the guest's agent never got ready: {chain}{}", console(machine));
    Failure::new(FailureKind::Guest, text)
}

/// Where the hypervisor waited longer for a CPU than it had one, and did so for a good part of its life:
/// that it is the host that is slow, and not the guest that hangs. For the end of an error text; empty
/// otherwise.
pub(super) fn starved(context: &VmContext, machine: &dyn Machine) -> String {
    let share = match context.deps.processes.cpu_share(&machine.identity()) {
        Ok(Some(share)) => share,
        Ok(None) => return String::new(),
        Err(error) => {
            let error = matchlock_model::failure::chain(&error);
            return format!("; how much CPU the hypervisor had cannot be told: {error}");
        }
    };
    let lived = context.launched_at().map(|launched| launched.elapsed()).unwrap_or_default();
    if share.waited <= share.had || share.waited < lived / 3 {
        return String::new();
    }
    format!(
        "; the hypervisor had {:.1} s of CPU and waited {:.1} s for one: this host is busy, try again \
         or raise MATCHLOCK_BOOT_TIMEOUT",
        share.had.as_secs_f64(),
        share.waited.as_secs_f64()
    )
}

/// The end of the console, for the end of an error text.
fn console(machine: &dyn Machine) -> String {
    match machine.console_tail(CONSOLE_LINES) {
        Ok(lines) if lines.is_empty() => "; its console is empty".to_owned(),
        Ok(lines) => format!("; its console ends with: {}", lines.join(" | ")),
        Err(error) => format!("; its console cannot be read: {error}"),
    }
}

pub(super) async fn configure_guest(context: &VmContext) -> OpResult {
    let link = context
        .link()
        .ok_or_else(|| Failure::new(FailureKind::Internal, "the guest is not connected"))?;
    let config = context.create.spec.guest_config(context.id, context.subnet());
    link.configure(&config).await.map_err(|e| Failure::from_error(FailureKind::Guest, &e))
}

/// Asks the guest to power off and waits until it has. A guest that does not answer is no failure
/// of the stop: the machine is closed next, and the step's entry says what happened.
pub(super) async fn shutdown_guest(context: &VmContext, grace: Duration) -> OpResult {
    let (Some(machine), Some(link)) = (context.machine(), context.link()) else {
        return Ok(());
    };
    let asked = async {
        link.shutdown(grace).await.map_err(|e| Failure::from_error(FailureKind::Guest, &e))?;
        machine.wait_exit().await;
        Ok(())
    };
    let limit = grace + context.deps.limits.power_off;
    let result: OpResult = timeout(limit, asked).await.unwrap_or_else(|_| {
        let text = format!("the guest did not power off within {limit:?}");
        Err(Failure::new(FailureKind::Timeout, text))
    });
    if let Err(failure) = &result {
        tracing::warn!(vm_id = %context.id, %failure, "the guest was not shut down cleanly");
    }
    context.note_cleanup(CleanupStep::GuestSync, &result);
    Ok(())
}

/// Ends the hypervisor and sees that it is gone: by its handle, or, where a launch was cancelled or
/// an earlier life did not keep its handle, by the VM's mark.
pub(super) async fn close_machine(context: &VmContext) -> OpResult {
    context.set_link(None);
    snapshot::let_go(context).await;
    let limit = context.deps.limits.kill;
    if let Some(machine) = context.machine() {
        machine.kill(limit).await.map_err(|e: HypervisorError| host(&e))?;
        return Ok(());
    }
    end_marked(context).await
}

/// Ends every hypervisor that has the VM's mark.
pub(super) async fn end_marked(context: &VmContext) -> OpResult {
    let limit = context.deps.limits.kill;
    let processes = Arc::clone(&context.deps.processes);
    let mark = context.deps.mark(context.id);
    for process in processes.find_marked().map_err(|e| host(&e))? {
        if process.mark == mark {
            processes.kill(&process.identity, limit).await.map_err(|e| host(&e))?;
        }
    }
    Ok(())
}
