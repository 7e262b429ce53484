//! The task that runs a session, and the handle that opens streams on it.
//!
//! ```text
//!   Mux ── open request ──► driver task ── polls ──► yamux ──► Guard ──► transport
//!    ▲                        │ supervised: a panic ends this link only
//!    └───── Ending (watch) ◄──┘ first cause wins; also set by whoever finds a violation
//! ```
//!
//! # Invariants
//! 1. The driver ends when the session fails, when somebody ends the link ([`Ending::end`]), or
//!    when the last [`Mux`] handle is gone. With it the transport is dropped, so the guest sees it.
//! 2. An ended link has one cause, and everybody who asks gets that one.
//! 3. A stream that the guest opens, and any other abuse that the guard finds, ends the link.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::task::{Context, Poll};

use matchlock_wire::{MAX_STREAMS, SPLIT_SEND_BYTES, STREAM_WINDOW_BYTES};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};
use yamux::{Connection, ConnectionError, FrameDecodeError, Mode};

use super::LinkError;
use super::guard::{Budget, Guard, Stop, stop_of};
use super::ledger::Ledger;
use super::stream::LinkStream;

/// Open requests that may wait for the driver.
const OPEN_REQUESTS: usize = 8;

/// A stream can be read to its end here a moment before yamux has taken it off its table; opening
/// another one over yamux's limit would end the session, so yamux's limit is twice ours.
const MUX_STREAMS: usize = 2 * MAX_STREAMS;

type OpenRequest = oneshot::Sender<LinkStream>;

/// Why a link ended, once it has.
#[derive(Debug)]
pub(super) struct Ending {
    cause: watch::Sender<Option<LinkError>>,
}

impl Ending {
    /// A link that has not ended.
    pub(super) fn new() -> Self {
        Self { cause: watch::Sender::new(None) }
    }

    /// Ends the link, unless it has ended already; returns the cause that counts.
    pub(super) fn end(&self, cause: LinkError) -> LinkError {
        self.cause.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(cause.clone());
            }
            first
        });
        self.cause.borrow().clone().unwrap_or(cause)
    }

    /// The cause, if the link has ended.
    pub(super) fn now(&self) -> Option<LinkError> {
        self.cause.borrow().clone()
    }

    /// Waits until the link has ended.
    pub(super) async fn ended(&self) -> LinkError {
        let mut cause = self.cause.subscribe();
        match cause.wait_for(Option::is_some).await.map(|known| known.clone()) {
            Ok(Some(cause)) => cause,
            // The sender lives in self: this cannot be.
            Ok(None) | Err(_) => LinkError::Lost { cause: "its task is gone".to_owned() },
        }
    }
}

/// Opens streams on a session. The session lives as long as a clone of this.
#[derive(Debug, Clone)]
pub(super) struct Mux {
    opens: mpsc::Sender<OpenRequest>,
    ending: Arc<Ending>,
}

impl Mux {
    /// Starts a session, the host's side, over this transport.
    pub(super) fn start<R, W>(reader: R, writer: W) -> Self
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let ledger = Arc::new(Ledger::default());
        let budget = Arc::new(Budget::default());
        let guard = Guard::new(reader, writer, ledger.clone(), budget.clone());
        let (opens, requests) = mpsc::channel(OPEN_REQUESTS);
        let ending = Arc::new(Ending::new());
        let driver = Driver {
            connection: Connection::new(guard.compat(), mux_config(), Mode::Client),
            requests,
            waiting: None,
            ledger,
            budget,
        };
        tokio::spawn(supervise(driver, ending.clone()));
        Self { opens, ending }
    }

    /// Opens a stream. Nothing is sent before something is written to it.
    pub(super) async fn open(&self) -> Result<LinkStream, LinkError> {
        let (reply, stream) = oneshot::channel();
        if self.opens.send(reply).await.is_err() {
            return Err(self.ending.ended().await);
        }
        match stream.await {
            Ok(stream) => Ok(stream),
            Err(_) => Err(self.ending.ended().await),
        }
    }

    /// The link's end.
    pub(super) fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }
}

fn mux_config() -> yamux::Config {
    let mut config = yamux::Config::default();
    // A connection window of exactly the streams' windows turns the growing of windows off.
    config
        .set_max_num_streams(MUX_STREAMS)
        .set_max_connection_receive_window(Some(MUX_STREAMS * STREAM_WINDOW_BYTES))
        .set_split_send_size(SPLIT_SEND_BYTES)
        .set_read_after_close(true);
    config
}

struct Driver<T> {
    connection: Connection<Compat<T>>,
    requests: mpsc::Receiver<OpenRequest>,
    /// A request that yamux could not serve yet.
    waiting: Option<OpenRequest>,
    ledger: Arc<Ledger>,
    budget: Arc<Budget>,
}

/// Runs the driver in a task of its own, so that a panic in the multiplexer is this link's end and
/// nothing else's.
async fn supervise<T>(mut driver: Driver<T>, ending: Arc<Ending>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let ended = ending.clone();
    let task = tokio::spawn(async move {
        tokio::select! {
            cause = ended.ended() => cause,
            cause = std::future::poll_fn(|cx| driver.poll(cx)) => cause,
        }
    });
    let cause = match task.await {
        Ok(cause) => cause,
        Err(error) if error.is_panic() => {
            LinkError::Protocol { what: "the multiplexer panicked on what it sent".to_owned() }
        }
        Err(_) => LinkError::Lost { cause: "its task was cancelled".to_owned() },
    };
    let cause = ending.end(cause);
    tracing::debug!(%cause, "guest link ended");
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// Drives the session until it ends.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<LinkError> {
        self.budget.renew();
        if let Poll::Ready(cause) = self.poll_opens(cx) {
            return Poll::Ready(cause);
        }
        match self.connection.poll_next_inbound(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(stream))) => Poll::Ready(LinkError::Protocol {
                what: format!("it opened the stream {}", stream.id()),
            }),
            Poll::Ready(Some(Err(error))) => Poll::Ready(cause_of(&error)),
            Poll::Ready(None) => Poll::Ready(machine_closed()),
        }
    }

    /// Ready only when the session is over.
    fn poll_opens(&mut self, cx: &mut Context<'_>) -> Poll<LinkError> {
        loop {
            let request = match self.waiting.take() {
                Some(request) => request,
                None => match self.requests.poll_recv(cx) {
                    Poll::Ready(Some(request)) => request,
                    Poll::Ready(None) => {
                        return Poll::Ready(LinkError::Lost {
                            cause: "this side has closed it".to_owned(),
                        });
                    }
                    Poll::Pending => return Poll::Pending,
                },
            };
            match self.connection.poll_new_outbound(cx) {
                Poll::Ready(Ok(stream)) => {
                    let stream = LinkStream::new(stream, self.ledger.clone());
                    if request.send(stream).is_err() {
                        tracing::trace!("a stream was opened for somebody who has left");
                    }
                }
                Poll::Ready(Err(error)) => return Poll::Ready(cause_of(&error)),
                Poll::Pending => {
                    self.waiting = Some(request);
                    return Poll::Pending;
                }
            }
        }
    }
}

/// What a failure of the session means.
fn cause_of(error: &ConnectionError) -> LinkError {
    match error {
        ConnectionError::Io(error) | ConnectionError::Decode(FrameDecodeError::Io(error)) => {
            cause_of_io(error)
        }
        ConnectionError::Decode(error) => LinkError::Protocol { what: error.to_string() },
        ConnectionError::TooManyStreams
        | ConnectionError::NoMoreStreamIds
        | ConnectionError::InvalidWindowUpdate => LinkError::Protocol { what: error.to_string() },
        other => LinkError::Lost { cause: other.to_string() },
    }
}

fn cause_of_io(error: &io::Error) -> LinkError {
    match stop_of(error) {
        Some(Stop::Violation(what)) => LinkError::Protocol { what: what.clone() },
        Some(Stop::Closed(how)) => LinkError::Lost { cause: how.clone() },
        None => match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
                machine_closed()
            }
            _ => LinkError::from_io(error),
        },
    }
}

fn machine_closed() -> LinkError {
    LinkError::Lost { cause: "the machine closed the connection".to_owned() }
}
