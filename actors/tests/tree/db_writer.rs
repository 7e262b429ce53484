//! The writer, on its thread and in a task as simulations have it: what is queued is committed at once, nothing beyond the bound is taken, and whatever
//! fails, nobody is told anything that is not so.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use matchlock_actors::db_writer::{
    BATCH_OPS, DbError, DbHandle, DbWriter, DbWriterArgs, DbWriterMsg, QUEUE_OPS, QUEUE_WAIT,
    Runner, Store, ThreadSlot, join_thread,
};
use matchlock_actors::handle::{CallError, ServiceSlot};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::{InvalidTransition, Phase};
use matchlock_model::record::Resources;
use matchlock_store::{NewVm, ReadPool, WriteConn, WriteError, WriteOp, WriteOutcome, open_state};
use ractor::concurrency::{OneshotReceiver, oneshot};
use ractor::{Actor, ActorRef};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::world::{PATIENCE, World};

type Answer = OneshotReceiver<Result<WriteOutcome, DbError>>;
type Answers = Vec<Result<WriteOutcome, WriteError>>;

/// Tells the size of each batch, and writes it when it is let.
struct Gate {
    conn: WriteConn,
    asked: Sender<usize>,
    let_through: Receiver<()>,
}

impl Store for Gate {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Answers {
        self.asked.send(ops.len()).unwrap();
        // As a task it must not keep others of its runtime waiting.
        tokio::task::block_in_place(|| self.let_through.recv().unwrap());
        self.conn.apply(ops)
    }
}

/// A writer behind a gate.
struct Gated {
    home: TempDir,
    handle: DbHandle,
    actor: ActorRef<DbWriterMsg>,
    joined: JoinHandle<()>,
    thread: ThreadSlot,
    asked: Receiver<usize>,
    open: Sender<()>,
}

impl Gated {
    async fn new(thread: ThreadSlot) -> Self {
        Self::patient(thread, QUEUE_WAIT).await
    }

    async fn patient(thread: ThreadSlot, queue_wait: Duration) -> Self {
        let home = tempfile::tempdir().unwrap();
        let (asked_tx, asked) = channel();
        let (open, let_through) = channel();
        let conn = open_state(home.path()).unwrap();
        let gate = Mutex::new(Some(Gate { conn, asked: asked_tx, let_through }));
        let args = DbWriterArgs {
            open: Arc::new(move || Ok(Box::new(gate.lock().unwrap().take().unwrap()))),
            thread: Arc::clone(&thread),
            queue_wait,
        };
        let (actor, joined) = Actor::spawn(None, DbWriter, args).await.unwrap();
        let slot = ServiceSlot::new("the database writer");
        slot.set(Some(actor.clone()));
        let handle = DbHandle(slot.handle());
        Self { home, handle, actor, joined, thread, asked, open }
    }

    /// Puts a write into the actor's mailbox.
    fn send(&self, op: WriteOp) -> Answer {
        let (reply, answer) = oneshot();
        let message = DbWriterMsg::Write { op: Box::new(op), reply: reply.into() };
        self.actor.cast(message).unwrap();
        answer
    }
}

/// The real runner, and that of simulations, which nothing holds up here: both keep all that is said.
fn runners() -> [ThreadSlot; 2] {
    [ThreadSlot::default(), Runner::simulated(Box::new(|_| Box::pin(std::future::ready(()))))]
}

fn insert(number: u32) -> WriteOp {
    WriteOp::InsertVm {
        record: Box::new(NewVm {
            id: VmId::new(number),
            image: "i".into(),
            config_json: "{}".into(),
            owner: ProcessIdentity { pid: 1, start_ticks: 1, boot_id: String::new() },
            namespaces: Namespaces { net: String::new(), pid: String::new() },
            ephemeral: true,
            backend: "fake".into(),
            resources: Resources::default(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
        }),
    }
}

fn set_phase(number: u32, phase: Phase) -> WriteOp {
    WriteOp::SetPhase {
        vm: VmId::new(number),
        epoch: OwnerEpoch::FIRST,
        phase,
        last_error: None,
        backend: None,
        resources: None,
        cleanup: Vec::new(),
        at: jiff::Timestamp::UNIX_EPOCH,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_queued_is_committed_at_once_and_answered_one_by_one() {
    for runner in runners() {
        what_is_queued_is_committed_at_once_and_answered_one_by_one_on(runner).await;
    }
}

async fn what_is_queued_is_committed_at_once_and_answered_one_by_one_on(runner: ThreadSlot) {
    let gated = Gated::new(runner).await;
    let first = gated.send(insert(0));
    assert_eq!(gated.asked.recv_timeout(PATIENCE), Ok(1));
    let mut sent = Vec::new();
    for number in 1..=20 {
        sent.push(gated.send(insert(number)));
    }
    // One of them is refused, and its refusal is its own.
    sent.push(gated.send(set_phase(3, Phase::Running)));
    // A drained actor has handed everything on.
    gated.actor.drain().unwrap();
    tokio::time::timeout(PATIENCE, gated.joined).await.unwrap().unwrap();
    gated.open.send(()).unwrap();
    assert!(matches!(first.await.unwrap(), Ok(WriteOutcome::Version(1))));
    assert_eq!(gated.asked.recv_timeout(PATIENCE), Ok(21), "all that was queued, at once");
    gated.open.send(()).unwrap();
    let refused = sent.pop().unwrap().await.unwrap();
    let transition = InvalidTransition { from: Phase::Creating, to: Phase::Running };
    assert!(
        matches!(&refused, Err(DbError::Write(WriteError::Transition(t))) if *t == transition),
        "{refused:?}"
    );
    for answer in join_all(sent).await {
        assert!(matches!(answer.unwrap(), Ok(WriteOutcome::Version(1))));
    }
    let reader = ReadPool::open(gated.home.path()).unwrap().unwrap();
    assert_eq!(reader.vms().await.unwrap().len(), 21);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_the_queue_holds_is_refused_retryably_and_nothing_taken_is_lost() {
    for runner in runners() {
        more_than_the_queue_holds_is_refused_retryably_and_nothing_taken_is_lost_on(runner).await;
    }
}

async fn more_than_the_queue_holds_is_refused_retryably_and_nothing_taken_is_lost_on(
    runner: ThreadSlot,
) {
    let gated = Gated::new(runner).await;
    let first = gated.send(insert(0));
    assert_eq!(gated.asked.recv_timeout(PATIENCE), Ok(1));
    let many = u32::try_from(QUEUE_OPS).unwrap() + 30;
    let mut writes: Vec<_> = (1..=many).map(|number| gated.send(insert(number))).collect();
    // The refusals come while the gate is still shut.
    for refused in writes.drain(QUEUE_OPS..) {
        let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap();
        assert!(matches!(&refused, Err(e @ DbError::Overloaded) if e.retryable()), "{refused:?}");
    }
    let gate = std::thread::spawn(move || {
        gated.open.send(()).unwrap();
        let mut largest = 0;
        while let Ok(size) = gated.asked.recv() {
            largest = largest.max(size);
            gated.open.send(()).unwrap();
        }
        largest
    });
    assert!(first.await.unwrap().is_ok());
    for answer in join_all(writes).await {
        assert!(matches!(answer.unwrap(), Ok(WriteOutcome::Version(1))));
    }
    let reader = ReadPool::open(gated.home.path()).unwrap().unwrap();
    assert_eq!(reader.vms().await.unwrap().len(), QUEUE_OPS + 1);
    gated.actor.stop_and_wait(None, Some(PATIENCE)).await.unwrap();
    join_thread(&gated.thread).await.unwrap();
    assert!(gate.join().unwrap() <= BATCH_OPS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_writes_everything_that_was_sent() {
    for runner in runners() {
        draining_writes_everything_that_was_sent_on(runner).await;
    }
}

async fn draining_writes_everything_that_was_sent_on(runner: ThreadSlot) {
    let gated = Gated::new(runner).await;
    let mut sent = vec![gated.send(insert(0))];
    assert_eq!(gated.asked.recv_timeout(PATIENCE), Ok(1));
    for number in 1..300 {
        sent.push(gated.send(insert(number)));
    }
    gated.actor.drain().unwrap();
    tokio::time::timeout(PATIENCE, gated.joined).await.unwrap().unwrap();
    // Whoever comes now is told that it is over, and waits for nothing.
    let late = gated.handle.write(insert(1_000)).await.unwrap_err();
    assert!(matches!(late, DbError::Call(CallError::Died { .. })), "{late:?}");
    for _ in 0..300 {
        gated.open.send(()).unwrap();
    }
    join_thread(&gated.thread).await.unwrap();
    for answer in join_all(sent).await {
        assert!(matches!(answer.unwrap(), Ok(WriteOutcome::Version(1))));
    }
    let reader = ReadPool::open(gated.home.path()).unwrap().unwrap();
    assert_eq!(reader.vms().await.unwrap().len(), 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_waited_too_long_is_not_written_any_more() {
    for runner in runners() {
        what_has_waited_too_long_is_not_written_any_more_on(runner).await;
    }
}

async fn what_has_waited_too_long_is_not_written_any_more_on(runner: ThreadSlot) {
    let gated = Gated::patient(runner, Duration::from_millis(50)).await;
    let first = gated.send(insert(1));
    assert_eq!(gated.asked.recv_timeout(PATIENCE), Ok(1));
    let late = gated.send(insert(2));
    tokio::time::sleep(Duration::from_millis(100)).await;
    gated.open.send(()).unwrap();
    assert!(first.await.unwrap().is_ok());
    let late = late.await.unwrap();
    assert!(matches!(&late, Err(e @ DbError::Delayed) if e.retryable()), "{late:?}");
    gated.actor.stop_and_wait(None, Some(PATIENCE)).await.unwrap();
    drop(gated.open);
    assert_eq!(gated.asked.try_iter().sum::<usize>(), 0);
    let reader = ReadPool::open(gated.home.path()).unwrap().unwrap();
    assert_eq!(reader.vms().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_life_waits_until_the_last_one_has_written() {
    for runner in runners() {
        the_next_life_waits_until_the_last_one_has_written_on(runner).await;
    }
}

async fn the_next_life_waits_until_the_last_one_has_written_on(runner: ThreadSlot) {
    let gated = Gated::new(runner).await;
    let first = gated.send(insert(1));
    assert_eq!(gated.asked.recv_timeout(PATIENCE), Ok(1));
    gated.actor.kill();
    gated.joined.await.unwrap();
    let opened = Arc::new(AtomicBool::new(false));
    let (home, seen) = (gated.home.path().to_owned(), Arc::clone(&opened));
    let args = DbWriterArgs {
        open: Arc::new(move || {
            seen.store(true, Ordering::Relaxed);
            Ok(Box::new(open_state(&home)?))
        }),
        thread: Arc::clone(&gated.thread),
        queue_wait: QUEUE_WAIT,
    };
    let next = tokio::spawn(Actor::spawn(None, DbWriter, args));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!opened.load(Ordering::Relaxed) && !next.is_finished(), "two threads write");
    gated.open.send(()).unwrap();
    assert!(first.await.unwrap().is_ok());
    let (actor, joined) = next.await.unwrap().unwrap();
    assert!(opened.load(Ordering::Relaxed));
    actor.stop(None);
    joined.await.unwrap();
}

static PANIC_BEFORE: AtomicBool = AtomicBool::new(false);
static PANIC_AFTER: AtomicBool = AtomicBool::new(false);

/// Panics when it is told to, before or after it writes.
struct Panicking(Box<dyn Store>);

impl Store for Panicking {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Answers {
        assert!(!PANIC_BEFORE.swap(false, Ordering::Relaxed), "before, on purpose");
        let answers = self.0.apply(ops);
        assert!(!PANIC_AFTER.swap(false, Ordering::Relaxed), "after, on purpose");
        answers
    }
}

#[tokio::test]
async fn a_writer_whose_thread_panics_is_restarted_and_never_lies() {
    let world = World::with_store(|store| Box::new(Panicking(store))).await;
    for (number, switch, written) in [(1, &PANIC_BEFORE, false), (2, &PANIC_AFTER, true)] {
        switch.store(true, Ordering::Relaxed);
        let lost = world.deps.db.write(insert(number)).await.unwrap_err();
        assert!(matches!(lost, DbError::Call(CallError::Died { .. })), "{lost:?}");
        assert!(!lost.retryable(), "it may have been written");
        assert!(lost.to_string().contains("unknown"), "{lost}");
        let is_there = world.deps.reader.vm(VmId::new(number)).await.unwrap().is_some();
        assert_eq!(is_there, written, "the test's own panic came at another moment");
        // The next life writes, without anybody having asked for it. What reaches the last one while
        // it ends is lost with it, and told.
        let mut next = world.deps.db.write(insert(10 + number)).await;
        for _ in 0..10 {
            if !matches!(&next, Err(DbError::Ended | DbError::Call(CallError::Died { .. }))) {
                break;
            }
            next = world.deps.db.write(insert(10 + number)).await;
        }
        assert!(matches!(next, Ok(WriteOutcome::Version(1))), "{next:?}");
    }
    world.shutdown().await;
}
