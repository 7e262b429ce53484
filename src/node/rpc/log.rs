//! `log` and `log_stream`: what a VM's image entrypoint has printed.
//!
//! The log is that of `matchlock log`: [`output_log`](crate::node::output_log) writes it, and cuts it.
//!
//! # Invariants
//! 1. `log` answers with at most the last [`MAX_LOG_BYTES`].
//! 2. `log_stream` holds one piece at a time, however much there is.

use std::io;
use std::time::Duration;

use matchlock_host::rootfs::VmPaths;
use matchlock_host::vm_log::{LogKind, LogReader, Tail};
use matchlock_model::id::VmId;
use serde::Deserialize;
use serde_json::json;

use super::detached;
use super::exec::COPIES;
use super::protocol::{Code, Id, RpcError, encode, notification, params};
use super::session::{Done, Session};
use super::vms::{SessionVm, Which};

/// The most that `log` answers with: an answer is one line.
pub(super) const MAX_LOG_BYTES: usize = 10 * 1024 * 1024;

/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(200);

/// How much is told at once.
const PIECE_BYTES: usize = 32 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogParams {
    vm_id: Option<String>,
    generation: Option<u64>,
}

fn vm_of(session: &Session, line: &[u8]) -> Result<SessionVm, RpcError> {
    let LogParams { vm_id, generation } = params(line)?;
    session.vms.find(&Which { vm_id, generation })
}

/// A VM's log, read piece by piece. Files are read on a thread where they hold up nobody.
struct Log {
    vm: VmId,
    paths: VmPaths,
    reader: Option<LogReader>,
}

impl Log {
    fn of(session: &Session, vm: VmId) -> Self {
        Self { vm, paths: session.host.deps.paths(vm), reader: None }
    }

    /// The next bytes; nothing when there are none for now, or no log yet.
    async fn next(mut self) -> Result<(Self, Vec<u8>), RpcError> {
        let vm = self.vm;
        let reading = tokio::task::spawn_blocking(move || {
            if self.reader.is_none() {
                self.reader = LogReader::open(&self.paths, LogKind::Output, Tail::All)?;
            }
            let mut piece = vec![0; PIECE_BYTES];
            let read = match &mut self.reader {
                Some(reader) => reader.read(&mut piece)?,
                None => 0,
            };
            piece.truncate(read);
            io::Result::Ok((self, piece))
        });
        let read = reading.await.map_err(|e| RpcError::new(Code::Internal, e.to_string()))?;
        read.map_err(|e| {
            RpcError::new(Code::File, format!("could not read the log of VM {vm}: {e}"))
        })
    }
}

/// The end of the log.
pub(super) async fn read(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    let vm = vm_of(session, line)?;
    let mut held = session.host.budget.hold();
    let mut log = Log::of(session, vm.id());
    let (mut content, mut counted) = (Vec::new(), 0_usize);
    loop {
        let (next, piece) = log.next().await?;
        log = next;
        if piece.is_empty() {
            break;
        }
        // What was cut away is not given back: it is at most as much again.
        if content.len() < 2 * MAX_LOG_BYTES - PIECE_BYTES {
            let needed = content.len() + piece.len();
            held.take(needed.saturating_sub(counted) * COPIES)?;
            counted = counted.max(needed);
        }
        content.extend(piece);
        if content.len() >= 2 * MAX_LOG_BYTES - PIECE_BYTES {
            content.drain(..content.len() - MAX_LOG_BYTES);
        }
    }
    content.drain(..content.len().saturating_sub(MAX_LOG_BYTES));
    Ok(Done { value: json!({ "content": encode(&content) }), held: Some(held) })
}

/// The log from its beginning, and what comes; until the VM has ended.
pub(super) async fn stream(
    session: &Session,
    id: Option<&Id>,
    line: &[u8],
) -> Result<Done, RpcError> {
    let vm = vm_of(session, line)?;
    let mut log = Log::of(session, vm.id());
    loop {
        // Before the look: what it has printed to its end is there then.
        let has_ended = match (vm.view(), &vm) {
            (Some(view), _) => view.settled,
            (None, vm) => detached::look(session, vm.id()).await?.has_ended,
        };
        let (next, data) = log.next().await?;
        log = next;
        if data.is_empty() {
            if has_ended {
                return Ok(json!({}).into());
            }
            tokio::time::sleep(POLL).await;
            continue;
        }
        let told = notification("log_stream.data", &json!({ "id": id, "data": encode(&data) }));
        if session.outbox.send(told, None).await.is_err() {
            return Err(RpcError::cancelled());
        }
    }
}
