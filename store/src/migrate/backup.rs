//! The copy of a database from before its pending migrations: making it, and putting it back.
//!
//! # Invariants
//! * A file named `.premigrate.bak` is whole: it is written under another name, checked, renamed.
//! * The live file is written through SQLite's backup API, never renamed or deleted: another
//!   process that has it open would go on writing into a file that nobody sees.
//! * Putting back must lose nothing: it is done only when live database and backup hold the same
//!   rows, in the columns that both have. What another process was told is stored stays stored,
//!   and what it was told is removed stays removed.
//! * From before that comparison until the last page is copied nobody else can commit: a copy that
//!   has begun holds the write lock of its target, even before its first page ([`hold`]). The
//!   comparison reads the live database through another connection, as it was last committed.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ffi};

use super::Applied;
use crate::busy::{self, LOCK_WAIT};
use crate::connect::{self, Access};
use crate::error::{OpenError, Recovery, without_sql};
use crate::files::{self, DbFiles};
use crate::migrations::Migration;

/// All pages in one step: SQLite's own sign for it.
const ALL: i32 = -1;

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
            failed: without_sql(failed).to_string(),
            source: Box::new(without_sql(source)),
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
        source: Box::new(without_sql(source)),
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
    // No backup of ours is without a page, and a copy of nothing would be done at its first step.
    let pages: i64 = backup.pragma_query_value(None, "page_count", |row| row.get(0))?;
    if pages == 0 {
        return Ok(Undone::Kept);
    }
    let copying = hold(&backup, live)?;
    if rows_differ(files)? {
        return Ok(Undone::Kept);
    }
    step(&copying, ALL)?;
    Ok(Undone::Removable(Recovery::Restored))
}

/// Begins to copy: takes the write lock of the target, copies nothing yet. Dropping the copy before
/// it is done leaves the target as it was.
pub(super) fn hold<'a>(
    from: &'a Connection,
    to: &'a mut Connection,
) -> rusqlite::Result<Backup<'a, 'a>> {
    let copying = Backup::new(from, to)?;
    step(&copying, 0)?;
    Ok(copying)
}

/// Whether live database and backup hold different rows, as far as both can hold the same.
fn rows_differ(files: &DbFiles) -> rusqlite::Result<bool> {
    let live = connect::connect(&files.db, Access::ReadOnly)?;
    let uri = connect::uri(&files.backup(), Access::ReadOnly);
    live.execute("ATTACH DATABASE ?1 AS backup", [uri])?;
    let (ours, theirs) = (tables(&live, "main")?, tables(&live, "backup")?);
    for table in ours.union(&theirs) {
        if table_differs(&live, table, ours.contains(table), theirs.contains(table))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn tables(conn: &Connection, schema: &str) -> rusqlite::Result<BTreeSet<String>> {
    let mut query = conn.prepare(&format!(
        "SELECT name FROM {schema}.sqlite_schema WHERE type = 'table'
         AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
         AND name NOT IN ('schema_migrations', 'schema_checksums')",
    ))?;
    query.query_map([], |row| row.get(0))?.collect()
}

fn table_differs(
    conn: &Connection,
    table: &str,
    in_live: bool,
    in_backup: bool,
) -> rusqlite::Result<bool> {
    let columns = if in_live && in_backup { shared_columns(conn, table)? } else { String::new() };
    let name = quoted(table);
    let sql = if columns.is_empty() {
        // A migration made or dropped it, or all of its columns; rows in it may be anybody's.
        let sides = [(in_live, "main"), (in_backup, "backup")];
        let exists = sides
            .iter()
            .filter(|(there, _)| *there)
            .map(|(_, schema)| format!("EXISTS (SELECT 1 FROM {schema}.{name})"))
            .collect::<Vec<_>>();
        format!("SELECT {}", exists.join(" OR "))
    } else {
        // EXCEPT looks at sets: a row that is there twice shows in the counts.
        let (live, backup) = (format!("main.{name}"), format!("backup.{name}"));
        format!(
            "SELECT (SELECT count(*) FROM {live}) <> (SELECT count(*) FROM {backup})
             OR EXISTS (SELECT {columns} FROM {live} EXCEPT SELECT {columns} FROM {backup})
             OR EXISTS (SELECT {columns} FROM {backup} EXCEPT SELECT {columns} FROM {live})"
        )
    };
    conn.query_row(&sql, [], |row| row.get(0))
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
    step(&Backup::new(from, to)?, ALL)
}

/// The next step of a copy, once nobody else holds the lock.
fn step(copying: &Backup<'_, '_>, pages: i32) -> rusqlite::Result<()> {
    let began = Instant::now();
    loop {
        match copying.step(pages)? {
            StepResult::Done | StepResult::More => return Ok(()),
            _ => {
                if !busy::pause_within(began, LOCK_WAIT) {
                    return Err(rusqlite::Error::SqliteFailure(
                        ffi::Error::new(ffi::SQLITE_BUSY),
                        Some("the copy found it locked again and again".to_owned()),
                    ));
                }
            }
        }
    }
}
