#[cfg(target_arch = "x86_64")]
mod crash;
mod random;
mod scenario;
#[cfg(target_arch = "x86_64")]
mod tracer;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use rusqlite::ErrorCode;
use scenario::{crash_second_migration, fill};
use tempfile::TempDir;

use super::*;
use crate::error::{DbFault, Recovery};
use crate::migrations::STATE;

const FIRST: Migration = Migration {
    module: "m",
    version: 1,
    name: "first",
    sql: "CREATE TABLE t (x INTEGER PRIMARY KEY, note TEXT); CREATE INDEX idx_t ON t (note);",
};
const SECOND: Migration = Migration {
    module: "m",
    version: 2,
    name: "second",
    sql: "ALTER TABLE t ADD COLUMN extra TEXT; UPDATE t SET extra = note;",
};
const THIRD: Migration =
    Migration { module: "m", version: 3, name: "third", sql: "CREATE TABLE u (x INTEGER);" };
const THIRD_BAD: Migration =
    Migration { sql: "CREATE TABLE u (x INTEGER); INSERT INTO nowhere VALUES (1);", ..THIRD };

struct Db {
    _dir: TempDir,
    files: DbFiles,
}

fn db() -> Db {
    // A disk has no part in what is tested here, and makes hundreds of set-ups slow.
    let memory = std::path::Path::new("/dev/shm");
    let dir = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.unwrap();
    let files = DbFiles::new(&dir.path().join("home"), "test.db");
    Db { _dir: dir, files }
}

fn db_with_rows() -> Db {
    let db = db();
    fill(&db.files);
    db
}

fn db_with_crashed_migration() -> Db {
    let db = db_with_rows();
    crash_second_migration(&db.files);
    db
}

fn rows(conn: &Connection) -> i64 {
    conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap()
}

fn versions(conn: &Connection) -> Vec<i64> {
    let applied = Applied::read(conn).unwrap();
    applied.versions.into_iter().map(|(_, v)| v).collect()
}

fn recovery(error: OpenError) -> Recovery {
    match error {
        OpenError::Migration { module: "m", version: 3, name: "third", recovery, .. } => recovery,
        other => panic!("{other:?}"),
    }
}

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_failed_first_migration_changes_nothing() {
    let db = db_with_rows();
    open(&db.files, &[FIRST, SECOND]).unwrap();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    assert_eq!(recovery(failed), Recovery::Unchanged);
    assert!(!db.files.backup().try_exists().unwrap());
    let conn = open(&db.files, &[FIRST, SECOND]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1, 2]));
    assert!(!has_table(&conn, "u").unwrap());
}

#[test]
fn a_failed_later_migration_puts_the_database_back() {
    let db = db_with_rows();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    assert_eq!(recovery(failed), Recovery::Restored);
    assert!(!db.files.backup().try_exists().unwrap());
    let conn = open(&db.files, &[FIRST]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1]));
    assert!(connect::is_wal(&conn).unwrap());
    assert!(conn.prepare("SELECT extra FROM t").is_err());
    backup::check(&conn, &db.files.db).unwrap();
    drop(conn);
    let conn = open(&db.files, &[FIRST, SECOND, THIRD]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1, 2, 3]));
}

#[test]
fn a_new_database_whose_setup_fails_is_empty_again() {
    let db = db();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    assert_eq!(recovery(failed), Recovery::Restored);
    let conn = open(&db.files, &[FIRST, SECOND]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (0, vec![1, 2]));
}

#[test]
fn others_who_have_it_open_go_on_after_a_restore() {
    let db = db_with_rows();
    let other = writer(&db.files).unwrap();
    other.execute("INSERT INTO t VALUES (1000, 'acknowledged')", []).unwrap();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    assert_eq!(recovery(failed), Recovery::Restored);
    assert_eq!(rows(&other), 101);
    other.execute("INSERT INTO t VALUES (1001, 'after')", []).unwrap();
    drop(other);
    let conn = open(&db.files, &[FIRST]).unwrap();
    assert_eq!(rows(&conn), 102);
}

#[test]
fn a_crashed_migration_is_gone_on_with() {
    let db = db_with_crashed_migration();
    let conn = open(&db.files, &[FIRST, SECOND, THIRD]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1, 2, 3]));
    assert!(!db.files.backup().try_exists().unwrap());
}

#[test]
fn a_crashed_last_migration_leaves_only_its_backup_to_remove() {
    let db = db_with_crashed_migration();
    let conn = open(&db.files, &[FIRST, SECOND]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1, 2]));
    assert!(!db.files.backup().try_exists().unwrap());
}

#[test]
fn a_leftover_backup_is_what_is_put_back() {
    let db = db_with_crashed_migration();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    assert_eq!(recovery(failed), Recovery::Restored);
    // Version 1 is what only the leftover knew: a fresh backup would have had version 2.
    let conn = open(&db.files, &[FIRST]).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1]));
}

#[test]
fn what_was_written_after_the_crash_is_not_undone() {
    let db = db_with_crashed_migration();
    let conn = writer(&db.files).unwrap();
    conn.execute("INSERT INTO t VALUES (1000, 'acknowledged', 'x')", []).unwrap();
    conn.close().unwrap();
    let before = fs::read(db.files.backup()).unwrap();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    let backup = db.files.backup();
    assert_eq!(recovery(failed), Recovery::KeptPartly { backup: backup.clone() });
    assert_eq!(fs::read(backup).unwrap(), before, "the leftover was overwritten");
    let conn = writer(&db.files).unwrap();
    assert_eq!((rows(&conn), versions(&conn)), (101, vec![1, 2]));
}

/// How the third migration fails when another process has run this after the second one crashed.
fn recovery_after(sql: &str) -> (Recovery, Connection) {
    let db = db_with_crashed_migration();
    let conn = writer(&db.files).unwrap();
    conn.execute_batch(sql).unwrap();
    conn.close().unwrap();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    let conn = writer(&db.files).unwrap();
    (recovery(failed), conn)
}

#[test]
fn what_was_removed_or_changed_after_the_crash_is_not_undone() {
    let (told, conn) = recovery_after("DELETE FROM t WHERE x = 1");
    assert!(matches!(told, Recovery::KeptPartly { .. }), "{told:?}");
    assert_eq!((rows(&conn), versions(&conn)), (99, vec![1, 2]));
    let (told, conn) = recovery_after("UPDATE t SET x = 1001 WHERE x = 1");
    assert!(matches!(told, Recovery::KeptPartly { .. }), "{told:?}");
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1, 2]));
    // The same change and its opposite: nothing would be lost.
    let (told, conn) = recovery_after(
        "UPDATE t SET note = 'x' WHERE x = 1; UPDATE t SET note = 'note 1' WHERE x = 1",
    );
    assert_eq!(told, Recovery::Restored);
    assert_eq!((rows(&conn), versions(&conn)), (100, vec![1]));
}

#[test]
fn a_row_that_is_there_twice_counts_twice() {
    let twice = Migration { sql: "CREATE TABLE t (x INTEGER, note TEXT);", ..FIRST };
    let db = db();
    let conn = open(&db.files, &[twice]).unwrap();
    conn.execute_batch("INSERT INTO t VALUES (1, 'same'), (1, 'same')").unwrap();
    backup::make(&conn, &db.files).unwrap();
    conn.execute_batch("DELETE FROM t WHERE rowid = 2").unwrap();
    conn.close().unwrap();
    let failed = open(&db.files, &[twice, SECOND, THIRD_BAD]).unwrap_err();
    assert!(matches!(recovery(failed), Recovery::KeptPartly { .. }));
    assert_eq!(rows(&writer(&db.files).unwrap()), 1);
}

#[test]
fn a_copy_that_has_begun_keeps_others_from_committing() {
    let db = db_with_crashed_migration();
    let backup = connect::connect(&db.files.backup(), Access::ReadOnly).unwrap();
    let mut live = writer(&db.files).unwrap();
    let other = writer(&db.files).unwrap();
    other.busy_handler(None).unwrap();
    let holding = backup::hold(&backup, &mut live).unwrap();
    let refused = other.execute_batch("BEGIN IMMEDIATE").unwrap_err();
    assert_eq!(DbFault::of(&refused), DbFault::Busy, "{refused}");
    // Reading goes on, and sees what was last committed.
    assert_eq!((rows(&other), versions(&other)), (100, vec![1, 2]));
    drop(holding);
    other
        .execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (1000, 'after', NULL); COMMIT")
        .unwrap();
    assert_eq!((rows(&live), versions(&live)), (101, vec![1, 2]));
    backup::check(&live, &db.files.db).unwrap();
}

#[test]
fn an_empty_leftover_never_wipes_the_database() {
    let db = db_with_rows();
    files::create_private(&db.files.backup()).unwrap();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD_BAD]).unwrap_err();
    assert!(matches!(recovery(failed), Recovery::KeptPartly { .. }));
    assert_eq!(rows(&writer(&db.files).unwrap()), 100);
}

#[test]
fn a_damaged_leftover_is_reported_and_kept() {
    let db = db_with_crashed_migration();
    let mut bytes = fs::read(db.files.backup()).unwrap();
    bytes[5000..9000].fill(0xaa);
    fs::write(db.files.backup(), &bytes).unwrap();
    let failed = open(&db.files, &[FIRST, SECOND, THIRD]).unwrap_err();
    assert_eq!(failed.fault(), DbFault::Corrupt, "{failed}");
    assert!(failed.to_string().contains("premigrate.bak"), "{failed}");
    assert_eq!(fs::read(db.files.backup()).unwrap(), bytes);
    assert_eq!(versions(&writer(&db.files).unwrap()), [1, 2]);
}

#[test]
fn a_half_made_backup_is_made_anew() {
    let db = db_with_rows();
    fs::write(db.files.backup_in_the_making(), b"half").unwrap();
    fs::write(db.files.journal_of_backup_in_the_making(), b"half").unwrap();
    let conn = open(&db.files, &[FIRST, SECOND]).unwrap();
    assert_eq!(versions(&conn), [1, 2]);
    for left in [db.files.backup_in_the_making(), db.files.journal_of_backup_in_the_making()] {
        assert!(!left.try_exists().unwrap());
    }
}

#[test]
fn damage_found_before_a_migration_is_refused_untouched() {
    let db = db_with_rows();
    let mut bytes = fs::read(&db.files.db).unwrap();
    // The second page on holds the tables; the first, with the schema, stays readable.
    let pages = bytes.len();
    bytes[8192 + 100..pages].fill(0x55);
    fs::write(&db.files.db, &bytes).unwrap();
    let failed = open(&db.files, &[FIRST, SECOND]).unwrap_err();
    assert_eq!(failed.fault(), DbFault::Corrupt, "{failed}");
    assert_eq!(fs::read(&db.files.db).unwrap(), bytes);
    assert!(!db.files.backup().try_exists().unwrap());
    assert!(!db.files.backup_in_the_making().try_exists().unwrap());
}

#[test]
fn a_newer_database_is_refused_by_writers_and_readers() {
    let db = db_with_rows();
    open(&db.files, &[FIRST, SECOND]).unwrap().close().unwrap();
    let before = fs::read(&db.files.db).unwrap();
    for failed in
        [open(&db.files, &[FIRST]).unwrap_err(), open_to_read(&db.files, &[FIRST]).unwrap_err()]
    {
        assert!(
            matches!(&failed, OpenError::Newer { module, version: 2, known: 1, .. } if module == "m"),
            "{failed:?}"
        );
    }
    assert_eq!(fs::read(&db.files.db).unwrap(), before);
    let unknown = open(&db.files, &STATE[..1]).unwrap_err();
    assert!(matches!(unknown, OpenError::Newer { known: 0, .. }), "{unknown:?}");
}

#[test]
fn an_edited_migration_is_refused() {
    let db = db_with_rows();
    let edited = Migration { sql: "CREATE TABLE t (x INTEGER PRIMARY KEY);", ..FIRST };
    let failed = open(&db.files, &[edited]).unwrap_err();
    assert!(
        matches!(&failed, OpenError::Edited { version: 1, recorded, expected, .. }
            if *recorded == FIRST.checksum() && *expected == edited.checksum()),
        "{failed:?}"
    );
}

#[test]
fn readers_do_not_migrate() {
    let db = db_with_rows();
    let failed = open_to_read(&db.files, &[FIRST, SECOND]).unwrap_err();
    assert!(matches!(failed, OpenError::Older { version: 2, .. }), "{failed:?}");
    assert!(open_to_read(&db.files, &[FIRST]).unwrap().is_some());
}

#[test]
fn readers_wait_for_a_setup_that_is_under_way() {
    let db = db();
    db.files.prepare_dir().unwrap();
    let lock = db.files.lock_setup(LOCK_WAIT).unwrap();
    db.files.create_db().unwrap();
    let mut conn = writer(&db.files).unwrap();
    connect::use_wal(&conn).unwrap();
    apply(&mut conn, &FIRST).unwrap();
    // Half of it is there, and whoever does the rest has the lock: that is not an older database.
    let short = Duration::from_millis(30);
    let impatient =
        open_to_read_within(&db.files, &[FIRST, SECOND], Access::ReadOnly, short).unwrap_err();
    assert!(matches!(impatient, OpenError::SetupLocked { .. }), "{impatient:?}");
    std::thread::scope(|scope| {
        let (started, start) = std::sync::mpsc::channel();
        let files = &db.files;
        let reader = scope.spawn(move || {
            started.send(()).unwrap();
            open_to_read(files, &[FIRST, SECOND])
        });
        start.recv().unwrap();
        apply(&mut conn, &SECOND).unwrap();
        drop(lock);
        let read = reader.join().unwrap().unwrap().unwrap();
        assert_eq!(versions(&read), [1, 2]);
    });
}

#[test]
fn a_lock_held_too_long_is_told() {
    let db = db();
    db.files.prepare_dir().unwrap();
    let lock = db.files.lock_setup(LOCK_WAIT).unwrap();
    let short = Duration::from_millis(30);
    let failed = open_within(&db.files, &[FIRST], short).unwrap_err();
    assert!(
        matches!(&failed, OpenError::SetupLocked { waited, .. } if *waited == short),
        "{failed:?}"
    );
    assert_eq!(failed.fault(), DbFault::Busy);
    drop(lock);
    open_within(&db.files, &[FIRST], short).unwrap();
}

#[test]
fn an_open_database_that_is_up_to_date_takes_no_lock() {
    let db = db_with_rows();
    fs::remove_file(db.files.lock()).unwrap();
    open(&db.files, &[FIRST]).unwrap();
    assert!(!db.files.lock().try_exists().unwrap());
}

#[test]
fn a_migration_that_another_process_applied_meanwhile_is_skipped() {
    let db = db_with_rows();
    let mut conn = writer(&db.files).unwrap();
    apply(&mut conn, &SECOND).unwrap();
    // Its text would fail a second time: the column is there.
    apply(&mut conn, &SECOND).unwrap();
    assert_eq!(versions(&conn), [1, 2]);
}

#[test]
fn modes_are_private_and_repaired() {
    let db = db();
    fs::create_dir(&db.files.dir).unwrap();
    fs::set_permissions(&db.files.dir, fs::Permissions::from_mode(0o755)).unwrap();
    let mut conn = open(&db.files, &[FIRST]).unwrap();
    backup::make(&conn, &db.files).unwrap();
    apply(&mut conn, &SECOND).unwrap();
    assert_eq!(mode(&db.files.dir), 0o700);
    let mut names = Vec::new();
    for entry in fs::read_dir(&db.files.dir).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    let expected = ["", "-shm", "-wal", ".init.lock", ".premigrate.bak"];
    assert_eq!(names, expected.map(|suffix| format!("test.db{suffix}")));
    drop(conn);

    fs::set_permissions(&db.files.db, fs::Permissions::from_mode(0o644)).unwrap();
    open(&db.files, &[FIRST, SECOND]).unwrap();
    assert_eq!(mode(&db.files.db), 0o600);
}

#[test]
fn something_else_in_the_place_is_refused() {
    let db = db();
    fs::write(&db.files.dir, b"").unwrap();
    let failed = open(&db.files, &[FIRST]).unwrap_err();
    assert!(matches!(failed, OpenError::WrongKind { wanted: "directory", .. }), "{failed:?}");
    fs::remove_file(&db.files.dir).unwrap();
    fs::create_dir_all(&db.files.db).unwrap();
    let failed = open(&db.files, &[FIRST]).unwrap_err();
    assert!(matches!(failed, OpenError::WrongKind { wanted: "regular file", .. }), "{failed:?}");
}

#[test]
fn a_busy_database_is_told_as_such() {
    // SQLite's code, as a migration that cannot get the lock ends with it.
    let busy = rusqlite::Error::SqliteFailure(
        rusqlite::ffi::Error { code: ErrorCode::DatabaseBusy, extended_code: 5 },
        None,
    );
    let db = db_with_rows();
    let conn = writer(&db.files).unwrap();
    backup::make(&conn, &db.files).unwrap();
    let failed = backup::recover(conn, &db.files, &THIRD, busy);
    assert_eq!(failed.fault(), DbFault::Busy);
    assert_eq!(recovery(failed), Recovery::Unchanged);
}
