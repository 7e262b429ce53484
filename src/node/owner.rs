//! Asks the owner of a VM, over the VM's socket, from another process.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_host::rootfs::VmPaths;
use matchlock_host::socket;
use matchlock_model::exec::{ExecSpec, OutputStream};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::codec::Framed;

use super::protocol::{Ended, Frame, FrameCodec, Request, STDIN_FRAMES};
use crate::points::{CLIENT, injected};

type Connection = Framed<UnixStream, FrameCodec>;

/// How many events or inputs wait between the socket and us: each at most a frame of 32 KiB.
const QUEUE: usize = 16;

async fn connect(vms_dir: &Path, vm: VmId) -> Result<Connection, Failure> {
    let path = VmPaths::new(vms_dir, vm).owner_socket();
    let stream = socket::connect(&path).await.map_err(|error| {
        Failure::from_error(FailureKind::Host, &error)
            .context(format_args!("could not reach the owner of {vm} on {}", path.display()))
    })?;
    Ok(Framed::new(stream, FrameCodec::default()))
}

fn lost(vm: VmId, error: &io::Error) -> Failure {
    Failure::from_error(FailureKind::Host, error)
        .context(format_args!("lost the connection to the owner of {vm}"))
}

/// Asks the owner to take its VM down; returns once it has.
///
/// # Errors
/// When the owner cannot be reached, does not answer within `limit`, or could not do it.
pub async fn kill(vms_dir: &Path, vm: VmId, force: bool, limit: Duration) -> Result<(), Failure> {
    let asked = async {
        let mut connection = connect(vms_dir, vm).await?;
        let request = Frame::Request(Request::Kill { force });
        CLIENT.before("kill").map_err(injected)?;
        connection.send(request).await.map_err(|e| lost(vm, &e))?;
        let answer = connection.next().await;
        CLIENT.after("kill").map_err(injected)?;
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
    };
    timeout(limit, asked).await.unwrap_or_else(|_| {
        let text = format!("the owner of {vm} did not take it down within {limit:?}");
        Err(Failure::new(FailureKind::Timeout, text))
    })
}

/// Runs a command in a VM of another process.
///
/// # Errors
/// When its owner cannot be reached.
pub async fn exec(vms_dir: &Path, vm: VmId, spec: ExecSpec) -> Result<ExecSession, Failure> {
    let mut connection = connect(vms_dir, vm).await?;
    CLIENT.before("exec").map_err(injected)?;
    connection.send(Frame::Request(Request::Exec(spec))).await.map_err(|e| lost(vm, &e))?;
    CLIENT.after("exec").map_err(injected)?;
    let (stdin, stdin_waiting) = mpsc::channel(QUEUE);
    let (signals, signals_waiting) = mpsc::channel(QUEUE);
    let (event, events) = mpsc::channel(QUEUE);
    tokio::spawn(carry(connection, stdin_waiting, signals_waiting, event));
    Ok(ExecSession { stdin, signals, events })
}

async fn carry(
    connection: Connection,
    mut stdin: mpsc::Receiver<StdinInput>,
    mut signals: mpsc::Receiver<i32>,
    event: mpsc::Sender<Result<ExecEvent, LinkError>>,
) {
    let (mut to_owner, mut from_owner) = connection.split();
    let (taken, mut newly_taken) = mpsc::channel(STDIN_FRAMES + 1);
    let feed = async move {
        let mut may_send = STDIN_FRAMES;
        loop {
            let frame = tokio::select! {
                biased;
                Some(number) = signals.recv() => Frame::Signal(number),
                Some(()) = newly_taken.recv() => {
                    may_send += 1;
                    continue;
                }
                Some(input) = stdin.recv(), if may_send > 0 => match input {
                    StdinInput::Data(data) => Frame::Stdin(data),
                    StdinInput::Eof => Frame::StdinEof,
                },
                else => std::future::pending().await,
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
                taken.try_send(()).map_err(|_| unasked())?;
                continue;
            }
            let (next, last) = to_event(frame);
            if event.send(next).await.is_err() || last {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let ended: io::Result<bool> = tokio::select! {
        result = feed => result,
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

/// What a frame of the owner means, and whether it is the last.
fn to_event(frame: Frame) -> (Result<ExecEvent, LinkError>, bool) {
    match frame {
        Frame::Started => (Ok(ExecEvent::Started), false),
        Frame::Stdout(data) => (Ok(ExecEvent::Output(OutputStream::Stdout, data)), false),
        Frame::Stderr(data) => (Ok(ExecEvent::Output(OutputStream::Stderr, data)), false),
        Frame::Ended(Ended::Exited(status)) => (Ok(ExecEvent::Exited(status)), true),
        Frame::Ended(Ended::Refused(refusal)) => (Ok(ExecEvent::Refused(refusal)), true),
        Frame::Ended(Ended::Failed(failure)) => {
            (Err(LinkError::Lost { cause: failure.message }), true)
        }
        other => (Err(LinkError::Protocol { what: format!("it sent {other:?}") }), true),
    }
}
