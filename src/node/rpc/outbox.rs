//! Writes lines to the client.
//!
//! ```text
//!   calls, events ─► bounded queue ─► writer task ─► client
//!        (wait while it is full)         │ an error, or nothing taken for too long
//!                                        └─► lost
//! ```
//!
//! # Invariants
//! 1. At most [`QUEUE`] lines wait. Whoever sends waits for room, and with it what it reads from: a
//!    client that reads slowly blocks commands, and makes nothing grow.
//! 2. Lines of one sender keep their order.
//! 3. A client that takes nothing for [`Outbox::open`]'s limit is lost, as one that is gone.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::budget::Held;

/// How many lines wait.
const QUEUE: usize = 64;

/// How much is written at once. A client that takes as much within the limit is not lost.
const WRITE_BYTES: usize = 64 * 1024;

/// A line, and the part of the budget that it holds.
type Outgoing = (Bytes, Option<Held>);

/// Sends lines.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    lines: mpsc::Sender<Outgoing>,
    lost: CancellationToken,
}

/// The client is not there any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lost;

impl Outbox {
    /// Starts the writer. `stalled` is how long a client may take nothing.
    pub(super) fn open<W>(to: W, stalled: Duration) -> (Self, JoinHandle<io::Result<()>>)
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let (lines, waiting) = mpsc::channel(QUEUE);
        let lost = CancellationToken::new();
        let writer = tokio::spawn(write(waiting, to, stalled, lost.clone()));
        (Self { lines, lost }, writer)
    }

    /// Sends a line once there is room for it.
    ///
    /// # Errors
    /// When nobody will read it.
    pub(super) async fn send(&self, line: Bytes, held: Option<Held>) -> Result<(), Lost> {
        self.lines.send((line, held)).await.map_err(|_| Lost)
    }

    /// Waits until the client is lost.
    pub(super) async fn lost(&self) {
        self.lost.cancelled().await;
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut waiting: mpsc::Receiver<Outgoing>,
    mut to: W,
    stalled: Duration,
    lost: CancellationToken,
) -> io::Result<()> {
    // Also when this task is dropped or panics.
    let _lost = lost.drop_guard();
    while let Some((line, held)) = waiting.recv().await {
        let mut batch = BytesMut::new();
        let mut rest = line;
        if rest.len() < WRITE_BYTES {
            batch.extend_from_slice(&rest);
            while batch.len() < WRITE_BYTES
                && let Ok((line, _)) = waiting.try_recv()
            {
                batch.extend_from_slice(&line);
            }
            rest = batch.freeze();
        }
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(WRITE_BYTES));
            // The flush says that it was taken: the write itself may only have been begun.
            let written = async {
                to.write_all(&piece).await?;
                to.flush().await
            };
            timeout(stalled, written).await.unwrap_or_else(|_| {
                let text = format!("the client has read nothing for {stalled:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            })?;
        }
        drop(held);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, BufReader};

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn lines_arrive_whole_and_in_order() {
        let (ours, theirs) = tokio::io::duplex(100);
        let (outbox, writer) = Outbox::open(ours, SOON);
        let reading = tokio::spawn(async move {
            let mut lines = BufReader::new(theirs).lines();
            let mut read = Vec::new();
            while let Some(line) = lines.next_line().await.unwrap() {
                read.push(line);
            }
            read
        });
        let sent: Vec<String> = (0..200).map(|n| n.to_string().repeat(1 + n * 10)).collect();
        for line in &sent {
            outbox.send(format!("{line}\n").into(), None).await.unwrap();
        }
        drop(outbox);
        writer.await.unwrap().unwrap();
        assert_eq!(reading.await.unwrap(), sent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stops_reading_blocks_senders_and_is_lost_in_the_end() {
        let (ours, _theirs) = tokio::io::duplex(100);
        let (outbox, writer) = Outbox::open(ours, SOON);
        let line = Bytes::from(vec![b'x'; WRITE_BYTES]);
        let mut taken = 0;
        while timeout(Duration::from_millis(1), outbox.send(line.clone(), None)).await.is_ok() {
            taken += 1;
            assert!(taken <= QUEUE + 1, "the queue is bounded");
        }
        outbox.lost().await;
        assert_eq!(outbox.send(line, None).await, Err(Lost));
        let error = writer.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_client_that_is_gone_is_lost() {
        let (ours, theirs) = tokio::io::duplex(100);
        let (outbox, writer) = Outbox::open(ours, SOON);
        drop(theirs);
        outbox.send(Bytes::from_static(b"x\n"), None).await.unwrap();
        outbox.lost().await;
        assert!(writer.await.unwrap().is_err());
    }
}
