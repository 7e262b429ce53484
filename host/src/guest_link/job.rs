//! The conversation about one command: one stream in each session, as many sessions as it takes.
//!
//! ```text
//!                    ┌────────────────────── job task ─────────────────────┐
//!   guest ─ frames ─►│ reader ─► OutputQueue ─► deliverer ─► events ───────│─► caller
//!   guest ◄─ frames ─│ writer ◄─ acks · signals · size · StdinWindow ◄─────│── caller
//!                    └─────────────────────────────────────────────────────┘
//!
//!              ┌──── unknown, not started ─────────────┐
//!              ▼                                       │
//!   wait ─► Exec ─► talking ─ session lost ─► wait ─► Attach ─► talking ─ …
//!    └─ no session will come: the cause        └─ no session will come: the cause
//!   last event delivered, or the receiver is gone ──► parting: Release, read to the end;
//!                                                     in another session if this one is lost
//! ```
//!
//! # Invariants
//! 1. The reader never waits for the receiver: the job's window bounds what it must hold (see
//!    [`super::output`]), so no stream of the session is ever left unread.
//! 2. Signals and acknowledgements go before stdin that waits.
//! 3. The job's slot is held while it waits for a session, and is free again only when the guest has
//!    ended its side of the stream in a session that lives, or no session will come.
//! 4. A malformed conversation ends the link, with the cause as the job's last event.
//! 5. A command is executed once: a request that may have reached the guest is sent again only after
//!    the guest has said that it knows no such job, and with the same id, which a guest takes once.
//! 6. A signal is sent once: it is kept for the next session only while its message has not left
//!    completely for this one, so that the guest cannot have it. Before its start a command gets none,
//!    since whether the request itself arrived is open till then. One that was on its way when the
//!    session was lost may be lost with it.
//! 7. The last size of a terminal arrives: a session that continues a job begins with it.
//!
//! # Failure
//! When a session is lost, the job waits for the next one and attaches: the command goes on in the
//! guest all the time. When none will come (see [`super::sessions`]), what was received is delivered
//! first, then the cause. A dropped receiver releases the job, as soon as there is a session: the
//! guest kills the command. An attachment that is not answered in time ends the session as lost; the
//! job waits again.

use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use matchlock_model::exec::{ExecRefusalKind, TerminalSize};
use matchlock_wire::frame::FrameError;
use matchlock_wire::message::{ExecFailure, ExecFailureKind, ExecInput, ExecOutput, JobId};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::attach::Attachment;
use super::codec;
use super::driver::Mux;
use super::line::{Line, Reader, Writer, next_output};
use super::output::OutputQueue;
use super::sessions::Sessions;
use super::stdin::StdinWindow;
use super::{ExecEvent, LinkError, StdinInput};

/// Events in the receiver's channel. With chunks of 32 KiB that is 128 KiB; up to the job's window
/// of 256 KiB waits behind it.
pub(super) const EVENT_SLOTS: usize = 4;

/// How long a job whose link has no holder any more may take to say goodbye.
const PARTING: Duration = Duration::from_secs(2);

/// The signals of Linux.
const SIGNALS: std::ops::RangeInclusive<i32> = 1..=64;

/// What a job is made of.
pub(super) struct Job {
    /// Keeps the session alive while the command is talked about, and brings the next one.
    pub(super) sessions: Arc<Sessions>,
    /// The job's name in the guest.
    pub(super) id: JobId,
    /// The caller's ends of it.
    pub(super) caller: Caller,
    /// To the caller.
    pub(super) events: mpsc::Sender<Result<ExecEvent, LinkError>>,
    /// Cancelled when nobody holds the link.
    pub(super) orphaned: CancellationToken,
    /// The job's place among the concurrent ones.
    pub(super) slot: OwnedSemaphorePermit,
}

/// What comes from the caller, as long as its ends are open.
pub(super) struct Caller {
    /// The encoded request that starts the command, until it has started.
    pub(super) request: Bytes,
    /// Told when the request was handed to a session; dropped when there will be none.
    pub(super) accepted: Option<oneshot::Sender<()>>,
    /// `None` when the command has no stdin.
    pub(super) stdin: Option<mpsc::Receiver<StdinInput>>,
    /// `None` when there will be no more.
    pub(super) signals: Option<mpsc::Receiver<i32>>,
    /// The signal that is being sent.
    pub(super) signal: Option<i32>,
    /// The terminal's size; `None` without a terminal, or when it changes no more.
    pub(super) sizes: Option<watch::Receiver<TerminalSize>>,
}

impl Caller {
    fn accept(&mut self) {
        if let Some(accepted) = self.accepted.take()
            && accepted.send(()).is_err()
        {
            // The deliverer sees that too.
            tracing::trace!("a command's caller has left before it was started");
        }
    }
}

impl Job {
    /// Runs the conversation to its end.
    pub(super) async fn run(self) {
        let Self { sessions, id, mut caller, events, orphaned, slot } = self;
        let talk = Talk::new(id);
        let mut line = None;
        tokio::select! {
            () = talk.deliver(&events) => {}
            () = async { talk.converse(&sessions, &mut line, &mut caller).await; pending().await } => {}
        }
        drop((events, caller));
        tokio::select! {
            () = talk.part(&sessions, line) => {}
            () = async { orphaned.cancelled().await; tokio::time::sleep(PARTING).await } => {}
        }
        drop(slot);
    }
}

/// What reader, deliverer and writer share.
pub(super) struct Talk {
    pub(super) id: JobId,
    state: Mutex<JobState>,
    /// There is something to deliver.
    to_deliver: Notify,
    /// There is something to write that no channel announces.
    to_write: Notify,
}

/// Where the conversation is; an attachment goes on from here.
#[derive(Debug, Default)]
pub(super) struct JobState {
    /// The guest may know the job.
    pub(super) requested: bool,
    pub(super) started: bool,
    pub(super) output: OutputQueue,
    pub(super) stdin: StdinWindow,
}

impl Talk {
    fn new(id: JobId) -> Self {
        Self { id, state: Mutex::default(), to_deliver: Notify::new(), to_write: Notify::new() }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, JobState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- sessions --------------------------------------------------------------------------

    /// Talks, in as many sessions as it takes, until the last event.
    async fn converse(&self, sessions: &Sessions, line: &mut Option<Line>, caller: &mut Caller) {
        let last = loop {
            let mux = match sessions.live().await {
                Ok(session) => session.mux().clone(),
                Err(cause) => break Err(cause),
            };
            match self.converse_in(&mux, line, caller).await {
                Ok(last) => break Ok(last),
                // The session has this cause too; whether it is the last word is its matter.
                Err(cause) => tracing::debug!(%cause, "a command's stream was cut"),
            }
        };
        if last.is_err() {
            caller.accepted = None;
        }
        self.state().output.push(last);
        self.to_deliver.notify_one();
    }

    /// Talks in this session, until the last event.
    ///
    /// # Errors
    /// The cause of the session's end.
    async fn converse_in(
        &self,
        mux: &Mux,
        slot: &mut Option<Line>,
        caller: &mut Caller,
    ) -> Result<ExecEvent, LinkError> {
        let line = slot.insert(Line::open(mux).await?);
        let mut unknown = None;
        let requested = self.state().requested;
        let line = if requested {
            match self.attach(line).await? {
                Attachment::Made => line,
                Attachment::Refused(failure) => {
                    caller.accept();
                    return Ok(ExecEvent::Refused(codec::refusal(&failure)));
                }
                Attachment::Unknown(failure) => {
                    unknown = Some(failure);
                    slot.insert(Line::open(mux).await?)
                }
            }
        } else {
            line
        };
        if !requested || unknown.is_some() {
            self.state().requested = true;
            line.writer.write_buffer_mut().extend_from_slice(&caller.request);
        } else {
            caller.accept();
            if let Some(sizes) = &mut caller.sizes {
                // Whether the session before had told it is not known.
                sizes.mark_changed();
            }
        }
        let last = tokio::select! {
            last = self.read(&mut line.reader, mux, unknown) => last,
            () = async { self.write(&mut line.writer, caller).await; pending().await } => {
                Err(mux.ending().ended().await)
            }
        };
        if line.writer.write_buffer().is_empty() {
            // A signal that has left completely may have arrived.
            caller.signal = None;
        }
        last
    }

    pub(super) fn start(&self, state: &mut JobState) {
        state.started = true;
        state.output.push(Ok(ExecEvent::Started));
        self.to_deliver.notify_one();
        // Signals have waited for it.
        self.to_write.notify_one();
    }

    // ---- from the guest --------------------------------------------------------------------

    /// Reads until the command's last message or the session's end.
    async fn read(
        &self,
        reader: &mut Reader,
        mux: &Mux,
        unknown: Option<ExecFailure>,
    ) -> Result<ExecEvent, LinkError> {
        loop {
            // A stream with data at hand is always ready: let the deliverer and others run.
            tokio::task::coop::consume_budget().await;
            let message = next_output(reader, mux.ending()).await?;
            let last = self.take(message).map_err(|cause| mux.ending().end(cause))?;
            match (last, &unknown) {
                (Some(ExecEvent::Refused(mut refusal)), Some(failure))
                    if failure.kind == ExecFailureKind::Request
                        && refusal.kind == ExecRefusalKind::Request =>
                {
                    // Which of the two is the reason only their words say.
                    let before = codec::clean(&failure.message);
                    refusal.message = format!("{} ({before})", refusal.message);
                    return Ok(ExecEvent::Refused(refusal));
                }
                (Some(last), _) => return Ok(last),
                (None, _) => {}
            }
        }
    }

    /// Takes a message; gives the job's last event when this is it.
    fn take(&self, message: ExecOutput) -> Result<Option<ExecEvent>, LinkError> {
        let mut state = self.state();
        let violation = |what: String| LinkError::Protocol { what };
        match (message, state.started) {
            (ExecOutput::Started, false) => {
                self.start(&mut state);
            }
            (ExecOutput::Failed(failure), false) => {
                return Ok(Some(ExecEvent::Refused(codec::refusal(&failure))));
            }
            (ExecOutput::Output { stream, offset, data }, true) => {
                let stream = codec::output_stream(stream);
                state.output.take(stream, offset, data).map_err(violation)?;
                self.to_deliver.notify_one();
                if state.output.ack_is_due() {
                    // It was delivered before it came again.
                    self.to_write.notify_one();
                }
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

    // ---- to the caller ---------------------------------------------------------------------

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

    // ---- to the guest ----------------------------------------------------------------------

    /// Writes the request, then whatever there is to write, until the stream fails.
    async fn write(&self, writer: &mut Writer, caller: &mut Caller) {
        if let Err(error) = self.try_write(writer, caller).await {
            // The reader meets the same end and knows its cause.
            tracing::trace!(%error, "a job's stream takes nothing more");
        }
    }

    async fn try_write(&self, writer: &mut Writer, caller: &mut Caller) -> Result<(), FrameError> {
        writer.flush().await?;
        caller.accept();
        loop {
            let message = self.next_message(caller).await;
            writer.send(message).await?;
            caller.signal = None;
        }
    }

    /// The next message for the guest: acknowledgements, signals, the size, stdin.
    async fn next_message(&self, caller: &mut Caller) -> ExecInput {
        loop {
            let (started, wants_input, can_send) = {
                let mut state = self.state();
                if let Some(offset) = state.output.next_ack() {
                    return ExecInput::Ack { offset };
                }
                (state.started, state.stdin.wants_input(), state.stdin.can_send())
            };
            if started {
                caller.request = Bytes::new();
            }
            if let Some(signal) = caller.signal {
                return ExecInput::Signal(signal);
            }
            tokio::select! {
                biased;
                signal = receive(&mut caller.signals), if started => {
                    if SIGNALS.contains(&signal) {
                        caller.signal = Some(signal);
                        return ExecInput::Signal(signal);
                    }
                    // The agent would take it for a broken protocol.
                    tracing::warn!(signal, "a signal that does not exist was not sent");
                }
                size = next_size(&mut caller.sizes), if started => {
                    return ExecInput::Resize(codec::terminal_size(size));
                }
                () = std::future::ready(()), if can_send => {
                    let next = self.state().stdin.next();
                    if let Some(message) = next {
                        return message;
                    }
                }
                () = self.to_write.notified() => {}
                input = next_input(&mut caller.stdin), if wants_input => {
                    let mut state = self.state();
                    match input {
                        StdinInput::Data(data) => state.stdin.offer(data),
                        StdinInput::Eof => {
                            state.stdin.finish();
                            caller.stdin = None;
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

/// The next size that was not told; never without a terminal.
async fn next_size(sizes: &mut Option<watch::Receiver<TerminalSize>>) -> TerminalSize {
    if let Some(receiver) = sizes {
        if receiver.changed().await.is_ok() {
            return *receiver.borrow_and_update();
        }
        *sizes = None;
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

pub(super) fn name_of(message: &ExecOutput) -> &'static str {
    match message {
        ExecOutput::Started => "the start of a command",
        ExecOutput::Attached { .. } => "an attachment",
        ExecOutput::Failed(_) => "a refusal",
        ExecOutput::Output { .. } => "output",
        ExecOutput::StdinAck { .. } => "an acknowledgement of stdin",
        ExecOutput::Exited(_) => "the end of a command",
    }
}
