//! Who uses a bundle, and the one who removes it.
//!
//! ```text
//!   take     open the directory ─► LOCK_SH ─► still there under its name? ─► held until dropped
//!   exclude  open the directory ─► LOCK_EX ─► whoever asks renames it, then removes it
//! ```
//!
//! # Invariants
//! 1. Nobody waits: a bundle that is being removed counts as gone, one with a lease as in use.
//! 2. Whoever has taken a lease has looked again at the name: the bundle was not removed before.

use std::path::Path;

use rustix::io::Errno;

use super::GuestBundleError;
use crate::locked::Locked;

/// A shared lock on a bundle. While one is held, the bundle is not removed.
#[derive(Debug)]
pub struct BundleLease {
    /// Held for its lock.
    _lock: Locked,
}

impl BundleLease {
    /// Takes a lease on the bundle in this directory. Hold it as long as a VM of it lives.
    ///
    /// # Errors
    /// [`GuestBundleError::Gone`] when it was removed, or is being removed.
    pub fn take(dir: &Path) -> Result<Self, GuestBundleError> {
        let locked = Locked::shared(dir);
        let lock = locked.map_err(|error: Errno| GuestBundleError::io("lock", dir, error))?;
        let lock = lock.ok_or_else(|| GuestBundleError::Gone { dir: dir.to_owned() })?;
        Ok(Self { _lock: lock })
    }
}

/// Locks a directory for oneself; `None` when somebody else has a lock on it.
pub(super) fn exclude(dir: &Path) -> Result<Option<Locked>, Errno> {
    Locked::exclusive(dir)
}
