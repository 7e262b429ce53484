//! What is said on a VM's owner socket.
//!
//! ```text
//!   client                                   owner
//!     │ Request(exec)                           │
//!     │ ───────────────────────────────────────►│
//!     │ Stdin* StdinEof? Signal* Resize*        │
//!     │ ───────────────────────────────────────►│
//!     │                             StdinTaken* │  one for each Stdin
//!     │ ◄───────────────────────────────────────│
//!     │               Started Stdout* Stderr* Ended
//!     │ ◄───────────────────────────────────────│
//!     │ Request(kill)                           │
//!     │ ───────────────────────────────────────►│
//!     │                                 Killed  │  once the VM holds nothing any more
//!     │ ◄───────────────────────────────────────│
//! ```
//!
//! A client has at most [`STDIN_FRAMES`] frames of stdin on their way: so the owner never waits
//! for a command that does not read, and always sees a signal, or the client's end.
//!
//! The owner's first frame says at once that it has heard the request ([`Frame::Heard`]): a client
//! that waits longer for what it asked waits for the VM, not for an owner that stands still.
//!
//! Each frame is a 4-byte big-endian length, one byte that says what it is, and its payload:
//! bytes for streams, JSON for everything else. One request per connection; a client that goes
//! away cancels what it asked for.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use matchlock_model::exec::{ExecRefusal, ExecSpec, ExitStatus, TerminalSize};
use matchlock_model::failure::Failure;
use serde::{Deserialize, Serialize};
use tokio_util::codec::{Decoder, Encoder, LengthDelimitedCodec};

/// The longest frame: a command line with its environment, in JSON.
const MAX_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// How many frames of stdin a client may send that were not taken yet.
pub const STDIN_FRAMES: usize = 4;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a command.
    Exec(ExecSpec),
    /// Take the VM down.
    Kill {
        /// Kill the hypervisor without asking the guest.
        force: bool,
    },
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// It ran.
    Exited(ExitStatus),
    /// It was not started.
    Refused(ExecRefusal),
    /// It could not be followed to its end.
    Failed(Failure),
}

/// A frame, in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The first frame of a client.
    Request(Request),
    /// The first frame of an owner: it has the request.
    Heard,
    /// Bytes for the command's stdin.
    Stdin(Bytes),
    /// No more stdin.
    StdinEof,
    /// A signal for the command.
    Signal(i32),
    /// The command's terminal has another size now.
    Resize(TerminalSize),
    /// One frame of stdin was taken; another may be sent.
    StdinTaken,
    /// The command runs.
    Started,
    /// It printed on stdout.
    Stdout(Bytes),
    /// It printed on stderr.
    Stderr(Bytes),
    /// It ended. The last frame.
    Ended(Ended),
    /// The VM is down, or why not. The last frame.
    Killed(Result<(), Failure>),
}

/// Reads and writes [`Frame`]s.
#[derive(Debug)]
pub struct FrameCodec(LengthDelimitedCodec);

impl Default for FrameCodec {
    fn default() -> Self {
        Self(LengthDelimitedCodec::builder().max_frame_length(MAX_FRAME_BYTES).new_codec())
    }
}

fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<Frame>> {
        let Some(frame) = self.0.decode(src)? else { return Ok(None) };
        let mut frame = frame.freeze();
        if frame.is_empty() {
            return Err(invalid("an empty frame on the owner's socket"));
        }
        let kind = frame.split_to(1)[0];
        Ok(Some(match kind {
            1 => Frame::Request(serde_json::from_slice(&frame)?),
            2 => Frame::Stdin(frame),
            3 => Frame::StdinEof,
            4 => Frame::Signal(serde_json::from_slice(&frame)?),
            5 => Frame::Started,
            6 => Frame::Stdout(frame),
            7 => Frame::Stderr(frame),
            8 => Frame::Ended(serde_json::from_slice(&frame)?),
            9 => Frame::Killed(serde_json::from_slice(&frame)?),
            10 => Frame::StdinTaken,
            11 => Frame::Resize(serde_json::from_slice(&frame)?),
            20 => Frame::Heard,
            other => return Err(invalid(format!("unknown frame {other} on the owner's socket"))),
        }))
    }
}

impl Encoder<Frame> for FrameCodec {
    type Error = io::Error;

    fn encode(&mut self, frame: Frame, dst: &mut BytesMut) -> io::Result<()> {
        let (kind, payload): (u8, Bytes) = match frame {
            Frame::Request(request) => (1, serde_json::to_vec(&request)?.into()),
            Frame::Stdin(data) => (2, data),
            Frame::StdinEof => (3, Bytes::new()),
            Frame::Signal(number) => (4, serde_json::to_vec(&number)?.into()),
            Frame::Started => (5, Bytes::new()),
            Frame::Stdout(data) => (6, data),
            Frame::Stderr(data) => (7, data),
            Frame::Ended(ended) => (8, serde_json::to_vec(&ended)?.into()),
            Frame::Killed(result) => (9, serde_json::to_vec(&result)?.into()),
            Frame::StdinTaken => (10, Bytes::new()),
            Frame::Resize(size) => (11, serde_json::to_vec(&size)?.into()),
            Frame::Heard => (20, Bytes::new()),
        };
        let mut framed = BytesMut::with_capacity(1 + payload.len());
        framed.put_u8(kind);
        framed.extend_from_slice(&payload);
        self.0.encode(framed.freeze(), dst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use matchlock_model::exec::Terminal;

    #[test]
    fn frames_read_back_what_was_written() {
        let spec = ExecSpec {
            argv: vec![b"\xff".to_vec()],
            env: Vec::new(),
            cwd: None,
            user: Some("1".into()),
            stdin: true,
            terminal: Some(Terminal { size: TerminalSize { rows: 1, cols: 2 }, term: None }),
            stop_signal: None,
        };
        let frames = [
            Frame::Request(Request::Exec(spec)),
            Frame::Request(Request::Kill { force: true }),
            Frame::Stdin(Bytes::from_static(b"\0\xff")),
            Frame::StdinEof,
            Frame::Signal(15),
            Frame::Resize(TerminalSize { rows: 50, cols: 132 }),
            Frame::StdinTaken,
            Frame::Heard,
            Frame::Started,
            Frame::Stdout(Bytes::from_static(b"x")),
            Frame::Stderr(Bytes::new()),
            Frame::Ended(Ended::Exited(ExitStatus::Code(7))),
            Frame::Killed(Ok(())),
        ];
        let (mut codec, mut wire) = (FrameCodec::default(), BytesMut::new());
        for frame in &frames {
            codec.encode(frame.clone(), &mut wire).unwrap();
        }
        for frame in frames {
            assert_eq!(codec.decode(&mut wire).unwrap(), Some(frame));
        }
        assert_eq!(codec.decode(&mut wire).unwrap(), None);
    }

    #[test]
    fn strangers_are_refused() {
        let mut codec = FrameCodec::default();
        for bad in [&b"\0\0\0\0"[..], b"\0\0\0\x01\xee", b"\0\0\0\x03\x01{}", b"\xff\xff\xff\xff"] {
            assert!(codec.decode(&mut BytesMut::from(bad)).is_err(), "{bad:?} was taken");
        }
    }
}
