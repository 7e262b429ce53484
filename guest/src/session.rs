//! Sessions with the host: resynchronise, multiplex, hand out streams, start over.
//!
//! ```text
//!          ┌────────────── any end of a session ───────────────┐
//!          ▼                                                   │
//!   hunt for HELLO ─► answer ACK ─► same version? ─ yes ─► yamux server ─► one task per stream
//!     ▲      ▲                           │ no
//!     │      └───────────────────────────┘
//!   wait for a host (after the end of the line)
//! ```
//!
//! # Invariants
//! 1. One buffered reader lives as long as the line: bytes that were read beyond a hello belong to
//!    the session after it.
//! 2. At most [`MAX_STREAMS`] streams are served at once.
//! 3. The tasks of a session end with it. Jobs do not: they live in the agent.
//!
//! # Failure
//! A host that goes away, restarts or sends nonsense ends the session at most. Only a line that
//! fails for good ends [`serve`].

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use matchlock_wire::resync::{Greeting, Hunter, acknowledgement};
use matchlock_wire::{MAX_STREAMS, PROTOCOL_VERSION, SPLIT_SEND_BYTES, STREAM_WINDOW_BYTES};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::task::JoinSet;
use tokio_util::compat::{FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use crate::agent::Agent;
use crate::request;

/// What the port's driver hands over at once.
const READ_BYTES: usize = 4096;

/// An edge of the port that got lost would otherwise leave the guest deaf for ever.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A byte stream to a host that may go away and come back.
pub trait Line: AsyncRead + AsyncWrite + Unpin {
    /// Ready with `true` once a host is there, with `false` if none can come any more.
    ///
    /// # Errors
    /// When the line is broken for good.
    fn poll_reopened(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>>;
}

/// The line with its buffer, shared by the hunt and the session that follows it.
struct Shared<L>(Rc<RefCell<BufReader<L>>>);

impl<L> Clone for Shared<L> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<L: Line> AsyncRead for Shared<L> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buffer)
    }
}

impl<L: Line> AsyncWrite for Shared<L> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}

/// Serves one session after the other until the line is gone for good. Runs in a `LocalSet`.
///
/// # Errors
/// When the line is broken for good.
pub async fn serve<L: Line>(line: L, agent: Rc<Agent>) -> io::Result<()> {
    let line = Shared(Rc::new(RefCell::new(BufReader::with_capacity(READ_BYTES, line))));
    loop {
        match greet(line.clone()).await {
            Ok(Some(greeting)) if greeting.version == PROTOCOL_VERSION => {
                run(line.clone(), &agent).await;
            }
            // The other side sees our version in the answer and gives up or tries another.
            Ok(Some(_)) => {}
            // The line's end, or a host that left before it read the answer.
            Ok(None) | Err(_) => {
                if !reopened(&line).await? {
                    return Ok(());
                }
            }
        }
    }
}

/// Finds the next hello and answers it. `None` at the end of the line.
async fn greet<L: Line>(mut line: Shared<L>) -> io::Result<Option<Greeting>> {
    let mut hunter = Hunter::for_hello();
    let Some(greeting) = poll_fn(|cx| poll_hunt(&line, &mut hunter, cx)).await? else {
        return Ok(None);
    };
    line.write_all(&acknowledgement(&greeting.nonce)).await?;
    line.flush().await?;
    Ok(Some(greeting))
}

fn poll_hunt<L: Line>(
    line: &Shared<L>,
    hunter: &mut Hunter,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<Greeting>>> {
    let mut reader = line.0.borrow_mut();
    loop {
        let mut pinned = Pin::new(&mut *reader);
        let bytes = ready!(pinned.as_mut().poll_fill_buf(cx))?;
        if bytes.is_empty() {
            return Poll::Ready(Ok(None));
        }
        let (taken, greeting) = hunter.feed(bytes);
        pinned.consume(taken);
        if greeting.is_some() {
            return Poll::Ready(Ok(greeting));
        }
    }
}

async fn reopened<L: Line>(line: &Shared<L>) -> io::Result<bool> {
    loop {
        let wait = poll_fn(|cx| line.0.borrow_mut().get_mut().poll_reopened(cx));
        if let Ok(answer) = tokio::time::timeout(LOOK_AGAIN, wait).await {
            return answer;
        }
    }
}

/// One session, until it ends for whatever reason; the next hello is the only cure for all.
async fn run<L: Line>(line: Shared<L>, agent: &Rc<Agent>) {
    let mut config = Config::default();
    config
        .set_max_num_streams(MAX_STREAMS)
        .set_max_connection_receive_window(Some(MAX_STREAMS * STREAM_WINDOW_BYTES))
        .set_split_send_size(SPLIT_SEND_BYTES)
        .set_read_after_close(true);
    let mut connection = Connection::new(line.compat(), config, Mode::Server);
    let mut streams = JoinSet::new();
    while let Some(Ok(stream)) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
        streams.spawn_local(request::handle(Rc::clone(agent), stream.compat()));
        // What has ended is forgotten here; yamux bounds what has not.
        while streams.try_join_next().is_some() {}
    }
}
