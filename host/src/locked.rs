//! A file or directory with a lock (flock) on it, which it loses when it is dropped.
//!
//! Dropping unlocks before it closes: a child that is just being started has a copy of every descriptor
//! until its exec, and a lock lives as long as its last copy, unless it is unlocked. The kernel drops a
//! lock with the process that holds it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open, stat};
use rustix::io::Errno;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Something open that is unlocked when it is dropped.
#[derive(Debug)]
pub(crate) struct Locked(OwnedFd);

impl Locked {
    /// Takes what the caller has just locked.
    pub(crate) fn new(locked: OwnedFd) -> Self {
        Self(locked)
    }

    /// Locks a directory beside others who use it. `None` when it is not there (any more), or is being
    /// removed: whoever gets a lock has looked again at the name.
    pub(crate) fn shared(dir: &Path) -> Result<Option<Self>, Errno> {
        let opened = match open(dir, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened?,
        };
        match flock(&opened, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        Self(opened).if_named(dir)
    }

    /// The lock, if the name is still that of what is locked.
    fn if_named(self, dir: &Path) -> Result<Option<Self>, Errno> {
        let ours = fstat(self.as_fd())?;
        match stat(dir) {
            Ok(there) if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino) => {
                Ok(Some(self))
            }
            Ok(_) | Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Locks a directory for oneself; `None` when somebody else has a lock on it, or has just replaced it.
    pub(crate) fn exclusive(dir: &Path) -> Result<Option<Self>, Errno> {
        let opened = open(dir, DIRECTORY, Mode::empty())?;
        match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            locked => {
                locked?;
                Self(opened).if_named(dir)
            }
        }
    }
}

impl AsFd for Locked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Err(error) = flock(&self.0, FlockOperation::Unlock) {
            // Closing unlocks as well, only a little later.
            tracing::debug!(error = &error as &dyn std::error::Error, "could not unlock a file");
        }
    }
}
