//! One lock byte per VM in `$MATCHLOCK_HOME/vm.locks`: held means that its owner lives.
//!
//! The byte's offset is the VM's number. The owner holds an open-file-description lock (OFD) on
//! it for its whole life; the kernel drops it when the process ends, however it ends. Others ask
//! without waiting and without taking it. A second byte, far behind, is held by whoever cleans the VM
//! up: also a VM whose owner lives but does not answer is cleaned up by one process only.
//!
//! # Invariants
//! 1. A lock is held until its [`OwnerLock`] is dropped or the process ends.
//! 2. Two holders of one byte do not exist, in one process or in two.
//! 3. Asking changes nothing; "could not look" is an error.

use std::io;

use matchlock_model::id::VmId;

mod fake;
mod linux;

pub use fake::FakeOwnerLocks;
pub use linux::{LinuxOwnerLocks, OwnerLock, POINTS};

use linux::Role;

/// Why a lock could not be taken or asked about.
#[derive(Debug, thiserror::Error)]
pub enum OwnerLockError {
    /// The lock file could not be opened or used.
    #[error("could not use the lock file {path}")]
    File {
        /// The lock file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Somebody else holds it.
    #[error("{vm} has an owner that is alive")]
    Held {
        /// The VM.
        vm: VmId,
    },
}

/// A held lock, whatever holds it; dropping it releases it.
pub type HeldLock = Box<dyn Send + Sync>;

/// Taking VMs' locks and asking about them.
pub trait OwnerLocks: Send + Sync {
    /// Takes a VM's lock without waiting.
    ///
    /// # Errors
    /// [`OwnerLockError::Held`] when anybody, this process included, holds it already; otherwise
    /// when it could not be tried.
    fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError>;

    /// Takes the right to clean a VM up, without waiting. Independent of the owner's lock.
    ///
    /// # Errors
    /// As [`Self::try_acquire`].
    fn try_acquire_cleaner(&self, vm: VmId) -> Result<HeldLock, OwnerLockError>;

    /// Whether anybody, this process included, holds a VM's lock. Takes nothing. Whoever cleans the
    /// VM up holds it too: see [`Self::is_being_cleaned`].
    ///
    /// # Errors
    /// When it could not be asked.
    fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError>;

    /// [`Self::is_held`] of many, in their order.
    ///
    /// # Errors
    /// When it could not be asked of one of them.
    fn are_held(&self, vms: &[VmId]) -> Result<Vec<bool>, OwnerLockError> {
        vms.iter().map(|vm| self.is_held(*vm)).collect()
    }

    /// Whether anybody, this process included, cleans the VM up at this moment. Takes nothing.
    ///
    /// # Errors
    /// When it could not be asked.
    fn is_being_cleaned(&self, vm: VmId) -> Result<bool, OwnerLockError>;
}

impl OwnerLocks for LinuxOwnerLocks {
    fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        Ok(Box::new(self.acquire(vm, Role::Owner)?))
    }

    fn try_acquire_cleaner(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        Ok(Box::new(self.acquire(vm, Role::Cleaner)?))
    }

    fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        Self::is_held(self, vm)
    }

    fn are_held(&self, vms: &[VmId]) -> Result<Vec<bool>, OwnerLockError> {
        self.all_held(vms)
    }

    fn is_being_cleaned(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        self.holds(vm, Role::Cleaner)
    }
}

#[cfg(test)]
mod conformance {
    //! What every implementation must do.

    use super::*;

    fn locks_exclude_each_other(locks: &dyn OwnerLocks) {
        let (one, other) = (VmId::new(7), VmId::new(8));
        assert!(!locks.is_held(one).unwrap());
        let held = locks.try_acquire(one).unwrap();
        assert!(locks.is_held(one).unwrap());
        assert!(matches!(locks.try_acquire(one), Err(OwnerLockError::Held { vm }) if vm == one));
        assert!(!locks.is_held(other).unwrap());
        assert_eq!(locks.are_held(&[other, one, other]).unwrap(), [false, true, false]);
        drop(locks.try_acquire(other).unwrap());
        assert!(!locks.is_being_cleaned(one).unwrap());
        let cleaner = locks.try_acquire_cleaner(one).unwrap();
        assert!(locks.is_being_cleaned(one).unwrap());
        assert!(!locks.is_being_cleaned(other).unwrap());
        let refused = locks.try_acquire_cleaner(one);
        assert!(matches!(refused, Err(OwnerLockError::Held { vm }) if vm == one));
        drop(locks.try_acquire_cleaner(other).unwrap());
        drop(held);
        assert!(!locks.is_held(one).unwrap());
        drop(locks.try_acquire(one).unwrap());
        drop(cleaner);
        assert!(!locks.is_being_cleaned(one).unwrap());
        drop(locks.try_acquire_cleaner(one).unwrap());
        drop(locks.try_acquire(one).unwrap());
    }

    #[test]
    fn the_real_locks_conform() {
        let home = tempfile::tempdir().unwrap();
        locks_exclude_each_other(&LinuxOwnerLocks::open(home.path()).unwrap());
    }

    #[test]
    fn the_fake_locks_conform() {
        locks_exclude_each_other(&FakeOwnerLocks::default());
    }
}
