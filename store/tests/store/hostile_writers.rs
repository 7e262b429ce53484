//! Many processes that write at once, and writers that are killed: nothing lost, nothing twice.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use matchlock_model::id::OwnerEpoch;
use matchlock_model::phase::Phase;
use matchlock_store::{WriteConn, WriteError, WriteOp, WriteOutcome, open_state};
use rusqlite::Connection;

use crate::child::{Child, Dice, await_go, note, task, tell};
use crate::support::{
    EPOCH, Home, apply_one, at, check_integrity, insert, process, set_phase, set_phase_as,
    set_phase_saying, vm,
};

const PROCESSES: u32 = 8;
const WRITES: u32 = 1_000;
/// All write to this one.
const SHARED: u32 = 1;
/// All take this one over again and again.
const CONTESTED: u32 = 2;

/// One process of many.
struct Writer {
    conn: WriteConn,
    number: u32,
    writes: u32,
    longest: Duration,
}

impl Writer {
    fn write(&mut self, op: WriteOp) -> Result<WriteOutcome, WriteError> {
        self.writes += 1;
        let began = Instant::now();
        let answer = apply_one(&mut self.conn, op);
        self.longest = self.longest.max(began.elapsed());
        answer
    }

    /// A text that nobody else writes, without a blank.
    fn tag(&self) -> String {
        format!("process-{}-write-{}", self.number, self.writes)
    }

    /// Writes a row that must not be refused, and tells it.
    fn append(&mut self, number: u32, op: WriteOp) {
        match self.write(op) {
            Ok(WriteOutcome::Version(version)) => tell(&format!("row {number} {version}")),
            other => panic!("{other:?}"),
        }
    }

    /// One write to a VM that all write to, one to a VM that all take over.
    fn disturb(&mut self, epoch: &mut OwnerEpoch) {
        let tag = self.tag();
        match self.write(set_phase_saying(vm(SHARED), EPOCH, Phase::Creating, &tag)) {
            Ok(WriteOutcome::Version(version)) => tell(&format!("row {SHARED} {version} {tag}")),
            other => panic!("{other:?}"),
        }
        if self.writes.is_multiple_of(3) {
            let raise = WriteOp::RaiseEpoch {
                vm: vm(CONTESTED),
                pid: i32::try_from(self.number).unwrap(),
                at: at(0),
            };
            match self.write(raise) {
                Ok(WriteOutcome::Epoch(raised)) => *epoch = raised,
                other => panic!("{other:?}"),
            }
            tell(&format!("epoch {}", epoch.0));
            return;
        }
        let tag = self.tag();
        match self.write(set_phase_saying(vm(CONTESTED), *epoch, Phase::Creating, &tag)) {
            Ok(WriteOutcome::Version(version)) => tell(&format!("row {CONTESTED} {version} {tag}")),
            Err(WriteError::Fenced { current, .. }) if current > *epoch => {}
            other => panic!("{other:?}"),
        }
    }

    /// The whole life of a VM of its own.
    fn live(&mut self, number: u32, epoch: &mut OwnerEpoch) {
        let (id, second) = (vm(number), OwnerEpoch(2));
        let hypervisor = process(i32::try_from(number).unwrap());
        self.append(number, insert(id));
        for phase in [Phase::Created, Phase::Starting] {
            self.append(number, set_phase(id, phase));
            self.disturb(epoch);
        }
        let started = matchlock_model::record::Started::Booted;
        let launched =
            WriteOp::SetHypervisor { vm: id, epoch: EPOCH, hypervisor, started, at: at(1) };
        self.append(number, launched);
        let raise = WriteOp::RaiseEpoch { vm: id, pid: 1, at: at(2) };
        assert_eq!(self.write(raise), Ok(WriteOutcome::Epoch(second)));
        for phase in
            [Phase::Running, Phase::Stopping, Phase::Stopped, Phase::Cleaning, Phase::Cleaned]
        {
            self.append(number, set_phase_as(id, second, phase));
            self.disturb(epoch);
        }
        if number.is_multiple_of(2) {
            let remove = WriteOp::RemoveVm { vm: id, epoch: second };
            assert_eq!(self.write(remove), Ok(WriteOutcome::Removed));
            tell(&format!("removed {number}"));
        }
        let old = WriteOp::PruneHistory { before: Timestamp::UNIX_EPOCH };
        assert_eq!(self.write(old), Ok(WriteOutcome::Pruned { vms: 0, unreadable: 0 }));
    }
}

/// Lives of its own VMs, one after the other, and writes to those of all.
#[test]
#[ignore = "a helper process of the test below"]
fn writes_many() {
    let Some(task) = task() else { return };
    let (number, home) = task.split_once(' ').unwrap();
    let number: u32 = number.parse().unwrap();
    let conn = open_state(Path::new(home)).unwrap();
    let mut writer = Writer { conn, number, writes: 0, longest: Duration::ZERO };
    let mut epoch = EPOCH;
    tell("ready");
    await_go();
    for life in (0x1000 * (number + 1)).. {
        if writer.writes >= WRITES {
            break;
        }
        writer.live(life, &mut epoch);
    }
    tell(&format!("done {} {}", writer.writes, writer.longest.as_micros()));
}

/// What the processes were told, all in all.
#[derive(Default)]
struct Told {
    rows: BTreeMap<(String, i64), Option<String>>,
    epochs: BTreeSet<i64>,
    removed: BTreeSet<String>,
    done: u32,
    longest: Duration,
}

impl Told {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let id = |number: &str| vm(number.parse().unwrap()).to_string();
        let new = match words[..] {
            ["row", number, version] => {
                self.rows.insert((id(number), version.parse().unwrap()), None).is_none()
            }
            ["row", number, version, tag] => {
                let row = (id(number), version.parse().unwrap());
                self.rows.insert(row, Some(tag.to_owned())).is_none()
            }
            ["epoch", epoch] => self.epochs.insert(epoch.parse().unwrap()),
            ["removed", number] => self.removed.insert(id(number)),
            ["done", writes, longest] => {
                self.done += writes.parse::<u32>().unwrap();
                let longest = Duration::from_micros(longest.parse().unwrap());
                self.longest = self.longest.max(longest);
                true
            }
            _ => panic!("{line}"),
        };
        assert!(new, "told twice: {line}");
    }
}

#[test]
fn eight_processes_write_a_thousand_times_each() {
    let home = Home::new();
    let mut first = home.writer();
    let mut told = Told::default();
    for number in [SHARED, CONTESTED] {
        apply_one(&mut first, insert(vm(number))).unwrap();
        told.hear(&format!("row {number} 1"));
    }
    let mut children: Vec<Child> = (0..PROCESSES)
        .map(|number| {
            let task = format!("{number} {}", home.path.display());
            Child::start("hostile_writers::writes_many", &task)
        })
        .collect();
    for child in &mut children {
        assert_eq!(child.hear().unwrap(), "ready");
    }
    for child in &mut children {
        child.go();
    }
    let lines: Vec<Vec<String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = children
            .into_iter()
            .map(|mut child| {
                scope.spawn(move || {
                    let lines = std::iter::from_fn(|| child.hear()).collect();
                    assert!(child.end(), "a writer failed");
                    lines
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for line in lines.iter().flatten() {
        told.hear(line);
    }
    note(&format!("{} writes, the longest took {:?}", told.done, told.longest));
    assert!(told.done >= PROCESSES * WRITES);
    check_all(&home.plain(), &told);
}

fn check_all(conn: &Connection, told: &Told) {
    check_integrity(conn);
    let mut query = conn.prepare("SELECT vm_id, version, last_error FROM vm_lifecycle").unwrap();
    let stored: BTreeMap<(String, i64), String> = query
        .query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert!(stored.keys().eq(told.rows.keys()), "a row was lost, or is there untold");
    let mut last: BTreeMap<&str, i64> = BTreeMap::new();
    for ((id, version), said) in &stored {
        let before = last.insert(id, *version).unwrap_or(0);
        assert_eq!(*version, before + 1, "{id} has a gap");
        if let Some(tag) = &told.rows[&(id.clone(), *version)] {
            assert_eq!(said, tag, "{id} {version}");
        }
    }
    let raises = i64::try_from(told.epochs.len()).unwrap();
    assert!(told.epochs.iter().copied().eq(2..raises + 2), "{:?}", told.epochs);
    let epoch: i64 = conn
        .query_row(
            "SELECT owner_epoch FROM vm_nodes WHERE vm_id = ?1",
            [vm(CONTESTED).to_string()],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(epoch, raises + 1);
    let mut query = conn.prepare("SELECT id FROM vms").unwrap();
    let here: BTreeSet<String> =
        query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    let expected: BTreeSet<String> =
        last.keys().filter(|id| !told.removed.contains(**id)).map(|id| (*id).to_owned()).collect();
    assert_eq!(here, expected);
}

/// Writes to one VM, one to three writes at a time, until it is killed.
#[test]
#[ignore = "a helper process of the test below"]
fn writes_until_it_is_killed() {
    let Some(task) = task() else { return };
    let (number, home) = task.split_once(' ').unwrap();
    let id = vm(number.parse().unwrap());
    let mut conn = open_state(Path::new(home)).unwrap();
    apply_one(&mut conn, insert(id)).unwrap();
    tell("1 ");
    let mut written = 1;
    for size in (1..=MOST_AT_ONCE).cycle() {
        let tags: Vec<String> = (0..size).map(|n| format!("write-{}", written + n)).collect();
        written += size;
        let batch =
            tags.iter().map(|tag| set_phase_saying(id, EPOCH, Phase::Creating, tag)).collect();
        for (answer, tag) in conn.apply(batch).into_iter().zip(tags) {
            match answer {
                Ok(WriteOutcome::Version(version)) => tell(&format!("{version} {tag}")),
                other => panic!("{other:?}"),
            }
        }
    }
}

const MOST_AT_ONCE: usize = 3;
const KILLS: u32 = 200;

#[test]
fn a_writer_is_killed_two_hundred_times() {
    let mut dice = Dice::new("a_writer_is_killed_two_hundred_times");
    let home = Home::new();
    drop(home.writer());
    let mut acknowledged = BTreeMap::new();
    for round in 1..=KILLS {
        // Every other time nobody else has it open, so whoever comes next repairs it.
        let other = (round % 2 == 0).then(|| home.writer());
        let task = format!("{round} {}", home.path.display());
        let mut child = Child::start("hostile_writers::writes_until_it_is_killed", &task);
        let mut told = Vec::new();
        for _ in 0..dice.below(60) {
            told.push(child.hear().unwrap());
        }
        child.kill();
        told.extend(std::iter::from_fn(|| child.hear()));
        drop(child);
        let rows: BTreeMap<i64, String> = told
            .iter()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(version, tag)| (version.parse().unwrap(), tag.to_owned()))
            .collect();
        assert_eq!(rows.len(), told.len(), "round {round}: a number was given twice");
        let told = rows;
        let conn = home.plain();
        check_integrity(&conn);
        let stored = stored_rows(&conn, round);
        let untold = stored.keys().filter(|version| !told.contains_key(version)).count();
        assert!(untold <= MOST_AT_ONCE, "round {round}: {untold} rows that nobody was told of");
        assert!(told.iter().all(|row| stored.get(row.0) == Some(row.1)), "round {round}");
        acknowledged.insert(round, told);
        drop(other);
    }
    let conn = home.plain();
    for (round, told) in &acknowledged {
        let stored = stored_rows(&conn, *round);
        assert!(told.iter().all(|row| stored.get(row.0) == Some(row.1)), "round {round}");
    }
    let rows: usize = acknowledged.values().map(BTreeMap::len).sum();
    note(&format!("{KILLS} kills, {rows} acknowledged rows"));
}

fn stored_rows(conn: &Connection, number: u32) -> BTreeMap<i64, String> {
    let mut query =
        conn.prepare("SELECT version, last_error FROM vm_lifecycle WHERE vm_id = ?1").unwrap();
    let rows = query.query_map([vm(number).to_string()], |row| Ok((row.get(0)?, row.get(1)?)));
    rows.unwrap().collect::<Result<_, _>>().unwrap()
}
