//! The conversation of one stream about one job.
//!
//! # Invariants
//! 1. Receiving never waits for sending: signals and acknowledgements get through while output is
//!    stuck behind a slow host.
//! 2. The end of a stream, for whatever reason but `Release`, leaves the job as it is.

use std::rc::Rc;

use bytes::BytesMut;
use futures::StreamExt;
use matchlock_wire::frame::{Codec, MAX_CHUNK_BYTES};
use matchlock_wire::message::{
    ExecAttach, ExecFailure, ExecFailureKind, ExecInput, ExecOutput, Request,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::codec::{Encoder, FramedRead};

use super::Jobs;
use super::job::{Attachment, Job};
use crate::request::StreamError;

/// The frames of a job's stream, after the first.
pub type Inputs<R> = FramedRead<R, Codec<ExecInput, ()>>;

/// Small messages are sent together until there are this many bytes of them.
const BATCH_BYTES: usize = 16 * 1024;

/// The same stream with the messages that follow the request.
pub fn reframe<R: AsyncRead>(frames: FramedRead<R, Codec<Request, ()>>) -> Inputs<R> {
    frames.map_decoder(|_| Codec::default())
}

/// Serves the stream that started a job, or failed to.
///
/// # Errors
/// When the stream ends other than by both sides' will.
pub async fn start<R, W>(
    jobs: &Jobs,
    job: Result<Rc<Job>, ExecFailure>,
    inputs: Inputs<R>,
    writer: W,
) -> Result<(), StreamError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let attached = job.and_then(|job| match job.attach(0) {
        Ok((attachment, _)) => Ok((job, attachment)),
        Err(message) => Err(wrong(message)),
    });
    match attached {
        Ok((job, attachment)) => {
            converse(jobs, &job, &attachment, ExecOutput::Started, inputs, writer).await
        }
        Err(failure) => refuse(failure, writer).await,
    }
}

/// Serves a stream that continues a job.
///
/// # Errors
/// When the stream ends other than by both sides' will.
pub async fn attach<R, W>(
    jobs: &Jobs,
    attach: ExecAttach,
    inputs: Inputs<R>,
    writer: W,
) -> Result<(), StreamError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let attached = jobs.find(attach.job).and_then(|job| {
        let hold = job.attach(attach.output_offset).map_err(wrong)?;
        Ok((job, hold))
    });
    match attached {
        Ok((job, (attachment, stdin_offset))) => {
            let greeting = ExecOutput::Attached { stdin_offset };
            converse(jobs, &job, &attachment, greeting, inputs, writer).await
        }
        Err(failure) => refuse(failure, writer).await,
    }
}

fn wrong(message: String) -> ExecFailure {
    ExecFailure { kind: ExecFailureKind::Request, message }
}

async fn refuse<W: AsyncWrite + Unpin>(
    failure: ExecFailure,
    mut writer: W,
) -> Result<(), StreamError> {
    let mut bytes = BytesMut::new();
    encode(ExecOutput::Failed(failure), &mut bytes)?;
    writer.write_all(&bytes).await?;
    Ok(writer.shutdown().await?)
}

async fn converse<R, W>(
    jobs: &Jobs,
    job: &Job,
    attachment: &Attachment,
    greeting: ExecOutput,
    mut inputs: Inputs<R>,
    mut writer: W,
) -> Result<(), StreamError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    tokio::select! {
        biased;
        () = attachment.evicted.wait() => {}
        received = receive(jobs, job, attachment, &mut inputs) => received?,
        sent = send(job, attachment, greeting, &mut writer) => sent?,
    }
    Ok(writer.shutdown().await?)
}

/// Takes the host's messages until it releases the job or drops the stream.
async fn receive<R: AsyncRead + Unpin>(
    jobs: &Jobs,
    job: &Job,
    attachment: &Attachment,
    inputs: &mut Inputs<R>,
) -> Result<(), StreamError> {
    let broken = |what: String| StreamError::Protocol(what);
    while let Some(input) = inputs.next().await.transpose()? {
        match input {
            ExecInput::Stdin { data, .. } if data.len() > MAX_CHUNK_BYTES => {
                return Err(broken(format!("{} bytes of stdin in one frame", data.len())));
            }
            ExecInput::Stdin { offset, data } => {
                job.receive_stdin(offset, &data).map_err(|error| broken(error.to_string()))?
            }
            ExecInput::StdinEof { offset } => {
                job.end_stdin(offset).map_err(|error| broken(error.to_string()))?
            }
            ExecInput::Signal(number) => {
                job.signal(number).map_err(|error| broken(format!("signal {number}: {error}")))?
            }
            ExecInput::Resize(size) => job
                .resize(size)
                .map_err(|error| broken(format!("another size of a terminal: {error}")))?,
            ExecInput::Ack { offset } => job.acknowledge(attachment, offset).map_err(broken)?,
            ExecInput::Release => {
                jobs.release(job.id);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Sends what there is until the job is released or has failed to start.
async fn send<W: AsyncWrite + Unpin>(
    job: &Job,
    attachment: &Attachment,
    greeting: ExecOutput,
    writer: &mut W,
) -> Result<(), StreamError> {
    tokio::select! {
        biased;
        () = job.released.wait() => return Ok(()),
        () = job.decided.wait() => {}
    }
    let mut batch = BytesMut::with_capacity(BATCH_BYTES);
    let failure = job.failure();
    let over = failure.is_some();
    encode(failure.map_or(greeting, ExecOutput::Failed), &mut batch)?;
    loop {
        if !over {
            fill(job, attachment, &mut batch)?;
        }
        if !batch.is_empty() {
            writer.write_all(&batch).await?;
            batch.clear();
        } else if job.released.is_set() {
            return Ok(());
        } else {
            attachment.wake.notified().await;
        }
        if over {
            return Ok(());
        }
    }
}

fn fill(job: &Job, attachment: &Attachment, batch: &mut BytesMut) -> Result<(), StreamError> {
    while batch.len() < BATCH_BYTES {
        let Some(message) = job.next_message(attachment) else {
            break;
        };
        encode(message, batch)?;
    }
    Ok(())
}

fn encode(message: ExecOutput, bytes: &mut BytesMut) -> Result<(), StreamError> {
    Ok(Codec::<(), ExecOutput>::default().encode(message, bytes)?)
}
