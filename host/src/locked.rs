//! A file or directory with a lock (flock) on it, which it loses when it is dropped.
//!
//! Dropping unlocks before it closes: a child that is just being started has a copy of every descriptor
//! until its exec, and a lock lives as long as its last copy, unless it is unlocked. The kernel drops a
//! lock with the process that holds it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FlockOperation, flock};

/// Something open that is unlocked when it is dropped.
#[derive(Debug)]
pub(crate) struct Locked(OwnedFd);

impl Locked {
    /// Takes what the caller has just locked.
    pub(crate) fn new(locked: OwnedFd) -> Self {
        Self(locked)
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
