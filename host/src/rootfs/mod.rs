//! A VM's directory `vms/<vm-id>/` (0700): its writable disk, its sockets, its logs.
//!
//! # Invariants
//! 1. Every path is known before it exists ([`VmPaths`]); nothing else is ever made in the
//!    directory by the host.
//! 2. Creating and removing may be repeated: "already there" and "already gone" are success.
//! 3. After a removal the path was looked at again and is gone.
//! 4. No path is followed through a symbolic link that somebody put in its place.

use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use matchlock_model::id::VmId;

mod fake;
mod linux;

pub use fake::{FakeRootfs, RootfsFault, RootfsOp};
pub use linux::{LinuxRootfs, POINTS};

/// The paths of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    /// The directory.
    pub dir: PathBuf,
}

impl VmPaths {
    /// The paths of this VM below `vms/`.
    #[must_use]
    pub fn new(vms_dir: &Path, vm: VmId) -> Self {
        Self { dir: vms_dir.join(vm.to_string()) }
    }

    /// The writable disk.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs.ext4")
    }

    /// How the hypervisor was launched, as JSON.
    #[must_use]
    pub fn hypervisor_json(&self) -> PathBuf {
        self.dir.join("hypervisor.json")
    }

    /// The socket of the guest link (QEMU's end listens).
    #[must_use]
    pub fn link_socket(&self) -> PathBuf {
        self.dir.join("link.sock")
    }

    /// The socket of QEMU's control channel.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The socket on which the owner answers.
    #[must_use]
    pub fn owner_socket(&self) -> PathBuf {
        self.dir.join("owner.sock")
    }

    /// The directory of the logs.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// The guest's serial console.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.logs().join("console.log")
    }

    /// What an owner that nobody listens to (`run -d`) says.
    #[must_use]
    pub fn owner_log(&self) -> PathBuf {
        self.logs().join("owner.log")
    }

    /// What the hypervisor prints.
    #[must_use]
    pub fn hypervisor_log(&self) -> PathBuf {
        self.logs().join("hypervisor.log")
    }

    /// Every socket.
    #[must_use]
    pub fn sockets(&self) -> [PathBuf; 3] {
        [self.link_socket(), self.qmp_socket(), self.owner_socket()]
    }
}

/// Why a VM's files could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A file operation failed.
    #[error("could not {doing} {path}")]
    File {
        /// What was being done, e.g. `create`.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// mke2fs is not installed.
    #[error("mke2fs is not installed: install the package e2fsprogs")]
    NoMke2fs,
    /// mke2fs failed.
    #[error("mke2fs failed on {path} ({status}): {stderr}")]
    Mke2fs {
        /// The disk.
        path: PathBuf,
        /// Its exit status.
        status: String,
        /// The end of what it printed.
        stderr: String,
    },
    /// The mke2fs that was making this disk has not ended.
    #[error("{path} is still worked on by an mke2fs that does not end")]
    StillMade {
        /// The unfinished disk.
        path: PathBuf,
    },
    /// The removed path is still there.
    #[error("{path} is still there after its removal")]
    StillThere {
        /// The path.
        path: PathBuf,
    },
}

/// Making and removing a VM's files.
#[async_trait]
pub trait Rootfs: Send + Sync {
    /// Makes the VM's directory and its `logs/`, mode 0700.
    ///
    /// # Errors
    /// When a directory cannot be made, or the path is something else than a directory of ours.
    async fn create_dir(&self, paths: &VmPaths) -> Result<(), RootfsError>;

    /// Makes the writable disk: a sparse ext4 of `size_mb` MiB without a journal. A leftover of an
    /// earlier try is replaced. Cancelling (dropping the future) kills mke2fs, which may take a
    /// moment to end.
    ///
    /// # Errors
    /// When mke2fs is missing or fails, or there is no space.
    async fn create_disk(&self, paths: &VmPaths, size_mb: u64) -> Result<(), RootfsError>;

    /// Removes the writable disk, once nothing makes it any more.
    ///
    /// # Errors
    /// When it is still being made after 10 s, is still there afterwards or could not be looked at.
    async fn remove_disk(&self, paths: &VmPaths) -> Result<(), RootfsError>;

    /// Removes the sockets.
    ///
    /// # Errors
    /// When one is still there afterwards or could not be looked at.
    async fn remove_sockets(&self, paths: &VmPaths) -> Result<(), RootfsError>;

    /// Removes the whole directory with its logs.
    ///
    /// # Errors
    /// When something is still there afterwards or could not be looked at.
    async fn remove_dir(&self, paths: &VmPaths) -> Result<(), RootfsError>;

    /// Lists the ids for which a directory exists below `vms_dir`; other names are left out. A
    /// missing `vms_dir` holds none.
    ///
    /// # Errors
    /// When the directory could not be read.
    fn list_dirs(&self, vms_dir: &Path) -> Result<Vec<VmId>, RootfsError>;

    /// Lists what else is below `vms_dir`: names that are no VM's, and VMs' names of things that are
    /// no directories.
    ///
    /// # Errors
    /// When the directory could not be read.
    fn list_strangers(&self, vms_dir: &Path) -> Result<Vec<PathBuf>, RootfsError>;

    /// Which of the VM's files exist.
    ///
    /// # Errors
    /// When they could not be looked at.
    fn observe(&self, paths: &VmPaths) -> Result<ObservedFiles, RootfsError>;
}

/// Which of a VM's files exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ObservedFiles {
    /// The directory.
    pub dir: bool,
    /// The writable disk.
    pub rootfs: bool,
    /// Any of the sockets.
    pub sockets: bool,
}
