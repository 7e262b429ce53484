//! What all sessions of a guest share: who the agent is, its jobs, its machine.

use std::rc::Rc;
use std::time::Duration;

use matchlock_wire::message::{AgentInfo, Configure};
use tokio::sync::{mpsc, oneshot};

use crate::configure::ConfigureError;
use crate::jobs::Jobs;
use rustix::process::Pid;

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
    /// The time between the first signal and SIGKILL.
    pub grace: Duration,
    /// The small inits of the commands that have got a signal of their own.
    pub told: Vec<Pid>,
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
    pub fn order_shutdown(&self, grace: Duration, answered: oneshot::Receiver<()>) {
        if self.jobs.is_closed() {
            return;
        }
        // Full or closed: the guest is going down already.
        let Ok(place) = self.orders.try_reserve() else { return };
        place.send(ShutdownOrder { grace, told: self.jobs.close(), answered });
    }
}
