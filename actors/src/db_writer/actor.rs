//! The actor and its thread.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use matchlock_store::{OpenError, WriteConn, WriteError, WriteOp, WriteOutcome};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::runner::{ThreadSlot, Work, join_thread};
use super::{DbError, QUEUE_OPS};
use crate::points;

pub(super) type Reply = RpcReplyPort<Result<WriteOutcome, DbError>>;

/// What the writer is asked.
pub enum DbWriterMsg {
    /// Write this.
    Write {
        /// What to write.
        op: Box<WriteOp>,
        /// Answered after the commit.
        reply: Reply,
    },
    /// The thread has panicked; only the thread says so.
    ThreadPanicked {
        /// What the panic said.
        message: String,
    },
}

impl fmt::Debug for DbWriterMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { op, .. } => f.debug_tuple("Write").field(op).finish(),
            Self::ThreadPanicked { message } => {
                f.debug_tuple("ThreadPanicked").field(message).finish()
            }
        }
    }
}

/// Where a writer writes: [`WriteConn`], or what a test puts in its way.
pub trait Store: Send {
    /// Writes these ops in order in one transaction, and answers each once they are committed.
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>>;
}

impl Store for WriteConn {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        Self::apply(self, ops)
    }
}

/// Opens the store; called for each life of the writer.
pub type OpenStore = Arc<dyn Fn() -> Result<Box<dyn Store>, OpenError> + Send + Sync>;

/// What a writer is started with.
#[derive(Clone)]
pub struct DbWriterArgs {
    /// Opens the store.
    pub open: OpenStore,
    /// Where it writes: on a thread, which is kept there.
    pub thread: ThreadSlot,
    /// How long a write may wait for the thread; see [`QUEUE_WAIT`](super::QUEUE_WAIT).
    pub queue_wait: Duration,
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
    queue: mpsc::Sender<Waiting>,
}

/// A write that waits for the thread. Dropped before the thread has taken it, it says so: then it
/// was not written for sure.
#[derive(Debug)]
pub(super) struct Waiting {
    op: Option<Box<WriteOp>>,
    reply: Option<Reply>,
    sent: Instant,
}

impl Waiting {
    fn new(op: Box<WriteOp>, reply: Reply) -> Self {
        Self { op: Some(op), reply: Some(reply), sent: Instant::now() }
    }

    fn refuse(mut self, error: DbError) {
        if let Some(reply) = self.reply.take() {
            answer(reply, Err(error));
        }
    }

    /// From here on nobody knows but the thread. What has waited too long is refused instead: its
    /// caller would be gone before its answer.
    pub(super) fn take(mut self, queue_wait: Duration) -> Option<(WriteOp, Reply)> {
        if self.sent.elapsed() > queue_wait {
            self.refuse(DbError::Delayed);
            return None;
        }
        Some((*self.op.take()?, self.reply.take()?))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            answer(reply, Err(DbError::Ended));
        }
    }
}

impl Actor for DbWriter {
    type Msg = DbWriterMsg;
    type State = DbWriterState;
    type Arguments = DbWriterArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: DbWriterArgs,
    ) -> Result<DbWriterState, ActorProcessingErr> {
        if let Err(error) = join_thread(&args.thread).await {
            tracing::error!(%error, "the database writer's thread panicked");
        }
        let (queue, waiting) = mpsc::channel(QUEUE_OPS);
        let queue_wait = args.queue_wait;
        args.thread.start(&args.open, Work { waiting, actor: myself, queue_wait }).await?;
        Ok(DbWriterState { queue })
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: DbWriterMsg,
        state: &mut DbWriterState,
    ) -> Result<(), ActorProcessingErr> {
        points::message(&message)?;
        match message {
            DbWriterMsg::Write { op, reply } => {
                match state.queue.try_send(Waiting::new(op, reply)) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(waiting)) => {
                        waiting.refuse(DbError::Overloaded);
                    }
                    // The thread has panicked and its message is on the way.
                    Err(mpsc::error::TrySendError::Closed(waiting)) => {
                        waiting.refuse(DbError::Ended);
                    }
                }
                Ok(())
            }
            DbWriterMsg::ThreadPanicked { message } => {
                Err(io::Error::other(format!("its thread panicked: {message}")).into())
            }
        }
    }
}

/// A caller that is gone needs no answer.
pub(super) fn answer(reply: Reply, outcome: Result<WriteOutcome, DbError>) {
    if reply.send(outcome).is_err() {
        tracing::debug!("a writer's caller was gone before its answer");
    }
}
