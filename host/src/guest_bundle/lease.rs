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

use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open, stat};
use rustix::io::Errno;

use super::GuestBundleError;
use crate::locked::Locked;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

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
        let gone = || GuestBundleError::Gone { dir: dir.to_owned() };
        let io = |error: Errno| GuestBundleError::io("lock", dir, error);
        let opened = match open(dir, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Err(gone()),
            opened => opened.map_err(io)?,
        };
        match flock(&opened, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => return Err(gone()),
            locked => locked.map_err(io)?,
        }
        let lock = Locked::new(opened);
        let ours = fstat(lock.as_fd()).map_err(io)?;
        match stat(dir) {
            Ok(there) if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino) => {}
            Ok(_) | Err(Errno::NOENT) => return Err(gone()),
            Err(error) => return Err(io(error)),
        }
        Ok(Self { _lock: lock })
    }
}

/// Locks a directory for oneself; `None` when somebody else has a lock on it.
pub(super) fn exclude(dir: &Path) -> Result<Option<Locked>, Errno> {
    let opened = open(dir, DIRECTORY, Mode::empty())?;
    match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(None),
        locked => {
            locked?;
            Ok(Some(Locked::new(opened)))
        }
    }
}
