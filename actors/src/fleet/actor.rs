//! The actor.

use std::any::Any;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use matchlock_model::failure::{Failure, FailureKind, panic_text};
use matchlock_model::id::{Generation, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::vm::StopMode;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};

use super::message::{FleetMsg, Reply, RunningVm};
use super::register::{RegisteredVm, register};
use super::registry::{Entry, Registry, Release, VmHandle};
use crate::budget::RestartBudget;
use crate::deps::Deps;
use crate::handle::ServiceHandle;
use crate::points;
use crate::reconciler::ReconcilerMsg;
use crate::vm::{CreateVm, EffectScope, StartAs, Vm, VmArgs, VmMsg};

/// What Fleet is started with.
#[derive(Debug, Clone)]
pub struct FleetArgs {
    /// The world.
    pub deps: Deps,
    /// The VMs, also of earlier lives.
    pub registry: Registry,
    /// Compensates VMs whose actor gave up.
    pub reconciler: ServiceHandle<ReconcilerMsg>,
}

/// The supervisor of the VM actors.
#[derive(Debug)]
pub struct Fleet;

/// What Fleet knows.
#[derive(Debug)]
pub struct FleetState {
    pub(super) deps: Deps,
    pub(super) registry: Registry,
    pub(super) reconciler: ServiceHandle<ReconcilerMsg>,
    /// Whose actors are there: one that ends is told by its own id.
    actors: HashMap<ActorId, VmId>,
    /// VMs whose lock and row are on their way.
    registering: usize,
    closing: bool,
    /// Who waits for all VMs to be taken down.
    stopping: Vec<(StopMode, RpcReplyPort<Vec<VmHandle>>)>,
}

/// Memory that stays for the host beside a new VM, in MiB: the hypervisor itself and ourselves.
const HOST_RESERVE_MB: u64 = 64;

impl Actor for Fleet {
    type Msg = FleetMsg;
    type State = FleetState;
    type Arguments = FleetArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<FleetMsg>,
        args: FleetArgs,
    ) -> Result<FleetState, ActorProcessingErr> {
        let state = FleetState {
            deps: args.deps,
            registry: args.registry,
            reconciler: args.reconciler,
            actors: HashMap::new(),
            registering: 0,
            closing: false,
            stopping: Vec::new(),
        };
        // After a restart: the actors of the earlier life are dead, their VMs are not.
        for id in state.registry.ids() {
            let cause = Failure::new(FailureKind::Internal, "the supervisor of the VMs failed");
            state.close_scope(&myself, id, cause);
        }
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<FleetMsg>,
        message: FleetMsg,
        state: &mut FleetState,
    ) -> Result<(), ActorProcessingErr> {
        points::message(&message)?;
        match message {
            FleetMsg::CreateVm { create, reply } => state.admit(&myself, *create, reply),
            FleetMsg::Registered { result, reply } => {
                state.registering -= 1;
                let handle = match *result {
                    Ok(registered) => Ok(state.adopt(&myself, registered).await?),
                    Err(failure) => Err(failure),
                };
                answer(reply, handle);
                state.stop_all();
            }
            FleetMsg::StopVm { id, mode, reply } => answer(reply, state.stop(id, mode)),
            FleetMsg::StopAll { mode, reply } => {
                state.closing = true;
                state.stopping.push((mode, reply));
                state.stop_all();
            }
            FleetMsg::OpenLink { id, reply } => answer(reply, state.link(id)),
            FleetMsg::ScopeClosed { id, outcome } => {
                state.recover(&myself, id, outcome).await?;
            }
            FleetMsg::Compensated { id, cause } => state.publish_end(id, cause, Release::Plain),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<FleetMsg>,
        event: SupervisionEvent,
        state: &mut FleetState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(cell, error) => {
                if let Some(id) = state.vm_of(cell.get_id()) {
                    tracing::error!(vm_id = %id, %error, "a VM's actor failed");
                    let text = format!("the VM's actor failed: {error}");
                    state.close_scope(&myself, id, Failure::new(FailureKind::Internal, text));
                }
            }
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                if let Some(id) = state.vm_of(cell.get_id()) {
                    state.actor_ended(&myself, id, reason);
                }
            }
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => {}
        }
        Ok(())
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Failure>) {
    if reply.send(result).is_err() {
        tracing::debug!("the caller was gone before its answer");
    }
}

pub(super) fn panicked(what: &str, panic: &(dyn Any + Send)) -> Failure {
    let text = format!("{what} of a VM panicked: {}", panic_text(panic));
    Failure::new(FailureKind::Internal, text)
}

fn unknown(id: VmId) -> Failure {
    Failure::new(FailureKind::NotFound, format!("VM {id} not found in this process"))
}

impl FleetState {
    fn admit(&mut self, myself: &ActorRef<FleetMsg>, create: CreateVm, reply: Reply<VmHandle>) {
        if let Err(failure) = self.check_admission(create.spec.memory_mb) {
            return answer(reply, Err(failure));
        }
        self.registering += 1;
        let (deps, myself) = (self.deps.clone(), myself.clone());
        tokio::spawn(async move {
            // The node could never be stopped if it were not told that this VM is not coming.
            let registered = AssertUnwindSafe(register(deps, create)).catch_unwind().await;
            let result =
                Box::new(registered.unwrap_or_else(|panic| Err(panicked("the creation", &*panic))));
            if myself.cast(FleetMsg::Registered { result, reply }).is_err() {
                // The lock goes with the message; the row is the reconciler's.
                tracing::error!("the fleet was gone before a VM was registered");
            }
        });
    }

    fn check_admission(&self, memory_mb: u64) -> Result<(), Failure> {
        if self.closing {
            return Err(Failure::new(FailureKind::Cancelled, "matchlock is shutting down"));
        }
        let most = self.deps.limits.vms;
        if self.registry.lock().len() + self.registering >= most {
            let text = format!("this process has {most} VMs already, its limit");
            return Err(Failure::new(FailureKind::Host, text));
        }
        let available = (self.deps.available_memory_mb)()?;
        if memory_mb + HOST_RESERVE_MB > available {
            let text = format!(
                "not enough memory: the VM wants {memory_mb} MB, this host has {available} MB \
                 available ({HOST_RESERVE_MB} MB of it stay free); ask for less with --memory"
            );
            return Err(Failure::new(FailureKind::Host, text));
        }
        Ok(())
    }

    async fn adopt(
        &mut self,
        myself: &ActorRef<FleetMsg>,
        registered: RegisteredVm,
    ) -> Result<VmHandle, ActorProcessingErr> {
        let RegisteredVm { context, lock } = registered;
        let (id, context, scope) = (context.id, Arc::new(context), EffectScope::default());
        let handle = VmHandle::of(&context);
        let entry = Entry {
            context: Arc::clone(&context),
            scope: scope.clone(),
            actor: None,
            stop: None,
            budget: RestartBudget::for_vm(),
            lock: Some(lock),
        };
        self.registry.lock().insert(id, entry);
        let args =
            VmArgs { context, scope, generation: Generation::default(), start: StartAs::New };
        self.spawn_actor(myself, id, args).await?;
        Ok(handle)
    }

    /// Takes everything down for those who asked, once no VM is on its way any more: a VM whose
    /// row was just inserted must be among them.
    fn stop_all(&mut self) {
        if self.registering > 0 {
            return;
        }
        for (mode, reply) in std::mem::take(&mut self.stopping) {
            let handles = self.registry.handles();
            for handle in &handles {
                if let Err(failure) = self.stop(handle.id, mode) {
                    tracing::debug!(vm_id = %handle.id, %failure, "ended before its stop");
                }
            }
            if reply.send(handles).is_err() {
                tracing::debug!("nobody waits for the stop of all VMs");
            }
        }
    }

    /// The VM whose present actor this is, which has ended.
    fn vm_of(&mut self, actor: ActorId) -> Option<VmId> {
        let id = self.actors.remove(&actor)?;
        self.registry.has_actor(id, actor).then_some(id)
    }

    pub(super) async fn spawn_actor(
        &mut self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        args: VmArgs,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, _) = Actor::spawn_linked(None, Vm, args, myself.get_cell()).await?;
        self.actors.insert(actor.get_id(), id);
        if let Some(entry) = self.registry.lock().get_mut(&id) {
            entry.actor = Some(actor);
        }
        Ok(())
    }

    fn stop(&self, id: VmId, mode: StopMode) -> Result<VmHandle, Failure> {
        let mut registry = self.registry.lock();
        let entry = registry.get_mut(&id).ok_or_else(|| unknown(id))?;
        if entry.stop != Some(StopMode::Force) {
            entry.stop = Some(mode);
        }
        if let Some(actor) = &entry.actor
            && actor.cast(VmMsg::Stop(mode)).is_err()
        {
            tracing::debug!(vm_id = %id, "its next life is told to stop");
        }
        Ok(VmHandle::of(&entry.context))
    }

    fn link(&self, id: VmId) -> Result<RunningVm, Failure> {
        let registry = self.registry.lock();
        let entry = registry.get(&id).ok_or_else(|| unknown(id))?;
        let view = entry.context.watch().borrow().clone();
        match entry.context.link() {
            Some(link) if view.phase == Phase::Running => {
                Ok(RunningVm { link, context: Arc::clone(&entry.context) })
            }
            _ => {
                let why = view.cause.map(|cause| format!(": {cause}")).unwrap_or_default();
                let text = format!("VM {id} is not running (phase {}){why}", view.phase);
                Err(Failure::new(FailureKind::Guest, text))
            }
        }
    }
}
