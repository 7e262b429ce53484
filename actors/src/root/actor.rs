//! The actor.

use std::time::Duration;

use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor::{Message, RpcReplyPort};
use tokio::time::Instant;

use crate::budget::RestartBudget;
use crate::db_writer::{DbWriter, DbWriterArgs, DbWriterMsg};
use crate::deps::Deps;
use crate::fleet::{Fleet, FleetArgs, FleetMsg, Registry};
use crate::handle::{ServiceHandle, ServiceSlot};
use crate::images::{Images, ImagesArgs, ImagesMsg};
use crate::points;
use crate::reconciler::{Reconciler, ReconcilerMsg};
use crate::subnet_allocator::{SubnetAllocator, SubnetAllocatorArgs, SubnetAllocatorMsg};

/// What the root is asked.
#[derive(Debug)]
pub enum RootMsg {
    /// End all services, in order. The VMs must be settled already.
    Shutdown {
        /// Answered when they have ended. The writer's thread ends once the root itself is gone.
        reply: RpcReplyPort<()>,
    },
    /// Start a service again that has failed, now that it has waited.
    Start {
        /// Which.
        service: Service,
    },
}

/// How the services are reached.
#[derive(Debug, Clone)]
pub struct Services {
    /// The writer.
    pub db_writer: ServiceHandle<DbWriterMsg>,
    /// The reconciler.
    pub reconciler: ServiceHandle<ReconcilerMsg>,
    /// The subnet allocator.
    pub subnet_allocator: ServiceHandle<SubnetAllocatorMsg>,
    /// The images.
    pub images: ServiceHandle<ImagesMsg>,
    /// The fleet.
    pub fleet: ServiceHandle<FleetMsg>,
}

/// Where the services are published. Made before the root, because the services' own
/// dependencies hold handles to each other.
#[derive(Debug)]
pub struct Slots {
    db_writer: ServiceSlot<DbWriterMsg>,
    reconciler: ServiceSlot<ReconcilerMsg>,
    subnet_allocator: ServiceSlot<SubnetAllocatorMsg>,
    images: ServiceSlot<ImagesMsg>,
    fleet: ServiceSlot<FleetMsg>,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            db_writer: ServiceSlot::new("the database writer"),
            reconciler: ServiceSlot::new("the reconciler"),
            subnet_allocator: ServiceSlot::new("the subnet allocator"),
            images: ServiceSlot::new("the image service"),
            fleet: ServiceSlot::new("the fleet"),
        }
    }
}

impl Slots {
    /// Handles that follow these slots.
    #[must_use]
    pub fn services(&self) -> Services {
        Services {
            db_writer: self.db_writer.handle(),
            reconciler: self.reconciler.handle(),
            subnet_allocator: self.subnet_allocator.handle(),
            images: self.images.handle(),
            fleet: self.fleet.handle(),
        }
    }
}

/// What the root is started with.
#[derive(Debug)]
pub struct RootArgs {
    /// Where the services are published.
    pub slots: Slots,
    /// For the writer.
    pub db_writer: DbWriterArgs,
    /// For the reconciler and the fleet.
    pub deps: Deps,
    /// For the images.
    pub images: ImagesArgs,
}

/// The root.
#[derive(Debug)]
pub struct Root;

/// What the root knows.
#[derive(Debug)]
pub struct RootState {
    args: RootArgs,
    registry: Registry,
    budgets: [RestartBudget; Service::ALL.len()],
    closing: bool,
}

/// The services, in the order of their start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    DbWriter,
    Reconciler,
    SubnetAllocator,
    Images,
    Fleet,
}

impl Service {
    const ALL: [Self; 5] =
        [Self::DbWriter, Self::Reconciler, Self::SubnetAllocator, Self::Images, Self::Fleet];
}

/// How long a service may take to finish what it has.
const STOP_LIMIT: Duration = Duration::from_secs(20);

impl Actor for Root {
    type Msg = RootMsg;
    type State = RootState;
    type Arguments = RootArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<RootMsg>,
        args: RootArgs,
    ) -> Result<RootState, ActorProcessingErr> {
        let budgets = std::array::from_fn(|_| RestartBudget::for_service());
        let state = RootState { args, registry: Registry::default(), budgets, closing: false };
        for service in Service::ALL {
            state.start(&myself, service).await?;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<RootMsg>,
        message: RootMsg,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        points::message(&message)?;
        let reply = match message {
            RootMsg::Shutdown { reply } => reply,
            RootMsg::Start { service } if state.closing => {
                tracing::debug!(?service, "not started again: all are being ended");
                return Ok(());
            }
            RootMsg::Start { service } => return state.start(&myself, service).await,
        };
        state.shut_down().await;
        if reply.send(()).is_err() {
            tracing::debug!("nobody waits for the shutdown");
        }
        myself.stop(Some("shut down".into()));
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RootMsg>,
        event: SupervisionEvent,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, why): (ActorCell, String) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, last_state, reason) => {
                // The writer's last state holds its queue open; its next life joins the thread
                // that waits for that queue to close.
                drop(last_state);
                (cell, reason.unwrap_or_else(|| "stopped".into()))
            }
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => {
                return Ok(());
            }
        };
        let Some(service) = state.which(cell.get_id()) else { return Ok(()) };
        state.unpublish(service);
        if state.closing {
            return Ok(());
        }
        tracing::error!(?service, %why, "a service failed");
        match state.budgets[service as usize].spend(Instant::now()) {
            None => Err(format!("{service:?} keeps failing: {why}").into()),
            Some(Duration::ZERO) => state.start(&myself, service).await,
            Some(wait) => {
                drop(myself.send_after(wait, move || RootMsg::Start { service }));
                Ok(())
            }
        }
    }
}

fn is<M: Message>(slot: &ServiceSlot<M>, id: ActorId) -> bool {
    slot.get().is_some_and(|actor| actor.get_id() == id)
}

impl RootState {
    async fn start(
        &self,
        myself: &ActorRef<RootMsg>,
        service: Service,
    ) -> Result<(), ActorProcessingErr> {
        let (root, slots) = (myself.get_cell(), &self.args.slots);
        match service {
            Service::DbWriter => {
                let args = self.args.db_writer.clone();
                slots.db_writer.set(Some(Actor::spawn_linked(None, DbWriter, args, root).await?.0));
            }
            Service::Reconciler => {
                let args = self.args.deps.clone();
                let (actor, _) = Actor::spawn_linked(None, Reconciler, args, root).await?;
                slots.reconciler.set(Some(actor));
            }
            Service::SubnetAllocator => {
                let args = SubnetAllocatorArgs {
                    deps: self.args.deps.clone(),
                    reconciler: slots.reconciler.handle(),
                };
                let (actor, _) = Actor::spawn_linked(None, SubnetAllocator, args, root).await?;
                slots.subnet_allocator.set(Some(actor));
            }
            Service::Images => {
                let args = self.args.images.clone();
                slots.images.set(Some(Actor::spawn_linked(None, Images, args, root).await?.0));
            }
            Service::Fleet => {
                let args = FleetArgs {
                    deps: self.args.deps.clone(),
                    registry: self.registry.clone(),
                    reconciler: slots.reconciler.handle(),
                };
                slots.fleet.set(Some(Actor::spawn_linked(None, Fleet, args, root).await?.0));
            }
        }
        Ok(())
    }

    fn which(&self, id: ActorId) -> Option<Service> {
        let slots = &self.args.slots;
        [
            (is(&slots.db_writer, id), Service::DbWriter),
            (is(&slots.reconciler, id), Service::Reconciler),
            (is(&slots.subnet_allocator, id), Service::SubnetAllocator),
            (is(&slots.images, id), Service::Images),
            (is(&slots.fleet, id), Service::Fleet),
        ]
        .into_iter()
        .find_map(|(matches, service)| matches.then_some(service))
    }

    fn unpublish(&self, service: Service) {
        let slots = &self.args.slots;
        match service {
            Service::DbWriter => slots.db_writer.set(None),
            Service::Reconciler => slots.reconciler.set(None),
            Service::SubnetAllocator => slots.subnet_allocator.set(None),
            Service::Images => slots.images.set(None),
            Service::Fleet => slots.fleet.set(None),
        }
    }

    async fn shut_down(&mut self) {
        self.closing = true;
        let slots = &self.args.slots;
        stop(&slots.fleet).await;
        stop(&slots.images).await;
        stop(&slots.subnet_allocator).await;
        stop(&slots.reconciler).await;
        // Drained, not stopped: a stop would overtake writes that wait in its mailbox.
        if let Some(writer) = slots.db_writer.get() {
            slots.db_writer.set(None);
            if let Err(error) = writer.drain_and_wait(Some(STOP_LIMIT)).await {
                tracing::error!(%error, "the database writer did not finish in time");
            }
        }
    }
}

async fn stop<M: Message>(slot: &ServiceSlot<M>) {
    let Some(actor) = slot.get() else { return };
    slot.set(None);
    if let Err(error) = actor.stop_and_wait(Some("shut down".into()), Some(STOP_LIMIT)).await {
        tracing::error!(service = slot.name(), %error, "a service did not stop in time");
    }
}
