//! A VM of `matchlock run` from its creation to its end: its command, and what comes after it.
//!
//! ```text
//!  create ─► running ─► own command ─► its exit code recorded ─► (kept until told) ─► down
//! ```
//!
//! # On a crash
//! Before the exit code is recorded, `get` does not know it; from then on it does, whatever becomes of
//! this process and of the VM, until the VM is removed.

use std::path::PathBuf;
use std::time::Duration;

use matchlock_actors::fleet::VmHandle;
use matchlock_actors::vm::{CreateVm, VmContext};
use matchlock_model::exec::ExecSpec;
use matchlock_model::exit;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::phase::Phase;
use matchlock_model::signal;
use matchlock_model::spec::VmSpec;
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;
use tokio::time::{sleep, timeout};

use super::error::CliError;
use super::progress;
use super::render;
use super::timings::Stopwatch;
use crate::node::boot::Node;
use crate::node::client::{OwnCommand, not_cleaned_up, running, settled};
use crate::node::detach::{Asker, tell_when_started};
use crate::node::output_log::Audience;
use crate::node::relay::{Ending, Ours, RelayLimits, Relayed, SOON, relay};
use crate::node::signals::{Interrupt, Interrupts};
use crate::node::warming::Template;
use crate::points::{EXEC, injected};

/// From the VM's creation to its end.
pub(super) async fn in_vm(
    node: &Node,
    create: CreateVm,
    spec: &VmSpec,
    command: Option<ExecSpec>,
    asker: Option<Asker>,
    interrupts: &mut Interrupts,
    watch: &mut Stopwatch,
) -> Result<(u8, VmView), CliError> {
    let before = watch.elapsed();
    let template = node.warming().template_for(&create);
    let (mut vm, interrupt) = created(node, create, interrupts).await?;
    if let Some(which) = interrupt {
        let view = stop_interruptibly(node, &vm, StopMode::Force, interrupts).await?;
        return Ok((which.exit_code(), view));
    }
    let booting = format!("booting {}", vm.id);
    let up = tokio::select! {
        up = progress::waiting(&booting, running(&mut vm)) => up,
        which = interrupts.next() => {
            let view = stop_interruptibly(node, &vm, StopMode::Force, interrupts).await?;
            return Ok((which.exit_code(), view));
        }
    };
    let up = match up {
        Ok(up) => up,
        Err(failure) => {
            // The cause is known before the clean-up is done; a failed clean-up is worth more.
            let view = settled(vm.clone()).await?;
            let left = still_held(&view);
            // Somebody ended it while it came up: that is no failure of ours.
            if failure.kind == FailureKind::Cancelled && left.is_empty() {
                render::note(&failure.to_string());
                return Ok((KILLED, view));
            }
            let error = CliError::message(format_args!("{failure}{left}"));
            // By force, from an owner that did not answer.
            let is_overruled = failure.kind == FailureKind::Fenced;
            return Err(if is_overruled { error.with_code(KILLED) } else { error });
        }
    };
    let spawned = up.timings.disk.unwrap_or_default() + up.timings.spawn.unwrap_or_default();
    watch.spawned = Some(before + spawned);
    let template = template.and_then(|template| template.if_booted(&up.timings));
    let untold = asker.as_ref().map(Asker::told);
    let code = match (&command, asker) {
        (Some(command), asker) => {
            let then = OnStart { asker, template };
            Some(own(node, &vm, spec, command, then, interrupts, watch).await)
        }
        (None, asker) => {
            if let Some(asker) = asker {
                asker.tell(vm.id, &owner_log(node, &vm)).await?;
            }
            node.warming().make(template);
            None
        }
    };
    // Nobody knows its id, and nobody will.
    let is_unknown = untold.is_some_and(|told| !told.is_cancelled());
    if spec.ephemeral || is_unknown {
        let view = stop_interruptibly(node, &vm, StopMode::Force, interrupts).await;
        return Ok((code.unwrap_or(Ok(0))?, view?));
    }
    keep(node, &vm, spec, code, interrupts).await
}

/// What is done once the VM's own command has started.
struct OnStart {
    /// Is told the VM's id.
    asker: Option<Asker>,
    /// Is made for the VMs to come.
    template: Option<Template>,
}

/// Creates the VM; and who has interrupted that.
async fn created(
    node: &Node,
    create: CreateVm,
    interrupts: &mut Interrupts,
) -> Result<(VmHandle, Option<Interrupt>), Failure> {
    let mut creating = Box::pin(node.client().create_vm(create));
    tokio::select! {
        created = &mut creating => Ok((created?, None)),
        which = interrupts.next() => match timeout(SOON, creating).await {
            Ok(created) => Ok((created?, Some(which))),
            Err(_) => leave(which),
        },
    }
}

/// Ends this process: another one has the database and keeps it. What it may let us write in this last
/// moment is a VM that has nothing yet.
fn leave(which: Interrupt) -> ! {
    render::note("the database is in use by another process; `matchlock gc` finishes what is left");
    super::finish(which.exit_code())
}

/// Where the words of an owner go that nobody listens to.
fn owner_log(node: &Node, vm: &VmHandle) -> PathBuf {
    node.deps().paths(vm.id).owner_log()
}

/// What a settled VM still holds, for the end of an error line.
fn still_held(view: &VmView) -> String {
    not_cleaned_up(view).map(|text| format!("; {text}")).unwrap_or_default()
}

/// Runs the VM's own command to its end.
async fn own(
    node: &Node,
    vm: &VmHandle,
    spec: &VmSpec,
    command: &ExecSpec,
    OnStart { asker, template }: OnStart,
    interrupts: &mut Interrupts,
    watch: &mut Stopwatch,
) -> Result<u8, CliError> {
    if !spec.ephemeral && asker.is_none() {
        announce(vm);
    }
    let started = watch.elapsed();
    let OwnCommand { mut session, of } = node.client().exec_own(vm.id, command).await?;
    let audience = if asker.is_some() { Audience::None } else { Audience::Present };
    if let Some(asker) = asker {
        session = tell_when_started(session, asker, vm.id, owner_log(node, vm));
    }
    session = node.warming().once_started(session, template);
    let (session, log) = node.keep_output(session, vm.id, audience);
    let again = render::on_terminal(AGAIN);
    let stop_signal = command.stop_signal.unwrap_or(signal::TERM);
    let limits = RelayLimits { timeout: spec.timeout, grace: spec.grace, stop_signal, again };
    EXEC.before("relay").map_err(injected)?;
    let ours = Ours { stdin: command.stdin, terminal: command.terminal.is_some() };
    let Relayed { ending, code } = relay(session, ours, limits, interrupts).await;
    log.finish().await;
    EXEC.after("relay").map_err(injected)?;
    watch.exec = Some(watch.elapsed() - started);
    watch.command_ended = Some(Stopwatch::now());
    // What it is told to have ended with where nobody took its output any more.
    let code = code.or_else(|| closed_pipe(&ending));
    // One that goes with its command is asked by nobody afterwards.
    if let Some(code) = code
        && !spec.ephemeral
    {
        record_exit(node, &of, code).await;
    }
    match ending {
        Ending::Lost(lost) => Err(why_lost(vm, &lost).await),
        ending => exit_code(ending, spec.timeout),
    }
}

/// Records how a VM's own command ended. What keeps it from being recorded is said, and changes nothing
/// about how we end.
async fn record_exit(node: &Node, vm: &VmContext, code: u8) {
    if let Err(failure) = node.client().record_exit(vm, code).await {
        let id = vm.id;
        let text = format!("that the command of VM {id} ended with {code} was not recorded");
        render::error(&CliError::message(format_args!("{text}: {failure}")));
    }
}

/// The code of a command whose output nobody takes any more, as if the pipe were its own.
fn closed_pipe(ending: &Ending) -> Option<u8> {
    match ending {
        Ending::OutputClosed(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            Some(exit::by_signal(SIGPIPE))
        }
        _ => None,
    }
}

/// The exit code that an ending has.
pub(super) fn exit_code(ending: Ending, timeout: Option<Duration>) -> Result<u8, CliError> {
    if let Some(code) = closed_pipe(&ending) {
        return Ok(code);
    }
    match ending {
        Ending::Exited(status) => Ok(status.shell_code()),
        Ending::Interrupted(which) => Ok(which.exit_code()),
        Ending::Refused(refusal) => {
            Err(CliError::message(&refusal.message).with_code(refusal.exit_code()))
        }
        Ending::TimedOut => {
            let limit = timeout.unwrap_or_default();
            let limit = humantime::format_duration(limit);
            let text = format!("the command took longer than --timeout {limit}");
            Err(CliError::message(text).with_code(exit::TIMEOUT))
        }
        Ending::OutputClosed(error) => {
            Err(CliError::message(format_args!("could not write the command's output: {error}")))
        }
        Ending::Unattended(error) => {
            let text = "could not give the command our stdin or terminal";
            Err(CliError::message(format_args!("{text}: {error}")))
        }
        Ending::Lost(lost) => Err(CliError::failure(&lost)),
    }
}

const SIGPIPE: u8 = 13;
/// The code of a VM that was killed: by force, or while it came up.
const KILLED: u8 = exit::by_signal(9);

/// A command whose guest was lost: the VM knows why.
async fn why_lost(vm: &VmHandle, lost: &matchlock_host::guest_link::LinkError) -> CliError {
    match settled(vm.clone()).await {
        Ok(view) => match &view.cause {
            // By force, from an owner that did not answer: what is left is not ours to tell.
            Some(cause) if cause.kind == FailureKind::Fenced => {
                CliError::failure(cause).with_code(KILLED)
            }
            Some(cause) => CliError::message(format_args!(
                "the VM ended while its command ran: {cause}{}",
                still_held(&view)
            )),
            // Somebody asked for it (`matchlock kill`), without a grace.
            None => CliError::message(format_args!("the VM was killed")).with_code(KILLED),
        },
        Err(failure) => CliError::message(format_args!("{lost}; {failure}")),
    }
}

/// When a VM ends that was to be kept; its id follows.
const UNTIL: &str = "until a signal or `matchlock kill";

/// What somebody is told who has pressed Ctrl-C once.
const AGAIN: &str = "waiting for the VM to end; Ctrl-C again ends it at once";

fn announce(vm: &VmHandle) {
    render::note(&format!("VM {} is running", vm.id));
    render::note(&format!("  connect: matchlock exec -it {} -- sh", vm.id));
    render::note(&format!("  stop:    matchlock kill {}", vm.id));
}

/// Keeps a VM (`--rm=false`) until a signal or until somebody else ends it. The exit code is the
/// command's; without a command it says how the VM ended.
async fn keep(
    node: &Node,
    vm: &VmHandle,
    spec: &VmSpec,
    own: Option<Result<u8, CliError>>,
    interrupts: &mut Interrupts,
) -> Result<(u8, VmView), CliError> {
    let mut by_signal = interrupts.first();
    if by_signal.is_none() {
        match &own {
            Some(Err(error)) => {
                render::error(error);
                if vm.view.borrow().phase == Phase::Running {
                    render::note(&format!("VM {} is kept {UNTIL} {}`", vm.id, vm.id));
                }
            }
            // Somebody has ended it together with its command.
            Some(Ok(_)) if vm.view.borrow().phase != Phase::Running => {}
            Some(Ok(code)) => render::note(&format!(
                "the command ended with {code}; VM {} is kept {UNTIL} {}`",
                vm.id, vm.id
            )),
            None => announce(vm),
        }
        tokio::select! {
            view = settled(vm.clone()) => {
                let view = view?;
                return match &view.cause {
                    // By force, from an owner that did not answer: what is left is not ours to tell.
                    Some(cause) if cause.kind == FailureKind::Fenced => {
                        Err(CliError::failure(cause).with_code(KILLED))
                    }
                    Some(cause) => Err(CliError::message(format_args!(
                        "the VM ended: {cause}{}", still_held(&view)
                    ))),
                    None => Ok((kept_code(own, None), view)),
                };
            }
            which = interrupts.next() => by_signal = Some(which),
        }
    }
    let mode = StopMode::Graceful(spec.grace);
    let view = stop_interruptibly(node, vm, mode, interrupts).await?;
    Ok((kept_code(own, by_signal), view))
}

/// An error of the command was printed when it came.
fn kept_code(own: Option<Result<u8, CliError>>, by_signal: Option<Interrupt>) -> u8 {
    match (own, by_signal) {
        (Some(Ok(code)), _) => code,
        (Some(Err(error)), _) => error.exit_code(true),
        (None, Some(which)) => which.exit_code(),
        (None, None) => 0,
    }
}

/// Takes a VM down; a further signal makes a graceful stop a forced one.
async fn stop_interruptibly(
    node: &Node,
    vm: &VmHandle,
    mode: StopMode,
    interrupts: &mut Interrupts,
) -> Result<VmView, CliError> {
    // Taken down beside this one, not after it.
    node.warming().end();
    let mut stopped = std::pin::pin!(node.client().stop_vm(vm.id, mode));
    let by_key = interrupts.first() == Some(Interrupt::Interrupt);
    let mut again =
        render::on_terminal(AGAIN).filter(|_| by_key && matches!(mode, StopMode::Graceful(_)));
    let stopped = loop {
        tokio::select! {
            stopped = &mut stopped => break stopped,
            _ = interrupts.next() => break node.client().stop_vm(vm.id, StopMode::Force).await,
            () = sleep(SOON), if again.is_some() => {
                if let Some(line) = again.take() {
                    render::tell(line);
                }
            }
        }
    };
    match stopped {
        Ok(view) => Ok(view),
        // It had ended by itself before it could be asked.
        Err(failure) if failure.kind == FailureKind::NotFound => {
            let view = settled(vm.clone()).await?;
            match not_cleaned_up(&view) {
                None => Ok(view),
                Some(text) => Err(CliError::message(text)),
            }
        }
        Err(failure) => Err(failure.into()),
    }
}
