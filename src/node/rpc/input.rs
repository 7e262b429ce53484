//! What a client sends to a command in flight: its stdin, and its terminal's size.
//!
//! ```text
//!   reader of lines ─► queue, bounded in bytes ─► feeding of the command
//!     waits while it is full, and for no longer than STALLED without any of it being taken
//! ```
//!
//! # Invariants
//! 1. At most [`QUEUE_BYTES`] wait; each piece counts at least [`PIECE_BYTES`].
//! 2. A command that reads nothing does not block its session for long: its input then fails, and
//!    the command with it. Nothing is lost without a word.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use matchlock_host::guest_link::StdinInput;
use matchlock_model::exec::TerminalSize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How much waits for a command.
pub(super) const QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// How long a full queue may wait for a command that reads nothing.
pub(super) const STALLED: Duration = Duration::from_secs(10);

/// The cost of the smallest piece.
const PIECE_BYTES: usize = 256;

/// The longest piece.
const LARGEST_PIECE: usize = 1024 * 1024;

/// A piece of input, and its place in the queue.
pub(super) type Piece = (StdinInput, Option<OwnedSemaphorePermit>);

/// Sends input to a command in flight.
#[derive(Debug, Clone)]
pub(super) struct Input {
    pieces: mpsc::UnboundedSender<Piece>,
    room: Arc<Semaphore>,
    failed: CancellationToken,
    /// Nothing follows the end.
    ended: Arc<AtomicBool>,
    size: watch::Sender<TerminalSize>,
}

/// The command's end of it.
#[derive(Debug)]
pub(super) struct InputQueue {
    pub(super) pieces: mpsc::UnboundedReceiver<Piece>,
    /// The size of its terminal, when it changes.
    pub(super) sizes: watch::Receiver<TerminalSize>,
    /// Cancelled when the command has not read for too long.
    pub(super) failed: CancellationToken,
}

impl Input {
    /// A queue for a command.
    pub(super) fn new() -> (Self, InputQueue) {
        let (pieces, waiting) = mpsc::unbounded_channel();
        let failed = CancellationToken::new();
        let (size, sizes) = watch::channel(TerminalSize::default());
        let input = Self {
            pieces,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
            failed: failed.clone(),
            ended: Arc::default(),
            size,
        };
        (input, InputQueue { pieces: waiting, sizes, failed })
    }

    /// Sends bytes to the command's stdin. What comes for a command that takes no more is dropped,
    /// as the kernel would.
    pub(super) async fn data(&self, mut data: Bytes) {
        while !data.is_empty() && !self.ended.load(Ordering::SeqCst) {
            let piece = data.split_to(data.len().min(LARGEST_PIECE));
            let cost = u32::try_from(piece.len().max(PIECE_BYTES)).unwrap_or(u32::MAX);
            let room = Arc::clone(&self.room).acquire_many_owned(cost);
            let room = tokio::select! {
                room = timeout(STALLED, room) => room,
                () = self.pieces.closed() => return,
                () = self.failed.cancelled() => return,
            };
            let Ok(Ok(room)) = room else {
                self.failed.cancel();
                return;
            };
            if self.pieces.send((StdinInput::Data(piece), Some(room))).is_err() {
                return;
            }
        }
    }

    /// Changes the size of the command's terminal; of several at once the last counts.
    pub(super) fn resize(&self, size: TerminalSize) {
        self.size.send_replace(size);
    }

    /// Ends the command's stdin.
    pub(super) fn end(&self) {
        if !self.ended.swap(true, Ordering::SeqCst)
            && self.pieces.send((StdinInput::Eof, None)).is_err()
        {
            tracing::trace!("the end of input for a command that has ended");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_waits_for_the_command_and_no_longer() {
        let (input, mut queue) = Input::new();
        let megabyte = Bytes::from(vec![7; LARGEST_PIECE]);
        for _ in 0..QUEUE_BYTES / LARGEST_PIECE {
            input.data(megabyte.clone()).await;
        }
        let waiting = input.clone();
        let more = megabyte.clone();
        let blocked = tokio::spawn(async move { waiting.data(more).await });
        tokio::time::sleep(STALLED / 2).await;
        assert!(!blocked.is_finished());
        drop(queue.pieces.recv().await.unwrap());
        blocked.await.unwrap();
        assert!(!queue.failed.is_cancelled(), "it has read in time");

        input.data(megabyte.clone()).await;
        assert!(queue.failed.is_cancelled(), "it has read nothing for too long");
        input.data(megabyte).await;
    }

    #[tokio::test]
    async fn small_pieces_do_not_cost_more_than_they_count() {
        let (input, queue) = Input::new();
        for _ in 0..QUEUE_BYTES / PIECE_BYTES {
            input.data(Bytes::from_static(b"x")).await;
        }
        assert_eq!(input.room.available_permits(), 0);
        for _ in 0..10 {
            input.end();
            input.data(Bytes::from_static(b"x")).await;
        }
        assert_eq!(
            queue.pieces.len(),
            QUEUE_BYTES / PIECE_BYTES + 1,
            "one end, and nothing after it"
        );
        drop(queue);
        input.data(Bytes::from_static(b"x")).await;
        input.end();
    }
}
