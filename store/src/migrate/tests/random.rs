//! A process that migrates is killed at a random moment while another connection writes all the time
//! and others open the database; every row that was acknowledged is there in the end.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use super::scenario::{Scenario, dump};
use super::*;
use crate::child::{Child, Dice, await_go, note, task, tell};

const ROUNDS: u64 = 40;
const FIRST_ROW: i64 = 10_000;

/// Opens the database as its scenario says.
#[test]
#[ignore = "a helper process of the test here"]
fn opens() {
    let Some(task) = task() else { return };
    let (scenario, dir) = task.split_once(' ').unwrap();
    tell("ready");
    await_go();
    drop(open(&DbFiles::new(dir.as_ref(), "test.db"), Scenario::named(scenario).known()));
}

/// Where the rows go that are written all the time.
struct Target {
    insert: &'static str,
    select: &'static str,
    delete: &'static str,
}

fn target(scenario: Scenario) -> Target {
    if scenario == Scenario::Reference {
        return Target {
            insert: "INSERT INTO vms (id, pid, status, created_at, updated_at)
                     VALUES ('vm-' || ?1, ?1, 'running', '2025-11-02T08:00:00Z', '')",
            select: "SELECT pid FROM vms WHERE pid >= 10000",
            delete: "DELETE FROM vms WHERE pid >= 10000",
        };
    }
    Target {
        insert: "INSERT INTO t (x) VALUES (?1)",
        select: "SELECT x FROM t WHERE x >= 10000",
        delete: "DELETE FROM t WHERE x >= 10000",
    }
}

/// Writes until it is told to stop, with random pauses; tells each row once it is committed.
fn write_all_the_time(
    db: &std::path::Path,
    insert: &str,
    mut dice: Dice,
    acknowledged: &Sender<i64>,
    stop: &Receiver<()>,
) {
    let conn = Connection::open(db).unwrap();
    for row in FIRST_ROW.. {
        match conn.execute(insert, [row]) {
            Ok(_) => acknowledged.send(row).unwrap(),
            Err(e) => assert_eq!(DbFault::of(&e), DbFault::Busy, "{e}"),
        }
        let pause = Duration::from_micros(dice.below(2_000));
        if stop.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

#[test]
fn killed_at_random_moments_while_another_writes_all_the_time() {
    let mut dice = Dice::new("killed_at_random_moments_while_another_writes_all_the_time");
    let scenarios =
        [Scenario::Reference, Scenario::FailsLater, Scenario::GoesOn, Scenario::PutBack];
    let mut rows = 0;
    for round in 0..ROUNDS {
        let scenario = scenarios[usize::try_from(round % 4).unwrap()];
        let db = db();
        scenario.prepare(&db.files);
        let target = target(scenario);
        let (acknowledge, acknowledged) = channel();
        let writer_dice = Dice::seeded(dice.below(u64::MAX));
        let mut told = BTreeSet::new();
        std::thread::scope(|scope| {
            // Made in here, so that the writer stops when a check fails.
            let (stop, stopped) = channel();
            let (path, insert) = (&db.files.db, target.insert);
            scope.spawn(move || {
                write_all_the_time(path, insert, writer_dice, &acknowledge, &stopped);
            });
            let task = format!("{} {}", scenario.name(), db.files.dir.display());
            let mut child = Child::start("migrate::tests::random::opens", &task);
            child.hear().unwrap();
            told.extend(acknowledged.try_iter());
            child.go();
            for _ in 0..dice.below(30) {
                told.insert(acknowledged.recv().unwrap());
            }
            child.kill();
            child.end();
            // The next one comes while the writer still writes.
            match open(&db.files, scenario.known()) {
                Ok(_) => assert!(!scenario.fails()),
                Err(failed) => assert!(
                    scenario.fails() && recovery(failed) != Recovery::Unchanged,
                    "round {round}"
                ),
            }
            stop.send(()).unwrap();
        });
        told.extend(acknowledged.try_iter());
        rows += told.len();
        let conn = open(&db.files, scenario.repaired()).unwrap();
        backup::check(&conn, &db.files.db).unwrap();
        let mut query = conn.prepare(target.select).unwrap();
        let found: BTreeSet<i64> =
            query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(found, told, "round {round}, {scenario:?}");
        drop(query);
        conn.execute(target.delete, []).unwrap();
        assert_eq!(Some(&dump(&conn)), scenario.stages(&[]).last(), "round {round}");
    }
    note(&format!("{ROUNDS} rounds, {rows} acknowledged rows"));
}
