//! One lock per network namespace, held while a subnet is chosen and its TAP gets its address.
//!
//! Two installations, or two users' nodes, that look at one host's addresses at the same time
//! would find the same subnet free. Who holds this lock is the only one that chooses; the lock is
//! held for milliseconds, never over the removal of a TAP, which waits for grace periods.
//!
//! ```text
//!   node A ── bind ── @matchlock-subnets ── (abstract unix socket of the network namespace)
//!   node B ── bind: EADDRINUSE ── connect, and wait until A's end closes ── bind
//! ```
//!
//! # Invariants
//! 1. One holder per network namespace, in one process or in many; another namespace has its own.
//! 2. The lock goes when it is dropped or its process ends, however it ends. (A child that is being
//!    spawned at that moment holds a copy of the socket until its exec.)
//! 3. Waiting ends at its deadline, with an error that names the holder. There is no queue: who
//!    comes next is chance.
//!
//! # What it is not
//! A protection against local users: anybody in the namespace may bind the name, and keep VMs from
//! starting; the error then says who it is.

use std::io;
use std::time::Duration;

use async_trait::async_trait;

mod fake;
mod linux;

pub use fake::FakeNetworkLocks;
pub use linux::{LinuxNetworkLocks, POINTS};

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkLockError {
    /// Others held it all the time.
    #[error(
        "the lock for choosing subnets was held by others for {waited:?} ({}); if that is no \
         matchlock, end it",
        holder.map_or_else(|| "unknown whom".to_owned(), |h| h.to_string())
    )]
    Held {
        /// How long it was waited for.
        waited: Duration,
        /// Who held it when it was last asked.
        holder: Option<Holder>,
    },
    /// The kernel did not let us have a socket.
    #[error("could not use the lock for choosing subnets")]
    Socket(#[source] io::Error),
}

/// Who holds the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Its process; 0 when that is not visible from here.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "lastly by process {} of user {}", self.pid, self.uid)
    }
}

/// The held lock, whatever holds it; dropping it releases it.
pub type HeldNetworkLock = Box<dyn Send + Sync>;

/// Taking the lock of the process's network namespace.
#[async_trait]
pub trait NetworkLocks: Send + Sync {
    /// Waits for the lock, at most this long. Zero: tries once. Dropping the future leaves nothing
    /// held.
    ///
    /// # Errors
    /// [`NetworkLockError::Held`] when the time was up.
    async fn acquire(&self, patience: Duration) -> Result<HeldNetworkLock, NetworkLockError>;
}
