//! Reads lines of bounded length.
//!
//! # Invariants
//! 1. At most [`MAX_LINE_BYTES`] of a line are kept. A longer one is read to its end and thrown away
//!    but for its beginning, so that whoever sent it can be told; the lines after it are whole.
//! 2. What a large line takes is counted in the [`Budget`] while it comes, and held by whoever gets the
//!    line. One that does not fit is thrown away in the same manner. Its memory goes with it.
//! 3. A line without an end before the end of the input is no line: it may have been cut.
//! 4. Dropping [`LineReader::next`] before it has answered loses nothing.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::budget::{Budget, Held};
use super::protocol::RpcError;

/// The longest line, without its end: a file of 48 MiB in base64.
pub(super) const MAX_LINE_BYTES: usize = 64 * 1024 * 1024;

/// How much of a line that is too long is kept.
const HEAD_BYTES: usize = 4096;

/// From this length on a line counts in the budget.
const LARGE_LINE_BYTES: usize = 64 * 1024;

/// A large line takes room to grow, and then what is decoded of it.
const COPIES: usize = 3;

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
    /// The beginning of a line for which there is no room now, and what is said of that.
    NoRoom {
        /// The beginning.
        head: Bytes,
        /// What is said.
        error: RpcError,
    },
}

/// A line that is being thrown away.
#[derive(Debug)]
struct Discarding {
    head: Bytes,
    /// What was thrown away after it.
    after: usize,
    /// Why, if not for its length.
    error: Option<RpcError>,
}

/// Reads lines.
#[derive(Debug)]
pub(super) struct LineReader<R> {
    from: R,
    max: usize,
    buffer: BytesMut,
    /// No end of line is before this position.
    searched: usize,
    discarding: Option<Discarding>,
    budget: Budget,
    /// For the line that is being read, and how much.
    held: Held,
    counted: usize,
    /// The line that is being read does not fit.
    no_room: Option<RpcError>,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    /// Lines of at most `max` bytes.
    pub(super) fn new(from: R, max: usize, budget: Budget) -> Self {
        Self {
            from,
            max,
            buffer: BytesMut::new(),
            searched: 0,
            discarding: None,
            held: budget.hold(),
            budget,
            counted: 0,
            no_room: None,
        }
    }

    /// The next line, and what of the budget it takes; `None` at the end of the input.
    ///
    /// # Errors
    /// When the input cannot be read.
    pub(super) async fn next(&mut self) -> io::Result<Option<(Line, Held)>> {
        loop {
            if let Some(line) = self.take_line() {
                self.counted = 0;
                return Ok(Some((line, std::mem::replace(&mut self.held, self.budget.hold()))));
            }
            self.buffer.reserve(READ_BYTES);
            // Cancelled here, nothing was taken from the input.
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
            self.count();
        }
    }

    /// Counts what a large line takes by now.
    fn count(&mut self) {
        let length = self.buffer.len();
        if length <= LARGE_LINE_BYTES.max(self.counted) || self.discarding.is_some() {
            return;
        }
        match self.held.take((length - self.counted) * COPIES) {
            Ok(()) => self.counted = length,
            Err(error) => self.no_room = Some(error),
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
        if end > LARGE_LINE_BYTES {
            // It would keep the whole line's memory.
            self.buffer = BytesMut::from(&self.buffer[..]);
        }
        let no_room = self.no_room.take();
        if let Some(Discarding { head, after, error }) = self.discarding.take() {
            let length = head.len() + after + line.len();
            return Some(match error {
                Some(error) => Line::NoRoom { head, error },
                None => Line::TooLong { head, length },
            });
        }
        let length = line.len();
        let head = || Bytes::copy_from_slice(&line[..length.min(HEAD_BYTES).min(self.max)]);
        if length > self.max {
            return Some(Line::TooLong { head: head(), length });
        }
        if let Some(error) = no_room {
            return Some(Line::NoRoom { head: head(), error });
        }
        Some(Line::Whole(line.freeze()))
    }

    fn discard_what_is_too_much(&mut self) {
        if let Some(line) = &mut self.discarding {
            line.after += self.buffer.len();
        } else if self.buffer.len() > self.max || self.no_room.is_some() {
            let length = self.buffer.len();
            let head = Bytes::copy_from_slice(&self.buffer[..length.min(HEAD_BYTES).min(self.max)]);
            let (after, error) = (length - head.len(), self.no_room.take());
            self.discarding = Some(Discarding { head, after, error });
            // With what was reserved and is held for it.
            self.buffer = BytesMut::new();
            self.held = self.budget.hold();
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
        let mut reader = LineReader::new(Pieces(pieces, false), max, Budget::new(usize::MAX));
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
                    Some((line, _held)) => lines.push(line),
                    None => return (lines, most),
                }
            }
        })
    }

    fn reader(input: Vec<u8>, budget: &Budget) -> LineReader<io::Cursor<Vec<u8>>> {
        LineReader::new(io::Cursor::new(input), MAX_LINE_BYTES, budget.clone())
    }

    #[tokio::test]
    async fn a_large_line_is_counted_as_long_as_somebody_has_it() {
        let budget = Budget::new(10_000_000);
        let large = vec![b'x'; 1_000_000];
        let input = [&b"small\n"[..], &large, b"\nlast\n"].concat();
        let mut reader = reader(input, &budget);
        let (line, _held) = reader.next().await.unwrap().unwrap();
        assert_eq!(line, Line::Whole("small".into()));
        let (line, held) = reader.next().await.unwrap().unwrap();
        assert_eq!(line, Line::Whole(large.into()));
        let taken = 1_000_000 * COPIES;
        budget.hold().take(10_000_000 - taken + 1).unwrap_err();
        assert!(reader.buffer.capacity() <= 2 * READ_BYTES, "{}", reader.buffer.capacity());
        drop((line, held));
        budget.hold().take(10_000_000).unwrap();
        let (line, _held) = reader.next().await.unwrap().unwrap();
        assert_eq!(line, Line::Whole("last".into()));
    }

    #[tokio::test]
    async fn a_line_for_which_there_is_no_room_is_refused_and_the_next_is_read() {
        for length in [100_000, 400_000, 5_000_000] {
            let budget = Budget::new(200_000);
            let input = [&vec![b'x'; length][..], b"\nlast\n"].concat();
            let mut reader = reader(input, &budget);
            let (line, held) = reader.next().await.unwrap().unwrap();
            let Line::NoRoom { head, error } = line else { panic!("{length}: {line:?}") };
            assert_eq!((head.len(), error.code), (HEAD_BYTES, super::super::protocol::Code::Busy));
            drop(held);
            budget.hold().take(200_000).unwrap();
            let (line, _held) = reader.next().await.unwrap().unwrap();
            assert_eq!(line, Line::Whole("last".into()), "{length}");
        }
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
                    Line::NoRoom { .. } => prop_assert!(false, "there is room for everything"),
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
