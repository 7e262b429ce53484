//! Writes lines to the client.
//!
//! ```text
//!   calls, events ─► bounded queue ──┬─► writer task ─► client
//!        (wait while it is full)     │       │ an error, or nothing taken for too long
//!   reader ─► its own answers ───────┘       └─► lost
//!        (waits behind REPLY_BYTES of them)
//! ```
//!
//! # Invariants
//! 1. At most [`QUEUE`] lines wait. Whoever sends waits for room, and with it what it reads from: a
//!    client that reads slowly blocks commands, and makes nothing grow. The reader of requests has
//!    room of its own, [`REPLY_BYTES`]: it waits only for a client that asks and asks, and reads none
//!    of the answers.
//! 2. Lines of one sender keep their order.
//! 3. What a line holds of the budget it holds until it was written.
//! 4. A client that takes nothing for [`Outbox::open`]'s limit is lost, as one that is gone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::budget::Held;

/// How many lines wait.
const QUEUE: usize = 64;

/// How much of the reader's own answers waits. Each is short: these are tens of thousands.
const REPLY_BYTES: usize = 8 * 1024 * 1024;

/// What keeping the shortest answer costs.
const LEAST_REPLY: usize = 128;

/// How much is written at once. A client that takes as much within the limit is not lost.
const WRITE_BYTES: usize = 64 * 1024;

/// A line, and the part of the budget that it holds.
type Outgoing = (Bytes, Option<Held>);

/// An answer of the reader's own, and its room.
type Reply = (Bytes, OwnedSemaphorePermit);

/// Sends lines.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    lines: mpsc::Sender<Outgoing>,
    replies: mpsc::UnboundedSender<Reply>,
    room: Arc<Semaphore>,
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
        let (replies, answered) = mpsc::unbounded_channel();
        let lost = CancellationToken::new();
        let room = Arc::new(Semaphore::new(REPLY_BYTES));
        let written = write(waiting, answered, to, stalled, lost.clone(), Arc::clone(&room));
        let writer = tokio::spawn(written);
        (Self { lines, replies, room, lost }, writer)
    }

    /// Sends a line once there is room for it.
    ///
    /// # Errors
    /// When nobody will read it.
    pub(super) async fn send(&self, line: Bytes, held: Option<Held>) -> Result<(), Lost> {
        self.lines.send((line, held)).await.map_err(|_| Lost)
    }

    /// Sends a short line; waits only behind [`REPLY_BYTES`] of them.
    ///
    /// # Errors
    /// When nobody will read it.
    pub(super) async fn reply(&self, line: Bytes) -> Result<(), Lost> {
        let cost = line.len().clamp(LEAST_REPLY, REPLY_BYTES);
        let cost = u32::try_from(cost).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(cost).await.map_err(|_| Lost)?;
        self.replies.send((line, room)).map_err(|_| Lost)
    }

    /// Waits until the client is lost.
    pub(super) async fn lost(&self) {
        self.lost.cancelled().await;
    }
}

/// Nobody waits for room that will not come.
struct CloseOnDrop(Arc<Semaphore>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut waiting: mpsc::Receiver<Outgoing>,
    mut answered: mpsc::UnboundedReceiver<Reply>,
    mut to: W,
    stalled: Duration,
    lost: CancellationToken,
    room: Arc<Semaphore>,
) -> io::Result<()> {
    // Also when this task is dropped or panics.
    let _lost = lost.drop_guard();
    let _room = CloseOnDrop(room);
    loop {
        let first = tokio::select! {
            biased;
            Some((line, room)) = answered.recv() => (line, Some(room), None),
            Some((line, held)) = waiting.recv() => (line, None, held),
            else => return Ok(()),
        };
        let (mut rest, room, held) = first;
        let (mut rooms, mut held) = (Vec::from_iter(room), Vec::from_iter(held));
        if rest.len() < WRITE_BYTES {
            let mut batch = BytesMut::from(rest);
            while batch.len() < WRITE_BYTES {
                if let Ok((line, room)) = answered.try_recv() {
                    batch.extend_from_slice(&line);
                    rooms.push(room);
                } else if let Ok((line, more)) = waiting.try_recv() {
                    batch.extend_from_slice(&line);
                    held.extend(more);
                } else {
                    break;
                }
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
        drop((rooms, held));
    }
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
    async fn what_lines_hold_is_held_until_they_were_written() {
        use crate::node::rpc::budget::Budget;

        let (ours, mut theirs) = tokio::io::duplex(8);
        let budget = Budget::new(30);
        let (outbox, writer) = Outbox::open(ours, SOON);
        for _ in 0..3 {
            let mut held = budget.hold();
            held.take(10).unwrap();
            outbox.send(Bytes::from_static(b"0123456789\n"), Some(held)).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        budget.hold().take(1).unwrap_err();
        drop(outbox);
        let mut read = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut theirs, &mut read).await.unwrap();
        assert_eq!(read.len(), 33);
        writer.await.unwrap().unwrap();
        budget.hold().take(30).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn replies_have_room_of_their_own_and_are_waited_for_behind_it() {
        let (ours, mut theirs) = tokio::io::duplex(8);
        let (outbox, writer) = Outbox::open(ours, SOON);
        // The way of the others is full.
        while timeout(Duration::from_millis(1), outbox.send(Bytes::from_static(b"line\n"), None))
            .await
            .is_ok()
        {}
        let mut sent = 0;
        while timeout(Duration::from_millis(1), outbox.reply(Bytes::from_static(b"reply\n")))
            .await
            .is_ok()
        {
            sent += 1;
        }
        assert!((60_000..=REPLY_BYTES / LEAST_REPLY + 1).contains(&sent), "{sent}");
        let waiting = outbox.clone();
        let waiting = tokio::spawn(async move { waiting.reply(Bytes::from_static(b"!\n")).await });
        drop(outbox);
        let mut read = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut theirs, &mut read).await.unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(()));
        writer.await.unwrap().unwrap();
        assert_eq!(read.matches("reply\n").count(), sent);
        assert_eq!(read.matches("!\n").count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_to_reply_learns_that_the_client_is_lost() {
        let (ours, _theirs) = tokio::io::duplex(8);
        let (outbox, _writer) = Outbox::open(ours, SOON);
        let mut sent = 0;
        while outbox.reply(Bytes::from_static(b"nobody reads it\n")).await.is_ok() {
            sent += 1;
            assert!(sent <= REPLY_BYTES, "it is kept for ever");
        }
        timeout(SOON, outbox.lost()).await.unwrap();
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
