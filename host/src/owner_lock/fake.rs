//! Locks in memory, for tests of the actors.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use matchlock_model::id::VmId;

use super::linux::Role;
use super::{HeldLock, OwnerLockError, OwnerLocks};

/// Locks in memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeOwnerLocks {
    held: Held,
}

type Held = Arc<Mutex<BTreeSet<(Role, VmId)>>>;

struct FakeLock {
    held: Held,
    role: Role,
    vm: VmId,
}

impl Drop for FakeLock {
    fn drop(&mut self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&(self.role, self.vm));
    }
}

impl FakeOwnerLocks {
    fn acquire(&self, vm: VmId, role: Role) -> Result<HeldLock, OwnerLockError> {
        if !self.held.lock().unwrap_or_else(PoisonError::into_inner).insert((role, vm)) {
            return Err(OwnerLockError::Held { vm });
        }
        Ok(Box::new(FakeLock { held: Arc::clone(&self.held), role, vm }))
    }
}

impl OwnerLocks for FakeOwnerLocks {
    fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        self.acquire(vm, Role::Owner)
    }

    fn try_acquire_cleaner(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        self.acquire(vm, Role::Cleaner)
    }

    fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        Ok(self.held.lock().unwrap_or_else(PoisonError::into_inner).contains(&(Role::Owner, vm)))
    }
}
