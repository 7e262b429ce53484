//! A job's stdin between the host and the command's pipe.
//!
//! # Invariants
//! 1. What was received follows without a gap; at most [`JOB_WINDOW_BYTES`] wait.
//! 2. "Taken" means written into the pipe, or dropped because there is no pipe any more. It only
//!    grows, and is what the host is told.

use std::collections::VecDeque;

use matchlock_wire::message::JOB_WINDOW_BYTES;

/// How the host broke the rules of stdin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StdinError {
    /// The bytes do not follow those before them.
    #[error("stdin at offset {got} where {expected} was due")]
    Gap {
        /// The offset that was due.
        expected: u64,
        /// The offset that came.
        got: u64,
    },
    /// More than the window is in flight.
    #[error("{waiting} bytes of stdin in flight, over the window of {JOB_WINDOW_BYTES}")]
    Window {
        /// How many bytes would wait.
        waiting: u64,
    },
    /// Bytes after the end.
    #[error("stdin after its end")]
    AfterEnd,
}

/// Stdin that the command has not taken yet.
#[derive(Debug)]
pub struct Stdin {
    taken: u64,
    waiting: VecDeque<u8>,
    ended: bool,
    open: bool,
}

impl Stdin {
    /// The stdin of a new job; one that is not open takes and drops everything.
    pub fn new(open: bool) -> Self {
        Self { taken: 0, waiting: VecDeque::new(), ended: false, open }
    }

    /// The number of bytes taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    fn received(&self) -> u64 {
        self.taken + u64::try_from(self.waiting.len()).unwrap_or(u64::MAX)
    }

    fn expect(&self, got: u64) -> Result<(), StdinError> {
        let expected = self.received();
        if got == expected { Ok(()) } else { Err(StdinError::Gap { expected, got }) }
    }

    /// Receives bytes.
    ///
    /// # Errors
    /// When the host broke the rules; nothing was received then.
    pub fn receive(&mut self, offset: u64, data: &[u8]) -> Result<(), StdinError> {
        self.expect(offset)?;
        let count = u64::try_from(data.len()).unwrap_or(u64::MAX);
        if self.ended && count > 0 {
            return Err(StdinError::AfterEnd);
        }
        let waiting = (self.received() - self.taken).saturating_add(count);
        if waiting > JOB_WINDOW_BYTES {
            return Err(StdinError::Window { waiting });
        }
        if self.open {
            self.waiting.extend(data);
        } else {
            self.taken += count;
        }
        Ok(())
    }

    /// Receives the end.
    ///
    /// # Errors
    /// When it is not where the bytes end.
    pub fn end(&mut self, offset: u64) -> Result<(), StdinError> {
        self.expect(offset)?;
        self.ended = true;
        Ok(())
    }

    /// The next bytes for the pipe; empty if none wait.
    pub fn next(&self) -> &[u8] {
        let (first, second) = self.waiting.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// Whether the pipe is to be closed: the end has come and nothing waits.
    pub fn at_end(&self) -> bool {
        self.ended && self.waiting.is_empty()
    }

    /// The pipe took this many of the next bytes.
    pub fn take(&mut self, count: usize) {
        let count = count.min(self.waiting.len());
        self.waiting.drain(..count);
        self.taken += u64::try_from(count).unwrap_or(u64::MAX);
    }

    /// The pipe is closed: whatever waits or comes is taken and dropped.
    pub fn close(&mut self) {
        self.take(self.waiting.len());
        self.open = false;
    }

    /// A new stream will send again from what was taken; returns that offset.
    pub fn rewind(&mut self) -> u64 {
        if self.open {
            self.waiting.clear();
            self.ended = false;
        }
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gaps_windows_and_bytes_after_the_end_are_refused() {
        let mut stdin = Stdin::new(true);
        let window = usize::try_from(JOB_WINDOW_BYTES).unwrap();
        assert_eq!(stdin.receive(1, b"x"), Err(StdinError::Gap { expected: 0, got: 1 }));
        stdin.receive(0, &vec![0; window]).unwrap();
        let over = JOB_WINDOW_BYTES + 1;
        assert_eq!(
            stdin.receive(JOB_WINDOW_BYTES, b"x"),
            Err(StdinError::Window { waiting: over })
        );
        stdin.take(1);
        stdin.receive(JOB_WINDOW_BYTES, b"x").unwrap();
        assert!(stdin.end(0).is_err());
        stdin.end(over).unwrap();
        stdin.end(over).unwrap();
        assert_eq!(stdin.receive(over, b"x"), Err(StdinError::AfterEnd));
        assert!(!stdin.at_end());
        stdin.take(window);
        assert!(stdin.at_end());
        assert_eq!(stdin.rewind(), over);
        assert!(!stdin.at_end(), "a new stream says again where the end is");
    }

    #[test]
    fn without_a_pipe_everything_is_taken() {
        let mut stdin = Stdin::new(false);
        let window = usize::try_from(JOB_WINDOW_BYTES).unwrap();
        stdin.receive(0, &vec![0; window]).unwrap();
        stdin.receive(JOB_WINDOW_BYTES, &vec![0; window]).unwrap();
        assert_eq!(stdin.taken(), 2 * JOB_WINDOW_BYTES);
        stdin.end(2 * JOB_WINDOW_BYTES).unwrap();
        stdin.rewind();
        assert_eq!(stdin.receive(2 * JOB_WINDOW_BYTES, b"x"), Err(StdinError::AfterEnd));
    }

    proptest! {
        /// Whatever is received, taken and sent again, the pipe gets the host's bytes in order.
        #[test]
        fn the_pipe_gets_what_the_host_sent(
            sent in proptest::collection::vec(any::<u8>(), 0..600),
            steps in proptest::collection::vec((0..3_u8, 0..90_usize), 0..60),
        ) {
            let mut stdin = Stdin::new(true);
            let mut offset = 0_usize;
            let mut written = Vec::new();
            for (what, count) in steps {
                match what {
                    0 => {
                        let end = sent.len().min(offset + count);
                        stdin.receive(offset as u64, &sent[offset..end]).unwrap();
                        offset = end;
                    }
                    1 => {
                        let next = stdin.next();
                        let count = count.min(next.len());
                        written.extend_from_slice(&next[..count]);
                        stdin.take(count);
                    }
                    _ => offset = usize::try_from(stdin.rewind()).unwrap(),
                }
                prop_assert_eq!(&written[..], &sent[..written.len()]);
                prop_assert_eq!(stdin.taken(), written.len() as u64);
            }
        }
    }
}
