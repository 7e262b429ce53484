//! Connections: how a path becomes one, and the pragmas, here and nowhere else.
//!
//! # Invariants
//! * A connection never creates a database file; [`crate::files`] does, with its mode.
//! * A reading connection is opened read-only *and* refuses writing statements; [`Access::Alone`]
//!   only refuses them.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use crate::busy;

const STATEMENTS_KEPT: usize = 64;

/// The way a database is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    ReadWrite,
    /// To read while nobody else has it open: the index of the log is in memory then, not in a file
    /// for which the disk may have no room.
    Alone,
}

/// The path as an SQLite URI. Every byte that has a meaning in a URI is escaped.
pub(crate) fn uri(path: &Path, access: Access) -> String {
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri.push_str(match access {
        Access::ReadOnly => "?mode=ro",
        // To be alone takes a lock that only who may write can have.
        Access::ReadWrite | Access::Alone => "?mode=rw",
    });
    uri
}

/// Opens an existing database and prepares the connection.
pub(crate) fn connect(path: &Path, access: Access) -> rusqlite::Result<Connection> {
    let mode = match access {
        Access::ReadOnly => OpenFlags::SQLITE_OPEN_READ_ONLY,
        Access::ReadWrite | Access::Alone => OpenFlags::SQLITE_OPEN_READ_WRITE,
    };
    let flags = mode | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(uri(path, access), flags)?;
    prepare(&conn, access)?;
    Ok(conn)
}

/// Sets what holds for one connection. None of it touches the file.
pub(crate) fn prepare(conn: &Connection, access: Access) -> rusqlite::Result<()> {
    conn.busy_handler(Some(busy::handler::<{ busy::LOCK_WAIT_MILLIS }>))?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
    conn.pragma_update(None, "foreign_keys", true)?;
    conn.pragma_update(None, "trusted_schema", false)?;
    match access {
        Access::ReadOnly => conn.pragma_update(None, "query_only", true),
        Access::Alone => {
            conn.pragma_update_and_check(None, "locking_mode", "EXCLUSIVE", |_| Ok(()))?;
            conn.pragma_update(None, "query_only", true)
        }
        // A power cut takes the processes, TAPs and tables along with the last commits.
        Access::ReadWrite => conn.pragma_update(None, "synchronous", "NORMAL"),
    }
}

/// Whether the database keeps a write-ahead log. Reads the file, so it finds one that is none.
pub(crate) fn is_wal(conn: &Connection) -> rusqlite::Result<bool> {
    let mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    Ok(mode.eq_ignore_ascii_case("wal"))
}

/// Makes the database keep a write-ahead log; the file remembers it.
pub(crate) fn use_wal(conn: &Connection) -> rusqlite::Result<()> {
    let mode: String =
        conn.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if mode.eq_ignore_ascii_case("wal") {
        return Ok(());
    }
    Err(rusqlite::Error::SqliteFailure(
        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
        Some(format!(
            "the file system offers only journal mode {mode}, a write-ahead log is needed"
        )),
    ))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn paths_with_a_meaning_in_uris_are_escaped() {
        let path = Path::new(OsStr::from_bytes(b"/a b/100%/what?/#1/\xff.db"));
        assert_eq!(uri(path, Access::ReadOnly), "file:/a%20b/100%25/what%3F/%231/%FF.db?mode=ro");
    }
}
