//! Databases that are set up, migrated or put back, and what each may hold at any moment of it.
//!
//! # Invariants
//! * What a database may hold is computed by the migrations themselves, each run to its end.

use std::collections::BTreeMap;

use super::*;

/// A home in a certain state, and the list of migrations that it is then opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scenario {
    /// Nothing is there yet.
    Fresh,
    /// The reference has written it.
    Reference,
    /// The first migration and 100 rows are there, and the third migration fails.
    FailsLater,
    /// The second migration crashed after its commit; the third works.
    GoesOn,
    /// The second migration crashed after its commit; the third fails.
    PutBack,
}

const GOOD: &[Migration] = &[FIRST, SECOND, THIRD];
const FAILING: &[Migration] = &[FIRST, SECOND, THIRD_BAD];

impl Scenario {
    const ALL: [Self; 5] =
        [Self::Fresh, Self::Reference, Self::FailsLater, Self::GoesOn, Self::PutBack];

    pub(super) fn name(self) -> String {
        format!("{self:?}")
    }

    pub(super) fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|known| known.name() == name).unwrap()
    }

    /// What it is opened with.
    pub(super) fn known(self) -> &'static [Migration] {
        match self {
            Self::Fresh | Self::Reference => STATE,
            Self::GoesOn => GOOD,
            Self::FailsLater | Self::PutBack => FAILING,
        }
    }

    /// What works in the end.
    pub(super) fn repaired(self) -> &'static [Migration] {
        if self.fails() { GOOD } else { self.known() }
    }

    pub(super) fn fails(self) -> bool {
        self.known().len() == FAILING.len() && self.known()[2].sql == THIRD_BAD.sql
    }

    pub(super) fn prepare(self, db: &DbFiles) {
        match self {
            Self::Fresh => {}
            Self::Reference => {
                fs::create_dir(&db.dir).unwrap();
                let conn = Connection::open(&db.db).unwrap();
                let rows = include_str!("../../../tests/store/fixtures/reference.sql");
                conn.execute_batch(rows).unwrap();
                conn.close().unwrap();
            }
            Self::FailsLater => fill(db),
            Self::GoesOn | Self::PutBack => {
                fill(db);
                crash_second_migration(db);
            }
        }
    }

    /// What it may hold: before anything was done, and after each migration that works.
    pub(super) fn stages(self, acts: &[&str]) -> Vec<Dump> {
        let dir = TempDir::new().unwrap();
        let files = DbFiles::new(&dir.path().join("home"), "test.db");
        match self {
            Self::GoesOn | Self::PutBack => Self::FailsLater.prepare(&files),
            _ => self.prepare(&files),
        }
        files.prepare_dir().unwrap();
        files.create_db().unwrap();
        let mut conn = writer(&files).unwrap();
        connect::use_wal(&conn).unwrap();
        for act in acts {
            conn.execute_batch(act).unwrap();
        }
        let mut stages = vec![dump(&conn)];
        for migration in self.repaired() {
            apply(&mut conn, migration).unwrap();
            let now = dump(&conn);
            if stages.last() != Some(&now) {
                stages.push(now);
            }
        }
        stages
    }

    /// What another process may do at any moment, with the same outcome before and after each
    /// migration: adding, removing, changing a row.
    pub(super) fn act(self, number: usize) -> &'static str {
        let acts = match self {
            Self::Fresh => panic!("nobody else has a home that is not there"),
            Self::Reference => [
                "INSERT INTO vms (id, status, created_at, updated_at)
                 VALUES ('vm-000000f1', 'running', '2025-11-02T08:00:00Z', '')",
                "DELETE FROM vms WHERE id = 'vm-0000000c'",
                "UPDATE vms SET status = 'stopped' WHERE id = 'vm-0000000a'",
            ],
            Self::FailsLater | Self::GoesOn | Self::PutBack => [
                "INSERT INTO t (x) VALUES (1000)",
                "DELETE FROM t WHERE x = 50",
                "UPDATE t SET x = 1000 WHERE x = 50",
            ],
        };
        acts[number % acts.len()]
    }
}

/// A database with the first migration and 100 rows.
pub(super) fn fill(files: &DbFiles) {
    let conn = open(files, &[FIRST]).unwrap();
    conn.execute_batch(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100)
         INSERT INTO t SELECT i, 'note ' || i FROM n",
    )
    .unwrap();
    conn.close().unwrap();
}

/// As a process leaves it that was killed between the second migration and the third.
pub(super) fn crash_second_migration(files: &DbFiles) {
    let mut conn = writer(files).unwrap();
    backup::make(&conn, files).unwrap();
    apply(&mut conn, &SECOND).unwrap();
    conn.close().unwrap();
}

/// All that a database says: its schema, and the rows of each table. Times of migrations differ.
pub(super) type Dump = BTreeMap<String, Vec<String>>;

pub(super) fn dump(conn: &Connection) -> Dump {
    let strings = |sql: &str| -> Vec<String> {
        let mut query = conn.prepare(sql).unwrap();
        query.query_map([], |row| row.get(0)).unwrap().collect::<rusqlite::Result<_>>().unwrap()
    };
    let own = !conn.is_autocommit();
    if !own {
        conn.execute_batch("BEGIN").unwrap();
    }
    let mut all = Dump::new();
    for table in strings("SELECT name FROM sqlite_schema WHERE type = 'table'") {
        let columns = strings(&format!(
            "SELECT 'quote(\"' || name || '\")' FROM pragma_table_info('{table}')
             WHERE name <> 'applied_at'"
        ));
        let columns = columns.join(" || ',' || ");
        all.insert(
            table.clone(),
            strings(&format!("SELECT {columns} FROM \"{table}\" ORDER BY 1")),
        );
    }
    let schema = "SELECT name || ' ' || coalesce(sql, '') FROM sqlite_schema ORDER BY 1";
    all.insert("schema".to_owned(), strings(schema));
    if !own {
        conn.execute_batch("COMMIT").unwrap();
    }
    all
}
