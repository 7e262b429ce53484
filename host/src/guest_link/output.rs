//! A command's output between the guest and the receiver of its events.
//!
//! ```text
//!   frames ── take ──►  queue (≤ the job's window)  ── next ──► events channel ──► receiver
//!                         received ≥ delivered ≥ acked
//!   rewind ── acked = due = delivered: what was received beyond it comes again, and is skipped
//! ```
//!
//! # Invariants
//! 1. The queue holds at most what the guest may send unacknowledged, [`JOB_WINDOW_BYTES`]. A guest
//!    that sends more breaks the protocol.
//! 2. The queue has at most [`MAX_PIECES`] pieces, however small the chunks: neighbours of one
//!    stream are joined, and at the limit a chunk joins the last piece of its stream. The order
//!    within stdout and within stderr never changes; the order between them is the order of
//!    arrival in the guest anyhow.
//! 3. Output is acknowledged after it was handed to the receiver's channel.
//! 4. An attachment continues after what was delivered, not after what was received: the guest
//!    takes its offset for an acknowledgement, and a job that loses its session again and again
//!    could pile up a window each time before a receiver that does not receive. What is received
//!    already is kept, is delivered whatever happens, and is skipped when it comes again.
//! 5. Nothing is acknowledged that the guest has not sent on the stream of now.

use std::collections::VecDeque;

use bytes::Bytes;
use matchlock_model::exec::OutputStream;
use matchlock_wire::frame::MAX_CHUNK_BYTES;
use matchlock_wire::message::JOB_WINDOW_BYTES;

use super::{ExecEvent, LinkError};

/// The most pieces that wait.
const MAX_PIECES: usize = 256;

/// So much delivered output is worth an acknowledgement.
const ACK_EVERY: u64 = 32 * 1024;

/// Output and other events that wait for the receiver.
#[derive(Debug, Default)]
pub(super) struct OutputQueue {
    waiting: VecDeque<Waiting>,
    received: u64,
    /// What the stream of now goes on with; less than `received` while old output comes again.
    due: u64,
    delivered: u64,
    acked: u64,
}

#[derive(Debug)]
enum Waiting {
    Output(OutputStream, Vec<u8>),
    Other(Result<ExecEvent, LinkError>),
}

impl OutputQueue {
    /// Takes a chunk of output.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn take(
        &mut self,
        stream: OutputStream,
        offset: u64,
        mut data: Vec<u8>,
    ) -> Result<(), String> {
        if offset != self.due {
            return Err(format!("it sent output from {offset}, expected {}", self.due));
        }
        if data.len() > MAX_CHUNK_BYTES {
            return Err(format!("it sent {} bytes of output in one message", data.len()));
        }
        // A usize fits a u64 on every Linux.
        let due = offset + data.len() as u64;
        if due - self.acked > JOB_WINDOW_BYTES {
            return Err(format!("it sent {} unacknowledged bytes", due - self.acked));
        }
        self.due = due;
        if due > self.received {
            let known = usize::try_from(self.received - offset).unwrap_or(usize::MAX);
            self.received = due;
            self.join(stream, data.split_off(known));
        }
        Ok(())
    }

    /// Prepares for another stream: the offset that it is to go on from.
    pub(super) fn rewind(&mut self) -> u64 {
        self.acked = self.delivered;
        self.due = self.delivered;
        self.due
    }

    fn join(&mut self, stream: OutputStream, data: Vec<u8>) {
        if let Some(Waiting::Output(last, piece)) = self.waiting.back_mut()
            && *last == stream
            && piece.len() + data.len() <= MAX_CHUNK_BYTES
        {
            piece.extend_from_slice(&data);
            return;
        }
        if self.waiting.len() >= MAX_PIECES {
            let own = self.waiting.iter_mut().rev().find_map(|waiting| match waiting {
                Waiting::Output(other, piece) if *other == stream => Some(piece),
                _ => None,
            });
            if let Some(piece) = own {
                piece.extend_from_slice(&data);
                return;
            }
        }
        self.waiting.push_back(Waiting::Output(stream, data));
    }

    /// Takes an event that is not output, or the link's end.
    pub(super) fn push(&mut self, event: Result<ExecEvent, LinkError>) {
        self.waiting.push_back(Waiting::Other(event));
    }

    /// The next event for the receiver; counts as delivered.
    pub(super) fn next(&mut self) -> Option<Result<ExecEvent, LinkError>> {
        match self.waiting.pop_front()? {
            Waiting::Other(event) => Some(event),
            Waiting::Output(stream, mut piece) => {
                if piece.len() > MAX_CHUNK_BYTES {
                    let rest = piece.split_off(MAX_CHUNK_BYTES);
                    self.waiting.push_front(Waiting::Output(stream, rest));
                }
                self.delivered += piece.len() as u64;
                Some(Ok(ExecEvent::Output(stream, Bytes::from(piece))))
            }
        }
    }

    /// Whether enough was delivered to be acknowledged.
    pub(super) fn ack_is_due(&self) -> bool {
        self.ackable() - self.acked >= ACK_EVERY
    }

    fn ackable(&self) -> u64 {
        self.delivered.min(self.due)
    }

    /// The offset to acknowledge, if it is due; counts as acknowledged.
    pub(super) fn next_ack(&mut self) -> Option<u64> {
        self.ack_is_due().then(|| {
            self.acked = self.ackable();
            self.acked
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use OutputStream::{Stderr, Stdout};

    #[test]
    fn only_the_next_offset_is_taken() {
        let mut queue = OutputQueue::default();
        queue.take(Stdout, 0, vec![1; 10]).expect("the first");
        queue.take(Stdout, 9, vec![1]).expect_err("an overlap");
        queue.take(Stdout, 11, vec![1]).expect_err("a gap");
        queue.take(Stderr, 10, vec![1]).expect("the next");
    }

    #[test]
    fn a_full_window_without_acknowledgement_is_the_limit() {
        let mut queue = OutputQueue::default();
        let mut offset = 0;
        while offset < JOB_WINDOW_BYTES {
            queue.take(Stdout, offset, vec![0; MAX_CHUNK_BYTES]).expect("within the window");
            offset += MAX_CHUNK_BYTES as u64;
        }
        queue.take(Stdout, offset, vec![0]).expect_err("over the window");
        queue.take(Stdout, offset, vec![0; MAX_CHUNK_BYTES + 1]).expect_err("a long chunk");
        assert_eq!(queue.next_ack(), None);
        assert!(queue.next().is_some());
        assert_eq!(queue.next_ack(), Some(MAX_CHUNK_BYTES as u64));
        queue.take(Stdout, offset, vec![0; MAX_CHUNK_BYTES]).expect("within the moved window");
    }

    #[test]
    fn another_stream_goes_on_after_what_was_delivered_and_keeps_what_was_received() {
        const CHUNK: u64 = MAX_CHUNK_BYTES as u64;
        let mut queue = OutputQueue::default();
        queue.take(Stdout, 0, vec![1; MAX_CHUNK_BYTES]).expect("the first");
        queue.take(Stderr, CHUNK, vec![2; MAX_CHUNK_BYTES]).expect("the second");
        assert!(queue.next().is_some());
        assert_eq!(queue.rewind(), CHUNK);
        assert!(queue.next().is_some(), "what was received is delivered");
        assert_eq!(queue.next_ack(), None, "the guest has not sent it on this stream");
        queue.take(Stderr, 0, vec![1]).expect_err("from before the attachment");
        queue.take(Stderr, 2 * CHUNK, vec![3]).expect_err("a gap on this stream");
        queue.take(Stderr, CHUNK, vec![2; 10]).expect("again");
        let mut straddling = vec![2; MAX_CHUNK_BYTES - 10];
        straddling[MAX_CHUNK_BYTES - 20..].fill(9);
        queue.take(Stderr, CHUNK + 10, straddling).expect("the rest again");
        assert!(queue.next().is_none(), "nothing comes twice");
        assert_eq!(queue.next_ack(), Some(2 * CHUNK));
        assert_eq!(queue.rewind(), 2 * CHUNK);
        queue.take(Stdout, 2 * CHUNK, vec![4; 10]).expect("new");
        assert_eq!(queue.rewind(), 2 * CHUNK);
        queue.take(Stdout, 2 * CHUNK, [vec![4; 10], vec![5; 3]].concat()).expect("old and new");
        let Some(Ok(ExecEvent::Output(_, data))) = queue.next() else { panic!("no output") };
        assert_eq!(data, [vec![4; 10], vec![5; 3]].concat());
        assert_eq!(queue.rewind(), 2 * CHUNK + 13);
    }

    #[test]
    fn attachments_without_a_reader_do_not_grow_the_queue() {
        let mut queue = OutputQueue::default();
        for _ in 0..3 {
            let mut offset = queue.rewind();
            while offset < JOB_WINDOW_BYTES {
                queue.take(Stdout, offset, vec![0; MAX_CHUNK_BYTES]).expect("within the window");
                offset += MAX_CHUNK_BYTES as u64;
            }
            queue.take(Stdout, offset, vec![0]).expect_err("over the window");
        }
        let waiting: usize = std::iter::from_fn(|| queue.next())
            .map(|event| match event {
                Ok(ExecEvent::Output(_, data)) => data.len(),
                other => panic!("unexpected {other:?}"),
            })
            .sum();
        assert_eq!(waiting as u64, JOB_WINDOW_BYTES);
    }

    #[test]
    fn small_chunks_are_few_pieces_and_keep_their_order() {
        let mut queue = OutputQueue::default();
        let mut sent = (Vec::new(), Vec::new());
        for offset in 0..200_000_u64 {
            let byte = vec![(offset % 251) as u8];
            if offset % 3 == 0 {
                sent.1.extend(&byte);
                queue.take(Stderr, offset, byte).expect("a byte");
            } else {
                sent.0.extend(&byte);
                queue.take(Stdout, offset, byte).expect("a byte");
            }
        }
        assert!(queue.waiting.len() <= MAX_PIECES + 1, "{} pieces", queue.waiting.len());
        let mut got = (Vec::new(), Vec::new());
        while let Some(event) = queue.next() {
            match event.expect("an event") {
                ExecEvent::Output(Stdout, data) => got.0.extend(data),
                ExecEvent::Output(Stderr, data) => got.1.extend(data),
                other => panic!("unexpected {other:?}"),
            }
        }
        assert_eq!(got, sent);
    }
}
