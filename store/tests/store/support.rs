//! A home in a temporary directory, and values to write into it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use jiff::{Timestamp, ToSpan as _};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::record::Resources;
use matchlock_store::{
    NewVm, ReadPool, STATE_DB, WriteConn, WriteError, WriteOp, WriteOutcome, open_state,
};
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

pub(crate) struct Home {
    _dir: TempDir,
    pub(crate) path: PathBuf,
}

impl Home {
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        // A name with every sign that has a meaning in SQLite's addresses.
        let path = dir.path().join("a home?mode=memory#100%41");
        Self { _dir: dir, path }
    }

    pub(crate) fn writer(&self) -> WriteConn {
        open_state(&self.path).unwrap()
    }

    pub(crate) fn reader(&self) -> ReadPool {
        ReadPool::open(&self.path).unwrap().unwrap()
    }

    /// A connection as any other program would open it.
    pub(crate) fn plain(&self) -> Connection {
        plain(&self.path)
    }
}

/// A connection to the database of this home, as any other program would open it.
pub(crate) fn plain(home: &Path) -> Connection {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(home.join(STATE_DB), flags).unwrap()
}

/// Makes this home as the reference leaves it.
pub(crate) fn reference_home_in(home: &Path) {
    fs::create_dir(home).unwrap();
    let conn = Connection::open(home.join(STATE_DB)).unwrap();
    conn.execute_batch(include_str!("fixtures/reference.sql")).unwrap();
    conn.close().unwrap();
}

/// Each file in this directory with its bytes. Nobody may have the database open in this process.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

/// SQLite's own check of everything.
pub(crate) fn check_integrity(conn: &Connection) {
    let report: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(report, "ok");
}

pub(crate) const EPOCH: OwnerEpoch = OwnerEpoch(1);

pub(crate) fn vm(number: u32) -> VmId {
    VmId::new(number)
}

/// A moment so many milliseconds after a fixed one.
pub(crate) fn at(millis: i64) -> Timestamp {
    let start: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
    start.checked_add(millis.milliseconds()).unwrap()
}

pub(crate) fn process(pid: i32) -> ProcessIdentity {
    ProcessIdentity {
        pid,
        start_ticks: 123_456,
        boot_id: "11111111-2222-3333-4444-555555555555".to_owned(),
    }
}

pub(crate) fn namespaces() -> Namespaces {
    Namespaces { net: "4:4026531840".to_owned(), pid: "4:4026531836".to_owned() }
}

pub(crate) fn resources() -> Resources {
    Resources {
        state_dir: Some("/home/vms/x".to_owned()),
        tap_name: Some("fc-00000001".to_owned()),
        ..Resources::default()
    }
}

pub(crate) fn new_vm(id: VmId) -> NewVm {
    NewVm {
        id,
        image: "tools:1.2".to_owned(),
        config_json: r#"{"cpus":1}"#.to_owned(),
        owner: process(4_000),
        namespaces: namespaces(),
        ephemeral: true,
        backend: "fake".to_owned(),
        resources: resources(),
        created_at: at(0),
    }
}

pub(crate) fn insert(id: VmId) -> WriteOp {
    WriteOp::InsertVm { record: Box::new(new_vm(id)) }
}

pub(crate) fn set_phase(id: VmId, phase: Phase) -> WriteOp {
    set_phase_as(id, EPOCH, phase)
}

pub(crate) fn set_phase_as(id: VmId, epoch: OwnerEpoch, phase: Phase) -> WriteOp {
    WriteOp::SetPhase {
        vm: id,
        epoch,
        phase,
        last_error: None,
        backend: None,
        resources: None,
        cleanup: Vec::new(),
        at: at(10),
    }
}

/// A phase with an error text.
pub(crate) fn set_phase_saying(id: VmId, epoch: OwnerEpoch, phase: Phase, error: &str) -> WriteOp {
    let mut op = set_phase_as(id, epoch, phase);
    if let WriteOp::SetPhase { last_error, .. } = &mut op {
        *last_error = Some(error.to_owned());
    }
    op
}

pub(crate) fn apply_one(conn: &mut WriteConn, op: WriteOp) -> Result<WriteOutcome, WriteError> {
    let mut answers = conn.apply(vec![op]);
    assert_eq!(answers.len(), 1);
    answers.remove(0)
}

/// Writes the phases up to `cleaned`.
pub(crate) fn clean(conn: &mut WriteConn, id: VmId) {
    for phase in [Phase::Cleaning, Phase::Cleaned] {
        apply_one(conn, set_phase(id, phase)).unwrap();
    }
}
