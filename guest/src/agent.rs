//! What all sessions of a guest share: who the agent is, its jobs, its machine.

use std::rc::Rc;
use std::time::Duration;

use matchlock_wire::message::{AgentInfo, Configure};
use tokio::sync::{mpsc, oneshot};

use crate::configure::ConfigureError;
use crate::jobs::Jobs;

/// The machine around the agent; in tests another one than the guest's.
pub trait Machine {
    /// Applies a configuration.
    ///
    /// # Errors
    /// When a part of it could not be applied; the rest may have been.
    fn configure(&self, config: &Configure) -> Result<(), ConfigureError>;
}

/// A shutdown that the host has asked for.
#[derive(Debug)]
pub struct ShutdownOrder {
    /// The time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Resolves when the host has the answer, or never will have it.
    pub answered: oneshot::Receiver<()>,
}

/// The agent.
pub struct Agent {
    /// What it says about itself.
    pub info: AgentInfo,
    /// The commands it runs.
    pub jobs: Rc<Jobs>,
    /// The machine it runs in.
    pub machine: Box<dyn Machine>,
    orders: mpsc::Sender<ShutdownOrder>,
}

impl Agent {
    /// A new agent, and where the host's shutdown order will arrive.
    pub fn new(
        info: AgentInfo,
        jobs: Rc<Jobs>,
        machine: Box<dyn Machine>,
    ) -> (Rc<Self>, mpsc::Receiver<ShutdownOrder>) {
        let (orders, receiver) = mpsc::channel(1);
        let agent = Self { info, jobs, machine, orders };
        (Rc::new(agent), receiver)
    }

    /// Refuses new commands from now on and passes the order on. A second order changes nothing.
    pub fn order_shutdown(&self, order: ShutdownOrder) {
        self.jobs.close();
        // Full or closed: the first order is being carried out already.
        drop(self.orders.try_send(order));
    }
}
