//! Opening from outside: modes, refusals, and looking without a trace.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use matchlock_store::{DbFault, OpenError, ReadPool, STATE_DB, open_state, read_images};
use tempfile::TempDir;

use crate::support::{Home, apply_one, insert, vm};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_new_home_is_private_and_so_is_what_is_in_it() {
    let home = Home::new();
    let mut writer = home.writer();
    apply_one(&mut writer, insert(vm(1))).unwrap();
    assert_eq!(mode(&home.path), 0o700);
    let mut files = 0;
    for entry in fs::read_dir(&home.path).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        files += 1;
    }
    // state.db, -wal, -shm and the lock; the backup is gone.
    assert_eq!(files, 4);
}

#[test]
fn a_home_that_is_too_open_is_closed() {
    let home = Home::new();
    drop(home.writer());
    fs::set_permissions(&home.path, fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(home.path.join(STATE_DB), fs::Permissions::from_mode(0o666)).unwrap();
    drop(home.writer());
    assert_eq!(mode(&home.path), 0o700);
    assert_eq!(mode(&home.path.join(STATE_DB)), 0o600);
}

#[test]
fn a_home_of_another_user_is_refused() {
    let home = Home::new();
    fs::create_dir(&home.path).unwrap();
    if std::os::unix::fs::chown(&home.path, Some(65_534), None).is_err() {
        // Only root can make this case; the root directory is another's for everybody else.
        let refused = open_state(Path::new("/")).unwrap_err();
        assert!(matches!(refused, OpenError::NotOurs { owner: 0, .. }), "{refused:?}");
        return;
    }
    let refused = open_state(&home.path).unwrap_err();
    assert!(matches!(refused, OpenError::NotOurs { owner: 65_534, us: 0, .. }), "{refused:?}");
    assert_eq!(fs::read_dir(&home.path).unwrap().count(), 0);
}

#[test]
fn a_file_that_is_no_database_is_refused_untouched() {
    let home = Home::new();
    fs::create_dir(&home.path).unwrap();
    let path = home.path.join(STATE_DB);
    let garbage: Vec<u8> = (0..20_000_u32).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
    fs::write(&path, &garbage).unwrap();
    let writing = open_state(&home.path).unwrap_err();
    let reading = ReadPool::open(&home.path).unwrap_err();
    for refused in [writing, reading] {
        assert_eq!(refused.fault(), DbFault::Corrupt, "{refused:?}");
        let line = refused.to_string();
        assert!(line.contains(STATE_DB) && line.contains("move it away"), "{line}");
        assert!(!line.contains('\n'), "{line}");
    }
    assert_eq!(fs::read(&path).unwrap(), garbage);
    let left: Vec<_> = fs::read_dir(&home.path).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [path]);
}

#[test]
fn looking_at_a_home_that_is_not_there_makes_nothing() {
    let dir = TempDir::new().unwrap();
    let home = dir.path().join("home");
    assert!(ReadPool::open(&home).unwrap().is_none());
    assert!(read_images(&home).unwrap().is_none());
    assert!(!home.try_exists().unwrap());
    fs::create_dir(&home).unwrap();
    assert!(ReadPool::open(&home).unwrap().is_none());
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
}

#[test]
fn an_empty_file_is_nothing_to_look_at_and_becomes_a_database() {
    let home = Home::new();
    fs::create_dir(&home.path).unwrap();
    fs::write(home.path.join(STATE_DB), b"").unwrap();
    assert!(ReadPool::open(&home.path).unwrap().is_none());
    drop(home.writer());
    assert!(ReadPool::open(&home.path).unwrap().is_some());
}

#[tokio::test]
async fn looking_changes_no_stored_byte() {
    let home = Home::new();
    let mut writer = home.writer();
    apply_one(&mut writer, insert(vm(1))).unwrap();
    drop(writer);
    let path = home.path.join(STATE_DB);
    let before = fs::read(&path).unwrap();
    let reader = home.reader();
    assert_eq!(reader.vms().await.unwrap().len(), 1);
    drop(reader);
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn many_may_open_a_new_home_at_once() {
    let home = Home::new();
    let start = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        let (home, start) = (&home, &start);
        let threads: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || {
                    start.wait();
                    let mut writer = open_state(&home.path)?;
                    Ok::<_, OpenError>(apply_one(&mut writer, insert(vm(number))))
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap().unwrap().unwrap();
        }
    });
    let count: i64 = home
        .plain()
        .query_row("SELECT count(*) FROM schema_migrations", [], |row| row.get(0))
        .unwrap();
    assert_eq!(count, 7);
}

#[test]
fn a_database_of_another_program_is_refused_untouched() {
    let schemas = [
        "CREATE TABLE notes (text)",
        "CREATE TABLE vms (name TEXT)",
        "CREATE VIEW answer AS SELECT 42",
        "CREATE TABLE schema_migrations (version TEXT); CREATE TABLE users (name)",
    ];
    for schema in schemas {
        let home = Home::new();
        fs::create_dir(&home.path).unwrap();
        let path = home.path.join(STATE_DB);
        rusqlite::Connection::open(&path).unwrap().execute_batch(schema).unwrap();
        let before = fs::read(&path).unwrap();
        let writing = open_state(&home.path).unwrap_err();
        let reading = ReadPool::open(&home.path).unwrap_err();
        for refused in [writing, reading] {
            let line = matchlock_model::failure::chain(&refused);
            let wanted =
                format!("{} is a database of another program: move it away", path.display());
            assert!(line.starts_with(&wanted) && !line.contains('\n'), "{schema}: {line}");
        }
        assert_eq!(fs::read(&path).unwrap(), before, "{schema}");
    }
}

#[tokio::test]
async fn what_goes_wrong_names_the_file_and_quotes_no_statement() {
    let home = Home::new();
    let mut writer = home.writer();
    let reader = home.reader();
    home.plain().execute_batch("DROP TABLE vm_lifecycle").unwrap();
    let wrote = apply_one(&mut writer, insert(vm(1))).unwrap_err().to_string();
    let read = matchlock_model::failure::chain(&reader.vms().await.unwrap_err());
    for (told, done) in [(wrote, "written"), (read, "read")] {
        let path = home.path.join(STATE_DB);
        assert!(told.starts_with(&format!("{} could not be {done}: ", path.display())), "{told}");
        assert!(told.contains("no such table") && !told.contains("SELECT"), "{told}");
    }
}

#[test]
fn what_is_no_regular_file_is_refused_alike_by_writers_and_readers() {
    type Make = fn(&std::path::Path);
    let makers: [(&str, Make); 3] = [
        ("is not a regular file", |path| fs::create_dir(path).unwrap()),
        ("is not a regular file", |path| {
            let mode = nix::sys::stat::Mode::S_IRWXU;
            nix::unistd::mkfifo(path, mode).unwrap();
        }),
        ("is a symbolic link to something that is not there", |path| {
            std::os::unix::fs::symlink("nowhere", path).unwrap();
        }),
    ];
    for (wanted, make) in makers {
        let home = Home::new();
        fs::create_dir(&home.path).unwrap();
        let path = home.path.join(STATE_DB);
        make(&path);
        let reading = ReadPool::open(&home.path).unwrap_err().to_string();
        let writing = open_state(&home.path).unwrap_err().to_string();
        assert!(reading.starts_with(&format!("{} {wanted}", path.display())), "{reading}");
        assert_eq!(reading, writing);
    }
}
