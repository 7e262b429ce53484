//! QEMU's control channel, as far as we use it: it says why the guest stopped, and is asked to save it.
//!
//! ```text
//!   Control::ask ─► follow ── command, perhaps with a descriptor ─► QEMU
//!            ◄───── one answer each, in order ◄────────────────────┘  (events in between)
//! ```
//!
//! The channel is read for as long as it lives, so that QEMU never waits for us. Losing it costs
//! the reason and what was asked, and nothing else; the machine goes on.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use futures::{SinkExt, StreamExt};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use super::super::HypervisorError;

/// The longest line that is kept; a longer one is skipped.
const MAX_LINE: usize = 1024 * 1024;

/// How many commands may wait for the one before.
const MAX_ASKED: usize = 4;

/// What QEMU answered; the text of its refusal.
type Answer = Result<serde_json::Value, String>;

/// A command for QEMU.
#[derive(Debug)]
pub(super) struct Asked {
    line: String,
    /// Goes along with it.
    descriptor: Option<OwnedFd>,
    answer: oneshot::Sender<Answer>,
}

/// Asks QEMU.
#[derive(Debug, Clone)]
pub(super) struct Control(mpsc::Sender<Asked>);

impl Control {
    /// What asks, and what [`follow`] is to be given.
    pub(super) fn new() -> (Self, mpsc::Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel(MAX_ASKED);
        (Self(sender), receiver)
    }

    /// Has QEMU carry out a command.
    ///
    /// # Errors
    /// When it refuses, or the channel has ended.
    pub(super) async fn ask(
        &self,
        command: &str,
        arguments: serde_json::Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<serde_json::Value, HypervisorError> {
        let failed = |why: &str| HypervisorError::Control { what: format!("{command}: {why}") };
        let line = serde_json::json!({ "execute": command, "arguments": arguments }).to_string();
        let (answer, answered) = oneshot::channel();
        let asked = Asked { line, descriptor, answer };
        self.0.send(asked).await.map_err(|_| failed("the channel has ended"))?;
        match answered.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refusal)) => Err(failed(&refusal)),
            Err(_) => Err(failed("the channel has ended")),
        }
    }
}

/// Why QEMU stopped the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shutdown {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest told the machine of its panic.
    Panic,
    /// Another reason, by QEMU's name.
    Other(String),
}

impl Shutdown {
    fn from_name(name: String) -> Self {
        match name.as_str() {
            "guest-shutdown" => Self::PowerOff,
            "guest-reset" => Self::Reset,
            "guest-panic" => Self::Panic,
            _ => Self::Other(name),
        }
    }
}

/// A message of QEMU's: the greeting, an answer or an event.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<serde::de::IgnoredAny>,
    event: Option<String>,
    data: Option<Data>,
    #[serde(rename = "return")]
    answer: Option<serde_json::Value>,
    error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct Data {
    reason: Option<String>,
}

/// The channel as it is followed.
struct Followed {
    lines: Framed<UnixStream, LinesCodec>,
    /// Who waits for the next answers; nobody for that to the capabilities.
    waiting: VecDeque<Option<oneshot::Sender<Answer>>>,
    shutdown: Option<Shutdown>,
}

/// Reads the channel to its end and returns the last reason that QEMU gave for stopping. Sends what is
/// asked meanwhile.
pub(super) async fn follow(
    stream: UnixStream,
    mut asked: mpsc::Receiver<Asked>,
) -> Option<Shutdown> {
    let lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE));
    let mut followed = Followed { lines, waiting: VecDeque::new(), shutdown: None };
    // After each error `Framed` says once that it has ended, and then goes on.
    let mut after_error = false;
    let (mut greeted, mut anybody) = (false, true);
    loop {
        let line = tokio::select! {
            biased;
            line = followed.lines.next() => line,
            command = asked.recv(), if greeted && anybody => {
                match command {
                    Some(command) => followed.send(command).await,
                    None => anybody = false,
                }
                continue;
            }
        };
        let line = match line {
            Some(Ok(line)) => line,
            None if after_error => {
                after_error = false;
                continue;
            }
            None => break,
            Some(Err(LinesCodecError::MaxLineLengthExceeded)) => {
                tracing::warn!(MAX_LINE, "skipped an over-long line of QMP");
                after_error = true;
                continue;
            }
            // The end of QEMU is often a reset of the connection.
            Some(Err(LinesCodecError::Io(error))) => {
                tracing::debug!(%error, "QMP has ended");
                break;
            }
        };
        match serde_json::from_str::<Message>(&line) {
            Ok(message) => {
                greeted |= message.greeting.is_some();
                followed.take(message).await;
            }
            Err(error) => tracing::warn!(%error, "skipped a line of QMP that is not understood"),
        }
    }
    followed.shutdown
}

impl Followed {
    async fn take(&mut self, message: Message) {
        if message.greeting.is_some() {
            // Events come only after this.
            self.waiting.push_back(None);
            if let Err(error) = self.lines.send(r#"{"execute":"qmp_capabilities"}"#).await {
                tracing::debug!(%error, "QMP has ended before it began");
            }
        }
        let answer = match (message.answer, message.error) {
            (_, Some(error)) => {
                tracing::warn!(%error, "QMP refused a command");
                let said = error.get("desc").and_then(serde_json::Value::as_str);
                Some(Err(said.unwrap_or("no reason given").to_owned()))
            }
            (Some(answer), None) => Some(Ok(answer)),
            (None, None) => None,
        };
        // Who has asked may have given up.
        if let Some(answer) = answer
            && let Some(Some(asker)) = self.waiting.pop_front()
            && asker.send(answer).is_err()
        {
            tracing::debug!("nobody waits for this answer of QMP any more");
        }
        if message.event.as_deref() == Some("SHUTDOWN") {
            let reason = message.data.and_then(|data| data.reason);
            self.shutdown = Some(reason.map_or_else(
                || Shutdown::Other("no reason given".to_owned()),
                Shutdown::from_name,
            ));
        }
    }

    /// Sends a command. Without success its asker is told by being forgotten.
    async fn send(&mut self, command: Asked) {
        let Asked { line, descriptor, answer } = command;
        let sent = match descriptor {
            Some(descriptor) => send_with(self.lines.get_ref(), &line, &descriptor).await,
            None => self.lines.send(line).await.map_err(|error| match error {
                LinesCodecError::Io(error) => error,
                error @ LinesCodecError::MaxLineLengthExceeded => io::Error::other(error),
            }),
        };
        match sent {
            Ok(()) => self.waiting.push_back(Some(answer)),
            Err(error) => tracing::warn!(%error, "could not ask QEMU"),
        }
    }
}

/// Sends a line with a descriptor beside it. Nothing of the framing's own is waiting to be written.
async fn send_with(stream: &UnixStream, line: &str, descriptor: &OwnedFd) -> io::Result<()> {
    let bytes = format!("{line}\n").into_bytes();
    let descriptors = [descriptor.as_fd()];
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut beside = SendAncillaryBuffer::new(&mut space);
            if !beside.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            let sent = sendmsg(stream, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL);
            Ok(sent?)
        })
        .await?;
    // The socket is empty between two commands, and this is a short one.
    if sent < bytes.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

    /// Plays QEMU: greets, expects the capabilities, says these lines and ends.
    async fn play(lines: &[&str]) -> Option<Shutdown> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_control, asked) = Control::new();
        let reader = tokio::spawn(follow(ours, asked));
        let mut theirs = BufReader::new(theirs);
        theirs.write_all(GREETING.as_bytes()).await.unwrap();
        let mut command = String::new();
        theirs.read_line(&mut command).await.unwrap();
        assert_eq!(command, "{\"execute\":\"qmp_capabilities\"}\n");
        theirs.write_all(b"{\"return\": {}}\r\n").await.unwrap();
        for line in lines {
            theirs.write_all(line.as_bytes()).await.unwrap();
            theirs.write_all(b"\r\n").await.unwrap();
        }
        drop(theirs);
        reader.await.unwrap()
    }

    fn event(reason: &str) -> String {
        format!(
            r#"{{"timestamp":{{}},"event":"SHUTDOWN","data":{{"guest":true,"reason":"{reason}"}}}}"#
        )
    }

    #[tokio::test]
    async fn each_reason_is_told_apart() {
        assert_eq!(play(&[&event("guest-shutdown")]).await, Some(Shutdown::PowerOff));
        assert_eq!(play(&[&event("guest-reset")]).await, Some(Shutdown::Reset));
        assert_eq!(play(&[&event("guest-panic")]).await, Some(Shutdown::Panic));
        let other = Shutdown::Other("host-signal".to_owned());
        assert_eq!(play(&[&event("host-signal")]).await, Some(other));
        assert_eq!(play(&[]).await, None);
    }

    #[tokio::test]
    async fn other_lines_do_not_hide_the_reason() {
        let long = format!("{{\"x\":\"{}\"}}", "y".repeat(2 * MAX_LINE));
        let reset = event("guest-reset");
        let lines = [r#"{"event":"RESUME"}"#, "rubbish", &long, "", &reset, r#"{"event":"STOP"}"#];
        assert_eq!(play(&lines).await, Some(Shutdown::Reset));
    }

    #[tokio::test]
    async fn a_question_and_its_descriptor_arrive_and_each_gets_its_answer() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (control, asked) = Control::new();
        let follower = tokio::spawn(follow(ours, asked));
        let (reader, writer) = std::io::pipe().unwrap();
        let asking = tokio::spawn({
            let control = control.clone();
            async move {
                let given = control.ask("getfd", serde_json::json!({}), Some(writer.into())).await;
                let refused = control.ask("migrate", serde_json::json!({}), None).await;
                (given.unwrap(), refused.unwrap_err().to_string())
            }
        });
        theirs.write_all(GREETING.as_bytes()).await.unwrap();
        // No more is read than that: a descriptor goes with the read that takes its first byte.
        let mut line = vec![0; "{\"execute\":\"qmp_capabilities\"}\n".len()];
        theirs.read_exact(&mut line).await.unwrap();
        theirs.write_all(b"{\"return\":{}}\r\n").await.unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 256];
        let received = theirs.async_io(Interest::READABLE, || {
            let parts = &mut [std::io::IoSliceMut::new(&mut bytes)];
            let flags = rustix::net::RecvFlags::empty();
            Ok(rustix::net::recvmsg(&theirs, parts, &mut beside, flags)?.bytes)
        });
        let received = received.await.unwrap();
        let text = String::from_utf8_lossy(&bytes[..received]).into_owned();
        assert!(text.contains("getfd") && text.ends_with('\n'), "{text}");
        let given = beside.drain().find_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        drop(std::fs::File::from(given.unwrap()));
        theirs.write_all(b"{\"event\":\"STOP\"}\r\n{\"return\":{\"a\":1}}\r\n").await.unwrap();
        let mut theirs = BufReader::new(theirs);
        let mut line = String::new();
        theirs.read_line(&mut line).await.unwrap();
        assert!(line.contains("migrate"), "{line}");
        theirs.write_all(b"{\"error\":{\"desc\":\"not now\"}}\r\n").await.unwrap();
        let (given, refused) = asking.await.unwrap();
        assert_eq!(given, serde_json::json!({"a": 1}));
        assert!(refused.contains("migrate: not now"), "{refused}");
        // All ends of the pipe's other side are closed by now.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
        drop(theirs);
        assert_eq!(follower.await.unwrap(), None);
        let late = control.ask("stop", serde_json::json!({}), None).await.unwrap_err().to_string();
        assert!(late.contains("has ended"), "{late}");
    }
}
