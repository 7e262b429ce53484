//! The fence around a VM's effects.

use std::future::Future;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// All effects of one life of a VM's actor. Closing it cancels them and waits for their end, so
/// that nothing of an old life can touch the host beside a new one.
#[derive(Debug, Clone, Default)]
pub struct EffectScope {
    cancel: CancellationToken,
    tasks: TaskTracker,
}

/// An effect did not end although it was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{tasks} effects still running {waited:?} after they were cancelled")]
pub struct ScopeStuck {
    /// How many.
    pub tasks: usize,
    /// How long they were given.
    pub waited: Duration,
}

impl EffectScope {
    /// Spawns a task in the scope.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // The handle is not needed: the tracker counts the task, the token ends it.
        drop(self.tasks.spawn(task));
    }

    /// A token for one operation; it is cancelled with the scope.
    #[must_use]
    pub fn operation(&self) -> CancellationToken {
        self.cancel.child_token()
    }

    /// Waits until the scope is closed.
    pub async fn closed(&self) {
        self.cancel.cancelled().await;
    }

    /// Cancels everything and waits until it has ended, however long that takes.
    pub async fn ended(&self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Cancels everything and waits until it has ended.
    ///
    /// # Errors
    /// When something is still running after `limit`.
    pub async fn close(&self, limit: Duration) -> Result<(), ScopeStuck> {
        timeout(limit, self.ended())
            .await
            .map_err(|_| ScopeStuck { tasks: self.tasks.len(), waited: limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn closing_ends_what_listens_and_names_what_does_not() {
        let scope = EffectScope::default();
        let cancel = scope.operation();
        scope.spawn(async move { cancel.cancelled().await });
        assert_eq!(scope.close(Duration::from_secs(1)).await, Ok(()));

        let deaf = EffectScope::default();
        deaf.spawn(std::future::pending());
        let stuck = deaf.close(Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(stuck.tasks, 1);
    }
}
