//! A VM's files in memory, for tests of what is built on [`Rootfs`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::id::VmId;

use super::{ObservedFiles, Rootfs, RootfsError, VmPaths};

/// An operation of [`Rootfs`], to be disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootfsOp {
    /// [`Rootfs::create_dir`].
    CreateDir,
    /// [`Rootfs::create_disk`].
    CreateDisk,
    /// [`Rootfs::remove_disk`].
    RemoveDisk,
    /// [`Rootfs::remove_sockets`].
    RemoveSockets,
    /// [`Rootfs::remove_dir`].
    RemoveDir,
    /// [`Rootfs::list_dirs`].
    ListDirs,
    /// [`Rootfs::observe`].
    Observe,
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootfsFault {
    /// It fails and changes nothing.
    Fails,
    /// It is done, and then says that it failed.
    FailsAfterwards,
    /// It takes this long before it is done. The two that are not async ignore it.
    Late(Duration),
    /// It never returns and changes nothing. The two that are not async fail instead.
    Never,
}

/// The files of VMs in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeRootfs {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    dirs: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
    faults: BTreeMap<RootfsOp, RootfsFault>,
    calls: Vec<RootfsOp>,
}

impl FakeRootfs {
    /// A host without any VM's files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Disturbs an operation from now on, or (with `None`) no longer.
    pub fn set_fault(&self, op: RootfsOp, fault: Option<RootfsFault>) {
        let mut state = self.state();
        match fault {
            Some(fault) => state.faults.insert(op, fault),
            None => state.faults.remove(&op),
        };
    }

    /// Puts a file into a VM's directory, as a hypervisor would its socket. Nothing happens when
    /// there is no such directory.
    pub fn add_file(&self, path: &Path) {
        let mut state = self.state();
        if let Some(files) = path.parent().and_then(|dir| state.dirs.get_mut(dir)) {
            files.insert(path.to_owned());
        }
    }

    /// The operations so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<RootfsOp> {
        self.state().calls.clone()
    }

    /// The directories and files that exist.
    #[must_use]
    pub fn existing(&self) -> Vec<PathBuf> {
        let state = self.state();
        state
            .dirs
            .iter()
            .flat_map(|(dir, files)| std::iter::once(dir).chain(files))
            .cloned()
            .collect()
    }

    /// Runs an operation with what disturbs it.
    async fn run<T>(
        &self,
        op: RootfsOp,
        dir: &Path,
        work: impl FnOnce(&mut State) -> Result<T, RootfsError> + Send,
    ) -> Result<T, RootfsError> {
        let fault = self.begin(op);
        match fault {
            None => work(&mut self.state()),
            Some(RootfsFault::Fails) => Err(injected(dir)),
            Some(RootfsFault::FailsAfterwards) => {
                work(&mut self.state())?;
                Err(injected(dir))
            }
            Some(RootfsFault::Late(delay)) => {
                tokio::time::sleep(delay).await;
                work(&mut self.state())
            }
            Some(RootfsFault::Never) => std::future::pending().await,
        }
    }

    /// The same for an operation that cannot wait.
    fn run_now<T>(
        &self,
        op: RootfsOp,
        dir: &Path,
        work: impl FnOnce(&State) -> T,
    ) -> Result<T, RootfsError> {
        match self.begin(op) {
            None | Some(RootfsFault::Late(_)) => Ok(work(&self.state())),
            Some(RootfsFault::Fails | RootfsFault::FailsAfterwards | RootfsFault::Never) => {
                Err(injected(dir))
            }
        }
    }

    fn begin(&self, op: RootfsOp) -> Option<RootfsFault> {
        let mut state = self.state();
        state.calls.push(op);
        state.faults.get(&op).copied()
    }
}

/// The error of a fault.
fn injected(path: &Path) -> RootfsError {
    let source = io::Error::other("injected fault");
    RootfsError::File { doing: "work on", path: path.to_owned(), source }
}

#[async_trait]
impl Rootfs for FakeRootfs {
    async fn create_dir(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        self.run(RootfsOp::CreateDir, &paths.dir, |state| {
            state.dirs.entry(paths.dir.clone()).or_default().insert(paths.logs());
            Ok(())
        })
        .await
    }

    async fn create_disk(&self, paths: &VmPaths, _size_mb: u64) -> Result<(), RootfsError> {
        self.run(RootfsOp::CreateDisk, &paths.dir, |state| {
            let missing = || RootfsError::File {
                doing: "open the directory",
                path: paths.dir.clone(),
                source: io::ErrorKind::NotFound.into(),
            };
            state.dirs.get_mut(&paths.dir).ok_or_else(missing)?.insert(paths.rootfs());
            Ok(())
        })
        .await
    }

    async fn remove_disk(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        self.run(RootfsOp::RemoveDisk, &paths.dir, |state| {
            if let Some(files) = state.dirs.get_mut(&paths.dir) {
                files.remove(&paths.rootfs());
            }
            Ok(())
        })
        .await
    }

    async fn remove_sockets(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        self.run(RootfsOp::RemoveSockets, &paths.dir, |state| {
            if let Some(files) = state.dirs.get_mut(&paths.dir) {
                files.retain(|file| !paths.sockets().contains(file));
            }
            Ok(())
        })
        .await
    }

    async fn remove_dir(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        self.run(RootfsOp::RemoveDir, &paths.dir, |state| {
            state.dirs.remove(&paths.dir);
            Ok(())
        })
        .await
    }

    fn list_dirs(&self, vms_dir: &Path) -> Result<Vec<VmId>, RootfsError> {
        self.run_now(RootfsOp::ListDirs, vms_dir, |state| {
            state
                .dirs
                .keys()
                .filter_map(|dir| dir.strip_prefix(vms_dir).ok()?.to_str()?.parse().ok())
                .collect()
        })
    }

    fn list_strangers(&self, vms_dir: &Path) -> Result<Vec<PathBuf>, RootfsError> {
        self.run_now(RootfsOp::ListDirs, vms_dir, |state| {
            let below = state.dirs.keys().filter(|dir| dir.parent() == Some(vms_dir));
            let is_vm = |dir: &Path| {
                dir.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.parse::<VmId>().is_ok())
            };
            below.filter(|dir| !is_vm(dir)).cloned().collect()
        })
    }

    fn observe(&self, paths: &VmPaths) -> Result<ObservedFiles, RootfsError> {
        self.run_now(RootfsOp::Observe, &paths.dir, |state| {
            state.dirs.get(&paths.dir).map_or_else(ObservedFiles::default, |files| ObservedFiles {
                dir: true,
                rootfs: files.contains(&paths.rootfs()),
                sockets: paths.sockets().iter().any(|socket| files.contains(socket)),
            })
        })
    }
}
