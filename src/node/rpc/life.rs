//! `create`, `wait`, `kill`, and the events of a VM's life.
//!
//! # Invariants
//! 1. A VM that was registered is the session's from that moment: whoever cancels its `create` has it
//!    taken down.
//! 2. A VM that does not come up leaves no record.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use matchlock_actors::fleet::VmHandle;
use matchlock_actors::reconciler::Outcome;
use matchlock_host::guest_bundle::KERNEL_VARIABLE;
use matchlock_host::guest_link::{ExecEvent, ExecSession};
use matchlock_model::exec::ExitStatus;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Goal;
use matchlock_model::spec::SpecError;
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::calls::Begun;
use super::create::{CreateParams, RunArguments, Wanted, prepare};
use super::detached;
use super::exec::until;
use super::protocol::{Code, RpcError, notification, params};
use super::session::{Done, Session};
use super::vms::{Coming, SessionVm, Which, ended, told};
use crate::node::client::{NodeClient, OwnCommand, not_cleaned_up, running, settled};
use crate::node::config::{CACHE_VARIABLE, HOME_VARIABLE, NodeConfig};
use crate::node::detach::{IMAGE_VARIABLE, start_for_session};
use crate::node::images::{Chosen, find_or_pull};
use crate::node::output_log::{self, Audience};
use crate::node::owner::{self, KillRequest};

/// How soon an entrypoint that fails makes its VM's creation fail.
const ENTRYPOINT_FAILS_WITHIN: Duration = Duration::from_millis(500);

/// How long the lock of a VM that has ended may still be held, and how often it is looked at.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
const RELEASE_POLL: Duration = Duration::from_millis(10);

fn vm_failed(failure: &Failure) -> RpcError {
    RpcError::failure(Code::Vm, failure)
}

/// Brings a VM up.
pub(super) async fn create(
    session: &Session,
    line: &[u8],
    begun: &Begun,
) -> Result<Done, RpcError> {
    let cancel = &begun.cancel;
    let asked: CreateParams = params(line)?;
    let launch_entrypoint = asked.launch_entrypoint;
    let arguments = if asked.detached { Some(asked.run_arguments()?) } else { None };
    let wanted = asked.check()?;
    let coming = session.vms.coming()?;
    let config = session.host.config.clone();
    let image =
        find_or_pull(config.clone(), &session.host.client, &wanted.spec.image, cancel).await;
    let image = image.map_err(|failure| match failure.kind {
        FailureKind::Cancelled => RpcError::cancelled(),
        _ => vm_failed(&failure),
    })?;
    if let Some(arguments) = arguments {
        let chosen = Chosen::from(&image);
        return create_detached(session, coming, wanted, (arguments, chosen), begun).await;
    }
    let prepared = tokio::task::spawn_blocking(move || prepare(&config, wanted, image));
    let create = prepared.await.map_err(|e| RpcError::new(Code::Internal, e.to_string()))??;
    let checked = session.host.deps.hypervisor.check();
    checked.map_err(|e| vm_failed(&Failure::from_error(FailureKind::Host, &e)))?;
    if cancel.is_cancelled() {
        return Err(RpcError::cancelled());
    }
    let entrypoint = launch_entrypoint.then(|| create.spec.command(&create.image));
    let image: Arc<str> = create.spec.image.as_str().into();
    let timeout = create.spec.timeout;
    let template = session.host.warming.template_for(&create);
    // From here on it is not left: the VM would be there, and nobody would know.
    let handle = session.host.client.create_vm(create).await.map_err(|f| vm_failed(&f))?;
    coming.arrived(SessionVm::Own { handle: handle.clone(), image, timeout });
    session.events.spawn(tell_phases(session.clone(), handle.clone()));
    let coming_up = async {
        let mut awaited = handle.clone();
        running(&mut awaited).await.map_err(|f| vm_failed(&f))?;
        match entrypoint {
            Some(command) => start_entrypoint(session, &handle, command).await,
            None => Ok(()),
        }
    };
    let up = tokio::select! {
        up = coming_up => up,
        () = cancel.cancelled() => Err(RpcError::cancelled()),
    };
    // Cancelled now, it would be there, and nobody would know its id.
    let up = up.and_then(|()| committed(session, begun));
    match up {
        Ok(()) => {
            let template = template.and_then(|one| one.if_booted(&handle.view.borrow().timings));
            session.host.warming.make(template);
            Ok(json!({ "id": handle.id }).into())
        }
        Err(mut error) => {
            if let Some(left) = discard(session, &handle).await {
                error.message = format!("{}; {left}", error.message);
            }
            session.vms.forget(handle.id);
            Err(error)
        }
    }
}

fn committed(session: &Session, begun: &Begun) -> Result<(), RpcError> {
    if session.calls.commit(&begun.key) { Ok(()) } else { Err(RpcError::cancelled()) }
}

/// A file without a name, for this user's processes only.
fn in_memory(content: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("env", MemfdFlags::CLOEXEC)?);
    file.write_all(content.as_bytes())?;
    Ok(file)
}

/// Brings a VM up that has an owner of its own.
async fn create_detached(
    session: &Session,
    coming: Coming,
    wanted: Wanted,
    (run, image): (RunArguments, Chosen),
    begun: &Begun,
) -> Result<Done, RpcError> {
    let NodeConfig { home, cache, .. } = session.host.config.clone();
    let RunArguments { mut arguments, env_file } = run;
    // Kept until it has started, and with it read the file.
    let env_file =
        in_memory(&env_file).map_err(|e| vm_failed(&Failure::from_error(FailureKind::Host, &e)))?;
    let (pid, number) = (std::process::id(), env_file.as_raw_fd());
    // Behind `run -d`.
    arguments.insert(2, format!("--env-file=/proc/{pid}/fd/{number}").into());
    let started = start_for_session(arguments, move |command| {
        command.env(HOME_VARIABLE, home).env(CACHE_VARIABLE, cache);
        command.env(IMAGE_VARIABLE, image.to_string());
        if let Some(kernel) = wanted.kernel {
            command.env(KERNEL_VARIABLE, kernel);
        }
    });
    let started = tokio::select! {
        started = started => started,
        // Its owner sees our end of the socket close, and takes it down.
        () = begun.cancel.cancelled() => return Err(RpcError::cancelled()),
    };
    drop(env_file);
    let id = started.map_err(|f| vm_failed(&f))?;
    if let Err(mut error) = committed(session, begun) {
        if let Err(left) = discard_detached(session, id).await {
            error.message = format!("{}; {}", error.message, left.message);
        }
        return Err(error);
    }
    coming.arrived(SessionVm::Detached { id, image: wanted.spec.image.into() });
    Ok(json!({ "id": id }).into())
}

/// Takes a detached VM down of which nobody will know, and removes its record.
async fn discard_detached(session: &Session, id: VmId) -> Result<(), Failure> {
    session.host.client.want_removal(id).await?;
    kill_detached(session, id, true).await
}

async fn kill_detached(session: &Session, id: VmId, force: bool) -> Result<(), Failure> {
    let vms_dir = session.host.config.vms_dir();
    let how = KillRequest { force, heard: Some(OWNER_LIMIT), done: Some(OWNER_LIMIT) };
    owner::kill(&vms_dir, id, how).await
}

/// Takes a VM down that has not come up, and removes its record; what is left of it.
async fn discard(session: &Session, handle: &VmHandle) -> Option<String> {
    let client = &session.host.client;
    let view = match client.stop_vm(handle.id, StopMode::Force).await {
        Ok(view) => Ok(view),
        // It had ended by itself.
        Err(failure) if failure.kind == FailureKind::NotFound => settled(handle.clone()).await,
        Err(failure) => Err(failure),
    };
    match view {
        Ok(view) => match not_cleaned_up(&view) {
            None => remove_record(client, handle.id).await,
            left => left,
        },
        Err(failure) => Some(failure.message),
    }
}

/// Removes the record of a VM that has ended; what kept it from that.
async fn remove_record(client: &NodeClient, id: VmId) -> Option<String> {
    let deadline = Instant::now() + RELEASE_LIMIT;
    loop {
        let outcome = match client.reconcile(Some(id), Goal::Remove).await {
            Ok(mut reports) => reports.pop().map(|report| report.outcome),
            Err(failure) => return Some(failure.message),
        };
        match outcome {
            None | Some(Outcome::Cleaned { .. } | Outcome::Unknown) => return None,
            // Its lock is given back a moment after its last word.
            Some(Outcome::Running | Outcome::BeingCleaned) if Instant::now() < deadline => {
                tokio::time::sleep(RELEASE_POLL).await;
            }
            // Nothing is only planned here.
            Some(Outcome::Running | Outcome::BeingCleaned | Outcome::Planned) => {
                return Some(format!(
                    "VM {id} was not removed: it is still held; run `matchlock rm {id}`"
                ));
            }
            Some(Outcome::Failed { step, error, .. }) => {
                return Some(format!(
                    "VM {id} was not removed: {step}: {error}; run `matchlock rm {id}`"
                ));
            }
        }
    }
}

/// Starts the image's entrypoint, with its output in the VM's log.
async fn start_entrypoint(
    session: &Session,
    handle: &VmHandle,
    command: Result<matchlock_model::exec::ExecSpec, SpecError>,
) -> Result<(), RpcError> {
    let command = match command {
        Ok(command) => command,
        // An image that has none.
        Err(SpecError::NoCommand { .. }) => return Ok(()),
        Err(error) => return Err(RpcError::params(error.to_string())),
    };
    let failed = |text: String| RpcError::new(Code::Vm, format!("start image entrypoint: {text}"));
    let host = &session.host;
    let started = host.client.exec_own(handle.id, &command).await;
    let OwnCommand { session: started, of } = started.map_err(|failure| failed(failure.message))?;
    let client = host.client.clone();
    let record = async move |status: ExitStatus| {
        if let Err(failure) = client.record_exit(&of, status.shell_code()).await {
            tracing::error!(vm_id = %of.id, %failure, "an entrypoint's exit code was not recorded");
        }
    };
    let (vm, paths) = (handle.id, host.deps.paths(handle.id));
    let (started, log) = output_log::keep(started, vm, paths, host.vm_log, Audience::None);
    let ExecSession { mut events, .. } = started;
    // From its start on: how long that takes is no matter.
    let mut deadline = None;
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = until(deadline) => break,
        };
        match event {
            Some(Ok(ExecEvent::Exited(status))) if status.shell_code() != 0 => {
                return Err(failed(format!("exit code {}", status.shell_code())));
            }
            Some(Ok(ExecEvent::Exited(status))) => {
                drop(events);
                log.finish().await;
                record(status).await;
                return Ok(());
            }
            Some(Ok(ExecEvent::Refused(refusal))) => return Err(failed(refusal.message)),
            // It is in the log.
            Some(Ok(ExecEvent::Output(..))) => {}
            Some(Ok(ExecEvent::Started)) => {
                deadline = Some(Instant::now() + ENTRYPOINT_FAILS_WITHIN);
            }
            Some(Err(lost)) => return Err(failed(lost.to_string())),
            None => return Err(failed("its stream ended".into())),
        }
    }
    // It goes on as long as its VM does.
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            tracing::debug!(?event, "an image's entrypoint");
            if let Ok(ExecEvent::Exited(status)) = event {
                record(status).await;
            }
        }
        drop(events);
        log.finish().await;
    });
    Ok(())
}

/// Tells the client each phase of a VM, and its end.
async fn tell_phases(session: Session, handle: VmHandle) {
    let VmHandle { mut view, mut phases, .. } = handle;
    loop {
        let change = tokio::select! {
            biased;
            change = phases.next() => change,
            _ended = view.wait_for(|view| view.settled) => None,
        };
        let Some(change) = change else { break };
        let told = json!({
            "type": "vm",
            "timestamp": now(&session),
            "vm_id": handle.id,
            "phase": change.phase,
            "generation": change.generation.0,
            "cause": change.cause.as_ref().map(|cause| &cause.message),
        });
        if session.outbox.send(notification("event", &told), None).await.is_err() {
            return;
        }
    }
    let told = ended_event(&view.borrow().clone(), now(&session));
    if session.outbox.send(notification("event", &told), None).await.is_err() {
        tracing::debug!(vm_id = %handle.id, "nobody was told of a VM's end");
    }
}

fn now(session: &Session) -> i64 {
    (session.host.deps.now)().as_millisecond()
}

fn ended_event(view: &VmView, timestamp: i64) -> Value {
    let mut value = told(view);
    value["vm_id"] = value["id"].take();
    value["type"] = json!("vm");
    value["timestamp"] = json!(timestamp);
    if let Some(object) = value.as_object_mut() {
        object.remove("id");
    }
    value
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitParams {
    vm_id: Option<String>,
    generation: Option<u64>,
}

/// Waits until a VM has ended.
pub(super) async fn wait(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    let WaitParams { vm_id, generation } = params(line)?;
    match session.vms.find(&Which { vm_id, generation })? {
        SessionVm::Own { handle, .. } => {
            let view = settled(handle).await.map_err(|f| vm_failed(&f))?;
            Ok(told(&view).into())
        }
        SessionVm::Detached { id, .. } => Ok(detached::wait(session, id).await?.into()),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KillParams {
    vm_id: Option<String>,
    generation: Option<u64>,
    #[serde(default)]
    force: bool,
}

/// How long the owner of a detached VM may take.
const OWNER_LIMIT: Duration = Duration::from_secs(120);

/// Takes a VM down, and waits until it has ended.
pub(super) async fn kill(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    let KillParams { vm_id, generation, force } = params(line)?;
    let client = &session.host.client;
    match session.vms.living(&Which { vm_id, generation })? {
        SessionVm::Own { handle, .. } => {
            let mode = if force {
                StopMode::Force
            } else {
                StopMode::Graceful(client.grace(handle.id).await.map_err(|f| vm_failed(&f))?)
            };
            let stopped = client.stop_vm(handle.id, mode).await;
            match stopped {
                Ok(view) => Ok(told(&view).into()),
                Err(failure) if failure.kind == FailureKind::NotFound => {
                    Err(ended(&handle.view.borrow().clone()))
                }
                Err(failure) => Err(vm_failed(&failure)),
            }
        }
        SessionVm::Detached { id, .. } => match kill_detached(session, id, force).await {
            Ok(()) => Ok(detached::wait(session, id).await?.into()),
            Err(failure) if failure.kind == FailureKind::NotFound => {
                Err(detached::why_gone(session, id).await)
            }
            Err(failure) => Err(vm_failed(&failure)),
        },
    }
}
