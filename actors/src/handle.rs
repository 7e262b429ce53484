//! How a service that may be restarted is reached.
//!
//! The root publishes the current `ActorRef` of each service in a slot; a call waits for one
//! within its deadline. A call that the service had taken when it died is *not* sent again: it may
//! have had its effect. The caller is told, and decides.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use matchlock_model::failure::{Failure, FailureKind};
use ractor::rpc::CallResult;
use ractor::{ActorRef, Message, RpcReplyPort};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Reaches a service, whichever of its lives it is in.
#[derive(Debug)]
pub struct ServiceHandle<M> {
    name: &'static str,
    shared: Arc<Shared<M>>,
}

/// What a slot and its handles share: a `watch`, but for the order in which waiters wake, which is
/// that of their coming. A watch wakes them in random order, and no simulation would replay.
#[derive(Debug)]
struct Shared<M> {
    life: Mutex<Life<M>>,
    changed: Notify,
}

#[derive(Debug)]
struct Life<M> {
    /// `None` before the first, and while the next one is on its way.
    now: Option<ActorRef<M>>,
    /// There will be no other.
    last: bool,
}

impl<M: Message> Shared<M> {
    // A poisoned lock holds a whole value: its fields are replaced one by one.
    fn life(&self) -> MutexGuard<'_, Life<M>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Life<M>)) {
        change(&mut self.life());
        self.changed.notify_waiters();
    }

    /// Waits for a life; `None` when there will be none.
    async fn wait(&self) -> Option<ActorRef<M>> {
        loop {
            // Before the look: a change right after it is noticed.
            let changed = self.changed.notified();
            {
                let life = self.life();
                if life.now.is_some() || life.last {
                    return life.now.clone();
                }
            }
            changed.await;
        }
    }
}

impl<M> Clone for ServiceHandle<M> {
    fn clone(&self) -> Self {
        Self { name: self.name, shared: Arc::clone(&self.shared) }
    }
}

/// Publishes a service's current life; the root has one per service.
#[derive(Debug)]
pub struct ServiceSlot<M: Message> {
    name: &'static str,
    shared: Arc<Shared<M>>,
}

impl<M: Message> Drop for ServiceSlot<M> {
    fn drop(&mut self) {
        self.shared.change(|life| life.last = true);
    }
}

impl<M: Message> ServiceSlot<M> {
    /// A slot without a service yet.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            shared: Arc::new(Shared {
                life: Mutex::new(Life { now: None, last: false }),
                changed: Notify::new(),
            }),
        }
    }

    /// A handle that follows this slot.
    #[must_use]
    pub fn handle(&self) -> ServiceHandle<M> {
        ServiceHandle { name: self.name, shared: Arc::clone(&self.shared) }
    }

    /// The service's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Publishes a new life, or `None` while there is none.
    pub fn set(&self, actor: Option<ActorRef<M>>) {
        self.shared.change(|life| life.now = actor);
    }

    /// The current life.
    #[must_use]
    pub fn get(&self) -> Option<ActorRef<M>> {
        self.shared.life().now.clone()
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
        let life = timeout_at(deadline, self.shared.wait()).await;
        let actor = life.map_err(|_| timeout())?.ok_or(CallError::Ended { service })?;
        let left = deadline.saturating_duration_since(Instant::now());
        match actor.call(message, Some(left)).await {
            Ok(CallResult::Success(reply)) => Ok(reply),
            Ok(CallResult::Timeout) => Err(timeout()),
            Ok(CallResult::SenderError) | Err(_) => Err(CallError::Died { service }),
        }
    }
}
