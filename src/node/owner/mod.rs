//! Asks the owner of a VM, over the VM's socket, from another process.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures::{SinkExt, StreamExt, stream};
use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_host::rootfs::VmPaths;
use matchlock_host::socket;
use matchlock_model::exec::{ExecSpec, OutputStream, TerminalSize};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::codec::Framed;

use super::protocol::{Ended, Frame, FrameCodec, Request, STDIN_FRAMES};
use super::stderr;
use crate::points::{CLIENT, injected};

type Connection = Framed<UnixStream, FrameCodec>;

/// How many events or inputs wait between the socket and us: each at most a frame of 32 KiB.
const QUEUE: usize = 16;

async fn connect(vms_dir: &Path, vm: VmId) -> Result<Connection, Failure> {
    let path = VmPaths::new(vms_dir, vm).owner_socket();
    let stream = socket::connect(&path).await.map_err(|error| {
        let kind = match error.kind() {
            // It does not listen yet, or does not any more.
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => FailureKind::NotFound,
            _ => FailureKind::Host,
        };
        Failure::from_error(kind, &error)
            .context(format_args!("could not reach the owner of {vm} on {}", path.display()))
    })?;
    Ok(Framed::new(stream, FrameCodec::default()))
}

fn lost(vm: VmId, error: &io::Error) -> Failure {
    Failure::from_error(FailureKind::Host, error)
        .context(format_args!("lost the connection to the owner of {vm}"))
}

/// How long an owner may take to say that it has heard, before whoever waits is told that they wait.
const SILENCE: Duration = Duration::from_secs(3);

/// How long our own words wait for a reader of stderr that is busy.
const STDERR_WAIT: Duration = Duration::from_secs(2);

/// An owner that has heard.
struct Heard {
    connection: Connection,
    /// What an owner of an older version begins its answer with: it does not say that it has heard.
    first: Option<Frame>,
}

impl Heard {
    async fn answer(&mut self) -> Option<io::Result<Frame>> {
        match self.first.take() {
            Some(frame) => Some(Ok(frame)),
            None => self.connection.next().await,
        }
    }
}

/// Connects, asks, and waits until the owner says that it has heard, or answers.
async fn ask(vms_dir: &Path, vm: VmId, request: Request) -> Result<Heard, Failure> {
    let mut connection = connect(vms_dir, vm).await?;
    let step = match &request {
        Request::Kill { .. } => "kill",
        Request::Exec(_) => "exec",
    };
    CLIENT.before(step).map_err(injected)?;
    connection.send(Frame::Request(request)).await.map_err(|e| lost(vm, &e))?;
    match connection.next().await {
        Some(Ok(Frame::Heard)) => Ok(Heard { connection, first: None }),
        Some(Ok(answer)) => Ok(Heard { connection, first: Some(answer) }),
        Some(Err(error)) => Err(lost(vm, &error)),
        None => {
            Err(Failure::new(FailureKind::NotFound, format!("the owner of {vm} has just ended")))
        }
    }
}

/// The same, and says so on stderr while the owner does not answer: it may stand still for good.
async fn ask_audibly(vms_dir: &Path, vm: VmId, request: Request) -> Result<Heard, Failure> {
    let mut asked = std::pin::pin!(ask(vms_dir, vm, request));
    if let Ok(heard) = timeout(SILENCE, &mut asked).await {
        return heard;
    }
    let text = format!(
        "matchlock: the owner of VM {vm} does not answer, still waiting; \
         `matchlock kill --force {vm}` ends the VM without it\n"
    );
    stderr::write(&text, STDERR_WAIT);
    asked.await
}

/// How an owner is asked to take its VM down.
#[derive(Debug, Clone, Copy)]
pub struct KillRequest {
    /// Without asking the guest.
    pub force: bool,
    /// How long it may take to say that it has heard; `None` waits as long as `done` does, and says so.
    pub heard: Option<Duration>,
    /// How long it may take; `None` does not wait for it.
    pub done: Option<Duration>,
}

/// Asks the owner to take its VM down; returns once it has, or has heard where that is all that is
/// wanted.
///
/// # Errors
/// When the owner cannot be reached, does not answer in time, or could not do it. `NotFound` means that
/// it does not listen yet, or any more.
pub async fn kill(vms_dir: &Path, vm: VmId, how: KillRequest) -> Result<(), Failure> {
    let request = Request::Kill { force: how.force };
    let heard = async {
        let Some(limit) = how.heard else { return ask_audibly(vms_dir, vm, request).await };
        timeout(limit, ask(vms_dir, vm, request)).await.unwrap_or_else(|_| {
            let text = format!("the owner of {vm} did not answer within {limit:?}");
            Err(Failure::new(FailureKind::Timeout, text))
        })
    };
    let Some(limit) = how.done else {
        let heard = heard.await?;
        // Of one that says it at once, an answer is all there is.
        return heard.first.map_or(Ok(()), |answer| killed(vm, Some(Ok(answer))));
    };
    let asked = async {
        let answer = heard.await?.answer().await;
        CLIENT.after("kill").map_err(injected)?;
        killed(vm, answer)
    };
    timeout(limit, asked).await.unwrap_or_else(|_| {
        let text = format!("the owner of {vm} did not take it down within {limit:?}");
        Err(Failure::new(FailureKind::Timeout, text))
    })
}

/// What an owner's last word to a kill means.
fn killed(vm: VmId, answer: Option<io::Result<Frame>>) -> Result<(), Failure> {
    match answer {
        Some(Ok(Frame::Killed(result))) => result,
        Some(Ok(other)) => {
            let text = format!("the owner of {vm} answered with {other:?}");
            Err(Failure::new(FailureKind::Internal, text))
        }
        Some(Err(error)) => Err(lost(vm, &error)),
        // It ended with its VM, before its last word.
        None => Ok(()),
    }
}

/// Runs a command in a VM of another process.
///
/// # Errors
/// When its owner cannot be reached.
pub async fn exec(vms_dir: &Path, vm: VmId, spec: ExecSpec) -> Result<ExecSession, Failure> {
    let first_size = spec.terminal.as_ref().map(|terminal| terminal.size);
    let with_stdin = spec.stdin;
    let heard = ask_audibly(vms_dir, vm, Request::Exec(spec)).await?;
    CLIENT.after("exec").map_err(injected)?;
    let (stdin, stdin_waiting) = mpsc::channel(QUEUE);
    let (signals, signals_waiting) = mpsc::channel(QUEUE);
    let (event, events) = mpsc::channel(QUEUE);
    let size = watch::Sender::new(first_size.unwrap_or_default());
    let inputs = Inputs {
        stdin: with_stdin.then_some(stdin_waiting),
        signals: signals_waiting,
        sizes: first_size.map(|_| size.subscribe()),
    };
    tokio::spawn(carry(heard, inputs, event));
    Ok(ExecSession { stdin, signals, size, events })
}

/// What goes to the command.
struct Inputs {
    /// `None` without one, or after its end.
    stdin: Option<mpsc::Receiver<StdinInput>>,
    signals: mpsc::Receiver<i32>,
    sizes: Option<watch::Receiver<TerminalSize>>,
}

/// The next piece of stdin; a dropped sender is its end; never without stdin.
async fn next_input(stdin: &mut Option<mpsc::Receiver<StdinInput>>) -> StdinInput {
    match stdin {
        Some(receiver) => receiver.recv().await.unwrap_or(StdinInput::Eof),
        None => std::future::pending().await,
    }
}

/// The next size of a terminal; never without one, or when it changes no more.
async fn next_size(sizes: &mut Option<watch::Receiver<TerminalSize>>) -> TerminalSize {
    if let Some(receiver) = sizes {
        if receiver.changed().await.is_ok() {
            return *receiver.borrow_and_update();
        }
        *sizes = None;
    }
    std::future::pending().await
}

async fn carry(heard: Heard, inputs: Inputs, event: mpsc::Sender<Result<ExecEvent, LinkError>>) {
    let Inputs { mut stdin, mut signals, mut sizes } = inputs;
    let (mut to_owner, from_owner) = heard.connection.split();
    let mut from_owner = stream::iter(heard.first.map(Ok)).chain(from_owner);
    let (taken, mut newly_taken) = mpsc::channel(STDIN_FRAMES + 1);
    let feed = async move {
        let mut may_send = STDIN_FRAMES;
        loop {
            let frame = tokio::select! {
                biased;
                Some(number) = signals.recv() => Frame::Signal(number),
                size = next_size(&mut sizes) => Frame::Resize(size),
                Some(()) = newly_taken.recv() => {
                    may_send += 1;
                    continue;
                }
                input = next_input(&mut stdin), if may_send > 0 => match input {
                    StdinInput::Data(data) => Frame::Stdin(data),
                    StdinInput::Eof => {
                        stdin = None;
                        Frame::StdinEof
                    }
                },
            };
            if matches!(frame, Frame::Stdin(_) | Frame::StdinEof) {
                may_send -= 1;
            }
            to_owner.send(frame).await?;
        }
    };
    let gone = event.clone();
    let follow = async move {
        while let Some(frame) = from_owner.next().await.transpose()? {
            if frame == Frame::StdinTaken {
                // Closed: nothing can be sent any more.
                if let Err(mpsc::error::TrySendError::Full(())) = taken.try_send(()) {
                    return Err(unasked());
                }
                continue;
            }
            let (next, last) = to_event(frame);
            if event.send(next).await.is_err() || last {
                return Ok(true);
            }
        }
        Ok(false)
    };
    // The owner's last word may lie there already when it takes no more: only reading ends it.
    let fed = async {
        let result: io::Result<()> = feed.await;
        if let Err(error) = result {
            tracing::debug!(%error, "the owner takes no more");
        }
        std::future::pending::<io::Result<bool>>().await
    };
    let ended: io::Result<bool> = tokio::select! {
        result = fed => result,
        result = follow => result,
        // Nobody follows the command any more: closing the connection cancels it.
        () = gone.closed() => Ok(true),
    };
    let cause = match ended {
        Ok(true) => return,
        Ok(false) => "the VM's owner ended".to_owned(),
        Err(error) => error.to_string(),
    };
    drop(gone.send(Err(LinkError::Lost { cause })).await);
}

fn unasked() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "more stdin was taken than sent")
}

/// How [`LinkError::Lost`] begins.
const LOST: &str = "the link to the guest was lost: ";

/// What a frame of the owner means, and whether it is the last.
fn to_event(frame: Frame) -> (Result<ExecEvent, LinkError>, bool) {
    match frame {
        Frame::Started => (Ok(ExecEvent::Started), false),
        Frame::Stdout(data) => (Ok(ExecEvent::Output(OutputStream::Stdout, data)), false),
        Frame::Stderr(data) => (Ok(ExecEvent::Output(OutputStream::Stderr, data)), false),
        Frame::Ended(Ended::Exited(status)) => (Ok(ExecEvent::Exited(status)), true),
        Frame::Ended(Ended::Refused(refusal)) => (Ok(ExecEvent::Refused(refusal)), true),
        Frame::Ended(Ended::Failed(failure)) => {
            // Its words for what ours say already.
            let cause = failure.message.trim_start_matches(LOST).to_owned();
            (Err(LinkError::Lost { cause }), true)
        }
        other => (Err(LinkError::Protocol { what: format!("it sent {other:?}") }), true),
    }
}

#[cfg(test)]
mod tests;
