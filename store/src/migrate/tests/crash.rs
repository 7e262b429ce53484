//! A process that opens a database dies before its k-th call that changes files, for every k; with
//! nobody else there, and with others who have the database open and write at that very moment.
//!
//! After each death: what is seen at once is a state between two migrations, never damage; the next
//! who opens it gets what an undisturbed process would have got; nothing that was acknowledged is
//! lost. And the same without a death: a write of another process at any moment is kept.

use nix::unistd::Pid;

use super::scenario::{Dump, Scenario, dump};
use super::tracer::{Call, Then, trace};
use super::*;
use crate::child::{Child, await_go, note, task, tell};

/// Opens the database as its scenario says, on a thread that is traced.
#[test]
#[ignore = "a helper process of the tests here"]
fn opens() {
    let Some(task) = task() else { return };
    let (scenario, dir) = task.split_once(' ').unwrap();
    let scenario = Scenario::named(scenario);
    let files = DbFiles::new(dir.as_ref(), "test.db");
    let opening = std::thread::spawn(move || {
        tell(&rustix::thread::gettid().as_raw_nonzero().to_string());
        await_go();
        drop(open(&files, scenario.known()));
    });
    opening.join().unwrap();
}

/// Others in another process: one who reads all the time, one who writes.
struct Others {
    reader: Connection,
    seen: Dump,
    writer: Connection,
}

impl Others {
    fn of(files: &DbFiles) -> Self {
        let reader = writer(files).unwrap();
        reader.execute_batch("BEGIN").unwrap();
        let seen = dump(&reader);
        let writer = Connection::open(&files.db).unwrap();
        writer.busy_timeout(Duration::ZERO).unwrap();
        Self { reader, seen, writer }
    }

    /// Writes if it can be done at once; whether it was acknowledged.
    fn write(&self, act: &str) -> bool {
        match self.writer.execute_batch(act) {
            Ok(()) => true,
            Err(e) if DbFault::of(&e) == DbFault::Busy => false,
            Err(e) => panic!("{e}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Company {
    Alone,
    WithOthers,
}

/// Whether this moment differs from the one before it.
fn is_a_moment(call: Call, company: Company, then: Then) -> bool {
    match (call, company, then) {
        (Call::Change(_), ..) => true,
        // Whoever comes first takes no lock from the dead, and writes the shared memory anew.
        (_, Company::Alone, _) => false,
        (Call::Lock, ..) => true,
        // What others can do before an unlock is what they can do before the call after it.
        (Call::Unlock, Company::WithOthers, then) => then == Then::Kill,
    }
}

/// What may be seen, by what others wrote.
struct Expected {
    scenario: Scenario,
    stages: Vec<(Vec<&'static str>, Vec<Dump>)>,
}

impl Expected {
    fn of(scenario: Scenario) -> Self {
        let acts: Vec<Vec<&str>> = if scenario == Scenario::Fresh {
            vec![vec![]]
        } else {
            (0..4).map(|i| if i == 3 { vec![] } else { vec![scenario.act(i)] }).collect()
        };
        let stages = acts.into_iter().map(|acts| (acts.clone(), scenario.stages(&acts))).collect();
        Self { scenario, stages }
    }

    fn after(&self, acts: &[&str]) -> &[Dump] {
        &self.stages.iter().find(|(known, _)| known == acts).unwrap().1
    }
}

/// One life of the child. Answers what the k-th moment was, if it came to it.
fn play(expected: &Expected, company: Company, then: Then, k: usize) -> Option<Call> {
    let scenario = expected.scenario;
    let db = db();
    scenario.prepare(&db.files);
    let others = (company == Company::WithOthers).then(|| Others::of(&db.files));
    let helper = "migrate::tests::crash::opens";
    let mut child =
        Child::start(helper, &format!("{} {}", scenario.name(), db.files.dir.display()));
    let thread = Pid::from_raw(child.hear().unwrap().parse().unwrap());
    let mut moments = 0;
    let mut moment = None;
    let mut acts = Vec::new();
    let before = |call| {
        moments += usize::from(is_a_moment(call, company, then));
        if moments < k || moment.is_some() {
            return Then::GoOn;
        }
        moment = Some(call);
        // SQLite waits ten seconds for one who holds a lock that is only ever held for an instant.
        if let Some(others) = others.as_ref().filter(|_| call != Call::Unlock)
            && others.write(scenario.act(k))
        {
            acts.push(scenario.act(k));
        }
        then
    };
    trace(thread, || child.go(), before);
    drop(child);
    let when = format!("{scenario:?} {company:?} {then:?} {k} {moment:?} {acts:?}");
    let stages = expected.after(&acts);
    look(&db, others.as_ref(), stages, &when);
    finish(&db, scenario, stages, !acts.is_empty(), &when);
    if let Some(others) = others {
        assert_eq!(dump(&others.reader), others.seen, "{when}: a reader's view changed");
    }
    moment
}

/// What a plain connection sees right after the death.
fn look(db: &Db, others: Option<&Others>, stages: &[Dump], when: &str) {
    if let Some(others) = others {
        check(&others.writer, stages, when);
        return;
    }
    // Whoever looks repairs: the next one shall find what the dead one left.
    let copy = TempDir::new().unwrap();
    let Ok(entries) = fs::read_dir(&db.files.dir) else { return };
    for entry in entries {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("test.db");
    if path.try_exists().unwrap() {
        check(&Connection::open(path).unwrap(), stages, when);
    }
}

fn check(conn: &Connection, stages: &[Dump], when: &str) {
    let report: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(report, "ok", "{when}");
    let seen = dump(conn);
    assert!(stages.contains(&seen), "{when}: {seen:#?}");
}

/// The next processes open it, the second with migrations that work.
fn finish(db: &Db, scenario: Scenario, stages: &[Dump], others_wrote: bool, when: &str) {
    if scenario.fails() {
        let told = recovery(open(&db.files, scenario.known()).unwrap_err());
        let backup = db.files.backup();
        let (stage, kept) = match told {
            Recovery::Restored => (0, false),
            Recovery::KeptPartly { .. } if others_wrote => (1, true),
            other => panic!("{when}: {other:?}"),
        };
        assert_eq!(backup.try_exists().unwrap(), kept, "{when}");
        check(&writer(&db.files).unwrap(), &stages[stage..=stage], when);
    }
    let conn = open(&db.files, scenario.repaired()).unwrap_or_else(|e| panic!("{when}: {e:?}"));
    check(&conn, &stages[stages.len() - 1..], when);
    assert!(connect::is_wal(&conn).unwrap(), "{when}");
    let left = [
        db.files.backup(),
        db.files.backup_in_the_making(),
        db.files.journal_of_backup_in_the_making(),
    ];
    for path in left {
        assert!(!path.try_exists().unwrap(), "{when}: {} is left", path.display());
    }
}

/// Every k until the child has no k-th call any more.
fn play_all(scenario: Scenario, company: Company, then: Then) {
    let expected = Expected::of(scenario);
    let mut kinds = BTreeMap::new();
    let mut k = 1;
    while let Some(call) = play(&expected, company, then, k) {
        let kind = match call {
            Call::Change(name) => name,
            Call::Lock => "lock",
            Call::Unlock => "unlock",
        };
        *kinds.entry(kind).or_insert(0) += 1;
        k += 1;
    }
    note(&format!("{scenario:?}, {company:?}, {then:?}: {} moments, {kinds:?}", k - 1));
    assert!(k > 20, "only {k} moments: the calls are not seen");
}

#[test]
fn killed_at_any_moment_of_setting_up() {
    play_all(Scenario::Fresh, Company::Alone, Then::Kill);
}

#[test]
fn killed_at_any_moment_of_migrating_what_the_reference_wrote() {
    play_all(Scenario::Reference, Company::Alone, Then::Kill);
    play_all(Scenario::Reference, Company::WithOthers, Then::Kill);
}

#[test]
fn killed_at_any_moment_of_a_migration_that_fails_and_is_undone() {
    play_all(Scenario::FailsLater, Company::Alone, Then::Kill);
    play_all(Scenario::FailsLater, Company::WithOthers, Then::Kill);
}

#[test]
fn killed_at_any_moment_of_going_on_after_a_crash() {
    play_all(Scenario::GoesOn, Company::Alone, Then::Kill);
    play_all(Scenario::GoesOn, Company::WithOthers, Then::Kill);
}

#[test]
fn killed_at_any_moment_of_undoing_from_a_leftover_backup() {
    play_all(Scenario::PutBack, Company::Alone, Then::Kill);
    play_all(Scenario::PutBack, Company::WithOthers, Then::Kill);
}

#[test]
fn what_others_write_at_any_moment_of_a_migration_is_kept() {
    play_all(Scenario::Reference, Company::WithOthers, Then::GoOn);
    play_all(Scenario::GoesOn, Company::WithOthers, Then::GoOn);
}

#[test]
fn what_others_write_at_any_moment_of_undoing_is_kept() {
    play_all(Scenario::FailsLater, Company::WithOthers, Then::GoOn);
    play_all(Scenario::PutBack, Company::WithOthers, Then::GoOn);
}
