//! `exec`, `exec_stream`, `exec_pipe` and `exec_tty`: commands in a session's VMs.
//!
//! # Invariants
//! 1. A cancelled command gets SIGTERM, then [`CANCEL_GRACE`], then it is killed with all its children;
//!    when the session ends, it is killed at once.
//! 2. What a command prints reaches the client before its result, in order for each stream.
//! 3. What `exec` keeps of a command's output is bounded, and counted in the budget.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use matchlock_actors::fleet::VmHandle;
use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_model::exec::{ExecSpec, ExitStatus, OutputStream, Terminal, TerminalSize};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::phase::Phase;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::budget::Held;
use super::create::{refused_input, variables};
use super::detached;
use super::input::InputQueue;
use super::protocol::{Code, Id, RpcError, encode, notification, params};
use super::session::{Done, Session};
use super::vms::{SessionVm, Which, ended};
use crate::node::client::settled;
use crate::node::owner;

/// How much a command may print for `exec`.
pub(super) const MAX_OUTPUT_BYTES: usize = 32 * 1024 * 1024;

/// A byte that is kept is held as it came, in base64, and in the line that is sent.
pub(super) const COPIES: usize = 4;

/// How long a cancelled command has after SIGTERM.
pub(super) const CANCEL_GRACE: Duration = Duration::from_millis(800);

/// How long a VM whose guest was lost may take to say why.
const REASON_LIMIT: Duration = Duration::from_secs(10);

/// How long a VM that does not take what it is asked is looked at for its end.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

const SIGTERM: i32 = 15;

/// What a command's streams are to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Its output comes with its result.
    Buffered,
    /// Its output comes as it is printed.
    Stream,
    /// The same, and it has a stdin.
    Pipe,
    /// It has a terminal.
    Tty,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::Buffered => "exec",
            Self::Stream => "exec_stream",
            Self::Pipe => "exec_pipe",
            Self::Tty => "exec_tty",
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExecParams {
    vm_id: Option<String>,
    generation: Option<u64>,
    command: Command,
    working_dir: Option<String>,
    user: Option<String>,
    env: Option<BTreeMap<String, String>>,
    rows: Option<u16>,
    cols: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "command must be a text for `sh -c`, or a list of words to run as they are"
)]
enum Command {
    Shell(String),
    Words(Vec<String>),
}

impl ExecParams {
    fn take(self, mode: Mode) -> Result<(Which, ExecSpec), RpcError> {
        let terminal = match mode {
            Mode::Tty => Some(Terminal { size: terminal_size(self.rows, self.cols), term: None }),
            _ if self.rows.is_some() || self.cols.is_some() => {
                return Err(RpcError::params("rows and cols are for exec_tty"));
            }
            _ => None,
        };
        let argv: Vec<Vec<u8>> = match self.command {
            Command::Shell(text) => vec![b"sh".to_vec(), b"-c".to_vec(), text.into_bytes()],
            Command::Words(words) => words.into_iter().map(String::into_bytes).collect(),
        };
        if argv.is_empty() {
            return Err(RpcError::params("command is empty"));
        }
        if argv.iter().any(|word| word.contains(&0)) {
            return Err(RpcError::params("command holds a NUL, which no argument can"));
        }
        let env = variables(self.env.unwrap_or_default())?;
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let spec = ExecSpec {
            argv,
            env: env.into_iter().map(|var| (var.name.into_bytes(), var.value)).collect(),
            cwd: given(self.working_dir),
            user: given(self.user),
            stdin: matches!(mode, Mode::Pipe | Mode::Tty),
            terminal,
            stop_signal: None,
        };
        Ok((Which { vm_id: self.vm_id, generation: self.generation }, spec))
    }
}

/// Runs a command to its end.
pub(super) async fn exec(
    session: &Session,
    mode: Mode,
    id: Option<&Id>,
    line: &[u8],
    cancel: &CancellationToken,
    input: Option<InputQueue>,
) -> Result<Done, RpcError> {
    let (which, spec) = params::<ExecParams>(line)?.take(mode)?;
    let vm = session.vms.living(&which)?;
    let began = Instant::now();
    let opened = tokio::select! {
        opened = open(session, &vm, spec) => opened?,
        () = cancel.cancelled() => return Err(RpcError::cancelled()),
    };
    let ExecSession { stdin, signals, size, events } = opened;
    let follower = Follower {
        session,
        vm: &vm,
        mode,
        id,
        cancel,
        signals,
        output: Output { out: Vec::new(), err: Vec::new(), held: session.host.budget.hold() },
    };
    tokio::select! {
        result = follower.follow(events, began) => result,
        error = pass_on(stdin, size, input) => Err(error),
    }
}

/// Passes the client's input on, and its terminal's size; why that could not go on.
async fn pass_on(
    stdin: mpsc::Sender<StdinInput>,
    size: watch::Sender<TerminalSize>,
    input: Option<InputQueue>,
) -> RpcError {
    let Some(input) = input else { return std::future::pending().await };
    let mut sizes = input.sizes.clone();
    let why = tokio::select! {
        why = input.lost() => why,
        error = feed(stdin, &input) => format!("input that waited could not be read: {error}; it was killed"),
        never = resize(size, &mut sizes) => match never {},
    };
    RpcError::new(Code::Exec, format!("the command's input failed: {why}"))
}

/// Starts the command.
async fn open(session: &Session, vm: &SessionVm, spec: ExecSpec) -> Result<ExecSession, RpcError> {
    let opened = match vm {
        SessionVm::Own { handle, .. } => session.host.client.exec(handle.id, spec).await,
        SessionVm::Detached { id, .. } => {
            owner::exec(&session.host.config.vms_dir(), *id, spec).await
        }
    };
    match opened {
        Ok(opened) => Ok(opened),
        Err(failure) => Err(not_started(session, vm, &failure).await),
    }
}

/// Why a VM did not take what it was asked.
pub(super) async fn not_started(session: &Session, vm: &SessionVm, failure: &Failure) -> RpcError {
    if let SessionVm::Detached { id, .. } = vm
        && failure.kind == FailureKind::NotFound
    {
        return detached::why_gone(session, *id).await;
    }
    // The guest may be lost to whoever talks to it a moment before its VM is seen to end.
    if failure.kind == FailureKind::Guest
        && let SessionVm::Own { handle, .. } = vm
        && leaves_running(handle).await
    {
        return why_ended(vm, failure).await;
    }
    match (vm.view(), failure.kind) {
        (_, FailureKind::Input) => refused_input(failure),
        // It ended while it was asked.
        (Some(view), _) if view.settled => ended(&view),
        (Some(view), _) if view.phase == Phase::Running => RpcError::failure(Code::Exec, failure),
        _ => RpcError::failure(Code::Vm, failure),
    }
}

/// Whether a VM ends within a moment.
async fn leaves_running(handle: &VmHandle) -> bool {
    let mut view = handle.view.clone();
    let left = view.wait_for(|view| view.settled || view.phase != Phase::Running);
    tokio::time::timeout(ENDS_WITHIN, left).await.is_ok()
}

/// Why a command's guest was lost: the VM knows.
pub(super) async fn why_lost(vm: &SessionVm, lost: &LinkError) -> RpcError {
    why_ended(vm, &Failure::from_error(FailureKind::Guest, lost)).await
}

async fn why_ended(vm: &SessionVm, lost: &Failure) -> RpcError {
    if let SessionVm::Own { handle, .. } = vm {
        let view = tokio::time::timeout(REASON_LIMIT, settled(handle.clone())).await;
        if let Ok(Ok(view)) = view {
            return ended(&view);
        }
    }
    RpcError::failure(Code::Exec, lost)
}

enum Never {}

/// Passes the client's input on, in order, as fast as the command takes it; what ends that.
async fn feed(stdin: mpsc::Sender<StdinInput>, input: &InputQueue) -> io::Error {
    loop {
        match input.next().await {
            Ok(piece) => {
                if stdin.send(piece).await.is_err() {
                    tracing::trace!("stdin of a command that reads no more");
                }
            }
            Err(error) => return error,
        }
    }
}

/// The size that a client gives, or what a terminal has whose size nobody knows.
pub(super) fn terminal_size(rows: Option<u16>, cols: Option<u16>) -> TerminalSize {
    let default = TerminalSize::default();
    let given = |number: Option<u16>, default| number.filter(|n| *n > 0).unwrap_or(default);
    TerminalSize { rows: given(rows, default.rows), cols: given(cols, default.cols) }
}

/// Passes the client's sizes on, the last of those that come at once.
async fn resize(
    size: watch::Sender<TerminalSize>,
    sizes: &mut watch::Receiver<TerminalSize>,
) -> Never {
    while sizes.changed().await.is_ok() {
        size.send_replace(*sizes.borrow_and_update());
    }
    std::future::pending().await
}

/// What a command has printed, for `exec`.
struct Output {
    out: Vec<u8>,
    err: Vec<u8>,
    held: Held,
}

impl Output {
    fn keep(&mut self, stream: OutputStream, data: &[u8]) -> Result<(), RpcError> {
        if self.out.len() + self.err.len() + data.len() > MAX_OUTPUT_BYTES {
            let text = format!(
                "the command printed more than {MAX_OUTPUT_BYTES} bytes and was killed; use exec_stream"
            );
            return Err(RpcError::new(Code::Exec, text));
        }
        self.held.take(data.len() * COPIES)?;
        match stream {
            OutputStream::Stdout => self.out.extend_from_slice(data),
            OutputStream::Stderr => self.err.extend_from_slice(data),
        }
        Ok(())
    }
}

/// Follows a command.
struct Follower<'a> {
    session: &'a Session,
    vm: &'a SessionVm,
    mode: Mode,
    id: Option<&'a Id>,
    cancel: &'a CancellationToken,
    signals: mpsc::Sender<i32>,
    output: Output,
}

impl Follower<'_> {
    async fn follow(
        mut self,
        mut events: mpsc::Receiver<Result<ExecEvent, LinkError>>,
        began: Instant,
    ) -> Result<Done, RpcError> {
        let limit = match self.vm {
            SessionVm::Own { timeout, .. } => *timeout,
            SessionVm::Detached { .. } => None,
        };
        let too_late = limit.map(|limit| began + limit);
        let mut ending: Option<(Instant, RpcError)> = None;
        loop {
            let given_up = ending.as_ref().map(|(at, _)| *at);
            let event = tokio::select! {
                biased;
                () = self.session.closing.cancelled() => return Err(RpcError::cancelled()),
                () = self.cancel.cancelled(), if ending.is_none() => {
                    ending = Some(self.terminate(RpcError::cancelled()));
                    continue;
                }
                () = until(too_late), if ending.is_none() => {
                    let seconds = limit.unwrap_or_default().as_secs();
                    let text = format!("the command took longer than {seconds} s, the VM's timeout_seconds");
                    ending = Some(self.terminate(RpcError::new(Code::Exec, text)));
                    continue;
                }
                () = until(given_up), if ending.is_some() => {
                    return Err(ending.map_or_else(RpcError::cancelled, |(_, error)| error));
                }
                event = events.recv() => event,
            };
            match event {
                Some(Ok(ExecEvent::Exited(status))) => {
                    return match ending {
                        Some((_, error)) => Err(error),
                        None => Ok(self.result(status, began)),
                    };
                }
                Some(Ok(event)) if ending.is_none() => self.take(event, too_late).await?,
                // Nobody waits for what it prints any more.
                Some(Ok(_)) => {}
                Some(Err(lost)) => return Err(self.why_lost(&lost).await),
                None => {
                    let lost = LinkError::Lost { cause: "the command's stream ended".into() };
                    return Err(self.why_lost(&lost).await);
                }
            }
        }
    }

    async fn why_lost(&self, lost: &LinkError) -> RpcError {
        tokio::select! {
            why = why_lost(self.vm, lost) => why,
            () = self.cancel.cancelled() => RpcError::cancelled(),
        }
    }

    /// Asks the command to end; when it is killed, and what its request is answered with.
    fn terminate(&self, error: RpcError) -> (Instant, RpcError) {
        if let Err(error) = self.signals.try_send(SIGTERM) {
            tracing::debug!(%error, "the command is gone, or has signals waiting");
        }
        (Instant::now() + CANCEL_GRACE, error)
    }

    /// Takes what happened before the end.
    async fn take(&mut self, event: ExecEvent, too_late: Option<Instant>) -> Result<(), RpcError> {
        match event {
            ExecEvent::Started if matches!(self.mode, Mode::Pipe | Mode::Tty) => {
                self.notify("ready", None, too_late).await;
            }
            ExecEvent::Refused(refusal) => return Err(RpcError::new(Code::Exec, refusal.message)),
            ExecEvent::Output(stream, data) if self.mode == Mode::Buffered => {
                self.output.keep(stream, &data)?;
            }
            ExecEvent::Output(OutputStream::Stdout, data) => {
                self.notify("stdout", Some(data), too_late).await;
            }
            ExecEvent::Output(OutputStream::Stderr, data) => {
                self.notify("stderr", Some(data), too_late).await;
            }
            ExecEvent::Started | ExecEvent::Exited(_) => {}
        }
        Ok(())
    }

    /// Tells the client; not once the request is cancelled or has taken too long.
    async fn notify(&self, what: &str, data: Option<Bytes>, too_late: Option<Instant>) {
        let mut told = json!({ "id": self.id });
        if let Some(data) = data {
            told["data"] = encode(&data).into();
        }
        let line = notification(&format!("{}.{what}", self.mode.name()), &told);
        tokio::select! {
            // A client that is lost ends the session.
            _sent = self.session.outbox.send(line, None) => {}
            () = self.cancel.cancelled() => {}
            () = until(too_late) => {}
        }
    }

    fn result(self, status: ExitStatus, began: Instant) -> Done {
        let Output { out, err, held } = self.output;
        let mut value: Value = json!({
            "exit_code": status.shell_code(),
            "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        if self.mode == Mode::Buffered {
            value["stdout"] = encode(&out).into();
            value["stderr"] = encode(&err).into();
        }
        Done { value, held: Some(held) }
    }
}

/// Waits until then; without a time, for ever.
pub(super) async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
