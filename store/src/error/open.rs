//! What can go wrong while a database is opened and brought up to date.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{DbFault, without_sql};

/// What to do about a file that could not be used, as far as it is known.
fn advice(error: &io::Error) -> String {
    match DbFault::of_file(error) {
        DbFault::Other => String::new(),
        fault => format!(": {fault}"),
    }
}

/// What became of the database after a failed migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// The failed migration was the first, and was rolled back.
    Unchanged,
    /// The migrations before it were undone from the backup.
    Restored,
    /// The migrations before it stay: rows have changed since, maybe by others, whose writes undoing
    /// would lose.
    KeptPartly {
        /// The state before the first of them.
        backup: PathBuf,
    },
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unchanged => f.write_str("nothing was changed"),
            Self::Restored => f.write_str("the database was put back as it was"),
            Self::KeptPartly { backup } => write!(
                f,
                "the migrations before it stay, because rows have changed since and undoing could lose what others wrote; the state before them is in {}",
                backup.display()
            ),
        }
    }
}

/// A database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory could not be made or looked at.
    #[error("cannot {doing} the directory {}{}", path.display(), advice(source))]
    Directory {
        /// What was being done.
        doing: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file beside the database could not be made or looked at.
    #[error("cannot {doing} {}{}", path.display(), advice(source))]
    File {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is there that is neither a directory nor, for a file, a regular file.
    #[error("{} is not a {wanted}: move it away", path.display())]
    WrongKind {
        /// What is there.
        path: PathBuf,
        /// What it should be.
        wanted: &'static str,
    },
    /// It is a symbolic link, and what it names is not there.
    #[error("{} is a symbolic link to something that is not there: put that back, or remove the link", path.display())]
    LeadsNowhere {
        /// The link.
        path: PathBuf,
    },
    /// It belongs to another user.
    #[error("{} belongs to user {owner}, but this is user {us}: use another directory, or run as its owner", path.display())]
    NotOurs {
        /// What belongs to another.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// Another process has been setting up the database for too long.
    #[error("{} was locked by another process for {waited:?}: it sets up the database, try again", path.display())]
    SetupLocked {
        /// The lock file.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// A newer Matchlock has been here.
    #[error("{} was written by a newer matchlock (it has {module} version {version}, this one knows {known}): use that one, or another MATCHLOCK_HOME", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// The module.
        module: String,
        /// The version found.
        version: i64,
        /// The newest version of that module that is known here, 0 for none.
        known: i64,
    },
    /// An older Matchlock made it, and a reader does not migrate.
    #[error("{} was made by an older matchlock (it lacks {module} version {version}): a command that writes, such as `matchlock gc`, brings it up to date", path.display())]
    Older {
        /// The database.
        path: PathBuf,
        /// The module of the first migration that is missing.
        module: &'static str,
        /// Its version.
        version: i64,
    },
    /// A migration that was applied is not the one that is known here.
    #[error("{} was set up with another text of migration {module} {version} (sha256 {recorded}, here {expected}): use the matchlock that made it", path.display())]
    Edited {
        /// The database.
        path: PathBuf,
        /// The module.
        module: &'static str,
        /// The version.
        version: i64,
        /// The checksum in the database.
        recorded: String,
        /// The checksum of the text here.
        expected: String,
    },
    /// A migration failed.
    #[error("migration {module} {version} ({name}) of {} failed, {recovery}: {}", path.display(), DbFault::of(source))]
    Migration {
        /// The database.
        path: PathBuf,
        /// The module.
        module: &'static str,
        /// The version.
        version: i64,
        /// The migration's name.
        name: &'static str,
        /// What became of the database.
        recovery: Recovery,
        /// Why it failed.
        source: Box<rusqlite::Error>,
    },
    /// A migration failed, and the state before it could not be put back. The next attempt does.
    #[error("a migration of {} failed ({failed}), and whether it must be put back from {} could not be found out: keep both files: {}", path.display(), backup.display(), DbFault::of(source))]
    Restore {
        /// The database.
        path: PathBuf,
        /// The backup, which is kept.
        backup: PathBuf,
        /// Why the migration failed.
        failed: String,
        /// Why it could not be put back.
        source: Box<rusqlite::Error>,
    },
    /// It has tables, but not ours.
    #[error("{} is a database of another program: move it away, or use another directory", path.display())]
    Foreign {
        /// The database.
        path: PathBuf,
    },
    /// SQLite's own check found damage.
    #[error("{} is damaged ({report}): move it away or put a backup in its place", path.display())]
    Damaged {
        /// The database or its backup.
        path: PathBuf,
        /// The first line of the check.
        report: String,
    },
    /// SQLite could not open, read or write it.
    #[error("cannot {doing} {}: {fault}", path.display())]
    Database {
        /// What was being done.
        doing: &'static str,
        /// The database.
        path: PathBuf,
        /// What kind of trouble.
        fault: DbFault,
        /// What SQLite says.
        source: Box<rusqlite::Error>,
    },
    /// The pool of readers could not be set up.
    #[error("cannot set up the readers of {}", path.display())]
    Pool {
        /// The database.
        path: PathBuf,
        /// Why.
        source: deadpool_sqlite::BuildError,
    },
}

impl OpenError {
    /// What SQLite says, with its kind.
    pub(crate) fn database(
        doing: &'static str,
        path: impl Into<PathBuf>,
        source: rusqlite::Error,
    ) -> Self {
        Self::Database {
            doing,
            path: path.into(),
            fault: DbFault::of(&source),
            source: Box::new(without_sql(source)),
        }
    }

    /// What kind of trouble it is with the database itself.
    #[must_use]
    pub fn fault(&self) -> DbFault {
        match self {
            Self::Database { fault, .. } => *fault,
            Self::Damaged { .. } => DbFault::Corrupt,
            Self::SetupLocked { .. } => DbFault::Busy,
            Self::Migration { source, .. } | Self::Restore { source, .. } => DbFault::of(source),
            Self::Directory { source, .. } | Self::File { source, .. } => DbFault::of_file(source),
            Self::WrongKind { .. }
            | Self::LeadsNowhere { .. }
            | Self::Foreign { .. }
            | Self::NotOurs { .. }
            | Self::Newer { .. }
            | Self::Older { .. }
            | Self::Edited { .. }
            | Self::Pool { .. } => DbFault::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_read_only_directory_are_known_by_their_files_too() {
        let failed = |kind: io::ErrorKind| OpenError::File {
            doing: "make",
            path: "/x".into(),
            source: kind.into(),
        };
        assert_eq!(failed(io::ErrorKind::StorageFull).fault(), DbFault::Full);
        for kind in [io::ErrorKind::ReadOnlyFilesystem, io::ErrorKind::PermissionDenied] {
            assert_eq!(failed(kind).fault(), DbFault::ReadOnly);
        }
    }
}
