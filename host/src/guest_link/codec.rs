//! The wire's codec with a tighter limit, and small translations between wire and model.

use std::error::Error;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use matchlock_model::exec::{
    ExecRefusal, ExecRefusalKind, ExecSpec, ExitStatus, OutputStream, TerminalSize,
};
use matchlock_model::guest::{AgentInfo, GuestConfig, GuestNetwork};
use matchlock_wire::frame::{Codec, FrameError, MAX_CHUNK_BYTES};
use matchlock_wire::message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::codec::{Decoder, Encoder};

use super::LinkError;

/// The longest frame of a command's conversation: a chunk and its envelope, or a line of text.
pub(super) const MAX_OUTPUT_FRAME: usize = MAX_CHUNK_BYTES + 4 * 1024;

/// The longest reply to a request.
pub(super) const MAX_REPLY_FRAME: usize = 64 * 1024;

/// The longest text of the guest's that is passed on.
const MAX_TEXT_CHARS: usize = 1000;

/// Reads frames of `In` up to a limit, before a byte of a longer one is buffered.
#[derive(Debug)]
pub(super) struct Limited<In> {
    codec: Codec<In, ()>,
    max: usize,
}

impl<In> Limited<In> {
    /// Frames up to this length.
    pub(super) fn new(max: usize) -> Self {
        Self { codec: Codec::default(), max }
    }
}

impl<In: DeserializeOwned> Decoder for Limited<In> {
    type Item = In;
    type Error = FrameError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<In>, FrameError> {
        if let Some(prefix) = src.first_chunk::<4>() {
            let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
            if len > self.max {
                return Err(FrameError::TooLong { len });
            }
        }
        self.codec.decode(src)
    }
}

/// One frame as bytes.
pub(super) fn encode<T: Serialize>(item: T) -> Result<BytesMut, FrameError> {
    let mut bytes = BytesMut::new();
    Codec::<(), T>::default().encode(item, &mut bytes)?;
    Ok(bytes)
}

/// What a frame that could not be read means: a violation, or `None` when the transport failed.
pub(super) fn violation_of(error: &FrameError) -> Option<LinkError> {
    match error {
        FrameError::Io(_) => None,
        FrameError::TooLong { len } => {
            Some(LinkError::Protocol { what: format!("it sent a message of {len} bytes") })
        }
        other => Some(LinkError::Protocol { what: with_sources(other) }),
    }
}

/// An error and its sources in one line, where only text can be kept.
pub(super) fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a String cannot fail.
        if write!(text, ": {error}").is_err() {
            break;
        }
        source = error.source();
    }
    text
}

/// A text from the guest as one printable line: it may end up on a terminal.
pub(super) fn clean(text: &str) -> String {
    text.chars()
        .take(MAX_TEXT_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .trim()
        .to_owned()
}

/// The agent's words, made printable.
pub(super) fn agent_info(agent: message::AgentInfo) -> AgentInfo {
    AgentInfo {
        agent_version: clean(&agent.agent_version),
        kernel_release: clean(&agent.kernel_release),
        init_started_us: agent.init_started_us,
        agent_ready_us: agent.agent_ready_us,
    }
}

/// The request that configures a guest, with the host's clock of this moment.
pub(super) fn configure(config: &GuestConfig) -> message::Configure {
    // A clock before 1970 or after 2554 is no clock to pass on: 0 leaves the guest's.
    let clock_unix_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0);
    message::Configure {
        hostname: config.hostname.clone(),
        add_hosts: config
            .add_hosts
            .iter()
            .map(|entry| (entry.ip.to_string(), entry.host.clone()))
            .collect(),
        dns_servers: config.dns_servers.iter().map(ToString::to_string).collect(),
        clock_unix_ns,
        cpu_millis: config.cpu_millis,
        network: config.network.as_ref().map(network),
    }
}

fn network(network: &GuestNetwork) -> message::Network {
    let GuestNetwork { mac, address, prefix, gateway, gateway_mac, mtu } = *network;
    message::Network { mac, address, prefix, gateway, gateway_mac, mtu }
}

/// The request that starts a command.
pub(super) fn exec_start(job: message::JobId, spec: &ExecSpec) -> message::ExecStart {
    let bytes = |bytes: &Vec<u8>| message::Bytes(bytes.clone());
    message::ExecStart {
        job,
        argv: spec.argv.iter().map(bytes).collect(),
        env: spec.env.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
        cwd: spec.cwd.clone(),
        user: spec.user.clone(),
        stdin: spec.stdin,
        terminal: spec.terminal.as_ref().map(|terminal| message::Terminal {
            size: terminal_size(terminal.size),
            term: terminal.term.clone(),
        }),
        stop_signal: spec.stop_signal,
    }
}

/// The size of a terminal.
pub(super) fn terminal_size(size: TerminalSize) -> message::TerminalSize {
    let TerminalSize { rows, cols } = size;
    message::TerminalSize { rows, cols }
}

/// Why the guest did not start a command.
pub(super) fn refusal(failure: &message::ExecFailure) -> ExecRefusal {
    use message::ExecFailureKind as Wire;
    let kind = match failure.kind {
        Wire::NotFound => ExecRefusalKind::NotFound,
        Wire::NotExecutable => ExecRefusalKind::NotExecutable,
        Wire::User => ExecRefusalKind::User,
        Wire::WorkingDirectory => ExecRefusalKind::WorkingDirectory,
        Wire::Request => ExecRefusalKind::Request,
        Wire::Unavailable => ExecRefusalKind::Unavailable,
        Wire::File => ExecRefusalKind::File,
    };
    ExecRefusal { kind, message: clean(&failure.message) }
}

/// How a command ended.
pub(super) fn exit_status(status: message::ExitStatus) -> ExitStatus {
    match status {
        message::ExitStatus::Code(code) => ExitStatus::Code(code),
        message::ExitStatus::Signal(signal) => ExitStatus::Signal(signal),
    }
}

/// Where output came from.
pub(super) fn output_stream(stream: message::OutputStream) -> OutputStream {
    match stream {
        message::OutputStream::Stdout => OutputStream::Stdout,
        message::OutputStream::Stderr => OutputStream::Stderr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_guest_cannot_write_to_a_terminal() {
        assert_eq!(clean("\x1b[2Jgone\r\nsecond\n"), "[2Jgone  second");
        assert_eq!(clean(&"x".repeat(5000)).len(), MAX_TEXT_CHARS);
    }

    #[test]
    fn a_long_frame_is_refused_at_its_length() {
        let mut decoder = Limited::<message::Reply>::new(100);
        let mut bytes = BytesMut::from(&[0, 0, 0, 101][..]);
        assert!(matches!(decoder.decode(&mut bytes), Err(FrameError::TooLong { len: 101 })));
    }
}
