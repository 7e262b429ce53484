//! The private directory of one import, and the removal of trees that nobody may trust.
//!
//! ```text
//!   mkdir images/tmp/<random> 0700 ─► flock(LOCK_EX | LOCK_NB) ─► still the same directory? ─► ours
//!        ▲                                 │ locked by a sweeper, or swept already              │
//!        └──────────── another name ◄──────┘                                      emptied, removed, unlocked
//! ```
//!
//! # Invariants
//! 1. A directory is locked as long as its maker lives, from before anything is written into it. One
//!    that can be locked has no maker: the sweeper locks first, and looks again that the name still
//!    leads to what it locked.
//! 2. Removal follows no link, uses a fixed number of descriptors and no recursion, whatever the
//!    depth: a directory inside a directory is first moved up to the top.
//!
//! `Drop` only closes the lock: what is left then is swept by the next import or by `gc`.

use std::ffi::{CString, OsStr};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use matchlock_failpoints::mutated;
use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, flock, fstat, mkdirat,
    open, openat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use super::{Garbage, GarbageKind, Garbages, ImageDirs, ImageError, POINTS};

pub(super) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What a sweep found below `images/tmp/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Left by an import that is gone; removed.
    pub removed: usize,
    /// Of an import that is alive; left alone.
    pub kept: usize,
}

/// A [`ImageError::File`].
pub(super) fn failed(
    doing: &'static str,
    path: impl Into<PathBuf>,
    source: impl Into<io::Error>,
) -> ImageError {
    ImageError::File { doing, path: path.into(), source: source.into() }
}

/// Makes a directory that only we may enter, with its parents.
pub(super) fn make_private(path: &Path) -> Result<(), ImageError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| failed("create", path, error))
}

/// The temporary directory of one import, locked.
#[derive(Debug)]
pub(super) struct Workspace {
    path: PathBuf,
    lock: OwnedFd,
}

impl Workspace {
    /// Makes one with a new name.
    pub(super) fn create(dirs: &ImageDirs) -> Result<Self, ImageError> {
        let tmp = dirs.tmp();
        make_private(&tmp)?;
        let parent = open(&tmp, DIRECTORY, Mode::empty()).map_err(|e| failed("open", &tmp, e))?;
        // Each failure means that a sweeper was just then at work on our new directory.
        for _ in 0..16 {
            if let Some(workspace) = Self::attempt(&tmp, parent.as_fd())? {
                return Ok(workspace);
            }
        }
        Err(failed("lock a directory in", tmp, io::Error::from(io::ErrorKind::WouldBlock)))
    }

    fn attempt(tmp: &Path, parent: BorrowedFd<'_>) -> Result<Option<Self>, ImageError> {
        let mut random = [0; 8];
        getrandom::fill(&mut random)
            .map_err(|error| failed("choose a name in", tmp, io::Error::other(error)))?;
        let name = hex::encode(random);
        let path = tmp.join(&name);
        match mkdirat(parent, &name, Mode::RWXU) {
            Err(Errno::EXIST) => return Ok(None),
            made => made.map_err(|error| failed("create", &path, error))?,
        }
        let lock = match openat(parent, &name, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened.map_err(|error| failed("open", &path, error))?,
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked.map_err(|error| failed("lock", &path, error))?,
        }
        Ok(is_named(parent, &name, &lock, &path)?.then_some(Self { path, lock }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a private directory inside and answers its path.
    pub(super) fn directory(&self, name: &str) -> Result<PathBuf, ImageError> {
        let path = self.path.join(name);
        make_private(&path)?;
        Ok(path)
    }

    /// Removes the directory and all in it, then unlocks.
    pub(super) fn remove(self) -> Result<(), ImageError> {
        remove_locked(&self.path, self.lock.as_fd())
    }
}

/// Whether a name in a directory still leads to what was opened.
pub(super) fn is_named(
    parent: BorrowedFd<'_>,
    name: impl rustix::path::Arg,
    opened: impl AsFd,
    path: &Path,
) -> Result<bool, ImageError> {
    let ours = fstat(opened).map_err(|error| failed("look at", path, error))?;
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok(same(&ours, &there)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// Whether both are the same file.
pub(super) fn same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

fn remove_locked(path: &Path, lock: BorrowedFd<'_>) -> Result<(), ImageError> {
    empty(lock, path)?;
    match rustix::fs::rmdir(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("remove", path, error)),
    }
}

/// Removes everything in a directory. Nobody else may change it meanwhile.
pub(super) fn empty(top: BorrowedFd<'_>, path: &Path) -> Result<(), ImageError> {
    let fail = |error: Errno| failed("empty", path, error);
    let mut moved = 0_u64;
    loop {
        let mut directories = 0_u64;
        for entry in Dir::read_from(top).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name().to_owned();
            if is_dot(&name) || unlinked(top, &name).map_err(fail)? {
                continue;
            }
            directories += 1;
            lift(top, &name, &mut moved).map_err(fail)?;
            match unlinkat(top, &name, AtFlags::REMOVEDIR) {
                // A directory that changes while it is read may hide entries: the next round sees them.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        if directories == 0 {
            return Ok(());
        }
    }
}

/// Empties a directory in `top`: what is no directory is unlinked, what is one moves up to `top`.
fn lift(top: BorrowedFd<'_>, name: &CString, moved: &mut u64) -> Result<(), Errno> {
    let inner = openat(top, name, DIRECTORY, Mode::empty())?;
    for entry in Dir::read_from(&inner)? {
        let child = entry?.file_name().to_owned();
        if is_dot(&child) || unlinked(inner.as_fd(), &child)? {
            continue;
        }
        loop {
            *moved += 1;
            let place = format!(".moved-{moved}");
            match renameat_with(&inner, &child, top, place, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                other => break other?,
            }
        }
    }
    Ok(())
}

fn is_dot(name: &CString) -> bool {
    matches!(name.as_bytes(), b"." | b"..")
}

/// Unlinks a name unless it is a directory; answers whether it is gone.
fn unlinked(parent: BorrowedFd<'_>, name: &CString) -> Result<bool, Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::ISDIR) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what imports left behind that did not end: entries of `images/tmp/` whose lock is free.
/// Nothing else is touched; a directory that is not there holds nothing.
///
/// # Errors
/// When an entry could not be looked at or removed; the others are swept nevertheless.
pub fn sweep_temporary(dirs: &ImageDirs) -> Result<Swept, ImageError> {
    let Garbages { removed, in_use, errors } = sweep_workspaces(dirs, false);
    let swept = Swept { removed: removed.len(), kept: in_use.len() };
    errors.into_iter().next().map_or(Ok(swept), Err)
}

/// The same, and says what was found. A dry run locks each entry for a moment and removes none.
pub fn sweep_workspaces(dirs: &ImageDirs, dry_run: bool) -> Garbages {
    let tmp = dirs.tmp();
    let mut found = Garbages::default();
    match names_in(&tmp) {
        Ok(None) => {}
        Ok(Some((parent, names))) => {
            for name in names {
                let path = tmp.join(OsStr::from_bytes(name.as_bytes()));
                let garbage = Garbage { kind: GarbageKind::Temporary, path, bytes: None };
                match sweep_one(&garbage.path, parent.as_fd(), &name, dry_run) {
                    Ok(true) => found.removed.push(garbage),
                    Ok(false) => found.in_use.push(garbage),
                    Err(error) => found.errors.push(error),
                }
            }
        }
        Err(error) => found.errors.push(error),
    }
    found
}

/// What is in a directory; `None` if it is not there.
fn names_in(directory: &Path) -> Result<Option<(OwnedFd, Vec<CString>)>, ImageError> {
    let fail = |error: Errno| failed("sweep", directory, error);
    let parent = match open(directory, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened.map_err(fail)?,
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(&parent).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name().to_owned();
        if !is_dot(&name) {
            names.push(name);
        }
    }
    Ok(Some((parent, names)))
}

/// Whether it is gone, or would be.
fn sweep_one(
    path: &Path,
    parent: BorrowedFd<'_>,
    name: &CString,
    dry_run: bool,
) -> Result<bool, ImageError> {
    let fail = |error: Errno| failed("sweep", path, error);
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(true),
        stat => stat.map_err(fail)?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        // Imports make directories only; this is nobody's.
        if !dry_run {
            unlinked(parent, name).map_err(fail)?;
        }
        return Ok(true);
    }
    let lock = match openat(parent, name, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(true),
        opened => opened.map_err(fail)?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(false),
        locked => locked.map_err(fail)?,
    }
    if dry_run {
        // Closing unlocks as well, only a little later.
        flock(&lock, FlockOperation::Unlock).map_err(fail)?;
        return Ok(true);
    }
    if is_named(parent, name, &lock, path)? && !mutated("leave_half_imports") {
        let at = |error| failed("sweep", path, error);
        POINTS.before("sweep").map_err(at)?;
        remove_locked(path, lock.as_fd())?;
        POINTS.after("sweep").map_err(at)?;
    }
    Ok(true)
}
