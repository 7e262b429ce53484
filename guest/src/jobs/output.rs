//! A job's output that the host has not acknowledged yet.
//!
//! ```text
//!   0 ......... base ─────────────── end
//!   forgotten    │  kept, at most the window  │  still in the command's pipes
//! ```
//!
//! # Invariants
//! 1. One offset counts stdout and stderr together, in the order in which they were read.
//! 2. Never more than [`JOB_WINDOW_BYTES`] are kept: who pushes asks for [`Output::space`] first.

use std::collections::VecDeque;

use matchlock_wire::message::{JOB_WINDOW_BYTES, OutputStream};

/// Where a piece of one stream begins; it ends where the next one does.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u64,
    stream: OutputStream,
}

/// A piece of output of one stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Which stream.
    pub stream: OutputStream,
    /// The position of the first byte.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

/// Output between what was acknowledged and what was read.
#[derive(Debug, Default)]
pub struct Output {
    base: u64,
    bytes: VecDeque<u8>,
    runs: VecDeque<Run>,
}

impl Output {
    /// The first byte that is still here.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The number of bytes read in all.
    pub fn end(&self) -> u64 {
        self.base + len(&self.bytes)
    }

    /// How many bytes may be pushed now.
    pub fn space(&self) -> usize {
        let space = JOB_WINDOW_BYTES.saturating_sub(len(&self.bytes));
        usize::try_from(space).unwrap_or(usize::MAX)
    }

    /// Takes what was read from a stream; at most [`Self::space`].
    pub fn push(&mut self, stream: OutputStream, data: &[u8]) {
        debug_assert!(data.len() <= self.space());
        if data.is_empty() {
            return;
        }
        if self.runs.back().map(|run| run.stream) != Some(stream) {
            let start = self.end();
            self.runs.push_back(Run { start, stream });
        }
        self.bytes.extend(data);
    }

    /// Forgets what is before `offset`; what was forgotten already is no matter. Nothing beyond
    /// the end can be acknowledged.
    pub fn acknowledge(&mut self, offset: u64) {
        let count = offset.min(self.end()).saturating_sub(self.base);
        self.base += count;
        self.bytes.drain(..usize::try_from(count).unwrap_or(usize::MAX));
        while self.runs.get(1).is_some_and(|next| next.start <= self.base) {
            self.runs.pop_front();
        }
        if self.bytes.is_empty() {
            self.runs.clear();
        }
    }

    /// The piece at `offset`: of one stream, at most `limit` bytes. `None` at the end, and for
    /// what was forgotten.
    pub fn chunk(&self, offset: u64, limit: usize) -> Option<Chunk> {
        if offset < self.base || offset >= self.end() {
            return None;
        }
        let after = self.runs.partition_point(|run| run.start <= offset);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let run_end = self.runs.get(after).map_or(self.end(), |next| next.start);
        let from = usize::try_from(offset - self.base).ok()?;
        let length = usize::try_from(run_end - offset).ok()?.min(limit);
        Some(Chunk { stream: run.stream, offset, data: self.copy(from, length) })
    }

    /// Block by block: byte by byte it is what limits a stream.
    fn copy(&self, from: usize, length: usize) -> Vec<u8> {
        let (first, second) = self.bytes.as_slices();
        let mut data = Vec::with_capacity(length);
        let (at, end) = (from.min(first.len()), (from + length).min(first.len()));
        data.extend_from_slice(first.get(at..end).unwrap_or_default());
        let at = (from + data.len()).saturating_sub(first.len());
        let end = at + length - data.len();
        data.extend_from_slice(second.get(at..end).unwrap_or_default());
        data
    }
}

fn len(bytes: &VecDeque<u8>) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Push(bool, Vec<u8>),
        Acknowledge(u64),
        Read(u64, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (any::<bool>(), proptest::collection::vec(any::<u8>(), 0..50))
                .prop_map(|(err, data)| Step::Push(err, data)),
            (0..2000_u64).prop_map(Step::Acknowledge),
            (0..2000_u64, 1..60_usize).prop_map(|(at, limit)| Step::Read(at, limit)),
        ];
        proptest::collection::vec(step, 0..80)
    }

    fn stream(err: bool) -> OutputStream {
        if err { OutputStream::Stderr } else { OutputStream::Stdout }
    }

    proptest! {
        /// Against the plainest model there is: every byte ever pushed, with its stream.
        #[test]
        fn it_is_the_tail_of_all_that_was_pushed(steps in steps()) {
            let mut output = Output::default();
            let mut all: Vec<(OutputStream, u8)> = Vec::new();
            let mut base = 0;
            for step in steps {
                match step {
                    Step::Push(err, data) => {
                        output.push(stream(err), &data);
                        all.extend(data.iter().map(|byte| (stream(err), *byte)));
                    }
                    Step::Acknowledge(offset) => {
                        output.acknowledge(offset);
                        base = base.max(offset.min(all.len() as u64));
                    }
                    Step::Read(at, limit) => {
                        let chunk = output.chunk(at, limit);
                        let inside = at >= base && at < all.len() as u64;
                        prop_assert_eq!(chunk.is_some(), inside);
                        if let Some(chunk) = chunk {
                            let from = usize::try_from(at).unwrap();
                            let expected: Vec<u8> = all[from..]
                                .iter()
                                .take_while(|(of, _)| *of == chunk.stream)
                                .take(limit)
                                .map(|(_, byte)| *byte)
                                .collect();
                            prop_assert!(!expected.is_empty());
                            prop_assert_eq!(chunk.data, expected);
                            prop_assert_eq!(chunk.offset, at);
                        }
                    }
                }
                prop_assert_eq!(output.base(), base);
                prop_assert_eq!(output.end(), all.len() as u64);
                let kept = usize::try_from(output.end() - base).unwrap();
                prop_assert_eq!(output.space() + kept, usize::try_from(JOB_WINDOW_BYTES).unwrap());
            }
        }
    }

    #[test]
    fn the_worst_alternation_stays_bounded_and_readable() {
        let mut output = Output::default();
        let mut count = 0_u64;
        while output.space() > 0 {
            output.push(stream(count % 2 == 1), &[count.to_le_bytes()[0]]);
            count += 1;
        }
        assert_eq!(count, JOB_WINDOW_BYTES);
        for offset in 0..count {
            let chunk = output.chunk(offset, 100).unwrap();
            assert_eq!(chunk.stream, stream(offset % 2 == 1));
            assert_eq!(chunk.data, [offset.to_le_bytes()[0]]);
        }
        output.acknowledge(count);
        assert!(output.runs.is_empty());
    }
}
