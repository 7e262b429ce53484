//! The program while it runs.

use std::io::Read;
use std::process::{Child, ChildStdin, Command, ExitStatus, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// The program while it runs. Its output is read all the time. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

fn read_all(from: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    from.map(|mut from| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // A broken pipe ends the output; what came before it is what there is.
            drop(from.read_to_end(&mut bytes));
            bytes
        })
    })
}

fn collected(thread: Option<JoinHandle<Vec<u8>>>) -> Vec<u8> {
    thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
        let stdout = read_all(child.stdout.take());
        let stderr = read_all(child.stderr.take());
        Ok(Self { child, stdout, stderr })
    }

    /// Its pid.
    ///
    /// # Errors
    /// Never for a pid of this system.
    pub fn pid(&self) -> Result<Pid> {
        let pid = i32::try_from(self.child.id())?;
        Pid::from_raw(pid).context("pid 0")
    }

    /// Its stdin, if it was piped; to be dropped for its end.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time; then it is killed.
    pub fn wait(mut self, limit: Duration) -> Result<Output> {
        let status = self.wait_status(limit)?;
        let (stdout, stderr) = (self.stdout.take(), self.stderr.take());
        Ok(Output { status, stdout: collected(stdout), stderr: collected(stderr) })
    }

    fn wait_status(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut status = None;
        let waited = wait_until(limit, "the end of the program", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        });
        if let Err(error) = waited {
            self.child.kill()?;
            self.child.wait()?;
            let stderr = collected(self.stderr.take());
            bail!("{error}; it printed: {}", String::from_utf8_lossy(&stderr));
        }
        status.context("it has just ended")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// Looks again and again until something is so.
///
/// # Errors
/// When it is not so in time, or could not be looked at.
pub fn wait_until(
    limit: Duration,
    what: &str,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "a test waits for another process")]
    let pause = || std::thread::sleep(Duration::from_millis(20));
    let deadline = Instant::now() + limit;
    while !is_so()? {
        if Instant::now() > deadline {
            bail!("{what} did not come within {limit:?}");
        }
        pause();
    }
    Ok(())
}
