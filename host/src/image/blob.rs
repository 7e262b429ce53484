//! Root filesystems in `images/blobs/`, and who uses them.
//!
//! ```text
//!   BlobLease::take  open ─► LOCK_SH ─► still there under its name? ─► held until dropped
//!   remove_blob      open ─► LOCK_EX ─► still there under its name? ─► unlink ─► unlock
//! ```
//!
//! # Invariants
//! 1. Each side looks again at the name after it has the lock, so that nobody holds a lease on a
//!    file that was just removed.
//! 2. Nobody waits: a blob that is being removed counts as gone, one with a lease as in use.
//!
//! The kernel drops a lease with the process that holds it.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use matchlock_failpoints::mutated;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, flock, fstat, open, openat, unlinkat,
};
use rustix::io::Errno;

use super::workspace::{DIRECTORY, failed, is_named};
use super::{Garbage, GarbageKind, Garbages, ImageDirs, ImageError, POINTS};
use crate::locked::Locked;

/// Nothing is followed, nothing waits for the other end of a fifo.
pub(super) const FILE: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// A shared lock on a blob. While one is held, the blob is not removed.
#[derive(Debug)]
pub struct BlobLease {
    path: PathBuf,
    size: u64,
    /// Held for its lock.
    _lock: Locked,
}

impl BlobLease {
    /// Takes a lease on a blob. Hold it as long as a VM runs from the blob.
    ///
    /// # Errors
    /// [`ImageError::NoBlob`] when there is no such file, or it is empty or being removed;
    /// [`ImageError::File`] when that could not be found out.
    pub fn take(path: &Path) -> Result<Self, ImageError> {
        match open(path, FILE, Mode::empty()) {
            Ok(file) => Self::hold(file, path),
            Err(Errno::NOENT | Errno::LOOP) => Err(ImageError::NoBlob { path: path.to_owned() }),
            Err(error) => Err(failed("open", path, error)),
        }
    }

    /// Locks what was opened under this path, unless it was removed since or is no blob.
    fn hold(file: OwnedFd, path: &Path) -> Result<Self, ImageError> {
        let gone = || ImageError::NoBlob { path: path.to_owned() };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => return Err(gone()),
            locked => locked.map_err(|error| failed("lock", path, error))?,
        }
        let lock = Locked::new(file);
        let stat = fstat(lock.as_fd()).map_err(|error| failed("look at", path, error))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !regular || stat.st_size == 0 || !is_named(rustix::fs::CWD, path, lock.as_fd(), path)? {
            return Err(gone());
        }
        Ok(Self { path: path.to_owned(), size: on_disk(&stat), _lock: lock })
    }

    /// The same lease, after the file was given another name.
    pub(super) fn moved(self, path: &Path) -> Self {
        Self { path: path.to_owned(), ..self }
    }

    /// The blob.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes that it takes on disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Removes a blob, unless it is still wanted; whether it is gone. One that is gone already is fine.
///
/// `is_wanted` is asked while nobody can take a lease: an import keeps its lease until its row is
/// written, so an image that has just begun to use the blob is seen.
///
/// # Errors
/// [`ImageError::InUse`] when somebody holds a [`BlobLease`] on it; [`ImageError::NotABlob`] when
/// the path is not directly below `images/blobs/` or is no regular file.
pub fn remove_blob(
    dirs: &ImageDirs,
    path: &Path,
    is_wanted: &mut dyn FnMut() -> bool,
) -> Result<bool, ImageError> {
    remove(dirs, path, &mut |_| is_wanted())
}

/// Removes what has a blob's name and is empty: all that a crash of the machine may leave of one.
pub(super) fn remove_empty(dirs: &ImageDirs, path: &Path) -> Result<(), ImageError> {
    remove(dirs, path, &mut |stat| stat.st_size > 0).map(drop)
}

/// `keep` is asked under the exclusive lock.
fn remove(
    dirs: &ImageDirs,
    path: &Path,
    keep: &mut dyn FnMut(&Stat) -> bool,
) -> Result<bool, ImageError> {
    let blobs = dirs.blobs();
    let refused = || ImageError::NotABlob { path: path.to_owned(), blobs: blobs.clone() };
    let Ok(relative) = path.strip_prefix(&blobs) else {
        return Err(refused());
    };
    let mut components = relative.components();
    let (Some(Component::Normal(name)), None) = (components.next(), components.next()) else {
        return Err(refused());
    };
    let fail = |error: Errno| failed("remove", path, error);
    let parent = match open(&blobs, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(true),
        opened => opened.map_err(fail)?,
    };
    let file = match openat(&parent, name, FILE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(true),
        Err(Errno::LOOP) => return Err(refused()),
        opened => opened.map_err(fail)?,
    };
    let stat = fstat(&file).map_err(fail)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refused());
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Err(ImageError::InUse { path: path.to_owned() }),
        locked => locked.map_err(fail)?,
    }
    let file = Locked::new(file);
    let at = |error| failed("remove", path, error);
    POINTS.before("remove_blob").map_err(at)?;
    if keep(&stat) {
        return Ok(false);
    }
    if is_named(parent.as_fd(), name, file.as_fd(), path)? {
        unlink_verified(parent.as_fd(), name, file.as_fd(), path)?;
    }
    POINTS.after("remove_blob").map_err(at)?;
    Ok(true)
}

/// Removes the blobs that nobody wants and nobody uses: a crash between a blob and its row leaves
/// one. A dry run locks each for a moment and removes none.
///
/// `is_wanted` is asked by the blob's file name, while nobody can take a lease on it.
pub fn sweep_blobs(
    dirs: &ImageDirs,
    dry_run: bool,
    is_wanted: &mut dyn FnMut(&OsStr) -> bool,
) -> Garbages {
    let blobs = dirs.blobs();
    let mut found = Garbages::default();
    let entries = match std::fs::read_dir(&blobs) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return found,
        Err(error) => return Garbages::failed(failed("sweep", &blobs, error)),
        Ok(entries) => entries,
    };
    for entry in entries {
        let name = match entry {
            Ok(entry) => entry.file_name(),
            Err(error) => {
                found.errors.push(failed("sweep", &blobs, error));
                continue;
            }
        };
        // Looked at twice: most are wanted, and those are not locked against a VM that begins.
        if !is_name_of_blob(&name) || is_wanted(&name) || mutated("leave_unnamed_blobs") {
            continue;
        }
        sweep_blob(&blobs.join(&name), dirs, dry_run, &mut || is_wanted(&name), &mut found);
    }
    found
}

fn sweep_blob(
    path: &Path,
    dirs: &ImageDirs,
    dry_run: bool,
    is_wanted: &mut dyn FnMut() -> bool,
    found: &mut Garbages,
) {
    let garbage = |bytes| Garbage { kind: GarbageKind::Blob, path: path.to_owned(), bytes };
    let mut unwanted = None;
    let mut keep = |stat: &Stat| {
        let wanted = is_wanted();
        if !wanted {
            unwanted = Some(garbage(Some(on_disk(stat))));
        }
        wanted || dry_run
    };
    match remove(dirs, path, &mut keep) {
        Ok(_) => found.removed.extend(unwanted),
        Err(ImageError::InUse { .. }) => found.in_use.push(garbage(None)),
        Err(error) => found.errors.push(error),
    }
}

/// The bytes that a file takes on disk.
pub(super) fn on_disk(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or_default() * 512
}

/// As `build` names them; what else may lie there is not ours to remove.
fn is_name_of_blob(name: &OsStr) -> bool {
    let digest = name
        .to_str()
        .and_then(|name| name.strip_prefix("sha256_"))
        .and_then(|name| name.strip_suffix(".erofs"));
    digest.is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn unlink_verified(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    file: BorrowedFd<'_>,
    path: &Path,
) -> Result<(), ImageError> {
    let fail = |error: Errno| failed("remove", path, error);
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(fail(error)),
    }
    // An import may have put a new file there since; only ours must be gone.
    if is_named(parent, name, file, path)? { Err(fail(Errno::BUSY)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_that_is_wanted_again_stays() {
        let cache = tempfile::tempdir().unwrap();
        let dirs = ImageDirs::new(cache.path());
        let path = dirs.blobs().join("sha256_1.erofs");
        std::fs::create_dir_all(dirs.blobs()).unwrap();
        std::fs::write(&path, "content").unwrap();
        let mut asked_under_the_lock = false;
        let mut is_wanted = || {
            asked_under_the_lock = BlobLease::take(&path).is_err();
            true
        };
        assert!(!remove_blob(&dirs, &path, &mut is_wanted).unwrap());
        assert!(asked_under_the_lock && path.try_exists().unwrap());
        assert!(remove_blob(&dirs, &path, &mut || false).unwrap());
        assert!(!path.try_exists().unwrap());
    }

    #[test]
    fn blobs_that_nobody_wants_are_swept_and_nothing_else() {
        let cache = tempfile::tempdir().unwrap();
        let dirs = ImageDirs::new(cache.path());
        assert!(sweep_blobs(&dirs, false, &mut |_| false).removed.is_empty());
        std::fs::create_dir_all(dirs.blobs()).unwrap();
        let blob = |digit: &str| dirs.blobs().join(format!("sha256_{}.erofs", digit.repeat(64)));
        let strange = [dirs.blobs().join("sha256_1.erofs"), dirs.blobs().join("notes")];
        let (wanted, used, left) = (blob("a"), blob("b"), blob("c"));
        for path in strange.iter().chain([&wanted, &used, &left]) {
            std::fs::write(path, "content").unwrap();
        }
        let lease = BlobLease::take(&used).unwrap();
        let mut is_wanted = |name: &OsStr| Some(name) == wanted.file_name();
        let there = |path: &PathBuf| path.try_exists().unwrap();
        for dry_run in [true, false] {
            let found = sweep_blobs(&dirs, dry_run, &mut is_wanted);
            let paths = |list: &[Garbage]| -> Vec<PathBuf> {
                list.iter().map(|garbage| garbage.path.clone()).collect()
            };
            assert_eq!(paths(&found.removed), std::slice::from_ref(&left));
            assert_eq!(paths(&found.in_use), std::slice::from_ref(&used));
            assert!(found.removed[0].bytes.is_some() && found.errors.is_empty());
            assert_eq!(there(&left), dry_run);
        }
        assert!(strange.iter().chain([&wanted, &used]).all(there) && !there(&left));
        // One that is wanted by the time that it is locked stays.
        drop(lease);
        let mut asked = 0;
        let mut later = |name: &OsStr| {
            asked += usize::from(Some(name) == used.file_name());
            Some(name) == wanted.file_name() || asked == 2
        };
        assert!(sweep_blobs(&dirs, false, &mut later).removed.is_empty());
        assert!(asked == 2 && there(&used));
    }

    #[test]
    fn a_file_that_was_removed_after_it_was_opened_is_not_leased() {
        let cache = tempfile::tempdir().unwrap();
        let dirs = ImageDirs::new(cache.path());
        let path = dirs.blobs().join("sha256_1.erofs");
        std::fs::create_dir_all(dirs.blobs()).unwrap();
        std::fs::write(&path, "content").unwrap();
        let early = open(&path, FILE, Mode::empty()).unwrap();
        remove_blob(&dirs, &path, &mut || false).unwrap();
        assert!(matches!(BlobLease::hold(early, &path), Err(ImageError::NoBlob { .. })));
        // The same name may lead to another file by then.
        std::fs::write(&path, "first").unwrap();
        let early = open(&path, FILE, Mode::empty()).unwrap();
        remove_blob(&dirs, &path, &mut || false).unwrap();
        std::fs::write(&path, "second").unwrap();
        assert!(matches!(BlobLease::hold(early, &path), Err(ImageError::NoBlob { .. })));
        BlobLease::take(&path).unwrap();
    }
}
