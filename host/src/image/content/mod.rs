//! What was downloaded: blobs under the name of their digest, shared by all images, in `images/content/`.
//!
//! ```text
//!   content/partial/sha256_<hex>   on its way: LOCK_EX by whoever downloads it; what is there is its start
//!        │ all there, digest right, synced
//!        ▼ LOCK_SH, rename
//!   content/sha256_<hex>           whole: LOCK_SH by each who needs it
//!   content/diff_<hex>             what a layer was found to hold, see `known`
//!   content/partial/build_<hex>    empty: LOCK_EX by whoever builds the image of this content
//! ```
//!
//! # Invariants
//! 1. A name in `content/` stands for a whole file that had this digest when it got the name.
//! 2. Of all processes one downloads a blob, and one builds an image; the others find it busy, come
//!    again, and find it there. Nobody has to wait for one that is slow: see `own`.
//! 3. Each looks again at the name after it has the lock: nobody works on a file that was removed.
//! 4. Nothing that is locked is removed. [`sweep`] asks whether a blob is wanted while it holds it
//!    alone, so that one whose image was just recorded stays.
//!
//! # On error, stop and crash
//! A partial file stays, unlocked: the next download goes on with it, or a sweep removes it. One
//! whose bytes turned out wrong, or for which the disk has no room, is removed at once.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use matchlock_failpoints::{Area, mutated};
use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags, flock, open, renameat_with};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::blob::{FILE, on_disk};
use super::config::is_sha256;
use super::garbage::{Garbage, GarbageKind, Garbages};
use super::stream::BUFFER;
use super::workspace::{failed, is_named};
use super::{ImageDirs, ImageError, room};
use crate::locked::Locked;

mod damaged;
mod known;
mod own;

pub(super) use damaged::forget_damaged;
use known::NOTE;
pub(super) use known::{diff_id, note};
pub(super) use own::{begun, own};

/// What a crash may come between.
pub const POINTS: Area = Area::new("content", &["write", "name", "note", "remove"]);

const BLOB: &str = "sha256_";
const BUILD: &str = "build_";

/// A whole blob, which stays as long as this is held.
#[derive(Debug)]
pub struct ContentLease {
    path: PathBuf,
    /// Held for its lock.
    _lock: Locked,
}

impl ContentLease {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// What became of the wish for a blob.
#[derive(Debug)]
pub(super) enum Claim {
    /// It is there.
    There(ContentLease),
    /// It is ours to download.
    Ours(Partial),
    /// Somebody else is at it: come again.
    Busy,
}

/// A blob on its way.
#[derive(Debug)]
pub(super) struct Partial {
    dirs: ImageDirs,
    hex: String,
    path: PathBuf,
    file: File,
    lock: Locked,
    hash: Sha256,
    done: u64,
    /// Whether nobody else can find it; then `path` is only its directory.
    is_unnamed: bool,
}

/// What a finished download is.
#[derive(Debug)]
pub(super) enum Finished {
    /// The blob.
    Whole(ContentLease),
    /// Somebody else has made or removed it meanwhile: claim it again.
    Again,
    /// Not what its name says, but this; it is empty now.
    Wrong(Partial, String),
}

fn partial_dir(dirs: &ImageDirs) -> PathBuf {
    dirs.content().join("partial")
}

/// Where the whole blob with this digest is, or will be.
pub(super) fn path_of(dirs: &ImageDirs, hex: &str) -> PathBuf {
    dirs.content().join(format!("{BLOB}{hex}"))
}

/// How many bytes of a blob are not there yet.
pub(super) fn missing(dirs: &ImageDirs, hex: &str, size: u64) -> u64 {
    let length = |path: PathBuf| path.symlink_metadata().map(|found| found.len());
    match (length(path_of(dirs, hex)), length(partial_dir(dirs).join(format!("{BLOB}{hex}")))) {
        (Ok(_), _) => 0,
        (Err(_), Ok(begun)) => size.saturating_sub(begun),
        (Err(_), Err(_)) => size,
    }
}

/// A lock without waiting; whether we have it.
fn locked(
    file: &impl std::os::fd::AsFd,
    how: FlockOperation,
    path: &Path,
) -> Result<bool, ImageError> {
    match flock(file, how) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(failed("lock", path, error)),
    }
}

/// A whole blob: leased, busy, or none.
fn whole(dirs: &ImageDirs, hex: &str) -> Result<Option<Claim>, ImageError> {
    let path = path_of(dirs, hex);
    let file = match open(&path, FILE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened.map_err(|error| failed("open", &path, error))?,
    };
    if !locked(&file, FlockOperation::NonBlockingLockShared, &path)? {
        return Ok(Some(Claim::Busy));
    }
    let lock = Locked::new(file);
    if !is_named(rustix::fs::CWD, &path, lock.as_fd(), &path)? {
        return Ok(Some(Claim::Busy));
    }
    Ok(Some(Claim::There(ContentLease { path, _lock: lock })))
}

/// A file in `partial/`, made if it is missing, that we alone hold; `None` while another does.
fn hold(dirs: &ImageDirs, name: &str) -> Result<Option<(PathBuf, Locked)>, ImageError> {
    let parent = partial_dir(dirs);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&parent);
    made.map_err(|error| failed("create", &parent, error))?;
    let path = parent.join(name);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(&path, flags, Mode::RUSR | Mode::WUSR);
    let file = file.map_err(|error| failed("open", &path, error))?;
    if !locked(&file, FlockOperation::NonBlockingLockExclusive, &path)? {
        return Ok(None);
    }
    let lock = Locked::new(file);
    Ok(is_named(rustix::fs::CWD, &path, lock.as_fd(), &path)?.then_some((path, lock)))
}

/// The blob with this digest and size, or the right to download it.
pub(super) fn claim(dirs: &ImageDirs, hex: &str, size: u64) -> Result<Claim, ImageError> {
    match whole(dirs, hex)? {
        Some(Claim::There(lease)) => return damaged::of_size(dirs, hex, lease, size),
        Some(other) => return Ok(other),
        None => {}
    }
    let Some((path, lock)) = hold(dirs, &format!("{BLOB}{hex}"))? else {
        return Ok(Claim::Busy);
    };
    // Whoever had the lock before may have finished it.
    if whole(dirs, hex)?.is_some() {
        remove(&path)?;
        return Ok(Claim::Busy);
    }
    let duplicate =
        lock.as_fd().try_clone_to_owned().map_err(|error| failed("open", &path, error))?;
    let mut partial = Partial {
        dirs: dirs.clone(),
        hex: hex.to_owned(),
        file: File::from(duplicate),
        path,
        lock,
        hash: Sha256::new(),
        done: 0,
        is_unnamed: false,
    };
    partial.take_up(size)?;
    Ok(Claim::Ours(partial))
}

impl Partial {
    /// The bytes that are there.
    pub(super) const fn done(&self) -> u64 {
        self.done
    }

    fn fail(&self, doing: &'static str) -> impl Fn(std::io::Error) -> ImageError + use<> {
        let path = self.path.clone();
        move |error| failed(doing, &path, error)
    }

    /// Reads what an earlier download left.
    fn take_up(&mut self, size: u64) -> Result<(), ImageError> {
        let fail = self.fail("read");
        if self.file.metadata().map_err(&fail)?.len() > size {
            return self.restart();
        }
        let mut buffer = vec![0; BUFFER];
        loop {
            match self.file.read(&mut buffer).map_err(&fail)? {
                0 => return Ok(()),
                count => {
                    self.hash.update(&buffer[..count]);
                    self.done += count as u64;
                }
            }
        }
    }

    /// Forgets what is there.
    pub(super) fn restart(&mut self) -> Result<(), ImageError> {
        let fail = self.fail("empty");
        self.file.set_len(0).map_err(&fail)?;
        self.file.seek(SeekFrom::Start(0)).map_err(&fail)?;
        self.hash = Sha256::new();
        self.done = 0;
        Ok(())
    }

    /// Adds the next bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let at = self.fail("write");
        POINTS.before("write").map_err(|error| at(error.into()))?;
        let room = room::check(&self.file, &self.path, bytes.len() as u64);
        if let Err(error) = room.and_then(|()| self.file.write_all(bytes).map_err(&at)) {
            if error.is_full() {
                // What cannot be finished takes the room of what can.
                remove(&self.path)?;
            }
            return Err(error);
        }
        self.hash.update(bytes);
        self.done += bytes.len() as u64;
        POINTS.after("write").map_err(|error| at(error.into()))
    }

    /// Gives the blob its name, if it is what that says.
    pub(super) fn finish(mut self) -> Result<Finished, ImageError> {
        let found = hex::encode(self.hash.clone().finalize());
        if found != self.hex {
            self.restart()?;
            return Ok(Finished::Wrong(self, found));
        }
        let fail = self.fail("sync");
        self.file.set_permissions(Permissions::from_mode(0o400)).map_err(&fail)?;
        self.file.sync_all().map_err(&fail)?;
        POINTS.before("name").map_err(|error| fail(error.into()))?;
        // Between the locks somebody may sweep it.
        if !locked(&self.lock, FlockOperation::NonBlockingLockShared, &self.path)?
            || !self.is_unnamed
                && !is_named(rustix::fs::CWD, &self.path, self.lock.as_fd(), &self.path)?
        {
            return Ok(Finished::Again);
        }
        let path = path_of(&self.dirs, &self.hex);
        match self.name(&path) {
            Err(Errno::EXIST) => {
                self.discard()?;
                return Ok(Finished::Again);
            }
            renamed => renamed.map_err(|error| failed("create", &path, error))?,
        }
        let content = self.dirs.content();
        let synced = File::open(&content).and_then(|directory| directory.sync_all());
        synced.map_err(|error| failed("sync", content, error))?;
        POINTS.after("name").map_err(|error| failed("create", &path, error))?;
        Ok(Finished::Whole(ContentLease { path, _lock: self.lock }))
    }

    /// Gives it this name, if nothing has it.
    fn name(&self, path: &Path) -> Result<(), Errno> {
        let cwd = rustix::fs::CWD;
        if self.is_unnamed {
            return own::name(&self.file, path);
        }
        renameat_with(cwd, &self.path, cwd, path, RenameFlags::NOREPLACE)
    }

    /// Removes it: its bytes are of no use to anybody.
    pub(super) fn discard(self) -> Result<(), ImageError> {
        if self.is_unnamed { Ok(()) } else { remove(&self.path) }
    }
}

/// Removes a file that we hold alone; one that is gone is fine.
fn remove(path: &Path) -> Result<(), ImageError> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("remove", path, error)),
    }
}

/// Puts a blob there that is here already; `None` while another does the same.
pub(super) fn put(
    dirs: &ImageDirs,
    hex: &str,
    bytes: &[u8],
) -> Result<Option<ContentLease>, ImageError> {
    let mut partial = match claim(dirs, hex, bytes.len() as u64)? {
        Claim::There(lease) => return Ok(Some(lease)),
        // Somebody may be getting the same bytes from a registry that takes its time.
        Claim::Busy => match own(dirs, hex)? {
            Some(partial) => partial,
            None => return Ok(None),
        },
        Claim::Ours(partial) => partial,
    };
    partial.restart()?;
    partial.write(bytes)?;
    match partial.finish()? {
        Finished::Whole(lease) => Ok(Some(lease)),
        Finished::Again => Ok(None),
        Finished::Wrong(partial, found) => {
            partial.discard()?;
            let what = format!("content sha256:{hex} has the digest sha256:{found}");
            Err(ImageError::Damaged { what })
        }
    }
}

/// The bytes of a whole blob, if they still have its digest.
pub(super) fn read(lease: &ContentLease, hex: &str) -> Result<Vec<u8>, ImageError> {
    let path = lease.path();
    let bytes = std::fs::read(path).map_err(|error| failed("read", path, error))?;
    if hex::encode(Sha256::digest(&bytes)) == hex {
        return Ok(bytes);
    }
    let what = format!("{} does not have its digest any more; remove it", path.display());
    Err(ImageError::Damaged { what })
}

/// The right to build the image of this content.
#[derive(Debug)]
pub(super) struct BuildLock {
    path: PathBuf,
    _lock: Locked,
}

/// Takes it; `None` while another has it.
pub(super) fn lock_build(dirs: &ImageDirs, hex: &str) -> Result<Option<BuildLock>, ImageError> {
    let held = hold(dirs, &format!("{BUILD}{hex}"))?;
    Ok(held.map(|(path, lock)| BuildLock { path, _lock: lock }))
}

impl BuildLock {
    /// Gives it back.
    pub(super) fn release(self) -> Result<(), ImageError> {
        remove(&self.path)
    }
}

/// What a sweep does with blobs that are not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partials {
    /// They stay: a later pull goes on with them.
    Keep,
    /// They go, unless they are being downloaded.
    Remove,
}

/// Removes those of these blobs that are on their way and that nobody holds. An error is told once
/// they are all seen to.
pub(super) fn forget_partials(dirs: &ImageDirs, hexes: &[String]) -> Result<(), ImageError> {
    let mut found = Garbages::default();
    let mut is_other = |hex: &str| !hexes.iter().any(|one| one == hex);
    sweep_dir(&partial_dir(dirs), &[BLOB], false, &mut is_other, &mut found);
    found.errors.into_iter().next().map_or(Ok(()), Err)
}

/// Removes the blobs that nobody wants and nobody holds; of a dry run, only finds them.
///
/// `is_wanted` is asked by the 64 hex digits of the digest, the second time while nobody else can
/// take a lease on the blob.
pub fn sweep(
    dirs: &ImageDirs,
    partials: Partials,
    dry_run: bool,
    is_wanted: &mut dyn FnMut(&str) -> bool,
) -> Garbages {
    let mut found = Garbages::default();
    sweep_dir(&dirs.content(), &[BLOB, NOTE], dry_run, is_wanted, &mut found);
    if partials == Partials::Remove {
        sweep_dir(&partial_dir(dirs), &[BLOB, BUILD, NOTE], dry_run, &mut |_| false, &mut found);
    }
    found
}

fn sweep_dir(
    dir: &Path,
    prefixes: &[&str],
    dry_run: bool,
    is_wanted: &mut dyn FnMut(&str) -> bool,
    found: &mut Garbages,
) {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => return found.errors.push(failed("sweep", dir, error)),
        Ok(entries) => entries,
    };
    for entry in entries {
        let name = match entry {
            Ok(entry) => entry.file_name(),
            Err(error) => {
                found.errors.push(failed("sweep", dir, error));
                continue;
            }
        };
        let Some(name) = name.to_str() else { continue };
        let hex = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix));
        // What else may lie there is not ours to remove.
        let Some(hex) = hex.filter(|hex| is_sha256(hex)) else { continue };
        // Looked at twice: most are wanted, and those are not locked against a pull that begins.
        if is_wanted(hex) {
            continue;
        }
        let path = dir.join(name);
        let garbage = |bytes| Garbage { kind: GarbageKind::Content, path: path.clone(), bytes };
        match sweep_one(&path, dry_run, &mut || is_wanted(hex)) {
            Ok(Fate::Gone(bytes)) => found.removed.push(garbage(Some(bytes))),
            Ok(Fate::InUse) => found.in_use.push(garbage(None)),
            Ok(Fate::Wanted) => {}
            Err(error) => found.errors.push(error),
        }
    }
}

/// What became of something that a sweep has looked at.
enum Fate {
    /// It was removed, or would be; the bytes that it took on disk.
    Gone(u64),
    InUse,
    /// By now, or it is not there any more.
    Wanted,
}

fn sweep_one(
    path: &Path,
    dry_run: bool,
    is_wanted: &mut dyn FnMut() -> bool,
) -> Result<Fate, ImageError> {
    let file = match open(path, FILE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(Fate::Wanted),
        opened => opened.map_err(|error| failed("open", path, error))?,
    };
    if !locked(&file, FlockOperation::NonBlockingLockExclusive, path)? {
        return Ok(Fate::InUse);
    }
    let file = Locked::new(file);
    let at = |error| failed("remove", path, error);
    let is_ours = is_named(rustix::fs::CWD, path, file.as_fd(), path)?;
    if is_wanted() || !is_ours || mutated("leave_downloads") {
        return Ok(Fate::Wanted);
    }
    let stat = rustix::fs::fstat(file.as_fd()).map_err(|error| failed("look at", path, error))?;
    let bytes = on_disk(&stat);
    if dry_run {
        return Ok(Fate::Gone(bytes));
    }
    POINTS.before("remove").map_err(at)?;
    remove(path)?;
    POINTS.after("remove").map_err(at)?;
    Ok(Fate::Gone(bytes))
}

#[cfg(test)]
mod tests;
