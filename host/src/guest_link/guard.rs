//! Watches both directions of the transport below yamux, and ends the session on abuse.
//!
//! ```text
//!   yamux  ──write──►  Guard  ──►  transport  ──►  guest
//!          ◄──read───         ◄──             ◄──
//! ```
//!
//! yamux meets most violations with a GOAWAY frame and goes on, tells nobody, and bounds neither
//! rates nor the number of small frames. So the guard reads the headers too:
//!
//! | what | limit | why this number |
//! |---|---|---|
//! | stream opened by the guest | 0 | only the host opens streams |
//! | body of a data frame | 256 KiB | a stream's whole window; no honest frame can be longer |
//! | data for a stream that is not open | 0 | a stream is dropped here only after the guest's end of it |
//! | frames without a body, per second | 20,000 | honest: one window update per 128 KiB read (1,600/s at 200 MB/s), a few per stream |
//! | unread data frames | 16,384, then the guard stops reading | see [`super::ledger`] |
//! | GOAWAY written by us | 0 with a code | it means that yamux found a violation and would go on |
//! | work per poll | 64 KiB or 512 frames, then it waits for the next | one VM must not starve the others |
//!
//! # Invariants
//! 1. Bytes that complete a bad header are not handed to yamux.
//! 2. The ledger knows of the transport's end before yamux does: who meets the end of a stream can
//!    tell it from the end of all.
//! 3. An honest guest is never cut for being slow, chatty or fast: what it can do legally in
//!    large numbers (small frames, window updates) is slowed down or far below its limit.
//!
//! # Failure
//! A violation is an `io::Error` that carries a [`Stop`]; [`stop_of`] finds it again behind
//! yamux's own errors.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use matchlock_wire::STREAM_WINDOW_BYTES;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::ledger::Ledger;
use super::scanner::{DATA, GO_AWAY, HEADER_BYTES, Header, RST, SYN, Scanner, WINDOW_UPDATE};

/// So many frames without a body may come per second.
pub(super) const MAX_CONTROL_FRAMES: u32 = 20_000;

const CONTROL_PERIOD: Duration = Duration::from_secs(1);

/// After this much work in one poll of the session the guard yields.
const POLL_BUDGET: usize = 64 * 1024;

/// What a frame costs of the budget beside its body: handling it, not its 12 bytes, is the work.
const FRAME_COST: usize = 128;

/// Why the guard ended a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// The guest broke the protocol.
    Violation(String),
    /// The guest ended the session.
    Closed(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Violation(what) => write!(f, "protocol violation: {what}"),
            Self::Closed(how) => f.write_str(how),
        }
    }
}

impl std::error::Error for Stop {}

impl From<Stop> for io::Error {
    fn from(stop: Stop) -> Self {
        Self::other(stop)
    }
}

/// The guard's reason in an error that came from it.
pub(super) fn stop_of(error: &io::Error) -> Option<&Stop> {
    error.get_ref()?.downcast_ref()
}

fn violation(what: impl Into<String>) -> Stop {
    Stop::Violation(what.into())
}

/// The work that one poll of the session may still do. yamux polls reads and writes in a loop that
/// ends only when both are pending, so it is the session's owner who starts each poll's budget.
#[derive(Debug, Default)]
pub(super) struct Budget {
    spent: AtomicUsize,
}

impl Budget {
    /// A new poll begins.
    pub(super) fn renew(&self) {
        self.spent.store(0, Ordering::Relaxed);
    }

    fn spend(&self, work: usize) {
        self.spent.fetch_add(work, Ordering::Relaxed);
    }

    /// Pending, with a wake-up at once, when this poll has done enough.
    fn poll_left(&self, cx: &Context<'_>) -> Poll<()> {
        if self.spent.load(Ordering::Relaxed) < POLL_BUDGET {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// A transport with the guard around it.
#[derive(Debug)]
pub(super) struct Guard<R, W> {
    reader: R,
    writer: W,
    inbound: Inbound,
    scanner_in: Scanner,
    scanner_out: Scanner,
    budget: Arc<Budget>,
    /// yamux does not look at every error of a write, so a stop is told again at each call.
    stopped: Option<Stop>,
}

impl<R, W> Guard<R, W> {
    /// Guards this transport; `ledger` is told of every data frame.
    pub(super) fn new(reader: R, writer: W, ledger: Arc<Ledger>, budget: Arc<Budget>) -> Self {
        Self {
            reader,
            writer,
            inbound: Inbound { ledger, control: ControlRate::new(Instant::now()) },
            scanner_in: Scanner::default(),
            scanner_out: Scanner::default(),
            budget,
            stopped: None,
        }
    }

    fn still_open(&self) -> io::Result<()> {
        self.stopped.clone().map_or(Ok(()), |stop| Err(stop.into()))
    }

    fn stop(&mut self, stop: Stop) -> io::Error {
        self.inbound.ledger.break_off();
        self.stopped = Some(stop.clone());
        stop.into()
    }

    fn scan_inbound(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        let Self { inbound, scanner_in, budget, .. } = self;
        budget.spend(bytes.len());
        scanner_in.feed(bytes, |header| {
            budget.spend(FRAME_COST - HEADER_BYTES);
            inbound.check(header)
        })
    }

    fn scan_outbound(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        self.budget.spend(bytes.len());
        self.scanner_out.feed(bytes, |header| match header.kind {
            GO_AWAY if header.length != 0 => {
                Err(violation(format!("the multiplexer refused a frame (code {})", header.length)))
            }
            _ => Ok(()),
        })
    }
}

/// The rules for what the guest sends.
#[derive(Debug)]
struct Inbound {
    ledger: Arc<Ledger>,
    control: ControlRate,
}

impl Inbound {
    /// The streams' readers are to know of a failed transport before yamux ends their streams.
    fn watched<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.ledger.break_off();
        }
        result
    }

    fn check(&mut self, header: &Header) -> Result<(), Stop> {
        let Header { version, kind, stream, length, .. } = *header;
        if version != 0 {
            return Err(violation(format!("a frame has the unknown version {version}")));
        }
        match kind {
            GO_AWAY => {
                return Err(Stop::Closed(format!("the guest ended the session (code {length})")));
            }
            kind if kind > GO_AWAY => {
                return Err(violation(format!("a frame has the unknown kind {kind}")));
            }
            DATA | WINDOW_UPDATE if header.has(SYN) => {
                return Err(violation(format!("it opened the stream {stream}")));
            }
            _ => {}
        }
        let body = header.body_bytes();
        if body == 0 {
            return self.control.count(Instant::now());
        }
        if body > STREAM_WINDOW_BYTES {
            return Err(violation(format!("a frame has a body of {body} bytes")));
        }
        if header.has(RST) {
            return Err(violation(format!("it reset the stream {stream} with a body")));
        }
        if !self.ledger.arrived(stream) {
            return Err(violation(format!(
                "it sent data on the stream {stream}, which is not open"
            )));
        }
        Ok(())
    }
}

/// Counts frames without a body, period by period.
#[derive(Debug)]
struct ControlRate {
    since: Instant,
    frames: u32,
}

impl ControlRate {
    fn new(now: Instant) -> Self {
        Self { since: now, frames: 0 }
    }

    fn count(&mut self, now: Instant) -> Result<(), Stop> {
        if now.duration_since(self.since) >= CONTROL_PERIOD {
            *self = Self::new(now);
        }
        self.frames += 1;
        if self.frames > MAX_CONTROL_FRAMES {
            return Err(violation(format!(
                "more than {MAX_CONTROL_FRAMES} control frames came within a second"
            )));
        }
        Ok(())
    }
}

impl<R: AsyncRead + Unpin, W: Unpin> AsyncRead for Guard<R, W> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.still_open()?;
        ready!(this.budget.poll_left(cx));
        ready!(this.inbound.ledger.poll_room(cx));
        let before = buf.filled().len();
        let room = buf.remaining();
        let read = ready!(Pin::new(&mut this.reader).poll_read(cx, buf));
        if read.is_err() || (room > 0 && buf.filled().len() == before) {
            this.inbound.ledger.break_off();
        }
        read?;
        if let Err(stop) = this.scan_inbound(&buf.filled()[before..]) {
            buf.set_filled(before);
            return Poll::Ready(Err(this.stop(stop)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<R: Unpin, W: AsyncWrite + Unpin> AsyncWrite for Guard<R, W> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.still_open()?;
        ready!(this.budget.poll_left(cx));
        let written = ready!(Pin::new(&mut this.writer).poll_write(cx, buf));
        let written = this.inbound.watched(written)?;
        this.scan_outbound(&buf[..written]).map_err(|stop| this.stop(stop))?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.still_open()?;
        let flushed = ready!(Pin::new(&mut this.writer).poll_flush(cx));
        Poll::Ready(this.inbound.watched(flushed))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().writer).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, flags: u16, stream: u32, length: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, kind];
        bytes.extend(flags.to_be_bytes());
        bytes.extend(stream.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(body);
        bytes
    }

    async fn read_all(bytes: &[u8]) -> Result<Vec<u8>, Stop> {
        let ledger = Arc::new(Ledger::default());
        ledger.opened(1);
        let mut guard = Guard::new(bytes, tokio::io::sink(), ledger, Arc::default());
        let mut read = Vec::new();
        match guard.read_to_end(&mut read).await {
            Ok(_) => Ok(read),
            Err(error) => Err(stop_of(&error).expect("an error of the guard").clone()),
        }
    }

    #[tokio::test]
    async fn honest_frames_pass_unchanged() {
        let mut bytes = frame(DATA, 2, 1, 5, b"hello");
        bytes.extend(frame(WINDOW_UPDATE, 0, 1, 1 << 17, b""));
        bytes.extend(frame(2, 1, 0, 77, b""));
        bytes.extend(frame(DATA, 4, 1, 0, b""));
        assert_eq!(read_all(&bytes).await, Ok(bytes));
    }

    #[tokio::test]
    async fn each_violation_has_its_name() {
        let cases = [
            (frame(DATA, SYN, 2, 0, b""), "it opened the stream 2"),
            (frame(WINDOW_UPDATE, SYN, 2, 0, b""), "it opened the stream 2"),
            (frame(DATA, 0, 1, 2_000_000_000, b""), "a frame has a body of 2000000000 bytes"),
            (frame(DATA, 0, 1, 262_145, b""), "a frame has a body of 262145 bytes"),
            (frame(DATA, 0, 3, 1, b"x"), "it sent data on the stream 3, which is not open"),
            (frame(DATA, RST, 1, 1, b"x"), "it reset the stream 1 with a body"),
            (frame(9, 0, 1, 1, b""), "a frame has the unknown kind 9"),
            (vec![0xFF; 12], "a frame has the unknown version 255"),
        ];
        for (bytes, what) in cases {
            assert_eq!(read_all(&bytes).await, Err(Stop::Violation(what.to_owned())));
        }
    }

    #[tokio::test]
    async fn a_go_away_of_the_guest_ends_the_session() {
        let stop = read_all(&frame(GO_AWAY, 0, 0, 2, b"")).await;
        assert_eq!(stop, Err(Stop::Closed("the guest ended the session (code 2)".to_owned())));
    }

    #[tokio::test]
    async fn a_go_away_of_ours_is_a_violation_of_the_guests() {
        let mut guard =
            Guard::new(tokio::io::empty(), tokio::io::sink(), Arc::default(), Arc::default());
        guard.write_all(&frame(GO_AWAY, 0, 0, 0, b"")).await.expect("a normal end");
        let error = guard.write_all(&frame(GO_AWAY, 0, 0, 1, b"")).await.expect_err("a violation");
        assert!(matches!(stop_of(&error), Some(Stop::Violation(_))), "{error}");
    }

    #[test]
    fn the_control_rate_is_per_second() {
        let start = Instant::now();
        let mut rate = ControlRate::new(start);
        for second in 0..5 {
            let now = start + Duration::from_secs(second);
            for _ in 0..MAX_CONTROL_FRAMES {
                rate.count(now).expect("below the limit");
            }
        }
        rate.count(start + Duration::from_millis(4_900)).expect_err("over the limit");
    }

    #[tokio::test]
    async fn a_poll_does_a_bounded_amount_of_work() {
        let bytes = frame(DATA, 0, 1, 1, b"x").repeat(10_000);
        let ledger = Arc::new(Ledger::default());
        ledger.opened(1);
        let budget = Arc::new(Budget::default());
        let mut guard = Guard::new(bytes.as_slice(), tokio::io::sink(), ledger, budget.clone());
        let mut polls = 0_usize;
        let mut frames = 0_usize;
        let mut byte = [0; 13];
        while frames < 10_000 {
            std::future::poll_fn(|cx| {
                polls += 1;
                budget.renew();
                loop {
                    let mut buf = ReadBuf::new(&mut byte);
                    if ready_frame(Pin::new(&mut guard).poll_read(cx, &mut buf)).is_none() {
                        return Poll::Ready(());
                    }
                    frames += 1;
                    if frames == 10_000 {
                        return Poll::Ready(());
                    }
                }
            })
            .await;
        }
        assert!((19..=21).contains(&polls), "10,000 frames in {polls} polls");
    }

    fn ready_frame(poll: Poll<io::Result<()>>) -> Option<()> {
        match poll {
            Poll::Ready(result) => {
                result.expect("an honest frame");
                Some(())
            }
            Poll::Pending => None,
        }
    }
}
