//! `write_file`, `read_file` and `list_files`: as root, in the guest's first mount namespace.
//!
//! # Invariants
//! 1. What is read into one answer is bounded, and counted in the budget; files of any size go in
//!    pieces (`offset`, `length`).
//! 2. An answer that says that a file was written comes after its last byte was.

use std::borrow::Cow;

use bytes::Bytes;
use jiff::Timestamp;
use matchlock_host::guest_link::{ExecEvent, ExecSession, FileEntries, StdinInput};
use matchlock_model::exec::{ExitStatus, OutputStream};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::file::{FileEntry, FileOp};
use serde::Deserialize;
use serde_json::{Value, json};

use super::budget::Held;
use super::exec::{COPIES, not_started, why_lost};
use super::protocol::{Code, RpcError, decode, encode, params};
use super::session::{Done, Session};
use super::vms::{SessionVm, Which};

/// The most that one `read_file` answers with.
pub(super) const MAX_READ_BYTES: u64 = 32 * 1024 * 1024;

/// The most that the entries of one `list_files` may take, as the guest sends them.
pub(super) const MAX_LIST_BYTES: usize = 8 * 1024 * 1024;

/// What an entry may become in JSON, in multiples of what it is on the way.
const ENTRY_COPIES: usize = 16;

/// How much of a guest's error line is passed on.
const MAX_LINE_BYTES: usize = 4096;

const DEFAULT_MODE: u32 = 0o644;

/// How much is handed over at once; it is cut further on its way.
const PIECE_BYTES: usize = 256 * 1024;

fn file_failed(message: impl Into<String>) -> RpcError {
    RpcError::new(Code::File, message)
}

/// A session's VM and an operation on its files that has started.
struct Open {
    vm: SessionVm,
    session: ExecSession,
}

impl Open {
    async fn begin(session: &Session, which: &Which, op: FileOp) -> Result<Self, RpcError> {
        let op = op.check().map_err(|e| RpcError::params(e.to_string()))?;
        let vm = session.vms.living(which)?;
        let SessionVm::Own { handle, .. } = &vm else {
            let text = format!(
                "VM {} is detached: files of such a VM are not available in this version yet; use exec",
                vm.id()
            );
            return Err(file_failed(text));
        };
        let opened = session.host.client.file(handle.id, &op).await;
        let opened = match opened {
            Ok(opened) => opened,
            Err(failure) => {
                return Err(match not_started(session, &vm, &failure).await {
                    error if error.code == Code::Exec => file_failed(error.message),
                    error => error,
                });
            }
        };
        let mut open = Self { vm, session: opened };
        match open.session.events.recv().await {
            Some(Ok(ExecEvent::Started)) => Ok(open),
            event => Err(open.unexpected(event).await),
        }
    }

    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, RpcError> {
        let mut line = Vec::new();
        loop {
            match self.session.events.recv().await {
                Some(Ok(ExecEvent::Output(OutputStream::Stdout, data))) => return Ok(Some(data)),
                Some(Ok(ExecEvent::Output(OutputStream::Stderr, data))) => {
                    let room = MAX_LINE_BYTES.saturating_sub(line.len());
                    line.extend_from_slice(&data[..data.len().min(room)]);
                }
                Some(Ok(ExecEvent::Exited(ExitStatus::Code(0)))) => return Ok(None),
                Some(Ok(ExecEvent::Exited(_))) => {
                    return Err(file_failed(String::from_utf8_lossy(&line).trim()));
                }
                event => return Err(self.unexpected(event).await),
            }
        }
    }

    async fn unexpected(
        &self,
        event: Option<Result<ExecEvent, matchlock_host::guest_link::LinkError>>,
    ) -> RpcError {
        match event {
            Some(Ok(ExecEvent::Refused(refusal))) => file_failed(refusal.message),
            Some(Err(lost)) => why_lost(&self.vm, &lost).await,
            other => file_failed(format!("the guest answered with {other:?}")),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteParams<'a> {
    vm_id: Option<String>,
    generation: Option<u64>,
    path: String,
    #[serde(borrow)]
    content: Cow<'a, str>,
    mode: Option<u32>,
    offset: Option<u64>,
}

/// Writes a file.
pub(super) async fn write(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    let asked: WriteParams<'_> = params(line)?;
    let mut content = Bytes::from(decode("content", &asked.content)?);
    let which = Which { vm_id: asked.vm_id, generation: asked.generation };
    let mode = asked.mode.unwrap_or(DEFAULT_MODE);
    let op = FileOp::Write { path: asked.path, offset: asked.offset, mode };
    let mut open = Open::begin(session, &which, op).await?;
    let size = asked.offset.unwrap_or(0) + content.len() as u64;
    while !content.is_empty() {
        let piece = content.split_to(content.len().min(PIECE_BYTES));
        if open.session.stdin.send(StdinInput::Data(piece)).await.is_err() {
            // Why, its last event says.
            break;
        }
    }
    if open.session.stdin.send(StdinInput::Eof).await.is_err() {
        tracing::debug!("a file takes no more");
    }
    match open.next().await? {
        None => Ok(json!({ "size": size }).into()),
        Some(_) => Err(file_failed("the guest answered a written file with bytes")),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadParams {
    vm_id: Option<String>,
    generation: Option<u64>,
    path: String,
    offset: Option<u64>,
    length: Option<u64>,
}

/// Reads a file, or a piece of it.
pub(super) async fn read(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    let asked: ReadParams = params(line)?;
    let most = asked.length.unwrap_or(MAX_READ_BYTES);
    if most > MAX_READ_BYTES {
        let text = format!("length {most}: at most {MAX_READ_BYTES} bytes are read at once");
        return Err(RpcError::params(text));
    }
    let which = Which { vm_id: asked.vm_id, generation: asked.generation };
    // One more byte than wanted tells whether there is more.
    let op = FileOp::Read {
        path: asked.path,
        offset: asked.offset.unwrap_or(0),
        length: Some(most + 1),
    };
    let mut open = Open::begin(session, &which, op).await?;
    let mut held = session.host.budget.hold();
    let content = collect(&mut open, &mut held, COPIES).await?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let eof = content.len() <= most;
    if !eof && asked.length.is_none() {
        let text = format!(
            "the file is larger than {MAX_READ_BYTES} bytes: read it in pieces, with offset and length"
        );
        return Err(file_failed(text));
    }
    let content = &content[..content.len().min(most)];
    let value = json!({ "content": encode(content), "eof": eof });
    Ok(Done { value, held: Some(held) })
}

async fn collect(open: &mut Open, held: &mut Held, copies: usize) -> Result<Vec<u8>, RpcError> {
    let mut content = Vec::new();
    while let Some(piece) = open.next().await? {
        held.take(piece.len() * copies)?;
        content.extend_from_slice(&piece);
    }
    Ok(content)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListParams {
    vm_id: Option<String>,
    generation: Option<u64>,
    path: String,
}

/// Lists a directory.
pub(super) async fn list(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    let ListParams { vm_id, generation, path } = params(line)?;
    let which = Which { vm_id, generation };
    let mut open = Open::begin(session, &which, FileOp::List { path }).await?;
    let mut held = session.host.budget.hold();
    let (mut listed, mut entries, mut bytes) = (FileEntries::default(), Vec::new(), 0);
    let violation = |e| file_failed(Failure::from_error(FailureKind::Guest, &e).message);
    while let Some(piece) = open.next().await? {
        bytes += piece.len();
        if bytes > MAX_LIST_BYTES {
            let text = format!("the directory has too many entries: over {MAX_LIST_BYTES} bytes");
            return Err(file_failed(text));
        }
        held.take(piece.len() * ENTRY_COPIES)?;
        entries.extend(listed.take(&piece).map_err(violation)?);
    }
    if !listed.is_whole() {
        return Err(file_failed("the guest's list is cut off"));
    }
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    let files: Vec<Value> = entries.iter().map(shown).collect();
    Ok(Done { value: json!({ "files": files }), held: Some(held) })
}

fn shown(entry: &FileEntry) -> Value {
    let modified = Timestamp::from_second(entry.modified_unix_s).unwrap_or(Timestamp::UNIX_EPOCH);
    json!({
        "name": String::from_utf8_lossy(&entry.name),
        "size": entry.size,
        "mode": go_file_mode(entry.mode),
        "mod_time": modified,
        "is_dir": entry.mode & FILE_TYPE == DIRECTORY,
    })
}

const FILE_TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;

/// A mode as Go has it, whose programs read it: the permissions, and bits of its own for the rest.
const fn go_file_mode(mode: u32) -> u32 {
    let kind = match mode & FILE_TYPE {
        DIRECTORY => 1 << 31,
        0o120_000 => 1 << 27,
        0o060_000 => 1 << 26,
        0o020_000 => 1 << 26 | 1 << 21,
        0o010_000 => 1 << 25,
        0o140_000 => 1 << 24,
        _ => 0,
    };
    let mut special = 0;
    if mode & 0o4000 != 0 {
        special |= 1 << 23;
    }
    if mode & 0o2000 != 0 {
        special |= 1 << 22;
    }
    if mode & 0o1000 != 0 {
        special |= 1 << 20;
    }
    mode & 0o777 | kind | special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_those_of_go() {
        for (mode, go) in [
            (0o100_644, 0o644),
            (0o040_755, 0x8000_01ED),
            (0o041_777, 0x8010_01FF),
            (0o120_777, 0x0800_01FF),
            (0o104_755, 0x0080_01ED),
            (0o102_755, 0x0040_01ED),
            (0o020_666, 0x0420_01B6),
            (0o060_660, 0x0400_01B0),
            (0o010_600, 0x0200_0180),
            (0o140_600, 0x0100_0180),
        ] {
            assert_eq!(go_file_mode(mode), go, "{mode:o}");
        }
    }
}
