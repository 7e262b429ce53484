//! The actor and its thread.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use matchlock_store::{OpenError, WriteConn, WriteOp, WriteOutcome};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::mpsc;

use super::{BATCH_OPS, DbError, QUEUE_OPS};

type Reply = RpcReplyPort<Result<WriteOutcome, DbError>>;

/// What the writer is asked.
pub enum DbWriterMsg {
    /// Write this.
    Write {
        /// What to write.
        op: Box<WriteOp>,
        /// Answered after the commit.
        reply: Reply,
    },
}

impl fmt::Debug for DbWriterMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { op, .. } => f.debug_tuple("Write").field(op).finish(),
        }
    }
}

/// Opens the store; called for each life of the writer.
pub type OpenStore = Arc<dyn Fn() -> Result<WriteConn, OpenError> + Send + Sync>;

/// The thread of the current life, kept by the root so that the next life can join it.
pub type ThreadSlot = Arc<Mutex<Option<JoinHandle<()>>>>;

/// What a writer is started with.
#[derive(Clone)]
pub struct DbWriterArgs {
    /// Opens the store.
    pub open: OpenStore,
    /// Where the thread is kept.
    pub thread: ThreadSlot,
}

impl fmt::Debug for DbWriterArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DbWriterArgs").finish_non_exhaustive()
    }
}

/// The writer.
#[derive(Debug)]
pub struct DbWriter;

/// Sends to the thread; dropping it ends the thread once the queue is empty.
#[derive(Debug)]
pub struct DbWriterState {
    queue: mpsc::Sender<(WriteOp, Reply)>,
}

/// Waits until the thread of an ended life has written everything.
///
/// # Errors
/// When it panicked.
pub async fn join_thread(slot: &ThreadSlot) -> Result<(), DbError> {
    let thread = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(thread) = thread else { return Ok(()) };
    match tokio::task::spawn_blocking(move || thread.join()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(DbError::Lost),
    }
}

impl Actor for DbWriter {
    type Msg = DbWriterMsg;
    type State = DbWriterState;
    type Arguments = DbWriterArgs;

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        args: DbWriterArgs,
    ) -> Result<DbWriterState, ActorProcessingErr> {
        if let Err(error) = join_thread(&args.thread).await {
            tracing::error!(%error, "the database writer's thread panicked");
        }
        let open = Arc::clone(&args.open);
        let conn = tokio::task::spawn_blocking(move || open()).await??;
        let (queue, waiting) = mpsc::channel(QUEUE_OPS);
        let thread = std::thread::Builder::new()
            .name("db-writer".into())
            .spawn(move || write_batches(conn, waiting))?;
        *args.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(DbWriterState { queue })
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: DbWriterMsg,
        state: &mut DbWriterState,
    ) -> Result<(), ActorProcessingErr> {
        let DbWriterMsg::Write { op, reply } = message;
        match state.queue.try_send((*op, reply)) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full((_, reply))) => {
                answer(reply, Err(DbError::Overloaded));
                Ok(())
            }
            Err(mpsc::error::TrySendError::Closed((_, reply))) => {
                answer(reply, Err(DbError::Lost));
                Err(io::Error::other("the database writer's thread has ended").into())
            }
        }
    }
}

/// A caller that is gone needs no answer.
fn answer(reply: Reply, outcome: Result<WriteOutcome, DbError>) {
    if reply.send(outcome).is_err() {
        tracing::debug!("a writer's caller was gone before its answer");
    }
}

/// The thread: takes all that is queued, commits once, answers. Ends when the queue is closed and
/// empty. A panic drops the reply ports, which their callers see as [`DbError::Call`].
fn write_batches(mut conn: WriteConn, mut waiting: mpsc::Receiver<(WriteOp, Reply)>) {
    let mut batch = Vec::with_capacity(BATCH_OPS);
    while waiting.blocking_recv_many(&mut batch, BATCH_OPS) > 0 {
        let (ops, replies): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        let outcomes = conn.apply(ops);
        for (reply, outcome) in replies.into_iter().zip(outcomes) {
            answer(reply, outcome.map_err(DbError::from));
        }
    }
}
