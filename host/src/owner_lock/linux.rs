//! Open-file-description locks on single bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use matchlock_failpoints::{Area, Injected, mutated};
use matchlock_model::id::VmId;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::OwnerLockError;

/// The lock file's name in the state directory. It is never removed: the locks of two files with
/// one name do not see each other.
const FILE_NAME: &str = "vm.locks";

/// Whose lock it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Who runs the VM.
    Owner,
    /// Who cleans it up.
    Cleaner,
}

/// What a crash may come between. After `acquire` the lock is held and there is no row yet.
pub const POINTS: Area = Area::new("lock", &["acquire"]);

impl From<Injected> for OwnerLockError {
    fn from(injected: Injected) -> Self {
        Self::File { path: FILE_NAME.to_owned(), source: injected.into() }
    }
}

/// The locks of one state directory.
#[derive(Debug, Clone)]
pub struct LinuxOwnerLocks {
    path: PathBuf,
}

/// A held lock; dropping it releases it.
///
/// It has an open file description of its own: locks of one description do not exclude each other.
/// The descriptor is closed on exec, so a child cannot hold the lock beyond its owner.
#[derive(Debug)]
pub struct OwnerLock {
    vm: VmId,
    _file: File,
}

impl OwnerLock {
    /// Whose lock it is.
    #[must_use]
    pub const fn vm(&self) -> VmId {
        self.vm
    }
}

impl LinuxOwnerLocks {
    /// The locks of this state directory. Makes nothing.
    ///
    /// # Errors
    /// When what lies in the place of the lock file is not a file of ours, or could not be looked
    /// at.
    pub fn open(home: &Path) -> Result<Self, OwnerLockError> {
        let locks = Self { path: home.join(FILE_NAME) };
        locks.existing()?;
        Ok(locks)
    }

    /// Takes a VM's lock without waiting. The lock file is made if it is missing.
    ///
    /// # Errors
    /// [`OwnerLockError::Held`] when anybody, this process included, holds it already; otherwise
    /// when the file could not be used.
    pub fn try_acquire(&self, vm: VmId) -> Result<OwnerLock, OwnerLockError> {
        self.acquire(vm, Role::Owner)
    }

    pub(super) fn acquire(&self, vm: VmId, role: Role) -> Result<OwnerLock, OwnerLockError> {
        if role == Role::Owner {
            POINTS.before("acquire")?;
        }
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&self.path)
                .map_err(|source| self.failed(source))?;
            self.check_regular(&file)?;
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_byte(vm, role))) {
                Ok(_) => {}
                Err(Errno::EAGAIN) if mutated("ignore_owner_lock") => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Err(OwnerLockError::Held { vm }),
                Err(errno) => return Err(self.failed(errno.into())),
            }
            // A file that was replaced between the two steps locks nothing: once more.
            if self.is_current(&file).map_err(|source| self.failed(source))? {
                if role == Role::Owner {
                    POINTS.after("acquire")?;
                }
                return Ok(OwnerLock { vm, _file: file });
            }
        }
    }

    /// Whether a VM's lock is held by anybody, this process included. Takes nothing, makes
    /// nothing; a missing file means that nobody holds any.
    ///
    /// # Errors
    /// When the file could not be used.
    pub fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        self.holds(vm, Role::Owner)
    }

    /// Whether anybody has this role.
    pub(super) fn holds(&self, vm: VmId, role: Role) -> Result<bool, OwnerLockError> {
        self.existing()?.map_or(Ok(false), |file| self.is_locked(&file, vm, role))
    }

    /// Whether the locks of these VMs are held; the file is opened once.
    pub(super) fn all_held(&self, vms: &[VmId]) -> Result<Vec<bool>, OwnerLockError> {
        match self.existing()? {
            None => Ok(vec![false; vms.len()]),
            Some(file) => vms.iter().map(|vm| self.is_locked(&file, *vm, Role::Owner)).collect(),
        }
    }

    fn is_locked(&self, file: &File, vm: VmId, role: Role) -> Result<bool, OwnerLockError> {
        let mut lock = whole_byte(vm, role);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(|errno| self.failed(errno.into()))?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK && !mutated("ignore_owner_lock"))
    }

    /// The lock file opened for asking; `None` when it is missing.
    fn existing(&self) -> Result<Option<File>, OwnerLockError> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&self.path);
        match opened {
            Ok(file) => self.check_regular(&file).map(|()| Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed(source)),
        }
    }

    fn check_regular(&self, file: &File) -> Result<(), OwnerLockError> {
        let found = file.metadata().map_err(|source| self.failed(source))?;
        if found.is_file() {
            return Ok(());
        }
        Err(self.failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")))
    }

    /// Whether the path still names this file.
    fn is_current(&self, file: &File) -> io::Result<bool> {
        let ours = file.metadata()?;
        match self.path.symlink_metadata() {
            Ok(found) => Ok((found.dev(), found.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn failed(&self, source: io::Error) -> OwnerLockError {
        OwnerLockError::File { path: self.path.display().to_string(), source }
    }
}

/// A write lock on the VM's byte. The byte need not exist in the file.
fn whole_byte(vm: VmId, role: Role) -> libc::flock {
    // The constants are small; their types differ between platforms.
    #[expect(clippy::cast_possible_truncation, reason = "F_WRLCK and SEEK_SET are 1 and 0")]
    let (l_type, l_whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    let behind_all_owners = match role {
        Role::Owner => 0,
        Role::Cleaner => libc::off_t::from(u32::MAX) + 1,
    };
    let l_start = libc::off_t::from(vm.number()) + behind_all_owners;
    libc::flock { l_type, l_whence, l_start, l_len: 1, l_pid: 0 }
}
