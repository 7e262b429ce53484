//! Locks in memory, for tests of the actors.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use matchlock_model::id::VmId;

use super::{HeldLock, OwnerLockError, OwnerLocks};

/// Locks in memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeOwnerLocks {
    held: Arc<Mutex<BTreeSet<VmId>>>,
}

struct FakeLock {
    held: Arc<Mutex<BTreeSet<VmId>>>,
    vm: VmId,
}

impl Drop for FakeLock {
    fn drop(&mut self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.vm);
    }
}

impl OwnerLocks for FakeOwnerLocks {
    fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        if !self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(vm) {
            return Err(OwnerLockError::Held { vm });
        }
        Ok(Box::new(FakeLock { held: Arc::clone(&self.held), vm }))
    }

    fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        Ok(self.held.lock().unwrap_or_else(PoisonError::into_inner).contains(&vm))
    }
}
