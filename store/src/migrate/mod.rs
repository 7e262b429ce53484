//! Opening a database for writing: the fast way when it is as this binary knows it, setting up and
//! migrating it under a lock otherwise.
//!
//! ```text
//! look, without the lock ── up to date, no backup lies about ──────────────────────► open
//!   │ something is pending
//!   ▼
//! take <db>.init.lock ─► look again ─► backup (checked, whole) ─► migration 1 … n ─► drop backup ─► open
//!                                        │ one is there: a       │ one failed
//!                                        │ migration crashed,    ▼
//!                                        │ keep and use it      put back, or say why not
//! ```
//!
//! # Invariants
//! * Each migration is one IMMEDIATE transaction that also writes its row and checksum, and looks
//!   again whether it is still pending.
//! * The backup is of before the first pending migration; one that a crash left is never
//!   overwritten, but used by whoever goes on.
//! * Nothing acknowledged to another process is undone: see [`backup::recover`].
//! * A database that is damaged, newer, of another program, or differs in an applied migration is refused untouched.
//!
//! # On a crash
//! The lock goes with its holder, SQLite rolls the open transaction back, and the backup stays: the
//! next process goes on with the rest.

mod backup;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, TransactionBehavior, params};

use crate::busy::LOCK_WAIT;
use crate::connect::{self, Access};
use crate::error::OpenError;
use crate::files::{self, DbFiles};
use crate::migrations::Migration;

/// Opens the database for writing, makes it if it is missing, brings it up to date.
pub(crate) fn open(files: &DbFiles, known: &[Migration]) -> Result<Connection, OpenError> {
    open_within(files, known, LOCK_WAIT)
}

fn open_within(
    files: &DbFiles,
    known: &[Migration],
    lock_wait: Duration,
) -> Result<Connection, OpenError> {
    files.prepare_dir()?;
    if files.check_files()? {
        let conn = writer(files)?;
        if is_ready(&conn, files, known)? {
            return Ok(conn);
        }
    }
    let lock = files.lock_setup(lock_wait)?;
    files.create_db()?;
    let conn = set_up(writer(files)?, files, known)?;
    drop(lock);
    Ok(conn)
}

fn writer(files: &DbFiles) -> Result<Connection, OpenError> {
    let open = || {
        let conn = connect::connect(&files.db, Access::ReadWrite)?;
        // SQLite opens a file that cannot be written for reading, and tells at the first write.
        if conn.is_readonly(rusqlite::MAIN_DB)? {
            let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_READONLY);
            let text = "it opened for reading only".to_owned();
            return Err(rusqlite::Error::SqliteFailure(code, Some(text)));
        }
        Ok(conn)
    };
    open().map_err(|e| OpenError::database("write", &files.db, e))
}

fn is_ready(conn: &Connection, files: &DbFiles, known: &[Migration]) -> Result<bool, OpenError> {
    let applied = Applied::read_checked(conn, files, known)?;
    Ok(applied.pending(known).is_empty()
        && connect::is_wal(conn).map_err(|e| OpenError::database("read", &files.db, e))?
        && !files::is_there(&files.backup())?)
}

/// A reading connection to a database of this version; `None` if nothing was ever stored. Makes
/// and changes nothing.
///
/// A database that lacks something may be in the middle of being set up: then that is waited for.
pub(crate) fn open_to_read(
    files: &DbFiles,
    known: &[Migration],
) -> Result<Option<Connection>, OpenError> {
    open_to_read_within(files, known, Access::ReadOnly, LOCK_WAIT)
}

/// The same for a database on a full disk, which nobody else may have open meanwhile.
pub(crate) fn open_to_read_alone(
    files: &DbFiles,
    known: &[Migration],
) -> Result<Option<Connection>, OpenError> {
    open_to_read_within(files, known, Access::Alone, LOCK_WAIT)
}

fn open_to_read_within(
    files: &DbFiles,
    known: &[Migration],
    access: Access,
    lock_wait: Duration,
) -> Result<Option<Connection>, OpenError> {
    if !files.is_there_to_read()? {
        return Ok(None);
    }
    let conn = connect::connect(&files.db, access)
        .map_err(|e| OpenError::database("open", &files.db, e))?;
    if Applied::read_checked(&conn, files, known)?.pending(known).is_empty() {
        return Ok(Some(conn));
    }
    files.await_setup(lock_wait)?;
    let applied = Applied::read_checked(&conn, files, known)?;
    match applied.pending(known).first() {
        None => Ok(Some(conn)),
        Some(_) if applied.versions.is_empty() => Ok(None),
        Some(first) => Err(OpenError::Older {
            path: files.db.clone(),
            module: first.module,
            version: first.version,
        }),
    }
}

/// Brings the database up to date; the caller holds the lock.
fn set_up(
    mut conn: Connection,
    files: &DbFiles,
    known: &[Migration],
) -> Result<Connection, OpenError> {
    let pending: Vec<Migration> =
        Applied::read_checked(&conn, files, known)?.pending(known).into_iter().copied().collect();
    let crashed = files::is_there(&files.backup())?;
    if crashed {
        backup::check(&conn, &files.db)?;
    }
    if !pending.is_empty() {
        if crashed {
            backup::check_leftover(files)?;
        } else {
            backup::make(&conn, files)?;
        }
    }
    connect::use_wal(&conn).map_err(|e| OpenError::database("set up", &files.db, e))?;
    for migration in &pending {
        if let Err(failed) = apply(&mut conn, migration) {
            return Err(backup::recover(conn, files, migration, failed));
        }
    }
    files::remove(&files.backup())?;
    Ok(conn)
}

/// The tables that know what was applied. The second is ours; the reference knows the first alone.
const BOOKKEEPING: &str = "
    CREATE TABLE IF NOT EXISTS schema_migrations (
        module TEXT NOT NULL,
        version INTEGER NOT NULL,
        name TEXT NOT NULL,
        applied_at TEXT NOT NULL,
        PRIMARY KEY (module, version)
    );
    CREATE TABLE IF NOT EXISTS schema_checksums (
        module TEXT NOT NULL,
        version INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        PRIMARY KEY (module, version)
    );";

fn apply(conn: &mut Connection, migration: &Migration) -> rusqlite::Result<()> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    tx.execute_batch(BOOKKEEPING)?;
    let rows = tx.execute(
        "INSERT INTO schema_migrations (module, version, name, applied_at) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO NOTHING",
        params![migration.module, migration.version, migration.name, Timestamp::now().to_string(),],
    )?;
    if rows == 0 {
        return tx.rollback();
    }
    tx.execute_batch(migration.sql)?;
    tx.execute(
        "INSERT INTO schema_checksums (module, version, sha256) VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET sha256 = excluded.sha256",
        params![migration.module, migration.version, migration.checksum()],
    )?;
    tx.commit()
}

/// What was applied to a database.
#[derive(Debug, PartialEq, Eq)]
struct Applied {
    versions: BTreeSet<(String, i64)>,
    checksums: BTreeMap<(String, i64), String>,
}

impl Applied {
    fn read(conn: &Connection) -> rusqlite::Result<Self> {
        let mut applied = Self { versions: BTreeSet::new(), checksums: BTreeMap::new() };
        if has_table(conn, "schema_migrations")? {
            let mut query = conn.prepare("SELECT module, version FROM schema_migrations")?;
            let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            applied.versions = rows.collect::<rusqlite::Result<_>>()?;
        }
        if has_table(conn, "schema_checksums")? {
            let mut query = conn.prepare("SELECT module, version, sha256 FROM schema_checksums")?;
            let rows = query.query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))?;
            applied.checksums = rows.collect::<rusqlite::Result<_>>()?;
        }
        Ok(applied)
    }

    fn read_checked(
        conn: &Connection,
        files: &DbFiles,
        known: &[Migration],
    ) -> Result<Self, OpenError> {
        Self::check_ours(conn, files)?;
        let applied = Self::read(conn).map_err(|e| OpenError::database("read", &files.db, e))?;
        applied.check(files, known)?;
        Ok(applied)
    }

    /// Refuses a database whose tables are not ours. What is new has none at all: the bookkeeping
    /// comes with the first of them, in one transaction.
    fn check_ours(conn: &Connection, files: &DbFiles) -> Result<(), OpenError> {
        let ours: bool = conn
            .query_row(
                "SELECT (SELECT count(*) FROM pragma_table_info('schema_migrations')
                         WHERE name IN ('module', 'version')) = 2
                     OR NOT EXISTS (SELECT 1 FROM sqlite_schema WHERE name NOT GLOB 'sqlite_*')",
                [],
                |row| row.get(0),
            )
            .map_err(|e| OpenError::database("read", &files.db, e))?;
        if ours { Ok(()) } else { Err(OpenError::Foreign { path: files.db.clone() }) }
    }

    /// Refuses what another binary did that this one does not know.
    fn check(&self, files: &DbFiles, known: &[Migration]) -> Result<(), OpenError> {
        for (module, version) in &self.versions {
            let newest =
                known.iter().filter(|m| m.module == module).map(|m| m.version).max().unwrap_or(0);
            if *version > newest {
                return Err(OpenError::Newer {
                    path: files.db.clone(),
                    module: module.clone(),
                    version: *version,
                    known: newest,
                });
            }
        }
        for migration in known {
            // What the reference applied has no checksum here, and is taken as it is.
            let key = (migration.module.to_owned(), migration.version);
            let (Some(recorded), expected) = (self.checksums.get(&key), migration.checksum())
            else {
                continue;
            };
            if self.versions.contains(&key) && *recorded != expected {
                return Err(OpenError::Edited {
                    path: files.db.clone(),
                    module: migration.module,
                    version: migration.version,
                    recorded: recorded.clone(),
                    expected,
                });
            }
        }
        Ok(())
    }

    fn pending<'a>(&self, known: &'a [Migration]) -> Vec<&'a Migration> {
        known
            .iter()
            .filter(|m| !self.versions.contains(&(m.module.to_owned(), m.version)))
            .collect()
    }
}

fn has_table(conn: &Connection, name: &str) -> rusqlite::Result<bool> {
    conn.query_row(
        "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1)",
        [name],
        |row| row.get(0),
    )
}
