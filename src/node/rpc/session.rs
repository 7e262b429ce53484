//! One client and its VMs, from its first line to its end.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::join_all;
use matchlock_actors::deps::Deps;
use matchlock_host::vm_log::LogLimits;
use matchlock_model::failure::{Failure, FailureKind, panic_text};
use matchlock_model::vm::StopMode;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::budget::{Budget, Held};
use super::calls::Calls;
use super::exec::terminal_size;
use super::input::{Input, Spool};
use super::line::{Line, LineReader, MAX_LINE_BYTES};
use super::methods;
use super::outbox::Outbox;
use super::protocol::{
    Code, Header, Id, Refused, RpcError, RpcResult, decode, header, id_in, params, response,
};
use super::vms::{SessionVms, Which};
use crate::node::client::{NodeClient, not_cleaned_up, settled};
use crate::node::config::NodeConfig;
use crate::node::warming::Warming;

/// How long `close` waits for the VMs when it is not told.
const CLOSE_LIMIT: Duration = Duration::from_millis(2500);

/// How long the last events may take to leave, once everything is down.
const LAST_EVENTS: Duration = Duration::from_millis(200);

/// How long a client has for its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// What sessions have in common.
#[derive(Debug)]
pub struct RpcHost {
    /// The node.
    pub client: NodeClient,
    /// What makes snapshots beside its VMs.
    pub warming: Warming,
    /// What its actors have of this host.
    pub deps: Deps,
    /// Where things are.
    pub config: NodeConfig,
    /// How much of what VMs print is kept.
    pub vm_log: LogLimits,
    /// What all sessions may hold.
    pub budget: Budget,
    /// What of the input of commands may wait on disk.
    pub spool: Budget,
    /// How long a client may take nothing of what is written to it.
    pub stalled: Duration,
}

/// How a session ended.
#[derive(Debug)]
pub struct SessionEnd {
    /// What ended it.
    pub why: Why,
    /// What is left of its VMs, a line for each.
    pub left: Vec<String>,
}

/// What ended a session.
#[derive(Debug, PartialEq, Eq)]
pub enum Why {
    /// The client said so.
    Closed,
    /// The client's input has ended.
    EndOfInput,
    /// The process is to end.
    Stopped,
    /// The client is gone, or reads nothing.
    Lost(String),
}

/// A client's `close`.
struct Close {
    id: Option<Id>,
    limit: Duration,
}

/// An answer, and the part of the budget that it holds until it has left.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) value: Value,
    pub(super) held: Option<Held>,
}

impl From<Value> for Done {
    fn from(value: Value) -> Self {
        Self { value, held: None }
    }
}

/// A session, for its requests.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) host: Arc<RpcHost>,
    pub(super) vms: SessionVms,
    pub(super) outbox: Outbox,
    /// Cancelled when the session ends.
    pub(super) closing: CancellationToken,
    /// What tells the phases of VMs.
    pub(super) events: TaskTracker,
    pub(super) calls: Calls,
    running: TaskTracker,
}

/// Serves a client until its end; its VMs are down then.
pub async fn serve<R, W>(
    host: Arc<RpcHost>,
    reader: R,
    writer: W,
    stop: &CancellationToken,
) -> SessionEnd
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let (outbox, writing) = Outbox::open(writer, host.stalled);
    let session = Session {
        host,
        vms: SessionVms::default(),
        outbox,
        closing: CancellationToken::new(),
        events: TaskTracker::new(),
        calls: Calls::default(),
        running: TaskTracker::new(),
    };
    let (mut why, close) = session.read(reader, stop).await;
    let left = session.end(close).await;
    drop(session);
    let mut writing = writing;
    match timeout(LAST_LINES, &mut writing).await {
        Ok(Ok(Err(error))) if matches!(why, Why::Lost(_)) => why = Why::Lost(error.to_string()),
        Ok(_) => {}
        Err(_) => writing.abort(),
    }
    SessionEnd { why, left }
}

impl Session {
    /// Reads lines until the session is to end.
    async fn read<R: AsyncRead + Unpin>(
        &self,
        reader: R,
        stop: &CancellationToken,
    ) -> (Why, Option<Close>) {
        let mut lines = LineReader::new(reader, MAX_LINE_BYTES, self.host.budget.clone());
        let lost = || Why::Lost("the client reads no more".into());
        loop {
            let line = tokio::select! {
                biased;
                () = stop.cancelled() => return (Why::Stopped, None),
                () = self.outbox.lost() => return (lost(), None),
                line = lines.next() => line,
            };
            let (line, held) = match line {
                Ok(Some(line)) => line,
                Ok(None) => return (Why::EndOfInput, None),
                Err(error) => return (Why::Lost(error.to_string()), None),
            };
            let close = tokio::select! {
                biased;
                () = stop.cancelled() => return (Why::Stopped, None),
                () = self.outbox.lost() => return (lost(), None),
                close = self.take(line, held) => close,
            };
            if close.is_some() {
                return (Why::Closed, close);
            }
        }
    }

    /// Takes a line; begins what takes longer.
    async fn take(&self, line: Line, held: Held) -> Option<Close> {
        let line = match line {
            Line::Whole(line) if line.iter().all(u8::is_ascii_whitespace) => return None,
            Line::Whole(line) => line,
            Line::TooLong { head, length } => {
                let text = format!(
                    "a line of {length} bytes is over the limit of {MAX_LINE_BYTES}: send files in pieces (write_file with offset)"
                );
                let error = Err(RpcError::new(Code::InvalidRequest, text));
                self.reply(id_in(&head).as_ref(), &error).await;
                return None;
            }
            Line::NoRoom { head, error } => {
                self.reply(id_in(&head).as_ref(), &Err(error)).await;
                return None;
            }
        };
        let Header { id, method } = match header(&line) {
            Ok(header) => header,
            Err(Refused { id, error }) => {
                self.reply(id.as_ref(), &Err(error)).await;
                return None;
            }
        };
        match &*method {
            "close" => match params::<CloseParams>(&line).and_then(|params| params.limit()) {
                Ok(limit) => return Some(Close { id, limit }),
                Err(error) => self.reply_to(id.as_ref(), Err(error)).await,
            },
            "cancel" => self.reply_to(id.as_ref(), self.cancel(&line)).await,
            _ => match methods::input(&method) {
                Some(kind) => {
                    if let Err(error) = self.take_input(kind, &line) {
                        self.refuse_input(kind, &line, id.as_ref(), error).await;
                    }
                }
                None => self.begin(id, &method, line, held).await,
            },
        }
        None
    }

    fn cancel(&self, line: &[u8]) -> RpcResult {
        let CancelParams { id, vm_id } = params(line)?;
        self.of_this_session(vm_id)?;
        Ok(json!({ "cancelled": self.calls.cancel(&id) }))
    }

    /// A request is meant by its id; a VM that is named with it must be ours all the same.
    fn of_this_session(&self, vm_id: Option<String>) -> Result<(), RpcError> {
        if vm_id.is_some() {
            self.vms.find(&Which { vm_id, generation: None })?;
        }
        Ok(())
    }

    /// Input for a command in flight. It is answered only when it is wrong.
    fn take_input(&self, kind: methods::InputKind, line: &[u8]) -> Result<(), RpcError> {
        let given: InputParams = params(line)?;
        self.of_this_session(given.vm_id)?;
        let Some(input) = self.calls.input(&given.id) else {
            // It may just have ended.
            let text = format!("no command in flight has id {}", given.id);
            return Err(RpcError::params(text));
        };
        match kind {
            methods::InputKind::Stdin => {
                let data = given.data.ok_or_else(|| RpcError::params("data is missing"))?;
                let data = decode("data", &data)?;
                input.data(&data);
            }
            methods::InputKind::Eof => input.end(),
            methods::InputKind::Resize => input.resize(terminal_size(given.rows, given.cols)),
        }
        Ok(())
    }

    /// Whoever does not wait for an answer would not hear that its bytes are lost: the command fails.
    async fn refuse_input(
        &self,
        kind: methods::InputKind,
        line: &[u8],
        id: Option<&Id>,
        error: RpcError,
    ) {
        if id.is_some() || kind == methods::InputKind::Resize {
            return self.reply_to(id, Err(error)).await;
        }
        tracing::debug!(?error, "wrong input");
        if let Ok(NamesCall { id }) = params(line) {
            let text = format!("its input was wrong: {}", error.message);
            self.calls.fail(&id, RpcError::params(text));
        }
    }

    /// Begins a request.
    async fn begin(&self, id: Option<Id>, name: &str, line: Bytes, held: Held) {
        let (input, queue) = methods::find(name)
            .ok()
            .filter(|method| method.takes_input())
            .map(|_| Input::new(self.spool()))
            .unzip();
        let begun = methods::find(name)
            .and_then(|method| Ok((method, self.calls.begin(id.as_ref(), input)?)));
        let (method, begun) = match begun {
            Ok(begun) => begun,
            Err(error) => return self.reply_to(id.as_ref(), Err(error)).await,
        };
        let session = self.clone();
        self.running.spawn(async move {
            let work = methods::call(&session, method, id.as_ref(), &line, &begun, queue);
            // A fault in one request is no other's.
            let worked = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
                let text = format!("the request panicked: {}", panic_text(&*panic));
                Err(RpcError::new(Code::Internal, text))
            });
            drop((line, held));
            let (result, held) = match worked {
                Ok(Done { value, held }) => (Ok(value), held),
                Err(error) => (Err(error), None),
            };
            let result = session.calls.finish(&begun.key, result);
            session.answer_to(id.as_ref(), result, held).await;
        });
    }

    fn spool(&self) -> Spool {
        Spool { directory: self.host.config.home.clone(), budget: self.host.spool.clone() }
    }

    /// Answers what the reader answers itself.
    async fn reply(&self, id: Option<&Id>, result: &RpcResult) {
        if self.outbox.reply(response(id, result)).await.is_err() {
            tracing::debug!("an answer had nobody to read it");
        }
    }

    /// The same, but for a notification.
    async fn reply_to(&self, id: Option<&Id>, result: RpcResult) {
        if id.is_some() {
            self.reply(id, &result).await;
        } else if let Err(error) = result {
            tracing::debug!(?error, "a notification failed");
        }
    }

    /// Answers a request; a notification is not answered.
    async fn answer_to(&self, id: Option<&Id>, result: RpcResult, held: Option<Held>) {
        if id.is_some() {
            self.answer(id, &result, held).await;
        } else if let Err(error) = result {
            tracing::debug!(?error, "a notification failed");
        }
    }

    async fn answer(&self, id: Option<&Id>, result: &RpcResult, held: Option<Held>) {
        let too_late = async {
            self.closing.cancelled().await;
            tokio::time::sleep(LAST_LINES).await;
        };
        tokio::select! {
            sent = self.outbox.send(response(id, result), held) => {
                if sent.is_err() {
                    tracing::debug!("an answer had nobody to read it");
                }
            }
            // Nobody takes it, and nothing may wait for that.
            () = too_late => {}
        }
    }

    /// Ends everything: what is in flight, then the VMs. What of them is left.
    async fn end(&self, close: Option<Close>) -> Vec<String> {
        self.closing.cancel();
        self.calls.cancel_all();
        self.running.close();
        let session = self.clone();
        let mut stopping = tokio::spawn(async move { session.stop_vms().await });
        let limit = close.as_ref().map(|close| close.limit);
        let in_time = match limit {
            Some(limit) => timeout(limit, &mut stopping).await.ok(),
            None => None,
        };
        let (left, in_time) = match in_time {
            Some(left) => (left, true),
            None if close.is_none() => (stopping.await, true),
            None => {
                // The client is told now; the rest goes on.
                let text = "the VMs are still being taken down; see `matchlock list`";
                let error = Err(RpcError::new(Code::Vm, text));
                self.last_answer(close.as_ref(), error).await;
                (stopping.await, false)
            }
        };
        let left = left.unwrap_or_else(|error| vec![format!("the clean-up failed: {error}")]);
        self.events.close();
        if timeout(LAST_EVENTS, self.events.wait()).await.is_err() {
            tracing::debug!("the client does not take the last events");
        }
        if in_time {
            let result = if left.is_empty() {
                Ok(json!({}))
            } else {
                Err(RpcError::new(Code::Vm, left.join("; ")))
            };
            self.last_answer(close.as_ref(), result).await;
        }
        left
    }

    async fn last_answer(&self, close: Option<&Close>, result: RpcResult) {
        let Some(close) = close else { return };
        self.answer_to(close.id.as_ref(), result, None).await;
    }

    /// Takes all VMs of this session down, and those that come while it does.
    async fn stop_vms(&self) -> Vec<String> {
        let mut left = self.stop_those_there().await;
        // A request that was bringing one up has seen that it is cancelled.
        self.running.wait().await;
        left.extend(self.stop_those_there().await);
        left
    }

    async fn stop_those_there(&self) -> Vec<String> {
        let stops = self.vms.own().into_iter().map(|handle| async move {
            let stopped = match self.host.client.stop_vm(handle.id, StopMode::Force).await {
                Ok(view) => Ok(view),
                // It had ended by itself.
                Err(failure) if failure.kind == FailureKind::NotFound => settled(handle).await,
                Err(failure) => Err(failure),
            };
            match stopped {
                Ok(view) => not_cleaned_up(&view),
                Err(Failure { message, .. }) => Some(message),
            }
        });
        join_all(stops).await.into_iter().flatten().collect()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseParams {
    timeout_seconds: Option<f64>,
}

impl CloseParams {
    /// 0 is as much as nothing said: taking down is by force, and takes no longer for it.
    fn limit(&self) -> Result<Duration, RpcError> {
        match self.timeout_seconds {
            None | Some(0.0) => Ok(CLOSE_LIMIT),
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .map_err(|e| RpcError::params(format!("timeout_seconds: {e}"))),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CancelParams {
    id: Id,
    vm_id: Option<String>,
}

/// Whose input it was to be, whatever else is wrong with it.
#[derive(Debug, Deserialize)]
struct NamesCall {
    id: Id,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InputParams {
    id: Id,
    vm_id: Option<String>,
    data: Option<String>,
    rows: Option<u16>,
    cols: Option<u16>,
}
