//! How a service that may be restarted is reached.
//!
//! The root publishes the current `ActorRef` of each service in a watch; a call waits for one
//! within its deadline. A call that the service had taken when it died is *not* sent again: it may
//! have had its effect. The caller is told, and decides.

use std::time::Duration;

use matchlock_model::failure::{Failure, FailureKind};
use ractor::rpc::CallResult;
use ractor::{ActorRef, Message, RpcReplyPort};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// Reaches a service, whichever of its lives it is in.
#[derive(Debug)]
pub struct ServiceHandle<M> {
    name: &'static str,
    current: watch::Receiver<Option<ActorRef<M>>>,
}

impl<M> Clone for ServiceHandle<M> {
    fn clone(&self) -> Self {
        Self { name: self.name, current: self.current.clone() }
    }
}

/// Publishes a service's current life; the root has one per service.
#[derive(Debug)]
pub struct ServiceSlot<M> {
    name: &'static str,
    current: watch::Sender<Option<ActorRef<M>>>,
}

impl<M: Message> ServiceSlot<M> {
    /// A slot without a service yet.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self { name, current: watch::Sender::new(None) }
    }

    /// A handle that follows this slot.
    #[must_use]
    pub fn handle(&self) -> ServiceHandle<M> {
        ServiceHandle { name: self.name, current: self.current.subscribe() }
    }

    /// The service's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Publishes a new life, or `None` while there is none.
    pub fn set(&self, actor: Option<ActorRef<M>>) {
        self.current.send_replace(actor);
    }

    /// The current life.
    #[must_use]
    pub fn get(&self) -> Option<ActorRef<M>> {
        self.current.borrow().clone()
    }
}

/// Why a service gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// It did not answer in time. What was asked may still be done.
    #[error("{service} did not answer within {waited:?}")]
    Timeout {
        /// The service.
        service: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// It died while it had the request. What was asked may have been done.
    #[error("{service} failed while it worked on the request")]
    Died {
        /// The service.
        service: &'static str,
    },
    /// It has ended for good.
    #[error("{service} has ended")]
    Ended {
        /// The service.
        service: &'static str,
    },
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let kind = match error {
            CallError::Timeout { .. } => FailureKind::Timeout,
            CallError::Died { .. } | CallError::Ended { .. } => FailureKind::Internal,
        };
        Self::from_error(kind, &error)
    }
}

impl<M: Message> ServiceHandle<M> {
    /// Calls the service and waits for its answer, `limit` at most in all.
    ///
    /// # Errors
    /// When there was no answer; see [`CallError`] for what may have happened all the same.
    pub async fn call<R: Send + 'static>(
        &self,
        message: impl FnOnce(RpcReplyPort<R>) -> M,
        limit: Duration,
    ) -> Result<R, CallError> {
        let service = self.name;
        let deadline = Instant::now() + limit;
        let timeout = || CallError::Timeout { service, waited: limit };
        let mut current = self.current.clone();
        let actor = match timeout_at(deadline, current.wait_for(Option::is_some)).await {
            Ok(Ok(actor)) => actor.clone().ok_or(CallError::Ended { service })?,
            Ok(Err(_)) => return Err(CallError::Ended { service }),
            Err(_) => return Err(timeout()),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        match actor.call(message, Some(left)).await {
            Ok(CallResult::Success(reply)) => Ok(reply),
            Ok(CallResult::Timeout) => Err(timeout()),
            Ok(CallResult::SenderError) | Err(_) => Err(CallError::Died { service }),
        }
    }
}
