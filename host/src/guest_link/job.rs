//! The conversation about one command, on one stream.
//!
//! ```text
//!                    ┌────────────────────── job task ─────────────────────┐
//!   guest ─ frames ─►│ reader ─► OutputQueue ─► deliverer ─► events ───────│─► caller
//!   guest ◄─ frames ─│ writer ◄─ acks · signals · StdinWindow ◄─ stdin ────│── caller
//!                    └─────────────────────────────────────────────────────┘
//!   talking ── last event delivered, or the receiver is gone ──► parting: Release, read to the end
//! ```
//!
//! # Invariants
//! 1. The reader never waits for the receiver: the job's window bounds what it must hold (see
//!    [`super::output`]), so no stream of the session is ever left unread.
//! 2. Signals and acknowledgements go before stdin that waits.
//! 3. The job's slot is free again only when the guest has ended its side of the stream.
//! 4. A malformed conversation ends the link, with the cause as the job's last event.
//!
//! # Failure
//! When the link ends, what was received is delivered first, then the cause; the command goes on
//! in the guest. A dropped receiver releases the job: the guest kills the command.

use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use futures::{SinkExt, StreamExt};
use matchlock_wire::frame::{Codec, FrameError};
use matchlock_wire::message::{ExecInput, ExecOutput};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::codec::{FramedRead, FramedWrite};
use tokio_util::sync::CancellationToken;

use super::codec::{self, Limited};
use super::driver::{Ending, Mux};
use super::output::OutputQueue;
use super::stdin::StdinWindow;
use super::stream::{self, LinkStream};
use super::{ExecEvent, LinkError, StdinInput};

/// Events in the receiver's channel. With chunks of 32 KiB that is 128 KiB; up to the job's window
/// of 256 KiB waits behind it.
pub(super) const EVENT_SLOTS: usize = 4;

/// How long a job whose link has no holder any more may take to say goodbye.
const PARTING: Duration = Duration::from_secs(2);

/// How long the cause of a stream's sudden end may lag behind it.
const CAUSE_LAG: Duration = Duration::from_secs(1);

/// The signals of Linux.
const SIGNALS: std::ops::RangeInclusive<i32> = 1..=64;

type Reader = FramedRead<ReadHalf<LinkStream>, Limited<ExecOutput>>;
type Writer = FramedWrite<WriteHalf<LinkStream>, Codec<(), ExecInput>>;

/// What a job is made of.
pub(super) struct Job {
    /// Keeps the session alive while the command is talked about.
    pub(super) mux: Mux,
    /// The stream, unused so far.
    pub(super) stream: LinkStream,
    /// The encoded request that starts the command.
    pub(super) request: BytesMut,
    /// Told when the request was handed to the session.
    pub(super) accepted: oneshot::Sender<()>,
    /// From the caller; `None` when the command has no stdin.
    pub(super) stdin: Option<mpsc::Receiver<StdinInput>>,
    /// From the caller.
    pub(super) signals: mpsc::Receiver<i32>,
    /// To the caller.
    pub(super) events: mpsc::Sender<Result<ExecEvent, LinkError>>,
    /// Cancelled when nobody holds the link.
    pub(super) orphaned: CancellationToken,
    /// The job's place among the concurrent ones.
    pub(super) slot: OwnedSemaphorePermit,
}

impl Job {
    /// Runs the conversation to its end.
    pub(super) async fn run(self) {
        let Self { mux, stream, request, accepted, stdin, signals, events, orphaned, slot } = self;
        let talk = Talk::new(mux.ending().clone());
        let (read_half, write_half) = tokio::io::split(stream);
        let mut reader = Reader::new(read_half, Limited::new(codec::MAX_OUTPUT_FRAME));
        let mut writer = Writer::new(write_half, Codec::default());
        writer.write_buffer_mut().unsplit(request);
        let inputs = Inputs { accepted: Some(accepted), stdin, signals: Some(signals) };
        tokio::select! {
            () = talk.deliver(&events) => {}
            () = async { talk.read(&mut reader).await; pending().await } => {}
            () = async { talk.write(&mut writer, inputs).await; pending().await } => {}
        }
        drop(events);
        tokio::select! {
            () = part(&mut reader, &mut writer) => {}
            _ = mux.ending().ended() => {}
            () = async { orphaned.cancelled().await; tokio::time::sleep(PARTING).await } => {}
        }
        drop((reader, writer, slot));
    }
}

/// Releases the job and reads the stream to its end.
async fn part(reader: &mut Reader, writer: &mut Writer) {
    let goodbye = async {
        writer.feed(ExecInput::Release).await?;
        writer.close().await
    };
    let (said, ()) = futures::join!(goodbye, stream::drain(reader.get_mut()));
    if let Err(error) = said {
        // The guest has ended the stream first, and with it the job.
        tracing::trace!(%error, "a job's release was not taken");
    }
}

/// The caller's ends, as long as they are open.
struct Inputs {
    accepted: Option<oneshot::Sender<()>>,
    stdin: Option<mpsc::Receiver<StdinInput>>,
    signals: Option<mpsc::Receiver<i32>>,
}

/// What reader, deliverer and writer share.
struct Talk {
    state: Mutex<JobState>,
    /// There is something to deliver.
    to_deliver: Notify,
    /// There is something to write that no channel announces.
    to_write: Notify,
    ending: Arc<Ending>,
}

/// Where the conversation is; an attachment would go on from here.
#[derive(Debug, Default)]
struct JobState {
    started: bool,
    output: OutputQueue,
    stdin: StdinWindow,
}

impl Talk {
    fn new(ending: Arc<Ending>) -> Self {
        Self { state: Mutex::default(), to_deliver: Notify::new(), to_write: Notify::new(), ending }
    }

    fn state(&self) -> MutexGuard<'_, JobState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the command's last message or the link's end.
    async fn read(&self, reader: &mut Reader) {
        let last = loop {
            // A stream with data at hand is always ready: let the deliverer and others run.
            tokio::task::coop::consume_budget().await;
            let taken = match reader.next().await {
                Some(Ok(message)) => self.take(message),
                Some(Err(error)) => Err(self.failure(codec::violation_of(&error)).await),
                None => Err(self.failure(None).await),
            };
            match taken {
                Ok(None) => {}
                Ok(Some(last)) => break Ok(last),
                Err(cause) => break Err(self.ending.end(cause)),
            }
        };
        self.state().output.push(last);
        self.to_deliver.notify_one();
    }

    /// Takes a message; gives the job's last event when this is it.
    fn take(&self, message: ExecOutput) -> Result<Option<ExecEvent>, LinkError> {
        let mut state = self.state();
        let violation = |what: String| LinkError::Protocol { what };
        match (message, state.started) {
            (ExecOutput::Started, false) => {
                state.started = true;
                state.output.push(Ok(ExecEvent::Started));
                self.to_deliver.notify_one();
            }
            (ExecOutput::Failed(failure), false) => {
                return Ok(Some(ExecEvent::Refused(codec::refusal(&failure))));
            }
            (ExecOutput::Output { stream, offset, data }, true) => {
                let stream = codec::output_stream(stream);
                state.output.take(stream, offset, data).map_err(violation)?;
                self.to_deliver.notify_one();
            }
            (ExecOutput::StdinAck { offset }, true) => {
                state.stdin.acknowledge(offset).map_err(violation)?;
                self.to_write.notify_one();
            }
            (ExecOutput::Exited(status), true) => {
                return Ok(Some(ExecEvent::Exited(codec::exit_status(status))));
            }
            (message, started) => {
                let when = if started { "after" } else { "before" };
                let what = name_of(&message);
                return Err(violation(format!("it sent {what} {when} the command's start")));
            }
        }
        Ok(None)
    }

    /// Why the stream ended before the command did.
    async fn failure(&self, violation: Option<LinkError>) -> LinkError {
        match violation {
            Some(violation) => violation,
            None => stream_cut(&self.ending, "it closed a command's stream").await,
        }
    }

    /// Hands events to the receiver until the last one, or until the receiver is gone.
    async fn deliver(&self, events: &mpsc::Sender<Result<ExecEvent, LinkError>>) {
        loop {
            let Ok(slot) = events.reserve().await else { return };
            let event = loop {
                let next = self.state().output.next();
                if let Some(event) = next {
                    break event;
                }
                tokio::select! {
                    () = self.to_deliver.notified() => {}
                    () = events.closed() => return,
                }
            };
            let is_last = !matches!(event, Ok(ExecEvent::Started | ExecEvent::Output(..)));
            slot.send(event);
            if is_last {
                return;
            }
            if self.state().output.ack_is_due() {
                self.to_write.notify_one();
            }
        }
    }

    /// Writes the request, then whatever there is to write, until the stream fails.
    async fn write(&self, writer: &mut Writer, inputs: Inputs) {
        if let Err(error) = self.try_write(writer, inputs).await {
            // The reader meets the same end and knows its cause.
            tracing::trace!(%error, "a job's stream takes nothing more");
        }
    }

    async fn try_write(&self, writer: &mut Writer, mut inputs: Inputs) -> Result<(), FrameError> {
        writer.flush().await?;
        if let Some(accepted) = inputs.accepted.take()
            && accepted.send(()).is_err()
        {
            // The caller has left; the deliverer sees that too.
            tracing::trace!("a command's caller has left before it was started");
        }
        loop {
            let message = self.next_message(&mut inputs).await;
            writer.send(message).await?;
        }
    }

    /// The next message for the guest: acknowledgements, then signals, then stdin.
    async fn next_message(&self, inputs: &mut Inputs) -> ExecInput {
        loop {
            let (wants_input, can_send) = {
                let mut state = self.state();
                if let Some(offset) = state.output.next_ack() {
                    return ExecInput::Ack { offset };
                }
                (state.stdin.wants_input(), state.stdin.can_send())
            };
            tokio::select! {
                biased;
                signal = receive(&mut inputs.signals) => {
                    if SIGNALS.contains(&signal) {
                        return ExecInput::Signal(signal);
                    }
                    // The agent would take it for a broken protocol.
                    tracing::warn!(signal, "a signal that does not exist was not sent");
                }
                () = std::future::ready(()), if can_send => {
                    let next = self.state().stdin.next();
                    if let Some(message) = next {
                        return message;
                    }
                }
                () = self.to_write.notified() => {}
                input = next_input(&mut inputs.stdin), if wants_input => {
                    let mut state = self.state();
                    match input {
                        StdinInput::Data(data) => state.stdin.offer(data),
                        StdinInput::Eof => {
                            state.stdin.finish();
                            inputs.stdin = None;
                        }
                    }
                }
            }
        }
    }
}

/// The next item of a channel; never when it is closed or was never there.
async fn receive<T>(channel: &mut Option<mpsc::Receiver<T>>) -> T {
    if let Some(receiver) = channel {
        if let Some(item) = receiver.recv().await {
            return item;
        }
        *channel = None;
    }
    pending().await
}

/// The next piece of stdin; a dropped sender is its end; never when there is no stdin.
async fn next_input(stdin: &mut Option<mpsc::Receiver<StdinInput>>) -> StdinInput {
    match stdin {
        Some(receiver) => receiver.recv().await.unwrap_or(StdinInput::Eof),
        None => pending().await,
    }
}

/// Why a stream ended too early: the link's cause if it has ended, else the guest's doing.
pub(super) async fn stream_cut(ending: &Ending, deed: &'static str) -> LinkError {
    match tokio::time::timeout(CAUSE_LAG, ending.ended()).await {
        Ok(cause) => cause,
        Err(_) => LinkError::Protocol { what: format!("{deed} too early") },
    }
}

fn name_of(message: &ExecOutput) -> &'static str {
    match message {
        ExecOutput::Started => "the start of a command",
        ExecOutput::Attached { .. } => "an attachment",
        ExecOutput::Failed(_) => "a refusal",
        ExecOutput::Output { .. } => "output",
        ExecOutput::StdinAck { .. } => "an acknowledgement of stdin",
        ExecOutput::Exited(_) => "the end of a command",
    }
}
