//! The files of a database: their names, their modes, the lock for setting it up.
//!
//! ```text
//! <dir>/                     0700   <db>                  0600, made by us before SQLite sees it
//!   <db>-wal, <db>-shm       0600, SQLite gives them the mode of <db>
//!   <db>.init.lock           0600, flock: held while the database is set up or migrated
//!   <db>.premigrate.bak      0600, whole: the state before the pending migrations
//!   <db>.premigrate.bak.tmp  0600, a backup being made
//! ```
//!
//! # Invariants
//! * No descriptor of a database that exists is opened here: closing it would drop the POSIX locks
//!   that SQLite holds on the file in this process. Existing files are looked at by path.
//! * The lock is released by closing its file, so also by the death of its holder.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::busy;
use crate::error::OpenError;

const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const OTHERS: u32 = 0o077;

/// The files of one database.
#[derive(Debug, Clone)]
pub(crate) struct DbFiles {
    pub(crate) dir: PathBuf,
    pub(crate) db: PathBuf,
}

impl DbFiles {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        Self { dir: dir.to_owned(), db: dir.join(name) }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.db.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.beside(".init.lock")
    }

    pub(crate) fn backup(&self) -> PathBuf {
        self.beside(".premigrate.bak")
    }

    pub(crate) fn backup_in_the_making(&self) -> PathBuf {
        self.beside(".premigrate.bak.tmp")
    }

    /// What a crash while the backup was being made leaves beside it.
    pub(crate) fn journal_of_backup_in_the_making(&self) -> PathBuf {
        self.beside(".premigrate.bak.tmp-journal")
    }

    /// Makes the directory, or checks and repairs the one that is there.
    pub(crate) fn prepare_dir(&self) -> Result<(), OpenError> {
        let path = &self.dir;
        let error = |doing, source| OpenError::Directory { doing, path: path.clone(), source };
        if fs::metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            DirBuilder::new()
                .recursive(true)
                .mode(DIR_MODE)
                .create(path)
                .map_err(|e| error("make", e))?;
        }
        let found = fs::metadata(path).map_err(|e| error("look at", e))?;
        if !found.is_dir() {
            return Err(OpenError::WrongKind { path: path.clone(), wanted: "directory" });
        }
        keep_private(path, &found, DIR_MODE).map_err(|e| match e {
            Private::NotOurs(e) => e,
            Private::Io(e) => error("make private", e),
        })
    }

    /// Checks the database's files and repairs their modes; says whether the database is there.
    pub(crate) fn check_files(&self) -> Result<bool, OpenError> {
        for path in [self.beside("-wal"), self.beside("-shm")] {
            check_file(&path)?;
        }
        check_file(&self.db)
    }

    /// Whether the database is there, for whoever only reads: a look at its kind, without touching it.
    pub(crate) fn is_there_to_read(&self) -> Result<bool, OpenError> {
        Ok(regular_file(&self.db)?.is_some())
    }

    /// Makes an empty database file if there is none. SQLite takes an empty file for a new database.
    pub(crate) fn create_db(&self) -> Result<(), OpenError> {
        match create_private(&self.db) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(source) => Err(OpenError::File { doing: "make", path: self.db.clone(), source }),
        }
    }

    /// Takes the lock for setting up.
    pub(crate) fn lock_setup(&self, cap: Duration) -> Result<SetupLock, OpenError> {
        let path = self.lock();
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(&path)
            .map_err(|source| OpenError::File { doing: "open", path: path.clone(), source })?;
        check_file(&path)?;
        wait_for(&path, cap, || file.try_lock())?;
        Ok(SetupLock { _file: file })
    }

    /// Waits until nobody sets the database up; without a trace when nobody ever did.
    pub(crate) fn await_setup(&self, cap: Duration) -> Result<(), OpenError> {
        let path = self.lock();
        match File::open(&path) {
            Ok(file) => wait_for(&path, cap, || file.try_lock_shared()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(OpenError::File { doing: "open", path, source }),
        }
    }
}

/// Held while a database is set up or migrated.
#[derive(Debug)]
pub(crate) struct SetupLock {
    _file: File,
}

fn wait_for(
    path: &Path,
    cap: Duration,
    mut try_lock: impl FnMut() -> Result<(), TryLockError>,
) -> Result<(), OpenError> {
    let began = Instant::now();
    loop {
        match try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => {
                return Err(OpenError::File { doing: "lock", path: path.to_owned(), source });
            }
        }
        if !busy::pause_within(began, cap) {
            return Err(OpenError::SetupLocked { path: path.to_owned(), waited: cap });
        }
    }
}

/// Makes a new file for the user alone, whatever the umask.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(FILE_MODE))?;
    Ok(file)
}

/// Removes a file; one that is gone already is fine.
pub(crate) fn remove(path: &Path) -> Result<(), OpenError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(OpenError::File { doing: "remove", path: path.to_owned(), source }),
    }
}

/// Whether there is something at this path.
pub(crate) fn is_there(path: &Path) -> Result<bool, OpenError> {
    path.try_exists().map_err(|source| OpenError::File {
        doing: "look for",
        path: path.to_owned(),
        source,
    })
}

/// What is known of the file at this path; `None` if there is nothing.
fn regular_file(path: &Path) -> Result<Option<fs::Metadata>, OpenError> {
    let failed = |source| OpenError::File { doing: "look at", path: path.to_owned(), source };
    loop {
        match fs::metadata(path) {
            Ok(found) if found.is_file() => return Ok(Some(found)),
            Ok(_) => {
                return Err(OpenError::WrongKind { path: path.to_owned(), wanted: "regular file" });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(source)),
        }
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_symlink() => {
                return Err(OpenError::LeadsNowhere { path: path.to_owned() });
            }
            // Another process has made it between the two looks.
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        }
    }
}

fn check_file(path: &Path) -> Result<bool, OpenError> {
    let error = |doing, source| OpenError::File { doing, path: path.to_owned(), source };
    let Some(found) = regular_file(path)? else { return Ok(false) };
    match keep_private(path, &found, FILE_MODE) {
        Ok(()) => Ok(true),
        Err(Private::NotOurs(e)) => Err(e),
        // SQLite removes the -wal and -shm files with the last connection.
        Err(Private::Io(e)) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(Private::Io(e)) => Err(error("make private", e)),
    }
}

enum Private {
    NotOurs(OpenError),
    Io(io::Error),
}

fn keep_private(path: &Path, found: &fs::Metadata, mode: u32) -> Result<(), Private> {
    let us = rustix::process::geteuid().as_raw();
    if found.uid() != us {
        return Err(Private::NotOurs(OpenError::NotOurs {
            path: path.to_owned(),
            owner: found.uid(),
            us,
        }));
    }
    let is = found.mode() & 0o7777;
    if is & OTHERS == 0 && is & mode == mode {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Private::Io)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_file_that_another_process_makes_just_now_is_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    File::create(&path).unwrap();
                    fs::remove_file(&path).unwrap();
                }
            });
            let looked = (0..100_000).map(|_| regular_file(&path).map(|found| found.is_some()));
            let wrong = looked.filter_map(Result::err).next();
            over.store(true, Ordering::Relaxed);
            assert!(wrong.is_none(), "{wrong:?}");
        });
        std::os::unix::fs::symlink(dir.path().join("nothing"), &path).unwrap();
        assert!(matches!(regular_file(&path), Err(OpenError::LeadsNowhere { .. })));
    }
}
