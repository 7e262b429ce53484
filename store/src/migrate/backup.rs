//! The copy of a database from before its pending migrations: making it, and putting it back.
//!
//! # Invariants
//! * A file named `.premigrate.bak` is whole: it is written under another name, checked, renamed.
//! * The live file is written through SQLite's backup API, never renamed or deleted: another
//!   process that has it open would go on writing into a file that nobody sees.
//! * Putting back must lose nothing: it is done only when every row of the live database is in the
//!   backup too. What another process was told is stored stays stored.
//!
//! Between that comparison and the first page written lies a moment in which another process can
//! commit; SQLite offers no way to hold the lock across both.

use std::path::Path;
use std::time::Instant;

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ffi};

use super::Applied;
use crate::busy::{self, LOCK_WAIT};
use crate::connect::{self, Access};
use crate::error::{OpenError, Recovery};
use crate::files::{self, DbFiles};
use crate::migrations::Migration;

/// Makes the backup and checks it; damage found in it is damage of the live database.
pub(super) fn make(live: &Connection, files: &DbFiles) -> Result<(), OpenError> {
    let draft = files.backup_in_the_making();
    files::remove(&files.journal_of_backup_in_the_making())?;
    files::remove(&draft)?;
    files::create_private(&draft).map_err(|source| OpenError::File {
        doing: "make",
        path: draft.clone(),
        source,
    })?;
    let made = write_draft(live, files, &draft).and_then(|()| {
        std::fs::rename(&draft, files.backup()).map_err(|source| OpenError::File {
            doing: "name",
            path: draft.clone(),
            source,
        })
    });
    if made.is_err() {
        // A draft that cannot be removed now is removed by the next attempt; the first error counts.
        files::remove(&draft).unwrap_or_default();
    }
    made
}

fn write_draft(live: &Connection, files: &DbFiles, draft: &Path) -> Result<(), OpenError> {
    let failed = |e| OpenError::database("back up", &files.db, e);
    let mut copy = connect::connect(draft, Access::ReadWrite).map_err(failed)?;
    copy_all(live, &mut copy).map_err(failed)?;
    // The copy says that it keeps a write-ahead log; a file that lies alone should not.
    copy.pragma_update_and_check(None, "journal_mode", "DELETE", |_| Ok(())).map_err(failed)?;
    check(&copy, &files.db)?;
    copy.close().map_err(|(_, e)| failed(e))
}

/// Checks the backup that a crashed migration left.
pub(super) fn check_leftover(files: &DbFiles) -> Result<(), OpenError> {
    let path = files.backup();
    let backup = connect::connect(&path, Access::ReadOnly)
        .map_err(|e| OpenError::database("open", &path, e))?;
    check(&backup, &path)
}

/// SQLite's own check of a whole database.
pub(super) fn check(conn: &Connection, path: &Path) -> Result<(), OpenError> {
    let report: String = conn
        .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
        .map_err(|e| OpenError::database("check", path, e))?;
    if report == "ok" {
        return Ok(());
    }
    Err(OpenError::Damaged { path: path.to_owned(), report })
}

/// After a failed migration: undoes those before it if that loses nothing, and tells what is so.
pub(super) fn recover(
    mut live: Connection,
    files: &DbFiles,
    migration: &Migration,
    failed: rusqlite::Error,
) -> OpenError {
    match undo(&mut live, files) {
        Ok(Undone::Removable(recovery)) => {
            if let Err(error) = files::remove(&files.backup()) {
                return error;
            }
            migration_failed(files, migration, recovery, failed)
        }
        Ok(Undone::Kept) => {
            let backup = files.backup();
            migration_failed(files, migration, Recovery::KeptPartly { backup }, failed)
        }
        Err(source) => OpenError::Restore {
            path: files.db.clone(),
            backup: files.backup(),
            failed: failed.to_string(),
            source: Box::new(source),
        },
    }
}

fn migration_failed(
    files: &DbFiles,
    migration: &Migration,
    recovery: Recovery,
    source: rusqlite::Error,
) -> OpenError {
    OpenError::Migration {
        path: files.db.clone(),
        module: migration.module,
        version: migration.version,
        name: migration.name,
        recovery,
        source: Box::new(source),
    }
}

enum Undone {
    /// The live database is as it was; the backup has done its work.
    Removable(Recovery),
    Kept,
}

fn undo(live: &mut Connection, files: &DbFiles) -> rusqlite::Result<Undone> {
    let backup = connect::connect(&files.backup(), Access::ReadOnly)?;
    if Applied::read(live)? == Applied::read(&backup)? {
        return Ok(Undone::Removable(Recovery::Unchanged));
    }
    if has_rows_beyond(live, files)? {
        return Ok(Undone::Kept);
    }
    copy_all(&backup, live)?;
    Ok(Undone::Removable(Recovery::Restored))
}

/// Whether the live database holds a row that its backup does not.
fn has_rows_beyond(live: &Connection, files: &DbFiles) -> rusqlite::Result<bool> {
    let uri = connect::uri(&files.backup(), Access::ReadOnly);
    live.execute("ATTACH DATABASE ?1 AS backup", [uri])?;
    let found = compare_tables(live);
    live.execute("DETACH DATABASE backup", [])?;
    found
}

fn compare_tables(live: &Connection) -> rusqlite::Result<bool> {
    let mut query = live.prepare(
        "SELECT name FROM main.sqlite_schema WHERE type = 'table'
         AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
         AND name NOT IN ('schema_migrations', 'schema_checksums')",
    )?;
    let tables: Vec<String> =
        query.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    for table in tables {
        let columns = shared_columns(live, &table)?;
        let table = quoted(&table);
        // A table that the backup lacks is a migration's; rows in it may be anybody's.
        let except = if columns.is_empty() {
            String::new()
        } else {
            format!("EXCEPT SELECT {columns} FROM backup.{table}")
        };
        let columns = if columns.is_empty() { "1" } else { &columns };
        let sql = format!("SELECT EXISTS (SELECT {columns} FROM main.{table} {except})");
        if live.query_row(&sql, [], |row| row.get(0))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn shared_columns(live: &Connection, table: &str) -> rusqlite::Result<String> {
    let mut query = live.prepare(
        "SELECT name FROM pragma_table_info(?1, 'main')
         INTERSECT SELECT name FROM pragma_table_info(?1, 'backup')",
    )?;
    let names = query
        .query_map([table], |row| row.get::<_, String>(0))?
        .map(|name| name.map(|name| quoted(&name)))
        .collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(names.join(", "))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn copy_all(from: &Connection, to: &mut Connection) -> rusqlite::Result<()> {
    let began = Instant::now();
    let copying = Backup::new(from, to)?;
    loop {
        match copying.step(-1) {
            Ok(StepResult::Done) => return Ok(()),
            Ok(StepResult::More) => {}
            Ok(_) => {
                if !busy::pause_within(began, LOCK_WAIT) {
                    return Err(rusqlite::Error::SqliteFailure(
                        ffi::Error::new(ffi::SQLITE_BUSY),
                        Some("the copy found it locked again and again".to_owned()),
                    ));
                }
            }
            Err(error) => return Err(error),
        }
    }
}
