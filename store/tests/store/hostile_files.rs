//! Databases that were damaged, cut off, made by a newer version or tampered with.

use std::collections::BTreeMap;
use std::fs;

use matchlock_model::phase::Phase;
use matchlock_store::{
    DbFault, OpenError, ReadError, ReadPool, STATE_DB, WriteError, WriteOp, open_state,
};

use crate::child::{Dice, note};
use crate::support::{Home, apply_one, at, contents, insert, set_phase, vm};

const PAGE: usize = 4_096;
const VMS: u32 = 60;

/// A home with a database of many pages, all of it in one file, and the bytes of that.
fn home_with_many_vms() -> (Home, Vec<u8>) {
    let home = Home::new();
    let mut conn = home.writer();
    for number in 1..=VMS {
        apply_one(&mut conn, insert(vm(number))).unwrap();
    }
    drop(conn);
    let bytes = fs::read(home.path.join(STATE_DB)).unwrap();
    assert!(bytes.len() > 8 * PAGE);
    (home, bytes)
}

fn assert_damaged(refused: &OpenError) {
    assert_eq!(refused.fault(), DbFault::Corrupt, "{refused:?}");
    assert!(refused.to_string().contains("move it away or put a backup in its place"), "{refused}");
}

fn assert_unchanged(before: &BTreeMap<String, Vec<u8>>, after: &BTreeMap<String, Vec<u8>>) {
    let sizes = |files: &BTreeMap<String, Vec<u8>>| {
        files.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect::<Vec<_>>()
    };
    assert_eq!(sizes(before), sizes(after));
    assert!(before == after, "the same files with other bytes");
}

/// A home with such a database, and what a writer is told who opens it.
fn open_damaged(bytes: &[u8]) -> (Home, Result<(), OpenError>) {
    let home = Home::new();
    fs::create_dir(&home.path).unwrap();
    fs::write(home.path.join(STATE_DB), bytes).unwrap();
    let before = contents(&home.path);
    let opened = open_state(&home.path).map(drop);
    if opened.is_err() {
        let mut after = contents(&home.path);
        // SQLite leaves an empty log and its index beside a database that it cannot even close.
        after.remove(&format!("{STATE_DB}-shm"));
        assert!(after.remove(&format!("{STATE_DB}-wal")).is_none_or(|log| log.is_empty()));
        assert_unchanged(&before, &after);
    }
    (home, opened)
}

#[test]
fn a_database_that_was_cut_off_is_refused_untouched() {
    let (_home, bytes) = home_with_many_vms();
    let pages = bytes.len() / PAGE;
    // A last page that is cut off counts as a page; only reading it shows that it is damaged.
    let cuts = (1..pages).flat_map(|page| [page * PAGE - 1, page * PAGE - 100, page * PAGE]);
    for cut in cuts {
        let (home, opened) = open_damaged(&bytes[..cut]);
        assert_damaged(&opened.unwrap_err());
        assert_damaged(&ReadPool::open(&home.path).unwrap_err());
    }
    open_damaged(&bytes).1.unwrap();
}

/// Reads and writes everything; answers the damage that was told.
async fn use_all(home: &Home) -> Vec<DbFault> {
    let mut told = Vec::new();
    let mut note_written = |answer: Result<_, WriteError>| match answer {
        Ok(_) => {}
        Err(WriteError::Database { fault, message, .. }) => {
            assert!(!message.is_empty());
            told.push(fault);
        }
        Err(other) => panic!("{other:?}"),
    };
    let mut conn = home.writer();
    for number in 1..=VMS {
        note_written(apply_one(&mut conn, set_phase(vm(number), Phase::Created)));
    }
    note_written(apply_one(&mut conn, insert(vm(VMS + 1))));
    note_written(apply_one(&mut conn, WriteOp::PruneHistory { before: at(0) }));
    let reader = home.reader();
    let mut note_read = |answer: Result<(), ReadError>| match answer {
        Ok(()) => {}
        Err(ReadError::Database { fault, .. }) => told.push(fault),
        Err(other) => panic!("{other:?}"),
    };
    note_read(reader.vms().await.map(drop));
    for number in 1..=VMS {
        note_read(reader.history(vm(number)).await.map(drop));
    }
    told
}

#[tokio::test]
async fn a_page_that_was_overwritten_is_told_as_damage_wherever_it_is_met() {
    let mut dice = Dice::new("a_page_that_was_overwritten_is_told_as_damage_wherever_it_is_met");
    let (_home, bytes) = home_with_many_vms();
    let (mut at_once, mut later, mut unmet) = (0, 0, 0);
    for page in 0..bytes.len() / PAGE {
        let mut damaged = bytes.clone();
        damaged[page * PAGE..][..PAGE].fill_with(|| u8::try_from(dice.below(256)).unwrap());
        // The kinds of page that SQLite knows are 2, 5, 10 and 13; a page of the first has a header.
        let kind = if page == 0 { 100 } else { page * PAGE };
        damaged[kind] = 0xff;
        let (home, opened) = open_damaged(&damaged);
        match opened {
            Err(refused) => {
                assert_damaged(&refused);
                at_once += 1;
            }
            Ok(()) => {
                let told = use_all(&home).await;
                assert!(told.iter().all(|fault| *fault == DbFault::Corrupt), "{page}: {told:?}");
                if told.is_empty() { unmet += 1 } else { later += 1 }
            }
        }
    }
    note(&format!("{at_once} pages refused when opened, {later} when met, {unmet} never met"));
    assert!(at_once >= 2, "the schema and its bookkeeping");
    assert!(later > unmet);
}

#[test]
fn a_newer_database_is_refused_untouched() {
    let (home, _) = home_with_many_vms();
    let later = "INSERT INTO schema_migrations VALUES ('node', 9, 'of_the_future', '2030-01-01')";
    home.plain().execute_batch(later).unwrap();
    let before = contents(&home.path);
    let newer = |refused: &OpenError| {
        assert!(
            matches!(refused, OpenError::Newer { module, version: 9, .. } if module == "node"),
            "{refused:?}"
        );
        let line = refused.to_string();
        assert!(line.contains("node version 9") && line.contains("newer matchlock"), "{line}");
    };
    newer(&open_state(&home.path).unwrap_err());
    assert_unchanged(&before, &contents(&home.path));
    newer(&ReadPool::open(&home.path).unwrap_err());
    assert!(contents(&home.path)[STATE_DB] == before[STATE_DB]);
}

#[test]
fn a_database_with_another_text_of_a_migration_is_refused_untouched() {
    let (home, _) = home_with_many_vms();
    let tamper =
        "UPDATE schema_checksums SET sha256 = 'beef' WHERE module = 'lifecycle' AND version = 2";
    assert_eq!(home.plain().execute(tamper, []).unwrap(), 1);
    let before = contents(&home.path);
    let edited = |refused: &OpenError| {
        assert!(
            matches!(refused, OpenError::Edited { module: "lifecycle", version: 2, recorded, .. }
                if recorded == "beef"),
            "{refused:?}"
        );
        assert!(refused.to_string().contains("use the matchlock that made it"), "{refused}");
    };
    edited(&open_state(&home.path).unwrap_err());
    assert_unchanged(&before, &contents(&home.path));
    edited(&ReadPool::open(&home.path).unwrap_err());
    assert!(contents(&home.path)[STATE_DB] == before[STATE_DB]);
}
