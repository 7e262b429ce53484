//! What a VM's own command prints goes into the VM's log as well, whoever reads the command.
//!
//! ```text
//!  guest ─ events ─► keep ─ the same events ─► relay
//!                     │ bytes, at most [`QUEUE`] pieces
//!                     ▼
//!                  thread ─► LogWriter ─► logs/vm.log, vm.log.1, …
//! ```
//!
//! # Invariants
//! 1. The command's output and its end are passed on whatever becomes of the log; what the log does
//!    not take is missing there, and is said once.
//! 2. A disk that stands still holds the command up once, for [`PATIENCE`], and not again.
//! 3. Once [`KeptOutput::finish`] returns in time, everything that was passed on is in the log.
//!
//! # On a crash
//! What was queued is lost: a queue of bytes, not of promises.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use matchlock_host::guest_link::{ExecEvent, ExecSession};
use matchlock_host::rootfs::VmPaths;
use matchlock_host::vm_log::{LogLimits, LogWriter};
use matchlock_model::id::VmId;
use tokio::sync::mpsc::error::{SendTimeoutError, TrySendError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How many pieces wait for the disk; a piece is what the guest sends at once, 32 KiB at most.
const QUEUE: usize = 64;

/// How long a disk that stands still holds anybody up.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether anybody reads the command beside the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Somebody does: the output is passed on.
    Present,
    /// Nobody does (`run -d`): only what else happens is passed on.
    None,
}

/// The log of a VM that is being written.
#[derive(Debug)]
pub struct KeptOutput {
    vm: VmId,
    done: oneshot::Receiver<()>,
}

impl KeptOutput {
    /// Waits until everything is written. To be called once the session has ended or was dropped.
    pub async fn finish(self) {
        // An error is the end of the thread as well.
        if timeout(PATIENCE, self.done).await.is_err() {
            tracing::warn!(vm_id = %self.vm, "the disk is slow: the end of the VM's log is missing");
        }
    }
}

/// The same session, of which the output is also written to the VM's log.
#[must_use]
pub fn keep(
    session: ExecSession,
    vm: VmId,
    paths: VmPaths,
    limits: LogLimits,
    audience: Audience,
) -> (ExecSession, KeptOutput) {
    let (finished, done) = oneshot::channel();
    let mut log = Queue::start(vm, paths, limits, finished);
    let ExecSession { stdin, signals, size, events: mut happening } = session;
    let (happened, events) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                // Nobody follows the command any more: dropping its events releases it.
                () = happened.closed() => return,
                event = happening.recv() => event,
            };
            let Some(event) = event else { return };
            if let Ok(ExecEvent::Output(_, data)) = &event {
                log.add(data.clone()).await;
                if audience == Audience::None {
                    continue;
                }
            }
            if happened.send(event).await.is_err() {
                return;
            }
        }
    });
    (ExecSession { stdin, signals, size, events }, KeptOutput { vm, done })
}

/// The way to the thread that writes.
#[derive(Debug)]
struct Queue {
    vm: VmId,
    pieces: mpsc::Sender<Bytes>,
    /// Whether the disk was waited for in vain.
    gave_up: bool,
    told: bool,
}

impl Queue {
    fn start(vm: VmId, paths: VmPaths, limits: LogLimits, finished: oneshot::Sender<()>) -> Self {
        let (pieces, waiting) = mpsc::channel(QUEUE);
        // A thread that the disk holds up must not take the place of others.
        let thread = std::thread::Builder::new().name("vm-log".into());
        let started = thread.spawn(move || {
            write_all(vm, &paths, limits, waiting);
            drop(finished);
        });
        if let Err(error) = started {
            tell(vm, &error);
        }
        Self { vm, pieces, gave_up: false, told: false }
    }

    async fn add(&mut self, data: Bytes) {
        let lost = match self.pieces.try_send(data) {
            Ok(()) => return,
            // The thread has said why.
            Err(TrySendError::Closed(_)) => return,
            Err(TrySendError::Full(data)) if !self.gave_up => {
                match self.pieces.send_timeout(data, PATIENCE).await {
                    Ok(()) | Err(SendTimeoutError::Closed(_)) => return,
                    Err(SendTimeoutError::Timeout(data)) => data,
                }
            }
            Err(TrySendError::Full(data)) => data,
        };
        self.gave_up = true;
        if !std::mem::replace(&mut self.told, true) {
            let bytes = lost.len();
            tracing::warn!(vm_id = %self.vm, bytes, "the disk is slow: the VM's log has gaps");
        }
    }
}

fn tell(vm: VmId, error: &io::Error) {
    tracing::warn!(vm_id = %vm, %error, "the VM's log is not written, or not all of it");
}

/// Writes what comes until nothing more does. One warning, however often it fails.
fn write_all(vm: VmId, paths: &VmPaths, limits: LogLimits, mut waiting: mpsc::Receiver<Bytes>) {
    let mut log = match LogWriter::open(paths, limits) {
        Ok(log) => log,
        Err(error) => return tell(vm, &error),
    };
    let mut told = false;
    while let Some(data) = waiting.blocking_recv() {
        if let Err(error) = log.append(&data)
            && !std::mem::replace(&mut told, true)
        {
            tell(vm, &error);
        }
    }
}

#[cfg(test)]
mod tests {
    use matchlock_host::guest_link::LinkError;
    use matchlock_model::exec::{ExitStatus, OutputStream};
    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;

    const VM: VmId = VmId::new(1);

    type Events = mpsc::Sender<Result<ExecEvent, LinkError>>;

    fn session() -> (ExecSession, Events) {
        let (stdin, _) = mpsc::channel(1);
        let (signals, _) = mpsc::channel(1);
        let (event, events) = mpsc::channel(1);
        let size = tokio::sync::watch::Sender::default();
        (ExecSession { stdin, signals, size, events }, event)
    }

    fn printed(stream: OutputStream, text: &str) -> Result<ExecEvent, LinkError> {
        Ok(ExecEvent::Output(stream, Bytes::copy_from_slice(text.as_bytes())))
    }

    /// What an event says, to be compared.
    fn said(event: &Result<ExecEvent, LinkError>) -> String {
        format!("{event:?}")
    }

    fn vm() -> (tempfile::TempDir, VmPaths) {
        let home = tempfile::tempdir().unwrap();
        let paths = VmPaths::new(home.path(), VM);
        std::fs::create_dir_all(paths.logs()).unwrap();
        (home, paths)
    }

    /// What is passed on of a command that prints and ends.
    async fn play(paths: &VmPaths, audience: Audience) -> Vec<String> {
        let (session, event) = session();
        let (mut kept, log) = keep(session, VM, paths.clone(), LogLimits::default(), audience);
        tokio::spawn(async move {
            for next in [
                Ok(ExecEvent::Started),
                printed(OutputStream::Stdout, "out "),
                printed(OutputStream::Stderr, "err\n"),
                Ok(ExecEvent::Exited(ExitStatus::Code(7))),
            ] {
                event.send(next).await.unwrap();
            }
        });
        let mut passed = Vec::new();
        while let Some(next) = kept.events.recv().await {
            passed.push(said(&next));
        }
        log.finish().await;
        passed
    }

    #[tokio::test]
    async fn both_streams_are_in_the_log_in_order_and_are_passed_on() {
        let (_home, paths) = vm();
        let passed = play(&paths, Audience::Present).await;
        assert_eq!(passed.len(), 4);
        assert_eq!(passed[1], said(&printed(OutputStream::Stdout, "out ")));
        let log = std::fs::read_to_string(paths.logs().join("vm.log")).unwrap();
        assert_eq!(log, "out err\n");
    }

    #[tokio::test]
    async fn without_an_audience_the_log_alone_has_the_output() {
        let (_home, paths) = vm();
        let passed = play(&paths, Audience::None).await;
        let ended = Ok(ExecEvent::Exited(ExitStatus::Code(7)));
        assert_eq!(passed, [said(&Ok(ExecEvent::Started)), said(&ended)]);
        let log = std::fs::read_to_string(paths.logs().join("vm.log")).unwrap();
        assert_eq!(log, "out err\n");
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_written_costs_the_command_nothing() {
        let (_home, paths) = vm();
        std::fs::remove_dir(paths.logs()).unwrap();
        assert_eq!(play(&paths, Audience::Present).await.len(), 4);
    }

    /// A FIFO that nobody reads stands in for a disk that stands still: opening it blocks.
    #[tokio::test]
    async fn a_disk_that_stands_still_holds_the_command_up_once() {
        let (_home, paths) = vm();
        let fifo = paths.logs().join("vm.log");
        mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
        let (session, event) = session();
        let (mut kept, log) =
            keep(session, VM, paths.clone(), LogLimits::default(), Audience::Present);
        let flood = tokio::spawn(async move {
            for _ in 0..4 * QUEUE {
                event.send(printed(OutputStream::Stdout, "x")).await.unwrap();
            }
        });
        let mut passed = 0;
        while kept.events.recv().await.is_some() {
            passed += 1;
        }
        flood.await.unwrap();
        assert_eq!(passed, 4 * QUEUE, "every byte is passed on");
        log.finish().await;
        // Lets the thread go on.
        drop(std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap());
    }

    #[tokio::test]
    async fn a_follower_that_goes_away_releases_the_command() {
        let (_home, paths) = vm();
        let (session, event) = session();
        let (kept, log) = keep(session, VM, paths, LogLimits::default(), Audience::Present);
        drop(kept);
        event.closed().await;
        log.finish().await;
    }
}
