//! Snapshots in the cache.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use rustix::io::Errno;
use tokio::task::spawn_blocking;

use super::record::{self, Guest, Record};
use super::{Draft, MAX_BYTES, MAX_COUNT, POINTS, Snapshot, SnapshotError, Snapshots, Wanted};
use crate::hypervisor::Saved;
use crate::image;
use crate::locked::Locked;

/// What is being made, and what is being removed.
const NEW: &str = ".new";
const REMOVED: &str = ".removed";

/// The snapshots below `<cache>/snapshots/`.
#[derive(Debug, Clone)]
pub struct LinuxSnapshots {
    dir: PathBuf,
}

/// What a snapshot takes at most, besides a part of the machine's memory: what its kernel knows of each
/// page.
const ROOM_BYTES: u64 = 128 << 20;
const ROOM_OF_MEMORY: u64 = 64;

/// How long somebody may read one that is to be replaced, and how often that is looked at.
const LONGEST_READ: Duration = Duration::from_secs(3);
const COME_AGAIN: Duration = Duration::from_millis(20);

/// The directory of one that is being made; removed with all that is in it when it is dropped.
pub(super) struct Room {
    dir: PathBuf,
    /// The number of its file, which tells it from another that has got its name.
    memory: (u64, u64),
    guest: Guest,
    is_shown: bool,
}

impl Room {
    /// Whether the name is still that of this one: somebody may have removed all snapshots by hand.
    fn is_there(&self) -> io::Result<bool> {
        match fs::symlink_metadata(self.dir.join("memory")) {
            Ok(found) => Ok((found.dev(), found.ino()) == self.memory),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.is_shown {
            return;
        }
        let look = |e| SnapshotError::io("look at", &self.dir, e);
        let removed = match self.is_there().map_err(look) {
            Ok(true) => remove_hidden(&self.dir),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            let error = matchlock_model::failure::chain(&error);
            tracing::warn!(error, "half a snapshot is left; `matchlock gc` tries again");
        }
    }
}

/// Removes what a change left that did not come to its end, or what somebody else has put there.
fn remove_hidden(path: &Path) -> Result<(), SnapshotError> {
    let fail = |error: io::Error| SnapshotError::io("remove", path, error);
    POINTS.before("sweep").map_err(|e| fail(e.into()))?;
    if fs::symlink_metadata(path).map_err(fail)?.is_dir() {
        fs::remove_dir_all(path).map_err(fail)?;
    } else {
        fs::remove_file(path).map_err(fail)?;
    }
    POINTS.after("sweep").map_err(|e| fail(e.into()))
}

/// Whose the directory of snapshots is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// It is not there.
    Nobodys,
    Ours,
    /// Root's, and we are not root.
    Roots,
    /// Of somebody whom we do not trust.
    Others,
}

impl Whose {
    /// Whether only those can have written there whom we trust.
    fn may_be_used(self) -> bool {
        matches!(self, Self::Ours | Self::Roots)
    }
}

/// One that is there.
struct Kept {
    dir: PathBuf,
    bytes: u64,
    used: SystemTime,
}

impl LinuxSnapshots {
    /// Those of this cache.
    #[must_use]
    pub fn new(cache: &Path) -> Self {
        Self { dir: cache.join("snapshots") }
    }

    /// Does blocking work elsewhere.
    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce(Self) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, SnapshotError> {
        let this = self.clone();
        let done = spawn_blocking(move || work(this)).await;
        done.unwrap_or_else(|e| Err(SnapshotError::io("work in", &self.dir, io::Error::other(e))))
    }

    /// Whose the directory is; one of our own that others can write in is an error.
    fn whose(&self) -> Result<Whose, SnapshotError> {
        let found = match fs::metadata(&self.dir) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Whose::Nobodys),
            Err(error) => return Err(SnapshotError::io("look at", &self.dir, error)),
        };
        match found.uid() {
            us if us == rustix::process::geteuid().as_raw() => {
                let not_ours = || SnapshotError::NotOurs { dir: self.dir.clone() };
                record::is_trusted(&found).then_some(Whose::Ours).ok_or_else(not_ours)
            }
            _ if record::is_trusted(&found) => Ok(Whose::Roots),
            _ => Ok(Whose::Others),
        }
    }

    fn find_now(&self, wanted: &Wanted) -> Result<Option<Snapshot>, SnapshotError> {
        let whose = self.whose()?;
        if !whose.may_be_used() {
            tracing::debug!(dir = %self.dir.display(), ?whose, "no snapshots to start from");
            return Ok(None);
        }
        let key = record::key(wanted);
        let dir = self.dir.join(&key);
        let lease = match Locked::shared(&dir) {
            // For root alone.
            Err(Errno::ACCESS) if whose == Whose::Roots => None,
            lease => lease.map_err(|e| SnapshotError::io("lock", &dir, e))?,
        };
        let Some(lease) = lease else { return Ok(None) };
        let record = Record::read(&dir)?;
        let unlike = match record.outdated()? {
            Some(what) => Some(what),
            None => record.unlike(wanted),
        };
        if let Some(what) = unlike {
            return Err(SnapshotError::Stale { key, what });
        }
        let path = dir.join("memory");
        let (memory, size) = record::open_file(&path)?;
        if size != record.bytes {
            let what = format!("{} has {size} bytes instead of {}", path.display(), record.bytes);
            return Err(SnapshotError::Damaged { what });
        }
        // Who is used least goes first when there are too many; not knowing it harms nobody.
        let noted = File::open(dir.join("snapshot.json"))
            .and_then(|record| record.set_modified(SystemTime::now()));
        if let Err(error) = noted {
            tracing::debug!(%error, key, "could not note the use of a snapshot");
        }
        let (memory, saved) = (Arc::new(memory), record.saved());
        Ok(Some(Snapshot { memory, key, saved, lease: Some(Box::new(lease)) }))
    }

    fn withdraw_now(&self, snapshot: Snapshot) -> Result<(), SnapshotError> {
        let Snapshot { memory, key, lease, .. } = snapshot;
        let dir = self.dir.join(key);
        let path = dir.join("memory");
        let look = |e| SnapshotError::io("look at", &path, e);
        let used = memory.metadata().map_err(look)?;
        drop(lease);
        // Whoever is changing something may be replacing it.
        let Some(_lock) = self.lock()? else { return Ok(()) };
        match fs::symlink_metadata(&path) {
            Ok(found) if (found.dev(), found.ino()) == (used.dev(), used.ino()) => {
                self.remove(&dir).map(drop)
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(look(error)),
        }
    }

    fn begin_now(&self, wanted: Wanted) -> Result<Draft, SnapshotError> {
        let make = |path: &Path| match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(SnapshotError::io("make", path, error))
            }
            _ => Ok(()),
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|e| SnapshotError::io("make", &self.dir, e))?;
        if !self.whose()?.may_be_used() {
            return Err(SnapshotError::NotOurs { dir: self.dir.clone() });
        }
        let lock = self.lock()?.ok_or_else(|| SnapshotError::Busy { dir: self.dir.clone() })?;
        self.sweep_hidden()?;
        self.has_room(&wanted)?;
        let guest = Guest::of(&wanted)?;
        let new = self.dir.join(NEW);
        make(&new)?;
        let path = new.join("memory");
        let memory = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let memory = memory.and_then(|file| Ok((file.metadata()?, file)));
        let (found, memory) = match memory {
            Ok(made) => made,
            Err(error) => {
                remove_hidden(&new)?;
                return Err(SnapshotError::io("make", &path, error));
            }
        };
        let memory_id = (found.dev(), found.ino());
        let room = Room { dir: new, memory: memory_id, guest, is_shown: false };
        Ok(Draft { memory, wanted, room: Some(room), claim: Box::new(lock) })
    }

    /// The disk may be the one of the state and the VMs: the reserve of images is theirs here, too.
    fn has_room(&self, wanted: &Wanted) -> Result<(), SnapshotError> {
        let needed = ROOM_BYTES + (wanted.memory_mb << 20) / ROOM_OF_MEMORY;
        let free = image::free_beside_the_reserve(&self.dir)
            .map_err(|e| SnapshotError::io("look at", &self.dir, e))?;
        if needed <= free {
            return Ok(());
        }
        Err(SnapshotError::NoSpace { dir: self.dir.clone(), needed, free })
    }

    fn publish_now(&self, draft: &mut Draft, saved: Saved) -> Result<(), SnapshotError> {
        let new = self.dir.join(NEW);
        let write = |error: io::Error| SnapshotError::io("write", &new, error);
        let gone = || SnapshotError::Removed { dir: self.dir.clone() };
        let room = draft.room.as_ref().ok_or_else(gone)?;
        if !room.is_there().map_err(write)? {
            return Err(gone());
        }
        let record = Record::new(&draft.wanted, &room.guest, saved)?;
        let text = serde_json::to_vec_pretty(&record).map_err(|e| write(e.into()))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(new.join("snapshot.json"))
            .map_err(write)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(write)?;
        draft.memory.sync_all().map_err(write)?;
        let place = self.dir.join(record::key(&draft.wanted));
        self.make_way(&place)?;
        POINTS.before("publish").map_err(|e| write(e.into()))?;
        fs::rename(&new, &place).map_err(write)?;
        if let Some(room) = &mut draft.room {
            room.is_shown = true;
        }
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(write)?;
        POINTS.after("publish").map_err(|e| write(e.into()))?;
        // It is there; what is wrong with others is for `gc` to tell.
        if let Err(error) = self.limit(Some(&place)) {
            let error = matchlock_model::failure::chain(&error);
            tracing::debug!(error, "other snapshots could not be looked at");
        }
        Ok(())
    }

    /// Removes the one whose place a new one takes, once whoever starts from it has read it.
    fn make_way(&self, place: &Path) -> Result<(), SnapshotError> {
        let begun = Instant::now();
        while !self.remove(place)? {
            if begun.elapsed() > LONGEST_READ {
                let key = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(SnapshotError::InUse { key });
            }
            #[expect(
                clippy::disallowed_methods,
                reason = "flock has no deadline, and this is a thread that may block"
            )]
            std::thread::sleep(COME_AGAIN);
        }
        Ok(())
    }

    fn sweep_now(&self) -> Result<usize, SnapshotError> {
        let whose = self.whose()?;
        if !whose.may_be_used() {
            return Ok(0);
        }
        match self.lock() {
            Ok(Some(_lock)) => Ok(self.sweep_hidden()? + self.limit(None)?),
            // Somebody is just making something, or has just removed everything.
            Ok(None) => Ok(0),
            Err(SnapshotError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(0)
            }
            // For root alone, who sweeps it, too.
            Err(SnapshotError::Io { source, .. })
                if whose == Whose::Roots && source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    fn lock(&self) -> Result<Option<Locked>, SnapshotError> {
        Locked::exclusive(&self.dir).map_err(|e: Errno| SnapshotError::io("lock", &self.dir, e))
    }

    /// Removes what changes left that did not come to their end.
    fn sweep_hidden(&self) -> Result<usize, SnapshotError> {
        let mut removed = 0;
        for name in self.names()?.iter().filter(|name| name.as_bytes().starts_with(b".")) {
            remove_hidden(&self.dir.join(name))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Removes what is of no use any more, then what is too much: the least recently used first, but
    /// not the one that was just made.
    fn limit(&self, made: Option<&Path>) -> Result<usize, SnapshotError> {
        let mut removed = 0;
        let (mut kept, mut failed) = (Vec::new(), None);
        for name in self.names()? {
            let dir = self.dir.join(name);
            let looked = match self.look_at(dir.clone()) {
                Ok(Some(found)) => {
                    kept.push(found);
                    Ok(())
                }
                Ok(None) => self.remove(&dir).map(|gone| removed += usize::from(gone)),
                Err(error) => Err(error),
            };
            // One that cannot be judged keeps no other from being.
            failed = failed.or(looked.err());
        }
        kept.sort_by_key(|one| std::cmp::Reverse((Some(&*one.dir) == made, one.used)));
        let mut sum = 0;
        for (number, one) in kept.iter().enumerate() {
            sum += one.bytes;
            let too_much = number >= MAX_COUNT || sum > MAX_BYTES;
            if too_much && Some(&*one.dir) != made {
                removed += usize::from(self.remove(&one.dir)?);
            }
        }
        failed.map_or(Ok(removed), Err)
    }

    /// One that somebody may use; `None` for one that nobody can.
    fn look_at(&self, dir: PathBuf) -> Result<Option<Kept>, SnapshotError> {
        let record = match Record::read(&dir) {
            Ok(record) => record,
            Err(SnapshotError::Damaged { .. }) => return Ok(None),
            Err(SnapshotError::Io { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if record.outdated()?.is_some() {
            return Ok(None);
        }
        match record::open_file(&dir.join("memory")) {
            Ok((_, size)) if size == record.bytes => {}
            Ok(_) | Err(SnapshotError::Damaged { .. }) => return Ok(None),
            Err(SnapshotError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let path = dir.join("snapshot.json");
        let used = fs::metadata(&path).and_then(|found| found.modified());
        let used = used.map_err(|e| SnapshotError::io("look at", &path, e))?;
        Ok(Some(Kept { bytes: record.bytes, used, dir }))
    }

    /// Removes one, if it is there and nobody has a lease on it; whether it is gone.
    fn remove(&self, dir: &Path) -> Result<bool, SnapshotError> {
        let fail = |error: io::Error| SnapshotError::io("remove", dir, error);
        match fs::symlink_metadata(dir) {
            Ok(found) if found.is_dir() => {}
            // A file or a link has no lease.
            Ok(_) => return fs::remove_file(dir).map(|()| true).map_err(fail),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(fail(error)),
        }
        let _excluded = match Locked::exclusive(dir) {
            Ok(Some(lock)) => lock,
            Ok(None) => return Ok(false),
            Err(Errno::NOENT) => return Ok(true),
            Err(error) => return Err(fail(error.into())),
        };
        let unnamed = self.dir.join(REMOVED);
        POINTS.before("remove").map_err(|e| fail(e.into()))?;
        fs::rename(dir, &unnamed).map_err(fail)?;
        fs::remove_dir_all(&unnamed).map_err(fail)?;
        POINTS.after("remove").map_err(|e| fail(e.into()))?;
        Ok(true)
    }

    fn names(&self) -> Result<Vec<OsString>, SnapshotError> {
        let fail = |error| SnapshotError::io("read", &self.dir, error);
        let entries = fs::read_dir(&self.dir).map_err(fail)?;
        entries.map(|entry| Ok(entry.map_err(fail)?.file_name())).collect()
    }
}

#[async_trait]
impl Snapshots for LinuxSnapshots {
    async fn find(&self, wanted: &Wanted) -> Result<Option<Snapshot>, SnapshotError> {
        let wanted = wanted.clone();
        self.elsewhere(move |this| this.find_now(&wanted)).await
    }

    async fn check(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        let (memory, saved) = (Arc::clone(&snapshot.memory), snapshot.saved.clone());
        self.elsewhere(move |_| record::check(&memory, &saved)).await
    }

    async fn begin(&self, wanted: &Wanted) -> Result<Draft, SnapshotError> {
        let wanted = wanted.clone();
        self.elsewhere(move |this| this.begin_now(wanted)).await
    }

    async fn publish(&self, mut draft: Draft, saved: Saved) -> Result<(), SnapshotError> {
        self.elsewhere(move |this| this.publish_now(&mut draft, saved)).await
    }

    async fn withdraw(&self, snapshot: Snapshot) -> Result<(), SnapshotError> {
        self.elsewhere(move |this| this.withdraw_now(snapshot)).await
    }

    async fn discard(&self, draft: Draft) -> Result<(), SnapshotError> {
        self.elsewhere(move |_| {
            drop(draft);
            Ok(())
        })
        .await
    }

    async fn sweep(&self) -> Result<usize, SnapshotError> {
        self.elsewhere(|this| this.sweep_now()).await
    }
}
