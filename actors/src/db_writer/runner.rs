//! Where the writing is done: on a thread of its own, or in a task.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use matchlock_model::failure::panic_text;
use matchlock_store::{WriteError, WriteOp, WriteOutcome};
use ractor::{ActorProcessingErr, ActorRef};
use tokio::sync::mpsc;
use tokio::task;

use super::actor::{DbWriterMsg, OpenStore, Reply, Store, Waiting, answer};
use super::{BATCH_OPS, DbError};

/// Where the writing is done, and what does it in the current life; kept by the root so that the
/// next life can wait for the last one's end.
pub type ThreadSlot = Arc<Runner>;

/// The moment of a batch at which a simulated writer is held up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It was taken from the queue and is not written yet.
    BeforeCommit,
    /// It was written and is not answered yet.
    AfterCommit,
}

/// How long a simulated writer is held up.
pub type Pace = Box<dyn Fn(Moment) -> BoxFuture<'static, ()> + Send + Sync>;

/// Where the writing is done: on a thread of its own, unless it is simulated.
#[derive(Default)]
pub struct Runner {
    /// It writes in a task of the actor's runtime, at this pace.
    simulated: Option<Arc<Pace>>,
    current: Mutex<Option<Current>>,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner")
            .field("simulated", &self.simulated.is_some())
            .finish_non_exhaustive()
    }
}

enum Current {
    Thread(thread::JoinHandle<()>),
    Task(task::JoinHandle<()>),
}

/// What one life of the writer has to do.
pub(super) struct Work {
    pub(super) waiting: mpsc::Receiver<Waiting>,
    pub(super) actor: ActorRef<DbWriterMsg>,
    pub(super) queue_wait: Duration,
}

impl Runner {
    /// For simulations: a task instead of the thread, so that what happens when depends on nothing
    /// but the runtime, whose time may be paused. The store is opened, and written, in place.
    #[must_use]
    pub fn simulated(pace: Pace) -> ThreadSlot {
        Arc::new(Self { simulated: Some(Arc::new(pace)), current: Mutex::default() })
    }

    pub(super) async fn start(
        &self,
        open: &OpenStore,
        work: Work,
    ) -> Result<(), ActorProcessingErr> {
        let current = match &self.simulated {
            None => {
                let open = Arc::clone(open);
                let store = task::spawn_blocking(move || open()).await??;
                let builder = thread::Builder::new().name("db-writer".into());
                Current::Thread(builder.spawn(move || write_until_closed(store, work))?)
            }
            Some(pace) => {
                Current::Task(task::spawn(write_in_task(open()?, work, Arc::clone(pace))))
            }
        };
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(current);
        Ok(())
    }
}

/// Waits until the thread of an ended life has written everything.
///
/// # Errors
/// When it panicked past its own guard.
pub async fn join_thread(slot: &ThreadSlot) -> Result<(), DbError> {
    let current = slot.current.lock().unwrap_or_else(PoisonError::into_inner).take();
    let ended = match current {
        None => return Ok(()),
        Some(Current::Thread(thread)) => {
            matches!(task::spawn_blocking(move || thread.join()).await, Ok(Ok(())))
        }
        Some(Current::Task(task)) => task.await.is_ok(),
    };
    if ended { Ok(()) } else { Err(DbError::Lost) }
}

/// The thread: ends when the queue is closed and empty, or with a panic, which it tells the actor.
fn write_until_closed(mut store: Box<dyn Store>, mut work: Work) {
    // Nothing of what the panic may have left half done is used again: the next life opens anew.
    let guarded = AssertUnwindSafe(|| {
        let mut batch = Vec::with_capacity(BATCH_OPS);
        while work.waiting.blocking_recv_many(&mut batch, BATCH_OPS) > 0 {
            let (ops, replies) = take(&mut batch, work.queue_wait);
            if !ops.is_empty() {
                give(replies, store.apply(ops));
            }
        }
    });
    if let Err(panic) = catch_unwind(guarded) {
        tell(&work.actor, panic_text(&*panic));
    }
}

/// The same as a task.
async fn write_in_task(mut store: Box<dyn Store>, mut work: Work, pace: Arc<Pace>) {
    let guarded = AssertUnwindSafe(async {
        let mut batch = Vec::with_capacity(BATCH_OPS);
        while work.waiting.recv_many(&mut batch, BATCH_OPS).await > 0 {
            let (ops, replies) = take(&mut batch, work.queue_wait);
            if ops.is_empty() {
                continue;
            }
            pace(Moment::BeforeCommit).await;
            let outcomes = store.apply(ops);
            pace(Moment::AfterCommit).await;
            give(replies, outcomes);
        }
    });
    if let Err(panic) = guarded.catch_unwind().await {
        tell(&work.actor, panic_text(&*panic));
    }
}

fn tell(actor: &ActorRef<DbWriterMsg>, panic: &str) {
    if actor.cast(DbWriterMsg::ThreadPanicked { message: panic.to_owned() }).is_err() {
        tracing::error!("the database writer's thread panicked after its actor had ended");
    }
}

/// Takes all that is queued; one commit writes it. A panic drops the reply ports of its batch, which
/// their callers see as [`DbError::Call`]: what they asked for may have been written.
fn take(batch: &mut Vec<Waiting>, queue_wait: Duration) -> (Vec<WriteOp>, Vec<Reply>) {
    batch.drain(..).filter_map(|waiting| waiting.take(queue_wait)).unzip()
}

fn give(replies: Vec<Reply>, outcomes: Vec<Result<WriteOutcome, WriteError>>) {
    for (reply, outcome) in replies.into_iter().zip(outcomes) {
        answer(reply, outcome.map_err(DbError::from));
    }
}
