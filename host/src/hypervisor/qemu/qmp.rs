//! QEMU's control channel, as far as we use it: it says why the guest stopped.
//!
//! The channel is read for as long as it lives, so that QEMU never waits for us. Losing it costs
//! the reason and nothing else; the machine goes on.

use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

/// The longest line that is kept; a longer one is skipped.
const MAX_LINE: usize = 1024 * 1024;

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
    error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct Data {
    reason: Option<String>,
}

/// Reads the channel to its end and returns the last reason that QEMU gave for stopping.
pub(super) async fn follow(stream: UnixStream) -> Option<Shutdown> {
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE));
    let mut shutdown = None;
    // After each error `Framed` says once that it has ended, and then goes on.
    let mut after_error = false;
    loop {
        let line = match lines.next().await {
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
        let message = match serde_json::from_str::<Message>(&line) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%error, "skipped a line of QMP that is not understood");
                continue;
            }
        };
        if message.greeting.is_some() {
            // Events come only after this.
            if let Err(error) = lines.send(r#"{"execute":"qmp_capabilities"}"#).await {
                tracing::debug!(%error, "QMP has ended before it began");
            }
        }
        if let Some(error) = message.error {
            tracing::warn!(%error, "QMP refused a command");
        }
        if message.event.as_deref() == Some("SHUTDOWN") {
            let reason = message.data.and_then(|data| data.reason);
            shutdown = Some(reason.map_or_else(
                || Shutdown::Other("no reason given".to_owned()),
                Shutdown::from_name,
            ));
        }
    }
    shutdown
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

    /// Plays QEMU: greets, expects the capabilities, says these lines and ends.
    async fn play(lines: &[&str]) -> Option<Shutdown> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reader = tokio::spawn(follow(ours));
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
}
