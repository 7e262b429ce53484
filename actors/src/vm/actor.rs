//! The actor: message in, `step`, operation out.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt as _;
use matchlock_model::failure::{Failure, FailureKind, panic_text};
use matchlock_model::id::Generation;
use matchlock_model::phase::Phase;
use matchlock_model::vm::{Effect, Heard, OpResult, StopMode, VmEvent, VmState, step};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio_util::sync::CancellationToken;

use super::context::{StartMode, VmContext};
use super::effects::{self, Progress};
use super::scope::EffectScope;
use super::watch;
use crate::points;

/// What a VM's actor is told.
#[derive(Debug)]
pub enum VmMsg {
    /// Take it down.
    Stop(StopMode),
    /// An operation has ended.
    OpDone {
        /// Which.
        op: u64,
        /// The phase that was committed last.
        recorded: Phase,
        /// How.
        result: OpResult,
    },
    /// The time for a cancelled operation to end is over.
    CancelDeadline {
        /// Which.
        op: u64,
    },
    /// The hypervisor has ended by itself.
    MachineExited(Failure),
    /// The guest cannot be reached any more, though the hypervisor is there.
    LinkLost(Failure),
    /// The guest does not answer, or does so again.
    Heard(Heard),
}

/// How a life of the actor begins.
#[derive(Debug, Clone)]
pub enum StartAs {
    /// The VM's row was just inserted.
    New,
    /// An earlier life failed. A VM that runs goes on; in any other phase the shutdown is finished
    /// from the row.
    Recover {
        /// The phase in the row.
        phase: Phase,
        /// Why the earlier life ended.
        cause: Failure,
        /// What somebody asked of the earlier life, or in between.
        stop: Option<StopMode>,
    },
}

/// What a VM's actor is started with.
#[derive(Debug, Clone)]
pub struct VmArgs {
    /// What outlives it.
    pub context: Arc<VmContext>,
    /// The fence around its effects.
    pub scope: EffectScope,
    /// Which life this is.
    pub generation: Generation,
    /// How it begins.
    pub start: StartAs,
}

/// A VM's actor.
#[derive(Debug)]
pub struct Vm;

/// The operation in flight.
#[derive(Debug)]
struct InFlight {
    op: u64,
    cancel: CancellationToken,
    /// Closed, nothing is begun any more, the taking down neither.
    fence: CancellationToken,
    progress: Arc<Mutex<Progress>>,
}

/// What the actor knows.
#[derive(Debug)]
pub struct VmActorState {
    context: Arc<VmContext>,
    scope: EffectScope,
    generation: Generation,
    vm: VmState,
    /// The phase that was committed last.
    recorded: Phase,
    ops: u64,
    in_flight: Option<InFlight>,
    watching: bool,
}

impl Actor for Vm {
    type Msg = VmMsg;
    type State = VmActorState;
    type Arguments = VmArgs;

    // Nothing fallible: a failure here would go to the spawner, not to supervision.
    async fn pre_start(
        &self,
        myself: ActorRef<VmMsg>,
        args: VmArgs,
    ) -> Result<VmActorState, ActorProcessingErr> {
        let recorded = match &args.start {
            StartAs::New => Phase::Creating,
            StartAs::Recover { phase, .. } => *phase,
        };
        let mut vm = VmState::new(args.context.create.spec.ephemeral);
        vm.template = matches!(args.context.create.start, StartMode::Template { .. });
        vm.phase = recorded;
        let (event, stop) = match args.start {
            StartAs::New => (VmEvent::Begin, None),
            StartAs::Recover { phase, cause, stop } => (VmEvent::Recover { phase, cause }, stop),
        };
        let mut state = VmActorState {
            context: args.context,
            scope: args.scope,
            generation: args.generation,
            vm,
            recorded,
            ops: 0,
            in_flight: None,
            watching: false,
        };
        state.apply(&myself, event)?;
        if let Some(mode) = stop {
            state.apply(&myself, VmEvent::Stop(mode))?;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<VmMsg>,
        message: VmMsg,
        state: &mut VmActorState,
    ) -> Result<(), ActorProcessingErr> {
        points::message(&message)?;
        match message {
            VmMsg::Stop(mode) => state.apply(&myself, VmEvent::Stop(mode)),
            VmMsg::MachineExited(cause) => {
                state.watching = false;
                state.apply(&myself, VmEvent::MachineExited(cause))
            }
            VmMsg::LinkLost(cause) => {
                state.watching = false;
                state.apply(&myself, VmEvent::LinkLost(cause))
            }
            VmMsg::Heard(heard) => state.apply(&myself, VmEvent::Heard(heard)),
            VmMsg::OpDone { op, recorded, result } => {
                if !state.is_current(op) {
                    tracing::warn!(vm_id = %state.context.id, op, "answer of an old operation");
                    return Ok(());
                }
                state.in_flight = None;
                state.recorded = recorded;
                state.apply(&myself, VmEvent::OpDone { recorded, result })
            }
            VmMsg::CancelDeadline { op } => {
                if !state.is_current(op) {
                    return Ok(());
                }
                state.give_up_operation(&myself)
            }
        }
    }
}

/// A panicked effect, as a failure of its operation.
fn panicked(panic: &(dyn Any + Send)) -> Failure {
    Failure::new(FailureKind::Internal, format!("an effect panicked: {}", panic_text(panic)))
}

impl VmActorState {
    fn is_current(&self, op: u64) -> bool {
        self.in_flight.as_ref().is_some_and(|in_flight| in_flight.op == op)
    }

    fn apply(
        &mut self,
        myself: &ActorRef<VmMsg>,
        event: VmEvent,
    ) -> Result<(), ActorProcessingErr> {
        tracing::debug!(vm_id = %self.context.id, generation = self.generation.0, ?event, "event");
        let (vm, effects) = step(self.vm.clone(), event)?;
        self.vm = vm;
        match effects.as_slice() {
            [] => {}
            [Effect::Cancel] => self.cancel_operation(myself),
            [Effect::Settle] => myself.stop(Some("settled".into())),
            _ => self.start_operation(myself, effects),
        }
        self.watch_machine(myself);
        let (generation, vm) = (self.generation, self.vm.clone());
        self.context.publish(move |view| {
            view.generation = generation;
            view.phase = vm.phase;
            view.cleaned_up = vm.is_cleaned_up();
            view.cause = vm.cause;
            view.settled = vm.settled;
        });
        Ok(())
    }

    fn start_operation(&mut self, myself: &ActorRef<VmMsg>, effects: Vec<Effect>) {
        self.ops += 1;
        let op = self.ops;
        let fence = self.scope.operation();
        let cancel = fence.child_token();
        let progress = Arc::new(Mutex::new(Progress::new(self.recorded)));
        self.in_flight = Some(InFlight {
            op,
            cancel: cancel.clone(),
            fence: fence.clone(),
            progress: Arc::clone(&progress),
        });
        let (context, myself) = (Arc::clone(&self.context), myself.clone());
        self.scope.spawn(async move {
            // A panic must not leave the actor waiting for an answer that never comes.
            let run =
                AssertUnwindSafe(effects::run(&context, &effects, &cancel, &fence, &progress));
            let result = run.catch_unwind().await.unwrap_or_else(|panic| Err(panicked(&*panic)));
            let recorded = progress.lock().unwrap_or_else(PoisonError::into_inner).recorded;
            if myself.cast(VmMsg::OpDone { op, recorded, result }).is_err() {
                tracing::debug!(vm_id = %context.id, op, "the actor was gone before the answer");
            }
        });
    }

    fn cancel_operation(&mut self, myself: &ActorRef<VmMsg>) {
        let Some(in_flight) = &self.in_flight else { return };
        in_flight.cancel.cancel();
        let op = in_flight.op;
        let limit = self.context.deps.limits.cancel;
        // The timer ends by itself with the actor.
        drop(myself.send_after(limit, move || VmMsg::CancelDeadline { op }));
    }

    fn give_up_operation(&mut self, myself: &ActorRef<VmMsg>) -> Result<(), ActorProcessingErr> {
        let Some(in_flight) = self.in_flight.take() else { return Ok(()) };
        in_flight.fence.cancel();
        let (recorded, effect) = {
            let progress = in_flight.progress.lock().unwrap_or_else(PoisonError::into_inner);
            (progress.recorded, progress.effect)
        };
        self.recorded = recorded;
        tracing::error!(vm_id = %self.context.id, effect, "a cancelled effect does not end");
        self.apply(myself, VmEvent::OpStuck { recorded, effect })
    }

    /// Watches the machine and the link once the VM runs.
    fn watch_machine(&mut self, myself: &ActorRef<VmMsg>) {
        if self.watching || self.vm.phase != Phase::Running || self.vm.op.is_some() {
            return;
        }
        self.watching = true;
        let (context, scope, myself) =
            (Arc::clone(&self.context), self.scope.clone(), myself.clone());
        self.scope.spawn(async move {
            let tell = |message| {
                if myself.cast(message).is_err() {
                    tracing::debug!(vm_id = %context.id, "the actor was gone before the VM's end");
                }
            };
            tokio::select! {
                biased;
                () = scope.closed() => {}
                last = watch::watch(&context, &tell) => tell(last),
            }
        });
    }
}
