//! Locks in memory, for tests of the actors.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use matchlock_model::id::VmId;

use super::linux::Role;
use super::{HeldLock, OwnerLockError, OwnerLocks};

/// Locks in memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeOwnerLocks {
    held: Held,
    cleaners: Arc<AtomicUsize>,
    unreadable: Arc<AtomicBool>,
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
    /// How often anybody has taken the right to clean a VM up.
    #[must_use]
    pub fn cleaners_taken(&self) -> usize {
        self.cleaners.load(Ordering::Relaxed)
    }

    /// Whether asking for an owner fails from now on.
    pub fn set_unreadable(&self, unreadable: bool) {
        self.unreadable.store(unreadable, Ordering::Relaxed);
    }

    fn acquire(&self, vm: VmId, role: Role) -> Result<HeldLock, OwnerLockError> {
        if !self.held.lock().unwrap_or_else(PoisonError::into_inner).insert((role, vm)) {
            return Err(OwnerLockError::Held { vm });
        }
        Ok(Box::new(FakeLock { held: Arc::clone(&self.held), role, vm }))
    }

    fn holds(&self, vm: VmId, role: Role) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).contains(&(role, vm))
    }
}

impl OwnerLocks for FakeOwnerLocks {
    fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        self.acquire(vm, Role::Owner)
    }

    fn try_acquire_cleaner(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        let lock = self.acquire(vm, Role::Cleaner)?;
        self.cleaners.fetch_add(1, Ordering::Relaxed);
        Ok(lock)
    }

    fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        if self.unreadable.load(Ordering::Relaxed) {
            let (path, source) = ("vm.locks".to_owned(), io::Error::other("injected fault"));
            return Err(OwnerLockError::File { path, source });
        }
        Ok(self.holds(vm, Role::Owner))
    }

    fn is_being_cleaned(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        Ok(self.holds(vm, Role::Cleaner))
    }
}
