//! A job's stream in one session.
//!
//! # Invariants
//! 1. The end of a stream by the guest's will is told from the session's end: only the former means
//!    that the guest has let go of the job.

use std::sync::Arc;

use futures::{SinkExt, StreamExt};
use matchlock_wire::frame::{Codec, FrameError};
use matchlock_wire::message::{ExecInput, ExecOutput, Request};
use tokio::io::{ReadHalf, WriteHalf};
use tokio_util::codec::{Encoder, FramedRead, FramedWrite};

use super::LinkError;
use super::codec::{self, Limited};
use super::driver::{Ending, Mux};
use super::ledger::Ledger;
use super::stream::{self, LinkStream};

/// How long the cause of a stream's sudden end may lag behind it.
const CAUSE_LAG: std::time::Duration = std::time::Duration::from_secs(1);

pub(super) type Reader = FramedRead<ReadHalf<LinkStream>, Limited<ExecOutput>>;
pub(super) type Writer = FramedWrite<WriteHalf<LinkStream>, Codec<(), ExecInput>>;

/// A stream about a job. Keeps its session alive.
pub(super) struct Line {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    ledger: Arc<Ledger>,
    mux: Mux,
}

impl Line {
    /// Opens a stream; nothing is sent.
    pub(super) async fn open(mux: &Mux) -> Result<Self, LinkError> {
        let stream = mux.open().await?;
        let ledger = stream.ledger().clone();
        let (read_half, write_half) = tokio::io::split(stream);
        Ok(Self {
            reader: Reader::new(read_half, Limited::new(codec::MAX_OUTPUT_FRAME)),
            writer: Writer::new(write_half, Codec::default()),
            ledger,
            mux: mux.clone(),
        })
    }

    /// Makes this the stream's first message; it goes out with the next flush.
    pub(super) fn request(&mut self, request: Request) -> Result<(), FrameError> {
        Codec::<(), Request>::default().encode(request, self.writer.write_buffer_mut())
    }

    /// The end of the line's session.
    pub(super) fn ending(&self) -> &Arc<Ending> {
        self.mux.ending()
    }

    /// Sends what waits and reads the guest's first message.
    pub(super) async fn answer(&mut self) -> Result<ExecOutput, LinkError> {
        if let Err(error) = self.writer.flush().await {
            // The reader meets the same end and knows its cause.
            tracing::trace!(%error, "a job's request was not taken");
        }
        next_output(&mut self.reader, self.mux.ending()).await
    }

    /// Releases the job and reads the stream to its end. False when the session has ended before.
    pub(super) async fn release(mut self) -> bool {
        let goodbye = async {
            self.writer.feed(ExecInput::Release).await?;
            self.writer.close().await
        };
        let parting = async {
            let (said, ()) = futures::join!(goodbye, stream::drain(self.reader.get_mut()));
            if let Err(error) = said {
                // The guest has ended the stream first, or the session has ended.
                tracing::trace!(%error, "a job's release was not taken");
            }
        };
        tokio::select! {
            () = parting => {}
            _ = self.mux.ending().ended() => {}
        }
        if self.ledger.is_broken() {
            // Whoever goes on with another session is not to meet this one.
            let cause = stream_cut(self.mux.ending(), "it ended a command's stream").await;
            self.mux.ending().end(cause);
        }
        self.mux.ending().now().is_none()
    }

    /// Ends this side and reads the guest's to its end, after its last message.
    pub(super) async fn finish(&mut self) {
        if let Err(error) = self.writer.close().await {
            tracing::trace!(%error, "a job's stream was closed by the guest first");
        }
        stream::drain(self.reader.get_mut()).await;
    }
}

/// The next message; what is wrong with it, or the cause of the stream's end, ends the session.
pub(super) async fn next_output(
    reader: &mut Reader,
    ending: &Ending,
) -> Result<ExecOutput, LinkError> {
    let violation = match reader.next().await {
        Some(Ok(message)) => return Ok(message),
        Some(Err(error)) => codec::violation_of(&error),
        None => None,
    };
    let cause = match violation {
        Some(violation) => violation,
        None => stream_cut(ending, "it closed a command's stream").await,
    };
    Err(ending.end(cause))
}

/// Why a stream ended too early: the link's cause if it has ended, else the guest's doing.
pub(super) async fn stream_cut(ending: &Ending, deed: &'static str) -> LinkError {
    match tokio::time::timeout(CAUSE_LAG, ending.ended()).await {
        Ok(cause) => cause,
        Err(_) => LinkError::Protocol { what: format!("{deed} too early") },
    }
}
