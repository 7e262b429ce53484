//! Carries a command's streams between this process and a guest until the command ends, a limit
//! passes, or somebody interrupts.
//!
//! ```text
//!   our stdin ─► session.stdin          session.events ─► our stdout, stderr
//!   signal, timeout ─► session.signals, then a grace, then the end
//! ```
//!
//! # Invariants
//! 1. A blocked stdout blocks the command, never a signal or the timeout.
//! 2. The guest's command gets a signal before anything is taken down.
//! 3. Everything that the command printed before it ended is written before we return.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_model::exec::{ExecRefusal, ExitStatus, OutputStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::signals::{Interrupt, Interrupts};

/// How a command ended for us.
#[derive(Debug)]
pub enum Ending {
    /// It ended.
    Exited(ExitStatus),
    /// It was not started.
    Refused(ExecRefusal),
    /// Its guest was lost.
    Lost(LinkError),
    /// It took longer than it may.
    TimedOut,
    /// We were interrupted.
    Interrupted(Interrupt),
    /// Nobody reads our stdout or stderr any more.
    OutputClosed(io::Error),
}

/// What a relay is to observe.
#[derive(Debug, Clone, Copy)]
pub struct RelayLimits {
    /// How long the command may take.
    pub timeout: Option<Duration>,
    /// How long a command has after a signal before it is given up.
    pub grace: Duration,
}

/// How much is read from stdin at once.
const STDIN_CHUNK_BYTES: usize = 64 * 1024;

const SIGTERM: i32 = 15;

/// Carries the streams until the command ends or is given up. Dropping the session then releases
/// the command: the guest kills what is left of it.
pub async fn relay(
    session: ExecSession,
    with_stdin: bool,
    limits: RelayLimits,
    interrupts: &mut Interrupts,
) -> Ending {
    let ExecSession { stdin, signals, events } = session;
    let feeder = with_stdin.then(|| tokio::spawn(feed_stdin(stdin)));
    let ending = follow(events, &signals, limits, interrupts).await;
    if let Some(feeder) = feeder {
        // It may wait for a terminal for ever.
        feeder.abort();
    }
    ending
}

async fn follow(
    events: mpsc::Receiver<Result<ExecEvent, LinkError>>,
    signals: &mpsc::Sender<i32>,
    limits: RelayLimits,
    interrupts: &mut Interrupts,
) -> Ending {
    let mut output = std::pin::pin!(write_output(events));
    let timeout = limits.timeout.map(|limit| Instant::now() + limit);
    let mut give_up: Option<(Instant, Ending)> = None;
    loop {
        let until = give_up.as_ref().map(|(at, _)| *at);
        tokio::select! {
            ending = &mut output => {
                return match give_up {
                    Some((_, reason)) => reason,
                    None => ending,
                };
            }
            which = interrupts.next() => {
                if give_up.is_some() {
                    return Ending::Interrupted(interrupts.first().unwrap_or(which));
                }
                forward(signals, i32::from(which.number()));
                give_up = Some((Instant::now() + limits.grace, Ending::Interrupted(which)));
            }
            () = wait_until(timeout), if give_up.is_none() => {
                forward(signals, SIGTERM);
                give_up = Some((Instant::now() + limits.grace, Ending::TimedOut));
            }
            () = wait_until(until), if until.is_some() => {
                if let Some((_, reason)) = give_up {
                    return reason;
                }
            }
        }
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn forward(signals: &mpsc::Sender<i32>, number: i32) {
    if let Err(error) = signals.try_send(number) {
        tracing::debug!(number, %error, "the command is gone, or has signals waiting");
    }
}

/// Writes what the command prints; ends with the command.
async fn write_output(mut events: mpsc::Receiver<Result<ExecEvent, LinkError>>) -> Ending {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        let Some(event) = events.recv().await else {
            return Ending::Lost(LinkError::Lost { cause: "the command's stream ended".into() });
        };
        let written = match event {
            Err(lost) => return Ending::Lost(lost),
            Ok(ExecEvent::Started) => Ok(()),
            Ok(ExecEvent::Refused(refusal)) => return Ending::Refused(refusal),
            Ok(ExecEvent::Exited(status)) => return Ending::Exited(status),
            // Flushed each time: the writes are carried out by another thread, and only the flush
            // says that they were.
            Ok(ExecEvent::Output(OutputStream::Stdout, data)) => {
                write_and_flush(&mut stdout, &data).await
            }
            Ok(ExecEvent::Output(OutputStream::Stderr, data)) => {
                write_and_flush(&mut stderr, &data).await
            }
        };
        if let Err(error) = written {
            return Ending::OutputClosed(error);
        }
    }
}

async fn write_and_flush(to: &mut (impl AsyncWriteExt + Unpin), data: &[u8]) -> io::Result<()> {
    to.write_all(data).await?;
    to.flush().await
}

async fn feed_stdin(to: mpsc::Sender<StdinInput>) {
    let mut stdin = tokio::io::stdin();
    let mut chunk = vec![0; STDIN_CHUNK_BYTES];
    loop {
        let input = match stdin.read(&mut chunk).await {
            Ok(0) => StdinInput::Eof,
            Ok(read) => StdinInput::Data(Bytes::copy_from_slice(&chunk[..read])),
            Err(error) => {
                tracing::warn!(%error, "could not read stdin");
                StdinInput::Eof
            }
        };
        let last = input == StdinInput::Eof;
        // The command may end without reading all of it.
        if to.send(input).await.is_err() || last {
            return;
        }
    }
}
