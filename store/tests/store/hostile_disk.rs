//! A full disk and a read-only one, for real: a small file system in memory, in a mount namespace of
//! its own that ends with the thread of the test. It takes root.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::Path;

use matchlock_model::image::ImageScope;
use matchlock_model::phase::Phase;
use matchlock_store::{
    DbFault, OpenError, ReadPool, STATE_DB, WriteConn, WriteError, WriteOp, WriteOutcome,
    open_images, open_state, read_images,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rusqlite::Connection;
use tempfile::TempDir;

use crate::child::{Child, note};
use crate::images::image;
use crate::support::{
    EPOCH, apply_one, at, check_integrity, contents, insert, new_vm, plain, reference_home_in,
    set_phase, set_phase_saying, vm,
};

const SIZE: &str = "size=2m,mode=0700";
const BLOCK: usize = 4_096;

/// Runs a test with a file system of 2 MB that nobody else sees.
fn on_a_small_disk(test: impl FnOnce(&Path) + Send) {
    let dir = TempDir::new().unwrap();
    std::thread::scope(|scope| {
        let path = dir.path();
        let testing = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap_or_else(|e| {
                panic!("this test mounts a file system, which takes root (CAP_SYS_ADMIN): {e}")
            });
            let own = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, own, None::<&str>).unwrap();
            let kind = Some("tmpfs");
            mount(kind, path, kind, MsFlags::empty(), Some(SIZE)).unwrap();
            test(path);
        });
        testing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn remount(disk: &Path, flags: MsFlags) {
    let flags = flags | MsFlags::MS_REMOUNT;
    mount(None::<&str>, disk, None::<&str>, flags, Some(SIZE)).unwrap();
}

/// Takes all the room but this many blocks.
fn fill(disk: &Path, but: usize) {
    let mut ballast = File::create(disk.join("ballast")).unwrap();
    let mut written = 0;
    loop {
        match ballast.write(&[0; BLOCK]) {
            Ok(bytes) => written += bytes,
            Err(e) if e.kind() == ErrorKind::StorageFull => break,
            Err(e) => panic!("{e}"),
        }
    }
    ballast.set_len(u64::try_from(written.saturating_sub(but * BLOCK)).unwrap()).unwrap();
}

fn make_room(disk: &Path) {
    fs::remove_file(disk.join("ballast")).unwrap();
}

fn assert_full(refused: &WriteError) {
    assert!(matches!(refused, WriteError::Database { fault: DbFault::Full, .. }), "{refused:?}");
    assert!(refused.retryable());
    assert!(refused.to_string().contains("free some space"), "{refused}");
}

/// Writes batches of three until one is refused; answers how many rows were acknowledged.
fn write_until_refused(conn: &mut WriteConn, acknowledged: &mut Vec<String>) {
    loop {
        let texts: Vec<String> =
            (0..3).map(|n| format!("{}-{}", acknowledged.len() + n, "x".repeat(500))).collect();
        let batch = texts.iter().map(|t| set_phase_saying(vm(1), EPOCH, Phase::Creating, t));
        let answers = conn.apply(batch.collect());
        let mut refused = false;
        for (answer, text) in answers.into_iter().zip(texts) {
            match answer {
                Ok(_) => acknowledged.push(text),
                Err(error) => {
                    assert_full(&error);
                    refused = true;
                }
            }
        }
        if refused {
            return;
        }
    }
}

fn stored(conn: &Connection) -> Vec<String> {
    let mut query = conn
        .prepare("SELECT last_error FROM vm_lifecycle WHERE version > 1 ORDER BY version")
        .unwrap();
    query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

#[test]
fn images_can_be_looked_up_on_a_full_disk() {
    on_a_small_disk(|disk| {
        let images = disk.join("images");
        let mut conn = open_images(&images).unwrap();
        let record = image(ImageScope::Local, "tools:1", "a", 1);
        conn.put_image(&record, "sha256:a", at(0)).unwrap();
        drop(conn);
        fill(disk, 0);
        for _ in 0..2 {
            let reader = read_images(&images).unwrap().unwrap();
            assert_eq!(reader.find("tools:1").unwrap().as_ref(), Some(&record));
            // Whoever comes meanwhile waits, and is not misled.
            drop(reader);
        }
        make_room(disk);
        let mut conn = open_images(&images).unwrap();
        conn.put_image(&image(ImageScope::Local, "tools:2", "b", 2), "sha256:b", at(0)).unwrap();
        // Not alone with it, the index of the log is there.
        fill(disk, 0);
        assert_eq!(read_images(&images).unwrap().unwrap().list().unwrap().len(), 2);
    });
}

#[test]
fn writing_on_a_full_disk_is_refused_and_goes_on_when_there_is_room() {
    on_a_small_disk(|disk| {
        let home = disk.join("home");
        let mut conn = open_state(&home).unwrap();
        apply_one(&mut conn, insert(vm(1))).unwrap();
        let mut acknowledged = Vec::new();
        for but in 0..20 {
            fill(disk, but);
            write_until_refused(&mut conn, &mut acknowledged);
            // What was told is what is so, also while there is no room.
            assert_eq!(stored(&plain(&home)), acknowledged, "{but} blocks");
            make_room(disk);
            let more = set_phase_saying(vm(1), EPOCH, Phase::Creating, &format!("room {but}"));
            apply_one(&mut conn, more).unwrap();
            acknowledged.push(format!("room {but}"));
        }
        check_integrity(&plain(&home));
        drop(conn);
        let mut conn = open_state(&home).unwrap();
        assert!(apply_one(&mut conn, set_phase(vm(1), Phase::Created)).is_ok());
        acknowledged.push("room 19".to_owned());
        assert_eq!(stored(&plain(&home)), acknowledged);
    });
}

/// More than there is room for, in the middle of a batch: SQLite writes a part of it before the
/// commit, and gives the whole transaction up.
#[test]
fn a_batch_that_does_not_fit_is_refused_whole_or_in_part_as_it_is_told() {
    on_a_small_disk(|disk| {
        let home = disk.join("home");
        let mut conn = open_state(&home).unwrap();
        let mut big = new_vm(vm(2));
        big.config_json = "x".repeat(4 << 20);
        let batch = [insert(vm(1)), WriteOp::InsertVm { record: Box::new(big) }, insert(vm(3))];
        let answers = conn.apply(batch.into());
        assert_full(answers[1].as_ref().unwrap_err());
        for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
            assert_full(refused);
        }
        let stored: isize =
            plain(&home).query_row("SELECT count(*) FROM vms", [], |row| row.get(0)).unwrap();
        let told = answers.iter().filter(|answer| answer.is_ok()).count();
        assert_eq!(stored, told.cast_signed());
        for number in [4, 5] {
            apply_one(&mut conn, insert(vm(number))).unwrap();
        }
        check_integrity(&plain(&home));
    });
}

/// Opens a home with more and more room until it works; after each refusal there is room, and it
/// works too.
fn open_with_little_room(disk: &Path, prepare: impl Fn(&Path), check: impl Fn(&mut WriteConn)) {
    let home = disk.join("home");
    let mut refusals = 0;
    loop {
        prepare(&home);
        fill(disk, refusals);
        let opened = open_state(&home).map(drop);
        make_room(disk);
        check(&mut open_state(&home).unwrap_or_else(|e| panic!("{refusals} blocks: {e:?}")));
        check_integrity(&plain(&home));
        let names: Vec<_> = contents(&home).into_keys().collect();
        assert!(names.iter().all(|name| !name.contains("premigrate")), "{names:?}");
        fs::remove_dir_all(&home).unwrap();
        match opened {
            Ok(()) => break,
            Err(refused) => assert_refused(&refused, DbFault::Full, "free some space"),
        }
        refusals += 1;
    }
    note(&format!("refused with up to {refusals} free blocks of {BLOCK} bytes"));
    assert!(refusals > 3, "the disk was never full");
}

fn assert_refused(refused: &OpenError, fault: DbFault, advice: &str) {
    assert_eq!(refused.fault(), fault, "{refused:?}");
    let line = refused.to_string();
    assert!(line.contains(advice) && !line.contains('\n'), "{line}: {refused:?}");
}

#[test]
fn a_new_home_on_a_full_disk_is_refused_and_made_when_there_is_room() {
    on_a_small_disk(|disk| {
        open_with_little_room(
            disk,
            |_| {},
            |conn| assert_eq!(apply_one(conn, insert(vm(1))), Ok(WriteOutcome::Version(1))),
        );
    });
}

#[test]
fn a_migration_on_a_full_disk_is_refused_and_done_when_there_is_room() {
    on_a_small_disk(|disk| {
        open_with_little_room(disk, reference_home_in, |conn| {
            // The reference's own VM, with its two lifecycle rows.
            let next = matchlock_model::id::OwnerEpoch(0);
            let op = set_phase_saying(vm(0xa), next, Phase::Created, "next");
            assert_eq!(apply_one(conn, op), Ok(WriteOutcome::Version(3)));
        });
    });
}

#[test]
fn a_read_only_home_is_refused_for_writing_and_nothing_in_it_changes() {
    on_a_small_disk(|disk| {
        let home = disk.join("home");
        let mut conn = open_state(&home).unwrap();
        apply_one(&mut conn, insert(vm(1))).unwrap();
        drop(conn);
        let before = contents(&home);
        assert!(!before.contains_key(&format!("{STATE_DB}-wal")));
        remount(disk, MsFlags::MS_RDONLY);
        let advice = "check the rights on it and on its directory";
        assert_refused(&open_state(&home).unwrap_err(), DbFault::ReadOnly, advice);
        // A reader, too, writes: the index of the log.
        assert_refused(&ReadPool::open(&home).unwrap_err(), DbFault::ReadOnly, advice);
        assert_eq!(contents(&home), before);
        remount(disk, MsFlags::empty());
        let mut conn = open_state(&home).unwrap();
        apply_one(&mut conn, set_phase(vm(1), Phase::Created)).unwrap();
    });
}

#[test]
fn a_read_only_home_that_a_killed_writer_left_can_be_read() {
    on_a_small_disk(|disk| {
        let home = disk.join("home");
        let task = format!("1 {}", home.display());
        let mut child = Child::start("hostile_writers::writes_until_it_is_killed", &task);
        for _ in 0..10 {
            child.hear().unwrap();
        }
        child.kill();
        let more = std::iter::from_fn(|| child.hear()).count();
        drop(child);
        let before = contents(&home);
        assert!(before.contains_key(&format!("{STATE_DB}-wal")));
        remount(disk, MsFlags::MS_RDONLY);
        let refused = open_state(&home).unwrap_err();
        assert_refused(&refused, DbFault::ReadOnly, "check the rights on it and on its directory");
        // All that is needed is there: the log, and its index in the reader's own memory.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let history = runtime.block_on(async {
            let reader = ReadPool::open(&home).unwrap().unwrap();
            reader.history(vm(1)).await.unwrap()
        });
        assert!(history.len() >= 10 + more);
        drop(runtime);
        assert_eq!(contents(&home), before);
    });
}

#[test]
fn a_new_home_on_a_read_only_disk_is_refused() {
    on_a_small_disk(|disk| {
        remount(disk, MsFlags::MS_RDONLY);
        let refused = open_state(&disk.join("home")).unwrap_err();
        assert_refused(&refused, DbFault::ReadOnly, "check the rights");
        assert!(ReadPool::open(&disk.join("home")).unwrap().is_none());
    });
}
