//! One stream of a session, counted in the session's [`Ledger`] while it is read.
//!
//! # Invariants
//! 1. A stream is dropped only after its end was read, before anything was sent on it, or with
//!    its session: data that arrives for a dropped stream is a violation (see [`super::guard`]).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::Stream as _;
use futures::io::AsyncWrite as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::ledger::Ledger;

/// A stream that the host opened.
#[derive(Debug)]
pub(super) struct LinkStream {
    inner: yamux::Stream,
    ledger: Arc<Ledger>,
    /// The frame being read and how much of it was.
    frame: Option<(yamux::Packet, usize)>,
}

impl LinkStream {
    /// Takes a stream that was just opened.
    pub(super) fn new(inner: yamux::Stream, ledger: Arc<Ledger>) -> Self {
        ledger.opened(inner.id().val());
        Self { inner, ledger, frame: None }
    }

    /// The ledger of the stream's session.
    pub(super) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    fn id(&self) -> u32 {
        self.inner.id().val()
    }
}

impl Drop for LinkStream {
    fn drop(&mut self) {
        self.ledger.closed(self.id());
    }
}

impl AsyncRead for LinkStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.frame.is_none() {
            let Some(frame) = ready!(Pin::new(&mut self.inner).poll_next(cx)) else {
                return Poll::Ready(Ok(()));
            };
            self.frame = Some((frame?, 0));
            self.ledger.consumed(self.id());
        }
        if let Some((frame, read)) = &mut self.frame {
            let left = &frame.as_ref()[*read..];
            let taken = left.len().min(buf.remaining());
            buf.put_slice(&left[..taken]);
            *read += taken;
            if *read == frame.as_ref().len() {
                self.frame = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LinkStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

/// Reads and throws away everything up to the stream's end. A failed stream has ended too.
pub(super) async fn drain<R: AsyncRead + Unpin>(reader: &mut R) {
    let mut scrap = [0; 4096];
    while let Ok(1..) = reader.read(&mut scrap).await {
        // A stream with data at hand is always ready: let others run.
        tokio::task::coop::consume_budget().await;
    }
}
