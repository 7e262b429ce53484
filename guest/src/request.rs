//! One stream of a session: its first frame says what it is about.
//!
//! # Failure
//! A frame that is not a request, or breaks the protocol, ends its stream with a line on the
//! console. The session goes on.

use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use futures::StreamExt;
use matchlock_wire::frame::{Codec, FrameError};
use matchlock_wire::message::{Reply, Request, Shutdown};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::oneshot;
use tokio_util::codec::{Encoder, FramedRead};

use crate::agent::Agent;
use crate::boot::console;
use crate::jobs::stream;

/// How long a shutdown waits for the host to take the answer to it.
const ANSWER_TAKEN: Duration = Duration::from_secs(1);

/// Why a stream was dropped.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A frame could not be read or written.
    #[error("a frame could not be read or written")]
    Frame(#[from] FrameError),
    /// The transport under the stream failed.
    #[error("the stream failed")]
    Io(#[from] std::io::Error),
    /// The host broke the protocol.
    #[error("the host broke the protocol: {0}")]
    Protocol(String),
}

impl StreamError {
    /// A stream that ends with its session is nothing to talk about.
    fn is_lost_session(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Frame(FrameError::Io(_)))
    }
}

/// Serves one stream from its first frame to its end.
pub async fn handle<S>(agent: Rc<Agent>, stream: S)
where
    S: AsyncRead + AsyncWrite + 'static,
{
    let (reader, writer) = tokio::io::split(stream);
    match converse(&agent, reader, writer).await {
        Ok(()) => {}
        Err(error) if error.is_lost_session() => {}
        Err(error) => console::failure("a stream of the link was dropped", &error),
    }
}

async fn converse<S>(
    agent: &Rc<Agent>,
    reader: ReadHalf<S>,
    mut writer: WriteHalf<S>,
) -> Result<(), StreamError>
where
    S: AsyncRead + AsyncWrite,
{
    let mut frames = FramedRead::new(reader, Codec::<Request, ()>::default());
    let Some(request) = frames.next().await.transpose()? else {
        return Ok(());
    };
    match request {
        Request::Hello => reply(&mut writer, Reply::Hello(agent.info.clone())).await,
        Request::Configure(config) => {
            let answer = match agent.machine.configure(&config) {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Failed(console::chain(&error)),
            };
            reply(&mut writer, answer).await
        }
        Request::Shutdown(order) => {
            let (answered, receiver) = oneshot::channel();
            shut_down(agent, order, receiver);
            reply(&mut writer, Reply::Done).await?;
            wait_until_taken(frames.into_inner()).await;
            drop(answered);
            Ok(())
        }
        Request::Exec(start) => {
            let job = agent.jobs.exec(&start);
            stream::start(&agent.jobs, job, stream::reframe(frames), writer).await
        }
        Request::File(start) => {
            let job = agent.jobs.file(&start);
            stream::start(&agent.jobs, job, stream::reframe(frames), writer).await
        }
        Request::Attach(attach) => {
            stream::attach(&agent.jobs, attach, stream::reframe(frames), writer).await
        }
    }
}

async fn reply<S: AsyncRead + AsyncWrite>(
    writer: &mut WriteHalf<S>,
    reply: Reply,
) -> Result<(), StreamError> {
    let mut bytes = BytesMut::new();
    Codec::<(), Reply>::default().encode(reply, &mut bytes)?;
    writer.write_all(&bytes).await?;
    writer.flush().await?;
    writer.shutdown().await?;
    Ok(())
}

fn shut_down(agent: &Agent, order: Shutdown, answered: oneshot::Receiver<()>) {
    agent.order_shutdown(Duration::from_millis(u64::from(order.grace_ms)), answered);
}

/// The host drops a stream once it has its answer; that, or the session's end, ends the wait.
async fn wait_until_taken<R: AsyncRead + Unpin>(mut reader: R) {
    let mut rest = [0; 64];
    let taken = async { while matches!(reader.read(&mut rest).await, Ok(count) if count > 0) {} };
    // Without a sign in time the shutdown goes on: the answer was sent long ago.
    drop(tokio::time::timeout(ANSWER_TAKEN, taken).await);
}
