//! Carries a command's streams between this process and a guest until the command ends, a limit
//! passes, or somebody interrupts.
//!
//! ```text
//!   our stdin ─► session.stdin          session.events ─► our stdout, stderr
//!   our terminal's size ─► session.size
//!   signal, timeout ─► session.signals, then a grace, then the end
//! ```
//!
//! # Invariants
//! 1. A blocked stdout blocks the command, never a signal or the timeout.
//! 2. The guest's command gets a signal before anything is taken down.
//! 3. Everything that the command printed before it ended is written before we return.
//! 4. Our terminal is raw from the command's start to its end, and no longer. Until it has started,
//!    Ctrl-C is for us.
//!
//! # When our terminal goes
//! Its end is a SIGHUP to us, the end of stdin, or a write that fails: the command gets a SIGHUP and
//! has [`HANG_UP`] to act on it, since nobody is there to see more. Dropping the session hangs its
//! terminal up then.

use std::io;
use std::time::Duration;

use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_model::exec::{ExecRefusal, ExitStatus, OutputStream};
use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use super::signals::{Interrupt, Interrupts};
use super::stderr;
use super::stdin::Feeder;
use super::terminal::{self, RawMode};
use crate::points::EXEC;

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
    /// Our stdin or our terminal could not be given to it.
    Unattended(io::Error),
}

impl Ending {
    /// How the command itself ended, as a shell says it, as far as that is known.
    fn code(&self) -> Option<u8> {
        match self {
            Self::Exited(status) => Some(status.shell_code()),
            Self::Refused(refusal) => Some(refusal.exit_code()),
            Self::Lost(_)
            | Self::TimedOut
            | Self::Interrupted(_)
            | Self::OutputClosed(_)
            | Self::Unattended(_) => None,
        }
    }
}

/// How a command ended for us, and for itself: one that we interrupt may make of it what it likes.
#[derive(Debug)]
pub struct Relayed {
    /// For us.
    pub ending: Ending,
    /// The command's own exit code, as far as it is known.
    pub code: Option<u8>,
}

impl Relayed {
    /// An ending of which that is all there is to know.
    fn of(ending: Ending) -> Self {
        Self { code: ending.code(), ending }
    }
}

/// What of ours a command gets.
#[derive(Debug, Clone, Copy)]
pub struct Ours {
    /// Our stdin.
    pub stdin: bool,
    /// It has a terminal of its own that follows ours; with our stdin, ours is raw meanwhile.
    pub terminal: bool,
}

/// What a relay is to observe.
#[derive(Debug, Clone, Copy)]
pub struct RelayLimits {
    /// How long the command may take.
    pub timeout: Option<Duration>,
    /// How long a command has after a signal before it is given up.
    pub grace: Duration,
    /// What a command gets that takes too long.
    pub stop_signal: u8,
    /// What is said on stderr about a second Ctrl-C, when the command does not end at the first.
    pub again: Option<&'static str>,
}

/// How long a command may take to end after a first Ctrl-C before anything is said about a second.
pub const SOON: Duration = Duration::from_secs(1);

/// How long our own words wait for a reader of stderr that is busy.
const STDERR_WAIT: Duration = Duration::from_secs(2);

/// How long a command whose terminal has gone may take to end.
const HANG_UP: Duration = Duration::from_secs(1);

/// Carries the streams until the command ends or is given up. Dropping the session then releases
/// the command: the guest kills what is left of it.
pub async fn relay(
    session: ExecSession,
    ours: Ours,
    limits: RelayLimits,
    interrupts: &mut Interrupts,
) -> Relayed {
    let ExecSession { stdin, signals, size, events } = session;
    if ours.terminal
        && let Err(error) = terminal::follow(size)
    {
        return Relayed::of(Ending::Unattended(error));
    }
    let gone = Notify::new();
    match Carrier::new(events, stdin, ours) {
        Ok(carrier) => follow(carrier.run(&gone), &gone, &signals, limits, interrupts).await,
        Err(error) => Relayed::of(Ending::Unattended(error)),
    }
}

async fn follow(
    carried: impl Future<Output = Ending>,
    gone: &Notify,
    signals: &mpsc::Sender<i32>,
    limits: RelayLimits,
    interrupts: &mut Interrupts,
) -> Relayed {
    let mut carried = std::pin::pin!(carried);
    let timeout = limits.timeout.map(|limit| Instant::now() + limit);
    let mut give_up: Option<(Instant, Ending)> = None;
    let mut say_at = None;
    loop {
        let until = give_up.as_ref().map(|(at, _)| *at);
        tokio::select! {
            ending = &mut carried => {
                return match give_up {
                    Some((_, reason)) => Relayed { code: ending.code(), ending: reason },
                    None => Relayed::of(ending),
                };
            }
            which = interrupts.next() => {
                if give_up.is_some() {
                    return Relayed::of(Ending::Interrupted(interrupts.first().unwrap_or(which)));
                }
                forward(signals, i32::from(which.number()));
                give_up = Some((Instant::now() + limits.grace, Ending::Interrupted(which)));
                say_at = (which == Interrupt::Interrupt).then(|| Instant::now() + SOON);
            }
            () = wait_until(say_at), if say_at.is_some() => {
                say_at = None;
                if let Some(text) = limits.again {
                    stderr::write(&format!("matchlock: {text}\n"), STDERR_WAIT);
                }
            }
            () = gone.notified() => {
                // The signal may have come before, or not at all.
                let which = interrupts.hang_up();
                if give_up.is_none() {
                    forward(signals, i32::from(which.number()));
                }
                let at = Instant::now() + limits.grace.min(HANG_UP);
                let at = until.map_or(at, |until| until.min(at));
                let reason = give_up.map_or(Ending::Interrupted(which), |(_, reason)| reason);
                give_up = Some((at, reason));
            }
            () = wait_until(timeout), if give_up.is_none() => {
                forward(signals, i32::from(limits.stop_signal));
                give_up = Some((Instant::now() + limits.grace, Ending::TimedOut));
            }
            () = wait_until(until), if until.is_some() => {
                if let Some((_, reason)) = give_up {
                    return Relayed::of(reason);
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

/// Writes what the command prints, and begins with its stdin.
struct Carrier {
    events: mpsc::Receiver<Result<ExecEvent, LinkError>>,
    ours: Ours,
    /// To the command, until that is begun with; of a terminal also later, so that its end is a
    /// hang-up and not the end-of-file key.
    stdin: Option<mpsc::Sender<StdinInput>>,
    feeder: Option<Feeder>,
    raw: Option<RawMode>,
    /// Our terminal is gone: what comes for it is dropped.
    is_gone: bool,
}

impl Carrier {
    fn new(
        events: mpsc::Receiver<Result<ExecEvent, LinkError>>,
        stdin: mpsc::Sender<StdinInput>,
        ours: Ours,
    ) -> io::Result<Self> {
        let mut carrier =
            Self { events, ours, stdin: None, feeder: None, raw: None, is_gone: false };
        if !ours.stdin {
            return Ok(carrier);
        }
        if ours.terminal {
            carrier.stdin = Some(stdin);
        } else {
            carrier.feeder = Some(Feeder::start(stdin)?);
        }
        Ok(carrier)
    }

    /// Ends with the command. `gone` is told when our terminal is.
    async fn run(mut self, gone: &Notify) -> Ending {
        let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
        loop {
            let event = tokio::select! {
                event = self.events.recv() => event,
                () = ended(&mut self.feeder) => {
                    self.feeder = None;
                    if self.ours.terminal {
                        gone.notify_one();
                    }
                    continue;
                }
            };
            let Some(event) = event else {
                return Ending::Lost(LinkError::Lost {
                    cause: "the command's stream ended".into(),
                });
            };
            let written = match event {
                Err(lost) => return Ending::Lost(lost),
                Ok(ExecEvent::Started) => match self.begin() {
                    Ok(()) => Ok(()),
                    Err(error) => return Ending::Unattended(error),
                },
                Ok(ExecEvent::Refused(refusal)) => return Ending::Refused(refusal),
                Ok(ExecEvent::Exited(status)) => return Ending::Exited(status),
                Ok(ExecEvent::Output(..)) if self.is_gone => Ok(()),
                // Flushed each time: the writes are carried out by another thread, and only the
                // flush says that they were.
                Ok(ExecEvent::Output(OutputStream::Stdout, data)) => {
                    write_and_flush(&mut stdout, &data).await
                }
                Ok(ExecEvent::Output(OutputStream::Stderr, data)) => {
                    write_and_flush(&mut stderr, &data).await
                }
            };
            match written {
                Ok(()) => {}
                Err(error) if self.ours.terminal && is_hang_up(&error) => {
                    self.is_gone = true;
                    gone.notify_one();
                }
                Err(error) => return Ending::OutputClosed(error),
            }
        }
    }

    /// The command has started: from now on it has our terminal.
    fn begin(&mut self) -> io::Result<()> {
        if let Some(stdin) = &self.stdin {
            EXEC.before("terminal")?;
            self.raw = Some(terminal::enter()?);
            EXEC.after("terminal")?;
            self.feeder = Some(Feeder::start(stdin.clone())?);
        }
        Ok(())
    }
}

async fn ended(feeder: &mut Option<Feeder>) {
    match feeder {
        Some(feeder) => feeder.ended().await,
        None => std::future::pending().await,
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::IO.raw_os_error())
}

async fn write_and_flush(to: &mut (impl AsyncWriteExt + Unpin), data: &[u8]) -> io::Result<()> {
    to.write_all(data).await?;
    to.flush().await
}
