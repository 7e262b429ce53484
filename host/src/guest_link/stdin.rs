//! A command's stdin between the sender and the guest.
//!
//! # Invariants
//! 1. At most [`JOB_WINDOW_BYTES`] are sent and not acknowledged. They are kept, so that a later
//!    attachment can send them again, before anything new.
//! 2. Nothing is sent after the end of input. Only another attachment gets that end once more.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use matchlock_wire::frame::MAX_CHUNK_BYTES;
use matchlock_wire::message::{ExecInput, JOB_WINDOW_BYTES};

/// The most chunks in flight: single typed bytes must not cost an allocation each without bound.
const MAX_CHUNKS: usize = 4096;

/// What of a command's stdin waits, is on its way, or was taken.
#[derive(Debug, Default)]
pub(super) struct StdinWindow {
    waiting: Bytes,
    /// Sent in an earlier attachment and to be sent again, from offset `sent`.
    again: VecDeque<Bytes>,
    /// Sent and not acknowledged, from offset `acked`.
    unacked: VecDeque<Bytes>,
    sent: u64,
    acked: u64,
    end: End,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    Waiting,
    Sent,
}

impl StdinWindow {
    /// Whether it takes more from the sender.
    pub(super) fn wants_input(&self) -> bool {
        self.waiting.is_empty() && self.end == End::Open
    }

    /// Takes bytes from the sender, at any length.
    pub(super) fn offer(&mut self, data: Bytes) {
        self.waiting = data;
    }

    /// The sender has no more.
    pub(super) fn finish(&mut self) {
        if self.end == End::Open {
            self.end = End::Waiting;
        }
    }

    /// Whether there is something to send now.
    pub(super) fn can_send(&self) -> bool {
        if !self.again.is_empty() {
            // It fitted the window before.
            true
        } else if self.waiting.is_empty() {
            self.end == End::Waiting
        } else {
            self.room() > 0 && self.unacked.len() < MAX_CHUNKS
        }
    }

    fn room(&self) -> usize {
        let room = JOB_WINDOW_BYTES - (self.sent - self.acked);
        usize::try_from(room).unwrap_or(usize::MAX).min(MAX_CHUNK_BYTES)
    }

    /// The next message for the guest; counts as sent.
    pub(super) fn next(&mut self) -> Option<ExecInput> {
        if !self.can_send() {
            return None;
        }
        let offset = self.sent;
        let chunk = match self.again.pop_front() {
            Some(chunk) => chunk,
            None if self.waiting.is_empty() => {
                self.end = End::Sent;
                return Some(ExecInput::StdinEof { offset });
            }
            None => self.waiting.split_to(self.room().min(self.waiting.len())),
        };
        self.sent += chunk.len() as u64;
        let data = chunk.to_vec();
        self.unacked.push_back(chunk);
        Some(ExecInput::Stdin { offset, data })
    }

    /// The guest has taken everything before this offset.
    ///
    /// # Errors
    /// What is wrong with the offset.
    pub(super) fn acknowledge(&mut self, offset: u64) -> Result<(), String> {
        if offset > self.sent || offset < self.acked {
            return Err(format!(
                "it acknowledged {offset} bytes of stdin, {} were sent and {} acknowledged before",
                self.sent, self.acked
            ));
        }
        while self.acked < offset {
            let Some(chunk) = self.unacked.front_mut() else {
                return Err("it acknowledged stdin that is not kept".to_owned());
            };
            let taken = usize::try_from(offset - self.acked).unwrap_or(usize::MAX).min(chunk.len());
            chunk.advance(taken);
            self.acked += taken as u64;
            if chunk.is_empty() {
                self.unacked.pop_front();
            }
        }
        Ok(())
    }

    /// Another attachment has taken everything before this offset, and gets again what follows.
    ///
    /// # Errors
    /// What is wrong with the offset.
    pub(super) fn rewind(&mut self, offset: u64) -> Result<(), String> {
        self.unacked.append(&mut self.again);
        self.sent = self.acked + self.unacked.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        self.acknowledge(offset)?;
        self.sent = self.acked;
        self.again = std::mem::take(&mut self.unacked);
        if self.end == End::Sent {
            self.end = End::Waiting;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(window: &mut StdinWindow) -> Vec<usize> {
        std::iter::from_fn(|| window.next())
            .map(|message| match message {
                ExecInput::Stdin { data, .. } => data.len(),
                _ => 0,
            })
            .collect()
    }

    #[test]
    fn it_stops_at_the_window_and_goes_on_after_an_acknowledgement() {
        let mut window = StdinWindow::default();
        window.offer(Bytes::from(vec![7; 300 * 1024]));
        assert_eq!(sizes(&mut window), [MAX_CHUNK_BYTES; 8]);
        assert!(!window.wants_input() && !window.can_send());
        window.acknowledge(1000).expect("in the middle of a chunk");
        assert_eq!(sizes(&mut window), [1000]);
        window.acknowledge(JOB_WINDOW_BYTES + 1000).expect("everything sent");
        assert_eq!(sizes(&mut window), [MAX_CHUNK_BYTES, 300 * 1024 - 9 * MAX_CHUNK_BYTES - 1000]);
        assert!(window.wants_input());
    }

    #[test]
    fn the_end_follows_the_data_once() {
        let mut window = StdinWindow::default();
        window.offer(Bytes::from_static(b"abc"));
        window.finish();
        assert!(matches!(window.next(), Some(ExecInput::Stdin { offset: 0, .. })));
        assert_eq!(window.next(), Some(ExecInput::StdinEof { offset: 3 }));
        assert_eq!(window.next(), None);
        assert!(!window.wants_input());
    }

    #[test]
    fn acknowledgements_stay_between_acked_and_sent() {
        let mut window = StdinWindow::default();
        window.acknowledge(1).expect_err("nothing was sent");
        window.offer(Bytes::from_static(b"abc"));
        assert_eq!(sizes(&mut window), [3]);
        window.acknowledge(4).expect_err("more than was sent");
        window.acknowledge(2).expect("a part");
        window.acknowledge(1).expect_err("backwards");
    }

    #[test]
    fn another_attachment_gets_the_rest_again_and_then_the_end() {
        let stdin = |offset, data: &[u8]| Some(ExecInput::Stdin { offset, data: data.to_vec() });
        let mut window = StdinWindow::default();
        for piece in [&b"abc"[..], b"def", b"gh"] {
            window.offer(Bytes::from_static(piece));
            assert_eq!(sizes(&mut window), [piece.len()]);
        }
        window.finish();
        assert!(window.next().is_some_and(|last| last == ExecInput::StdinEof { offset: 8 }));
        window.acknowledge(2).expect("a part");
        window.rewind(1).expect_err("before what was acknowledged");
        window.rewind(9).expect_err("beyond what was sent");
        window.rewind(4).expect("in the middle of a chunk");
        assert_eq!(window.next(), stdin(4, b"ef"));
        window.acknowledge(8).expect_err("not sent again yet");
        // Cut once more, in the middle of it.
        window.rewind(5).expect("more was taken");
        assert_eq!(window.next(), stdin(5, b"f"));
        assert_eq!(window.next(), stdin(6, b"gh"));
        assert_eq!(window.next(), Some(ExecInput::StdinEof { offset: 8 }));
        window.rewind(8).expect("everything was taken");
        assert_eq!(window.next(), Some(ExecInput::StdinEof { offset: 8 }));
        assert_eq!(window.next(), None);
    }

    #[test]
    fn what_waits_comes_after_what_is_sent_again() {
        let mut window = StdinWindow::default();
        window.offer(Bytes::from(vec![7; 300 * 1024]));
        assert_eq!(sizes(&mut window), [MAX_CHUNK_BYTES; 8]);
        window.rewind(MAX_CHUNK_BYTES as u64).expect("a chunk was taken");
        assert_eq!(sizes(&mut window), [MAX_CHUNK_BYTES; 8], "seven again, one new");
        assert!(!window.can_send());
    }
}
