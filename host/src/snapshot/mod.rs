//! Snapshots: what machines on hold were saved as, for others to go on from.
//!
//! ```text
//!   begin ─► snapshots/.new/memory ─► (the hypervisor writes) ─┬─► publish ─► snapshots/<key>/
//!                                                              └─► dropped: .new is removed
//!   find ──► lease ─► the same as is wanted? ─► memory, to be launched with
//!                      └ no: stale              ├ check, beside the launch: each byte is hashed
//!                                               └ withdraw: whole, but what goes on from it fails
//!   sweep ─► what nobody can use any more, what is too much: the least recently used first
//! ```
//!
//! # Invariants
//! 1. A snapshot is there whole under its name or not at all; its name says what machine it is of, its
//!    record what host, hypervisor and guest exactly.
//! 2. Whoever changes something here holds the exclusive lock on `snapshots/`; what begins with a dot
//!    then has no maker that lives.
//! 3. A snapshot with a lease is not removed. A lease is held until the machine has read it all.
//! 4. Nobody else may read one: it is a machine's memory. Nothing of an image, and no secret, is in it.
//! 5. Nobody else may have written one: it goes into a hypervisor that is ours. One that others could
//!    write is none for us.
//!
//! # Failure
//! What is stale or damaged is an error of [`Snapshots::find`] or [`Snapshots::check`]; whoever asked
//! boots instead. What a crash leaves is swept by the next change and by `gc`.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use matchlock_failpoints::Area;

use crate::hypervisor::Saved;
use crate::locked::Locked;

mod fake;
mod linux;
mod record;

pub use fake::FakeSnapshots;
pub use linux::LinuxSnapshots;

/// What a crash may come between. `restore` is what is done with a snapshot that was found.
pub const POINTS: Area = Area::new("snapshot", &["publish", "restore", "remove", "sweep"]);

/// How many snapshots are kept.
pub const MAX_COUNT: usize = 8;

/// How many bytes of them are kept.
pub const MAX_BYTES: u64 = 2 << 30;

/// What machine a snapshot is wanted of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The number of virtual CPUs.
    pub vcpus: u32,
    /// The memory in MiB.
    pub memory_mb: u64,
    /// Whether it has a NIC.
    pub nic: bool,
    /// What its hypervisor says of itself, see
    /// [`Hypervisor::fingerprint`](crate::hypervisor::Hypervisor::fingerprint).
    pub hypervisor: String,
}

/// A snapshot to go on from. It is not removed while this is held, until [`Snapshot::release`].
#[derive(Debug)]
pub struct Snapshot {
    /// What was saved.
    pub memory: Arc<File>,
    key: String,
    saved: Saved,
    /// Keeps it from being removed.
    lease: Option<Box<dyn Lease>>,
}

impl Snapshot {
    /// Lets it be removed or replaced: nothing goes on from it, but which it was is still to be known.
    pub fn release(&mut self) {
        self.lease = None;
    }
}

/// What keeps a snapshot from being removed until it is dropped.
trait Lease: fmt::Debug + Send + Sync {}

impl Lease for Locked {}

/// A snapshot that is being made. Nobody else makes one meanwhile. Dropped, it leaves nothing.
pub struct Draft {
    memory: File,
    wanted: Wanted,
    /// Dropped before the lock: what it removes is nobody else's yet.
    room: Option<linux::Room>,
    /// Keeps others out.
    claim: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Draft").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

impl Draft {
    /// Where it is to be saved.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn file(&self) -> Result<File, SnapshotError> {
        self.memory.try_clone().map_err(|source| SnapshotError::Io {
            doing: "open",
            path: PathBuf::from("memory"),
            source,
        })
    }
}

/// Why a snapshot is of no use, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is of another guest, hypervisor or boot of this host.
    #[error("the snapshot {key} is stale: {what}; `matchlock warm` makes another")]
    Stale {
        /// Its name.
        key: String,
        /// What has changed.
        what: &'static str,
    },
    /// It is not what was saved.
    #[error("the snapshot is damaged: {what}; `matchlock warm` makes another")]
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// Somebody else makes or removes snapshots.
    #[error("another matchlock works on the snapshots in {dir}: try again")]
    Busy {
        /// Where.
        dir: PathBuf,
    },
    /// It is not to be replaced while microVMs read it.
    #[error(
        "the snapshot {key} could not be replaced: microVMs are starting from the older one; try again"
    )]
    InUse {
        /// Its name.
        key: String,
    },
    /// The disk is needed for other things.
    #[error(
        "there is no room for a snapshot in {dir}: it takes up to {} MB, and {} MB are free besides \
         what is kept for others",
        needed >> 20, free >> 20
    )]
    NoSpace {
        /// Where.
        dir: PathBuf,
        /// How many bytes it may take.
        needed: u64,
        /// How many it may have.
        free: u64,
    },
    /// Others could write there.
    #[error(
        "the snapshots in {dir} are another user's, or others can write there: remove that directory"
    )]
    NotOurs {
        /// Where.
        dir: PathBuf,
    },
    /// Somebody has removed it by hand while it was made.
    #[error("the snapshot was removed from {dir} while it was made")]
    Removed {
        /// Where it was.
        dir: PathBuf,
    },
    /// A file operation failed.
    #[error("could not {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl SnapshotError {
    fn io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, path: path.to_owned(), source: source.into() }
    }
}

/// The snapshots of a host.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// The one that such a machine can go on from; `None` when there is none.
    ///
    /// # Errors
    /// When there is one that is stale or damaged, or it cannot be looked at.
    async fn find(&self, wanted: &Wanted) -> Result<Option<Snapshot>, SnapshotError>;

    /// Sees that one is byte for byte what was saved. Beside a launch it costs no time.
    ///
    /// # Errors
    /// When it is not.
    async fn check(&self, snapshot: &Snapshot) -> Result<(), SnapshotError>;

    /// Begins one. Dropped, nothing was made; [`discard`](Self::discard) drops it where files may be
    /// removed.
    ///
    /// # Errors
    /// When somebody else makes one, or there is no place for it.
    async fn begin(&self, wanted: &Wanted) -> Result<Draft, SnapshotError>;

    /// Shows one that was saved, instead of an older one of such machines, once nobody reads that.
    ///
    /// # Errors
    /// When it cannot be shown, or the older one is in use for seconds; then nothing was made.
    async fn publish(&self, draft: Draft, saved: Saved) -> Result<(), SnapshotError>;

    /// Removes one that is whole and yet of no use, because what goes on from it fails; unless others
    /// use it, or it was replaced already.
    ///
    /// # Errors
    /// When it could not be looked at or removed.
    async fn withdraw(&self, snapshot: Snapshot) -> Result<(), SnapshotError>;

    /// Ends one that is not to be shown: removes what was made of it, and lets others make one.
    ///
    /// # Errors
    /// When something of it may be left. Others may make one all the same.
    async fn discard(&self, draft: Draft) -> Result<(), SnapshotError>;

    /// Removes what is left of changes, stale, or too much. How much was removed. Snapshots of another
    /// user's are none of ours.
    ///
    /// # Errors
    /// When something could not be removed or looked at.
    async fn sweep(&self) -> Result<usize, SnapshotError>;
}

#[cfg(test)]
mod tests;
