//! The lock in memory, for tests of the actors.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::{HeldNetworkLock, NetworkLockError, NetworkLocks};

/// The lock of one network namespace in memory; clones share it.
#[derive(Debug, Clone)]
pub struct FakeNetworkLocks {
    free: Arc<Semaphore>,
}

impl Default for FakeNetworkLocks {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(1)) }
    }
}

#[async_trait]
impl NetworkLocks for FakeNetworkLocks {
    async fn acquire(&self, patience: Duration) -> Result<HeldNetworkLock, NetworkLockError> {
        let begun = Instant::now();
        match timeout(patience, Arc::clone(&self.free).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Box::new(permit)),
            // It is never closed.
            Ok(Err(_)) | Err(_) => {
                Err(NetworkLockError::Held { waited: begun.elapsed(), holder: None })
            }
        }
    }
}
