//! The methods by their names.

use serde::Deserialize;
use serde_json::{Value, json};

use super::calls::Begun;
use super::exec::{self, Mode};
use super::input::InputQueue;
use super::protocol::{Code, Id, RpcError, params};
use super::session::{Done, Session};
use super::vms::Which;
use super::{detached, files, life, log};

/// A method that takes its time: each request runs beside the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Create,
    Exec(Mode),
    WriteFile,
    ReadFile,
    ListFiles,
    Log,
    LogStream,
    List,
    Wait,
    Kill,
}

/// What input is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputKind {
    /// Bytes of stdin.
    Stdin,
    /// Its end.
    Eof,
    /// The size of its terminal.
    Resize,
}

/// Input for a command in flight, if the name is one of those.
pub(super) fn input(name: &str) -> Option<InputKind> {
    match name {
        "exec_pipe.stdin" | "exec_tty.stdin" => Some(InputKind::Stdin),
        "exec_pipe.stdin_eof" | "exec_tty.stdin_eof" => Some(InputKind::Eof),
        "exec_tty.resize" => Some(InputKind::Resize),
        _ => None,
    }
}

/// The method of this name.
///
/// # Errors
/// That there is none, or which feature it belongs to that is not there yet.
pub(super) fn find(name: &str) -> Result<Method, RpcError> {
    let later = || {
        let text = format!("{name} is not available in this version yet");
        Err(RpcError::new(Code::MethodNotFound, text))
    };
    Ok(match name {
        "create" => Method::Create,
        "exec" => Method::Exec(Mode::Buffered),
        "exec_stream" => Method::Exec(Mode::Stream),
        "exec_pipe" => Method::Exec(Mode::Pipe),
        "exec_tty" => Method::Exec(Mode::Tty),
        "write_file" => Method::WriteFile,
        "read_file" => Method::ReadFile,
        "list_files" => Method::ListFiles,
        "log" => Method::Log,
        "log_stream" => Method::LogStream,
        "list" => Method::List,
        "wait" => Method::Wait,
        "kill" => Method::Kill,
        "allow_list_add" | "allow_list_delete" | "port_forward" => return later(),
        _ => {
            let shown: String = name.chars().take(100).collect();
            let text = format!("Method not found: {shown:?}");
            return Err(RpcError::new(Code::MethodNotFound, text));
        }
    })
}

impl Method {
    /// Whether a request takes input while it is in flight.
    pub(super) const fn takes_input(self) -> bool {
        matches!(self, Self::Exec(Mode::Pipe | Mode::Tty))
    }

    /// Whether its answers are told apart by the request's id.
    const fn needs_id(self) -> bool {
        matches!(self, Self::Exec(Mode::Stream | Mode::Pipe | Mode::Tty) | Self::LogStream)
    }
}

/// Carries out a request.
pub(super) async fn call(
    session: &Session,
    method: Method,
    id: Option<&Id>,
    line: &[u8],
    begun: &Begun,
    input: Option<InputQueue>,
) -> Result<Done, RpcError> {
    let cancel = &begun.cancel;
    if method.needs_id() && id.is_none() {
        let text = "it needs an id: its notifications carry it";
        return Err(RpcError::new(Code::InvalidRequest, text));
    }
    // Those that can be left at any moment.
    let work = async {
        match method {
            Method::Create | Method::Exec(_) => Ok(Value::Null.into()),
            Method::WriteFile => files::write(session, line).await,
            Method::ReadFile => files::read(session, line).await,
            Method::ListFiles => files::list(session, line).await,
            Method::Log => log::read(session, line).await,
            Method::LogStream => log::stream(session, id, line).await,
            Method::List => list(session, line).await,
            Method::Wait => life::wait(session, line).await,
            Method::Kill => life::kill(session, line).await,
        }
    };
    match method {
        Method::Create => life::create(session, line, begun).await,
        Method::Exec(mode) => exec::exec(session, mode, id, line, cancel, input).await,
        _ => tokio::select! {
            done = work => done,
            () = cancel.cancelled() => Err(RpcError::cancelled()),
        },
    }
}

/// The VMs of the session, or the one that is meant.
async fn list(session: &Session, line: &[u8]) -> Result<Done, RpcError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct ListParams {
        vm_id: Option<String>,
    }

    let ListParams { vm_id } = params(line)?;
    let vms = match vm_id {
        Some(_) => vec![session.vms.find(&Which { vm_id, generation: None })?],
        None => session.vms.all(),
    };
    let first = session.vms.first();
    let mut shown = Vec::with_capacity(vms.len());
    for vm in &vms {
        shown.push(detached::shown(session, vm, first == Some(vm.id())).await?);
    }
    Ok(json!({ "vms": shown }).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_yet_is_named() {
        for name in ["allow_list_add", "allow_list_delete", "port_forward"] {
            let error = find(name).unwrap_err();
            assert_eq!(error.code, Code::MethodNotFound);
            assert!(error.message.starts_with(&format!("{name} is not available")), "{error:?}");
        }
        let error = find("exce").unwrap_err();
        assert_eq!(error.message, "Method not found: \"exce\"");
    }
}
