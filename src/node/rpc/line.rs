//! Reads lines of bounded length.
//!
//! # Invariants
//! 1. At most [`MAX_LINE_BYTES`] of a line are kept. A longer one is read to its end and thrown away
//!    but for its beginning, so that whoever sent it can be told; the lines after it are whole.
//! 2. A line without an end before the end of the input is no line: it may have been cut.
//! 3. Dropping [`LineReader::next`] before it has answered loses nothing.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest line, without its end: a file of 48 MiB in base64.
pub(super) const MAX_LINE_BYTES: usize = 64 * 1024 * 1024;

/// How much of a line that is too long is kept.
const HEAD_BYTES: usize = 4096;

/// How much is read at once.
const READ_BYTES: usize = 64 * 1024;

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Whole(Bytes),
    /// The beginning of a line that is too long, and how long it is.
    TooLong {
        /// The beginning.
        head: Bytes,
        /// The length of all of it.
        length: usize,
    },
}

/// Reads lines.
#[derive(Debug)]
pub(super) struct LineReader<R> {
    from: R,
    max: usize,
    buffer: BytesMut,
    /// No end of line is before this position.
    searched: usize,
    /// Of the line that is too long: its beginning, and what of it was thrown away after that.
    discarding: Option<(Bytes, usize)>,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// Lines of at most `max` bytes.
    pub(super) fn new(from: R, max: usize) -> Self {
        Self { from, max, buffer: BytesMut::new(), searched: 0, discarding: None }
    }

    /// The next line; `None` at the end of the input.
    ///
    /// # Errors
    /// When the input cannot be read.
    pub(super) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.take_line() {
                return Ok(Some(line));
            }
            self.buffer.reserve(READ_BYTES);
            // Cancelled here, nothing was taken from the input.
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    fn take_line(&mut self) -> Option<Line> {
        let end = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end.map(|at| self.searched + at) else {
            self.searched = self.buffer.len();
            self.discard_what_is_too_much();
            return None;
        };
        let mut line = self.buffer.split_to(end + 1);
        line.truncate(end);
        self.searched = 0;
        if let Some((head, before)) = self.discarding.take() {
            return Some(Line::TooLong { length: head.len() + before + line.len(), head });
        }
        if line.len() > self.max {
            let length = line.len();
            line.truncate(HEAD_BYTES.min(self.max));
            return Some(Line::TooLong { head: Bytes::copy_from_slice(&line), length });
        }
        Some(Line::Whole(line.freeze()))
    }

    fn discard_what_is_too_much(&mut self) {
        if let Some((_, discarded)) = &mut self.discarding {
            *discarded += self.buffer.len();
        } else if self.buffer.len() > self.max {
            let head = Bytes::copy_from_slice(&self.buffer[..HEAD_BYTES.min(self.max)]);
            self.discarding = Some((head.clone(), self.buffer.len() - head.len()));
            // With what was reserved for it.
            self.buffer = BytesMut::new();
        } else {
            return;
        }
        self.buffer.clear();
        self.searched = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use proptest::prelude::*;
    use tokio::io::ReadBuf;

    use super::*;

    /// An input that comes in these pieces, with a pause after each.
    struct Pieces(Vec<Vec<u8>>, bool);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.1 = !self.1;
            if self.1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(piece) = self.0.first_mut() {
                let taken = piece.len().min(buf.remaining());
                buf.put_slice(&piece.drain(..taken).collect::<Vec<_>>());
                if piece.is_empty() {
                    self.0.remove(0);
                }
            }
            Poll::Ready(Ok(()))
        }
    }

    fn read_all(pieces: Vec<Vec<u8>>, max: usize) -> (Vec<Line>, usize) {
        let pieces = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
        let mut reader = LineReader::new(Pieces(pieces, false), max);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut lines, mut most) = (Vec::new(), 0);
            loop {
                // Dropped now and then: nothing may be lost.
                let next = tokio::select! {
                    biased;
                    next = reader.next() => next.unwrap(),
                    () = tokio::task::yield_now() => continue,
                };
                most = most.max(reader.buffer.len());
                match next {
                    Some(line) => lines.push(line),
                    None => return (lines, most),
                }
            }
        })
    }

    proptest! {
        #[test]
        fn lines_are_what_lies_between_their_ends(
            lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20),
            rest in prop::collection::vec(any::<u8>().prop_filter("", |b| *b != b'\n'), 0..60),
            cuts in prop::collection::vec(0_usize..2000, 0..30),
            max in 1_usize..50,
        ) {
            let lines: Vec<Vec<u8>> = lines
                .into_iter()
                .map(|line| line.into_iter().filter(|byte| *byte != b'\n').collect())
                .collect();
            let mut input: Vec<u8> = lines.iter().flat_map(|line| [&line[..], b"\n"].concat()).collect();
            input.extend(rest);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(input.len())).collect();
            cuts.extend([0, input.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| input[cut[0]..cut[1]].to_vec()).collect();
            let (read, _) = read_all(pieces, max);
            prop_assert_eq!(read.len(), lines.len());
            for (read, line) in read.iter().zip(&lines) {
                match read {
                    Line::Whole(whole) => prop_assert_eq!(whole, line),
                    Line::TooLong { head, length } => {
                        prop_assert!(line.len() > max && !head.is_empty());
                        prop_assert_eq!(*length, line.len());
                        prop_assert!(line.starts_with(head));
                    }
                }
                prop_assert_eq!(matches!(read, Line::Whole(_)), line.len() <= max);
            }
        }

        #[test]
        fn no_input_makes_it_hold_more_than_a_line(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..40),
        ) {
            let (_, most) = read_all(pieces, 1000);
            prop_assert!(most <= 1000 + 3000, "{most} bytes were kept");
        }
    }
}
