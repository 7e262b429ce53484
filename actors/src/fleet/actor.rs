//! The actor.

use std::any::Any;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use matchlock_host::guest_link::GuestLink;
use matchlock_host::owner_lock::HeldLock;
use matchlock_model::failure::{Failure, FailureKind, panic_text};
use matchlock_model::id::{Generation, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use tokio::time::Instant;

use super::MAX_VMS;
use super::register::{RegisteredVm, register};
use super::registry::{Entry, Registry, Release, VmHandle};
use crate::budget::RestartBudget;
use crate::deps::Deps;
use crate::handle::ServiceHandle;
use crate::points;
use crate::reconciler::{ReconcilerMsg, Target};
use crate::vm::{CreateVm, EffectScope, StartAs, Vm, VmArgs, VmContext, VmMsg, abandon};

type Reply<T> = RpcReplyPort<Result<T, Failure>>;

/// What Fleet is asked and told.
pub enum FleetMsg {
    /// Bring a VM up. Answered once its row is there; the view says what comes then.
    CreateVm {
        /// What it is to be.
        create: Box<CreateVm>,
        /// Its handle.
        reply: Reply<VmHandle>,
    },
    /// A VM's lock is held and its row is there (or not).
    Registered {
        /// The VM.
        result: Box<Result<RegisteredVm, Failure>>,
        /// Who asked for it.
        reply: Reply<VmHandle>,
    },
    /// Take a VM down. Answered at once; the view says what comes then.
    StopVm {
        /// Which.
        id: VmId,
        /// How.
        mode: StopMode,
        /// Its handle.
        reply: Reply<VmHandle>,
    },
    /// Take all VMs down and admit no more.
    StopAll {
        /// How.
        mode: StopMode,
        /// Their handles.
        reply: RpcReplyPort<Vec<VmHandle>>,
    },
    /// The link to a running guest.
    OpenLink {
        /// Which VM's.
        id: VmId,
        /// The link, and what the VM was asked to be.
        reply: Reply<RunningVm>,
    },
    /// The effects of a failed life have ended (or not).
    ScopeClosed {
        /// Whose.
        id: VmId,
        /// What is so now.
        outcome: ScopeOutcome,
    },
    /// The reconciler has done what it could for a VM that used up its budget.
    Compensated {
        /// Which.
        id: VmId,
        /// Why it was given up.
        cause: Failure,
    },
}

impl fmt::Debug for FleetMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CreateVm { .. } => "CreateVm",
            Self::Registered { .. } => "Registered",
            Self::StopVm { .. } => "StopVm",
            Self::StopAll { .. } => "StopAll",
            Self::OpenLink { .. } => "OpenLink",
            Self::ScopeClosed { .. } => "ScopeClosed",
            Self::Compensated { .. } => "Compensated",
        })
    }
}

/// A VM whose guest answers.
#[derive(Clone)]
pub struct RunningVm {
    /// The link to its guest.
    pub link: Arc<dyn GuestLink>,
    /// What it was asked to be.
    pub context: Arc<VmContext>,
}

/// What became of a failed life's effects.
#[derive(Debug, Clone)]
pub struct ScopeOutcome {
    /// Why the life ended.
    cause: Failure,
    /// The phase in the row, once all effects have ended; or why there is none.
    phase: Result<Phase, Failure>,
    /// Whether the VM's budget allows another life.
    may_restart: bool,
}

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
    deps: Deps,
    registry: Registry,
    reconciler: ServiceHandle<ReconcilerMsg>,
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
                if let Some(id) = state.registry.by_actor(cell.get_id()) {
                    tracing::error!(vm_id = %id, %error, "a VM's actor failed");
                    let text = format!("the VM's actor failed: {error}");
                    state.close_scope(&myself, id, Failure::new(FailureKind::Internal, text));
                }
            }
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                if let Some(id) = state.registry.by_actor(cell.get_id()) {
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

fn panicked(what: &str, panic: &(dyn Any + Send)) -> Failure {
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
        if self.registry.lock().len() + self.registering >= MAX_VMS {
            let text = format!("this process has {MAX_VMS} VMs already, its limit");
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
        &self,
        myself: &ActorRef<FleetMsg>,
        registered: RegisteredVm,
    ) -> Result<VmHandle, ActorProcessingErr> {
        let RegisteredVm { context, lock } = registered;
        let (id, context, scope) = (context.id, Arc::new(context), EffectScope::default());
        let handle = VmHandle { id, view: context.watch() };
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

    async fn spawn_actor(
        &self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        args: VmArgs,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, _) = Actor::spawn_linked(None, Vm, args, myself.get_cell()).await?;
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
        Ok(VmHandle { id, view: entry.context.watch() })
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

    /// An actor that ended without a fault has settled its VM, unless it was killed.
    fn actor_ended(&self, myself: &ActorRef<FleetMsg>, id: VmId, reason: Option<String>) {
        let settled = self
            .registry
            .lock()
            .get(&id)
            .is_some_and(|entry| entry.context.watch().borrow().settled);
        if settled {
            self.registry.retire(id, Release::Abandon);
            return;
        }
        let reason = reason.unwrap_or_else(|| "no reason".to_owned());
        tracing::error!(vm_id = %id, %reason, "a VM's actor was ended");
        let text = format!("the VM's actor was ended: {reason}");
        self.close_scope(myself, id, Failure::new(FailureKind::Internal, text));
    }

    /// Ends what a failed life left running, then reads where the VM stands.
    fn close_scope(&self, myself: &ActorRef<FleetMsg>, id: VmId, cause: Failure) {
        let Some((scope, wait)) = self.registry.lock().get_mut(&id).map(|entry| {
            entry.actor = None;
            (entry.scope.clone(), entry.budget.spend(Instant::now()))
        }) else {
            return;
        };
        let (deps, myself) = (self.deps.clone(), myself.clone());
        tokio::spawn(async move {
            let phase = match scope.close(deps.limits.cancel).await {
                Ok(()) => {
                    tokio::time::sleep(wait.unwrap_or_default()).await;
                    // A VM without an actor would never settle if this did not come back.
                    AssertUnwindSafe(recorded_phase(&deps, id))
                        .catch_unwind()
                        .await
                        .unwrap_or_else(|panic| Err(panicked("the recovery", &*panic)))
                }
                Err(stuck) => Err(Failure::from_error(FailureKind::Internal, &stuck)),
            };
            let outcome = ScopeOutcome { cause, phase, may_restart: wait.is_some() };
            if myself.cast(FleetMsg::ScopeClosed { id, outcome }).is_err() {
                tracing::error!(vm_id = %id, "the fleet was gone before a VM was recovered");
            }
        });
    }

    async fn recover(
        &self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        outcome: ScopeOutcome,
    ) -> Result<(), ActorProcessingErr> {
        let phase = match outcome.phase {
            Ok(phase) => phase,
            Err(failure) => {
                self.give_up(id, outcome.cause.context(failure));
                return Ok(());
            }
        };
        let mut restart = None;
        let mut lock = None;
        if let Some(entry) = self.registry.lock().get_mut(&id) {
            if outcome.may_restart {
                entry.scope = EffectScope::default();
                restart = Some(VmArgs {
                    context: Arc::clone(&entry.context),
                    scope: entry.scope.clone(),
                    generation: entry.context.generation().next(),
                    start: StartAs::Recover {
                        phase,
                        cause: outcome.cause.clone(),
                        stop: entry.stop,
                    },
                });
            } else {
                lock = entry.lock.take();
            }
        }
        match restart {
            Some(args) => {
                // Published first: the effects of the new life look at it.
                args.context.publish(|view| view.generation = args.generation);
                self.spawn_actor(myself, id, args).await
            }
            None => {
                self.compensate(myself, id, lock, outcome.cause);
                Ok(())
            }
        }
    }

    /// The VM's actor has used up its budget: the reconciler cleans up, with the lock we hold.
    fn compensate(
        &self,
        myself: &ActorRef<FleetMsg>,
        id: VmId,
        lock: Option<HeldLock>,
        cause: Failure,
    ) {
        let (reconciler, myself) = (self.reconciler.clone(), myself.clone());
        let context = self.registry.lock().get(&id).map(|entry| Arc::clone(&entry.context));
        let why = cause.clone();
        tokio::spawn(async move {
            if let Some(context) = context {
                abandon(&context).await;
            }
            let message = |reply| ReconcilerMsg::Reconcile {
                target: Target::Owned { vm: id, lock, cause: why },
                goal: Goal::Clean,
                reply,
            };
            let report = reconciler.call(message, Duration::from_secs(60)).await;
            tracing::warn!(vm_id = %id, ?report, "a VM whose actor kept failing was compensated");
            if myself.cast(FleetMsg::Compensated { id, cause }).is_err() {
                tracing::error!(vm_id = %id, "the fleet was gone before a VM was given up");
            }
        });
    }

    /// Gives up a VM that has no actor any more and cannot get one: ends its hypervisor, and leaves
    /// the rest to the reconciler.
    fn give_up(&self, id: VmId, cause: Failure) {
        self.publish_end(id, cause, Release::Abandon);
    }

    /// Publishes the end of a VM that has no actor any more, and forgets it.
    fn publish_end(&self, id: VmId, cause: Failure, release: Release) {
        let Some(context) = self.registry.lock().get(&id).map(|entry| Arc::clone(&entry.context))
        else {
            return;
        };
        tracing::error!(vm_id = %id, %cause, "a VM was given up");
        context.publish(|view| {
            view.cause = Some(cause);
            view.settled = true;
        });
        self.registry.retire(id, release);
    }
}

async fn recorded_phase(deps: &Deps, id: VmId) -> Result<Phase, Failure> {
    let head =
        deps.reader.lifecycle_head(id).await.map_err(|e| {
            Failure::from_error(FailureKind::Host, &e).context("could not read the VM")
        })?;
    head.map(|record| record.phase)
        .ok_or_else(|| Failure::new(FailureKind::NotFound, format!("VM {id} has no row")))
}
