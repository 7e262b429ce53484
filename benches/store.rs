//! The store: what group commit brings, and what opening and listing cost. `make bench`.

mod common;

use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::future::join_all;
use matchlock_actors::db_writer::{
    DbHandle, DbWriter, DbWriterArgs, QUEUE_WAIT, Store, ThreadSlot,
};
use matchlock_actors::handle::ServiceSlot;
use matchlock_model::phase::Phase;
use matchlock_store::{WriteConn, WriteError, WriteOp, WriteOutcome, open_state};
use ractor::Actor;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// How many writes each caller makes one after the other in a round.
const EACH: u64 = 8;

/// Gives each op a transaction of its own.
struct OneByOne(WriteConn);

impl Store for OneByOne {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        ops.into_iter().flat_map(|op| self.0.apply(vec![op])).collect()
    }
}

/// A state directory with this many VMs.
fn home_with(vms: u32, home: &Path) -> WriteConn {
    let mut conn = open_state(home).expect("a fresh state directory");
    common::write(&mut conn, (0..vms).map(|number| common::insert(number, home)).collect());
    for phase in [Phase::Created, Phase::Starting, Phase::Running] {
        common::write(&mut conn, (0..vms).map(|number| common::change(number, phase, 0)).collect());
    }
    conn
}

type Wrap = fn(WriteConn) -> Box<dyn Store>;

async fn writer(home: &Path, wrap: Wrap) -> DbHandle {
    let path = home.to_owned();
    let args = DbWriterArgs {
        open: Arc::new(move || Ok(wrap(open_state(&path)?))),
        thread: ThreadSlot::default(),
        queue_wait: QUEUE_WAIT,
    };
    let (actor, _) = Actor::spawn(None, DbWriter, args).await.expect("a writer");
    let slot = ServiceSlot::new("the database writer");
    slot.set(Some(actor));
    DbHandle(slot.handle())
}

/// Each caller writes the rows of a VM of its own, and waits for each answer.
async fn round(db: &DbHandle, callers: u32, counter: &AtomicU64) {
    let caller = |number: u32| async move {
        for _ in 0..EACH {
            let text = counter.fetch_add(1, Ordering::Relaxed);
            let written = db.write(common::change(number, Phase::Running, text)).await;
            written.expect("a write of the benchmark's own");
        }
    };
    join_all((0..callers).map(caller)).await;
}

fn writing(c: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let mut group = c.benchmark_group("write");
    let ways: [(&str, Wrap); 2] = [
        ("group_commit", |conn| Box::new(conn)),
        ("one_transaction_each", |conn| Box::new(OneByOne(conn))),
    ];
    for callers in [1_u32, 16, 128] {
        for (name, wrap) in ways {
            let home = TempDir::new().expect("a directory");
            drop(home_with(callers, home.path()));
            let (db, counter) = (runtime.block_on(writer(home.path(), wrap)), AtomicU64::new(1));
            group.throughput(Throughput::Elements(u64::from(callers) * EACH));
            group.bench_function(BenchmarkId::new(name, callers), |b| {
                b.iter(|| runtime.block_on(round(&db, callers, &counter)));
            });
        }
    }
    group.finish();
}

fn opening(c: &mut Criterion) {
    let home = TempDir::new().expect("a directory");
    drop(home_with(1_000, home.path()));
    c.bench_function("open/nothing_pending", |b| {
        b.iter(|| black_box(open_state(home.path()).expect("a database that is there")));
    });
}

/// As a whole process, from its start to its end.
fn listing(c: &mut Criterion) {
    let home = TempDir::new().expect("a directory");
    drop(home_with(1_000, home.path()));
    for (name, args) in
        [("list/1000_vms", vec!["list"]), ("list/1000_vms_json", vec!["list", "--json"])]
    {
        c.bench_function(name, |b| {
            b.iter(|| {
                let status = Command::new(env!("CARGO_BIN_EXE_matchlock"))
                    .args(&args)
                    .env("MATCHLOCK_HOME", home.path())
                    .stdout(Stdio::null())
                    .status();
                assert!(status.expect("the program").success());
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    targets = writing, opening, listing
}
criterion_main!(benches);
