//! A client of `matchlock rpc` or `matchlock serve`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::running::wait_until;

/// How long an answer may take on a loaded machine before a test gives up.
const PATIENCE: Duration = Duration::from_secs(180);

/// A session, and what it has said.
pub struct Session {
    child: Option<Child>,
    input: Option<Box<dyn Write + Send>>,
    lines: mpsc::Receiver<Value>,
    /// What came and was not asked for yet.
    seen: Vec<Value>,
    next_id: u64,
}

impl Session {
    /// Starts the program that serves one over its stdin and stdout.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("its stdin")?;
        let output = child.stdout.take().context("its stdout")?;
        Ok(Self::over(Some(child), Box::new(input), output))
    }

    /// Connects to a server's socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let input = stream.try_clone()?;
        Ok(Self::over(None, Box::new(Closing(input)), stream))
    }

    fn over(
        child: Option<Child>,
        input: Box<dyn Write + Send>,
        output: impl Read + Send + 'static,
    ) -> Self {
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                // A broken pipe ends the output.
                let Ok(line) = line else { return };
                let message = serde_json::from_str(&line).unwrap_or_else(
                    |error| json!({ "not_json": line, "error": error.to_string() }),
                );
                if send.send(message).is_err() {
                    return;
                }
            }
        });
        Self { child, input: Some(input), lines, seen: Vec::new(), next_id: 0 }
    }

    /// The program's process id.
    ///
    /// # Errors
    /// When it is somebody else's.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.child.as_ref().context("a server's session")?.id())
    }

    /// Sends a line as it is.
    ///
    /// # Errors
    /// When nobody reads it.
    pub fn send_line(&mut self, line: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("its input is closed")?;
        input.write_all(line)?;
        input.write_all(b"\n")?;
        Ok(input.flush()?)
    }

    /// Sends a request; its id.
    ///
    /// # Errors
    /// When nobody reads it.
    pub fn send(&mut self, method: &str, params: &Value) -> Result<u64> {
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        self.send_line(&serde_json::to_vec(&request)?)?;
        Ok(id)
    }

    /// Waits for a message like this.
    ///
    /// # Errors
    /// When none comes in time, or the output ends.
    pub fn message(&mut self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        if let Some(at) = self.seen.iter().position(&is_it) {
            return Ok(self.seen.remove(at));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self
                .lines
                .recv_timeout(left)
                .with_context(|| format!("{what} did not come; what came: {:?}", self.seen))?;
            if is_it(&message) {
                return Ok(message);
            }
            self.seen.push(message);
        }
    }

    /// The answer to a request: its result, or code and message of its error.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn answer(&mut self, id: u64) -> Result<Result<Value, (i64, String)>> {
        let answer = self.message(&format!("the answer to {id}"), |m| m["id"] == json!(id))?;
        ensure!(answer["jsonrpc"] == "2.0", "{answer}");
        match answer.get("error") {
            None => Ok(Ok(answer["result"].clone())),
            Some(error) => {
                let message = error["message"].as_str().context("a message")?.to_owned();
                Ok(Err((error["code"].as_i64().context("a code")?, message)))
            }
        }
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn ask(&mut self, method: &str, params: &Value) -> Result<Result<Value, (i64, String)>> {
        let id = self.send(method, params)?;
        self.answer(id)
    }

    /// Sends a request that succeeds.
    ///
    /// # Errors
    /// When it fails.
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value> {
        match self.ask(method, params)? {
            Ok(result) => Ok(result),
            Err((code, message)) => bail!("{method} failed with {code}: {message}"),
        }
    }

    /// Creates a small VM without a network, whose record goes with it; its id.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn create_vm(&mut self) -> Result<String> {
        let created = self.call("create", &small_vm())?;
        Ok(created["id"].as_str().context("an id")?.to_owned())
    }

    /// Everything that came and was not asked for.
    pub fn seen(&mut self) -> Vec<Value> {
        self.seen.extend(self.lines.try_iter());
        std::mem::take(&mut self.seen)
    }

    /// Ends its input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits for the end of its output, and of the program; how that ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(message) => self.seen.push(message),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("its output did not end"),
            }
        }
        let Some(child) = &mut self.child else { return Ok(None) };
        let mut status = None;
        wait_until(limit, "the end of the session's process", || {
            status = child.try_wait()?;
            Ok(status.is_some())
        })?;
        Ok(status)
    }
}

/// The parameters of a small VM without a network, whose record goes with it.
#[must_use]
pub fn small_vm() -> Value {
    json!({
        "image": "busybox",
        "remove": true,
        "resources": { "memory_mb": 128, "disk_size_mb": 64 },
        "network": { "no_network": true },
    })
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child
            && matches!(child.try_wait(), Ok(None))
        {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Ends the other side's input when dropped, though its output is still read.
struct Closing(UnixStream);

impl Write for Closing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        // The other side may be gone.
        drop(self.0.shutdown(std::net::Shutdown::Write));
    }
}
