//! What can go wrong with a database, one type per side: opening, writing, reading.
//!
//! # Invariants
//! * Each text names the file or the VM and, where a person must act, what to do.
//! * [`WriteError`] can be cloned, since one failed commit answers many callers; SQLite's own
//!   error is kept in it as text.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use matchlock_model::failure::chain;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::phase::{InvalidTransition, Phase};
use rusqlite::ffi::{ErrorCode, SQLITE_IOERR_SHMSIZE};
use rusqlite::types::Type;

mod open;

pub use open::{OpenError, Recovery};

/// What kind of trouble SQLite reports, as far as anybody decides by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DbFault {
    /// Another process held the lock for too long.
    Busy,
    /// The disk is full.
    Full,
    /// The file or its directory cannot be written.
    ReadOnly,
    /// The file is damaged or is no database.
    Corrupt,
    /// Anything else.
    Other,
}

impl DbFault {
    /// The kind of this error.
    #[must_use]
    pub fn of(error: &rusqlite::Error) -> Self {
        let Some(code) = error.sqlite_error() else {
            return Self::Other;
        };
        match code.code {
            // The last one: a process was stopped while it held a lock that is held for an instant.
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::FileLockingProtocolFailed => Self::Busy,
            ErrorCode::DiskFull => Self::Full,
            // The -shm file is grown by allocating its blocks, which is how a full disk shows first.
            ErrorCode::SystemIoFailure if code.extended_code == SQLITE_IOERR_SHMSIZE => Self::Full,
            ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen => {
                Self::ReadOnly
            }
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Self::Corrupt,
            _ => Self::Other,
        }
    }

    fn of_file(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            _ => Self::Other,
        }
    }

    /// Whether the same write may succeed later without anybody having changed it.
    #[must_use]
    pub const fn retryable(self) -> bool {
        matches!(self, Self::Busy | Self::Full)
    }
}

impl fmt::Display for DbFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy => "another process held its lock for too long, try again",
            Self::Full => "the disk is full, free some space (`matchlock gc` may) and try again",
            Self::ReadOnly => "it cannot be written, check the rights on it and on its directory",
            Self::Corrupt => "it is damaged, move it away or put a backup in its place",
            Self::Other => "SQLite failed",
        })
    }
}

/// The same error, which does not quote the whole statement: what is told is one line.
pub(crate) fn without_sql(error: rusqlite::Error) -> rusqlite::Error {
    match error {
        rusqlite::Error::SqlInputError { error, msg, .. } => {
            rusqlite::Error::SqliteFailure(error, Some(msg))
        }
        other => other,
    }
}

/// A write was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The id is taken, or was: its history is still there.
    #[error("{id} exists already")]
    VmExists {
        /// The id.
        id: VmId,
    },
    /// No such VM.
    #[error("there is no {vm}")]
    NotFound {
        /// The VM.
        vm: VmId,
    },
    /// Another owner has taken the VM over.
    #[error("{vm} has another owner now: epoch {} was asked to write, {} may", epoch.0, current.0)]
    Fenced {
        /// The VM.
        vm: VmId,
        /// The epoch of the write.
        epoch: OwnerEpoch,
        /// The epoch that may write.
        current: OwnerEpoch,
    },
    /// The VM may not become that.
    #[error(transparent)]
    Transition(#[from] InvalidTransition),
    /// Only a cleaned VM is removed.
    #[error("{vm} is {phase}, only a cleaned VM can be removed: clean it with `matchlock gc {vm}`")]
    NotCleaned {
        /// The VM.
        vm: VmId,
        /// Its phase.
        phase: Phase,
    },
    /// Only a VM that is being created gets a subnet: what asked for it was given up since.
    #[error("{vm} is {phase}, only a VM that is being created gets a subnet")]
    NotCreating {
        /// The VM.
        vm: VmId,
        /// Its phase.
        phase: Phase,
    },
    /// The VM still holds a subnet.
    #[error("{vm} still holds a subnet: clean it with `matchlock gc {vm}`")]
    SubnetHeld {
        /// The VM.
        vm: VmId,
    },
    /// All subnets are held, or overlap what this host uses.
    #[error(
        "no subnet is free: {pool} has {count}, {held} are held and the rest overlap this host's networks; remove VMs that are not needed, or set MATCHLOCK_SUBNET_POOL to a larger range"
    )]
    NoFreeSubnet {
        /// The pool.
        pool: String,
        /// How many it has.
        count: u64,
        /// How many are held, those of other pools included.
        held: usize,
    },
    /// A stored row cannot be read.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// A value has no form in JSON.
    #[error("{what} cannot be written as JSON: {reason}")]
    Json {
        /// What it is.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A value does not fit into the database.
    #[error("{what} does not fit into the database: {value}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// A fault of our own while it was being written. Nothing of it is there.
    #[error("a fault in matchlock kept it from being written, nothing was changed: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// SQLite could not write.
    #[error("{} could not be written: {fault} ({message})", path.display())]
    Database {
        /// The database.
        path: PathBuf,
        /// What kind of trouble.
        fault: DbFault,
        /// What SQLite says.
        message: String,
    },
}

impl WriteError {
    /// The same error; one of SQLite, which knows no file, names this one.
    pub(crate) fn in_file(mut self, db: &Path) -> Self {
        if let Self::Database { path, .. } = &mut self {
            db.clone_into(path);
        }
        self
    }

    /// Whether another process kept the database locked for too long.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        matches!(self, Self::Database { fault: DbFault::Busy, .. })
    }

    /// Whether the same write may succeed later without anybody having changed it.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Database { fault, .. } => fault.retryable(),
            Self::Panicked { .. } => true,
            Self::VmExists { .. }
            | Self::NotFound { .. }
            | Self::Fenced { .. }
            | Self::Transition(_)
            | Self::NotCleaned { .. }
            | Self::NotCreating { .. }
            | Self::SubnetHeld { .. }
            | Self::NoFreeSubnet { .. }
            | Self::Row(_)
            | Self::Json { .. }
            | Self::TooLarge { .. } => false,
        }
    }
}

impl From<rusqlite::Error> for WriteError {
    fn from(error: rusqlite::Error) -> Self {
        match BadRow::taken_from(error) {
            Ok(row) => Self::Row(row),
            // Whoever has the connection knows its file.
            Err(error) => Self::Database {
                path: PathBuf::new(),
                fault: DbFault::of(&error),
                message: chain(&without_sql(error)),
            },
        }
    }
}

/// Something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A stored row cannot be read.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// No connection came free, or none could be opened.
    #[error("cannot get a connection for reading")]
    Pool {
        /// Why.
        source: deadpool_sqlite::PoolError,
    },
    /// The thread that was reading ended without an answer.
    #[error("reading was interrupted")]
    Interrupted {
        /// How.
        source: deadpool_sqlite::InteractError,
    },
    /// SQLite could not read.
    #[error("{} could not be read: {fault}", path.display())]
    Database {
        /// The database.
        path: PathBuf,
        /// What kind of trouble.
        fault: DbFault,
        /// What SQLite says.
        source: rusqlite::Error,
    },
}

impl ReadError {
    /// What SQLite says of this database.
    pub(crate) fn of(path: &Path, error: rusqlite::Error) -> Self {
        match BadRow::taken_from(error) {
            Ok(row) => Self::Row(row),
            Err(source) => Self::Database {
                path: path.to_owned(),
                fault: DbFault::of(&source),
                source: without_sql(source),
            },
        }
    }
}

/// A stored value that is not what its column holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table}.{column} of {key} cannot be read: {reason}")]
pub struct BadRow {
    /// The table.
    pub table: &'static str,
    /// The column.
    pub column: &'static str,
    /// Which row.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
}

impl BadRow {
    /// As an error of the kind that rusqlite's row functions return.
    pub(crate) fn into_sqlite(self) -> rusqlite::Error {
        rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(self))
    }

    /// The bad row that travels in this error, or the error again.
    pub(crate) fn taken_from(error: rusqlite::Error) -> Result<Self, rusqlite::Error> {
        match error {
            rusqlite::Error::FromSqlConversionFailure(column, kind, inner) => inner
                .downcast::<Self>()
                .map(|row| *row)
                .map_err(|inner| rusqlite::Error::FromSqlConversionFailure(column, kind, inner)),
            other => Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::ffi;

    use super::*;

    #[test]
    fn faults_are_told_apart() {
        let cases = [
            (ffi::SQLITE_BUSY, DbFault::Busy),
            (ffi::SQLITE_BUSY_SNAPSHOT, DbFault::Busy),
            (ffi::SQLITE_LOCKED, DbFault::Busy),
            (ffi::SQLITE_PROTOCOL, DbFault::Busy),
            (ffi::SQLITE_FULL, DbFault::Full),
            (ffi::SQLITE_IOERR_SHMSIZE, DbFault::Full),
            (ffi::SQLITE_IOERR_READ, DbFault::Other),
            (ffi::SQLITE_READONLY_DIRECTORY, DbFault::ReadOnly),
            (ffi::SQLITE_CANTOPEN, DbFault::ReadOnly),
            (ffi::SQLITE_NOTADB, DbFault::Corrupt),
            (ffi::SQLITE_CORRUPT_INDEX, DbFault::Corrupt),
            (ffi::SQLITE_CONSTRAINT_UNIQUE, DbFault::Other),
        ];
        for (code, fault) in cases {
            let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            assert_eq!(DbFault::of(&error), fault, "code {code}");
            let write = WriteError::from(error);
            let retryable = matches!(fault, DbFault::Busy | DbFault::Full);
            assert_eq!(write.retryable(), retryable, "code {code}");
        }
    }
}
