//! A user at a terminal: types, reads, resizes, closes it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::wait_until;

/// How long anything may take that a terminal waits for.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long keys are given before they are typed again.
const AGAIN: Duration = Duration::from_secs(1);

/// How often a program is looked after that prints nothing.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A terminal of 24 lines of 80, and the program that was started on it. Dropping it kills the
/// program.
#[derive(Debug)]
pub struct Terminal {
    /// `None` once it was closed.
    master: Option<File>,
    /// Kept, so that the modes can be looked at after the program's end.
    slave: Option<OwnedFd>,
    child: Child,
    modes: String,
    output: Vec<u8>,
    seen: usize,
}

impl Terminal {
    /// Starts a program as the leader of a session on a terminal of its own: its stdin, stdout and
    /// stderr, unless the command has one of them elsewhere (see [`Self::start_with`]).
    ///
    /// # Errors
    /// When there is no terminal, or the program cannot be started.
    pub fn start(command: &Command) -> Result<Self> {
        Self::start_with(command, |_| {})
    }

    /// The same; `change` may give some of its streams another place.
    ///
    /// # Errors
    /// When there is no terminal, or the program cannot be started.
    pub fn start_with(command: &Command, change: impl FnOnce(&mut Command)) -> Result<Self> {
        let (master, slave) = open_terminal()?;
        fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
        let modes = modes_of(&master)?;
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        session.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
        change(&mut session);
        let child = session.spawn().context("setsid")?;
        Ok(Self {
            master: Some(master.into()),
            slave: Some(slave),
            child,
            modes,
            output: Vec::new(),
            seen: 0,
        })
    }

    fn master(&self) -> Result<&File> {
        self.master.as_ref().context("the terminal was closed")
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal takes nothing in time.
    pub fn keys(&mut self, keys: impl AsRef<[u8]>) -> Result<()> {
        let mut keys = keys.as_ref();
        let until = Instant::now() + PATIENCE;
        while !keys.is_empty() {
            match self.master()?.write(keys) {
                Ok(count) => keys = &keys[count..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    ensure!(Instant::now() < until, "the terminal takes no more keys");
                    self.look()?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads until this text has come; returns what came before it, since the last text.
    ///
    /// # Errors
    /// When it does not come in time, with what came instead.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.expect_within(text, PATIENCE)
    }

    /// Types, again and again, until this text has come: for keys that may come before whoever is to get
    /// them.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn keys_until(&mut self, keys: &str, text: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            self.keys(keys)?;
            match self.expect_within(text, AGAIN) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => {}
            }
        }
    }

    fn expect_within(&mut self, text: &str, limit: Duration) -> Result<String> {
        let until = Instant::now() + limit;
        loop {
            let new = &self.output[self.seen..];
            if let Some(at) = new.windows(text.len()).position(|part| part == text.as_bytes()) {
                let before = String::from_utf8_lossy(&new[..at]).into_owned();
                self.seen += at + text.len();
                return Ok(before);
            }
            if Instant::now() >= until {
                bail!("no {text:?}, but {:?}", String::from_utf8_lossy(new));
            }
            if !self.look()? && self.child.try_wait()?.is_some() && !self.look()? {
                let new = String::from_utf8_lossy(&self.output[self.seen..]);
                bail!("it ended before {text:?}: {new:?}");
            }
        }
    }

    /// Waits a moment for output. False if there was none.
    fn look(&mut self) -> Result<bool> {
        let mut chunk = [0; 64 * 1024];
        let mut master = self.master()?;
        let mut ready = [PollFd::new(master, PollFlags::IN)];
        poll(&mut ready, Some(&LOOK))?;
        match master.read(&mut chunk) {
            Ok(count) => {
                self.output.extend_from_slice(&chunk[..count]);
                Ok(count > 0)
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Everything that was printed so far.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// Changes the size, as a window's frame does.
    ///
    /// # Errors
    /// When the terminal is closed.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<()> {
        set_size(self.master()?, rows, cols)
    }

    /// Whether the modes are what they were before the program was started.
    ///
    /// # Errors
    /// When the terminal is closed.
    pub fn is_as_before(&self) -> Result<bool> {
        Ok(modes_of(self.master()?)? == self.modes)
    }

    /// Waits until the modes are as before, or are not.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn wait_until_as_before(&mut self, as_before: bool) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.is_as_before()? != as_before {
            ensure!(Instant::now() < until, "the modes stay as they are");
            self.look()?;
        }
        Ok(())
    }

    /// The process that was started.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal to the program.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid(), signal)?)
    }

    /// Closes the terminal, as a user closes the window.
    pub fn close(&mut self) {
        self.master = None;
        self.slave = None;
    }

    /// Reads until the program has ended.
    ///
    /// # Errors
    /// When it does not end in time, with what it has printed.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if self.master.is_none() {
            let child = &mut self.child;
            wait_until(PATIENCE, "the end of the program", || Ok(child.try_wait()?.is_some()))?;
        }
        let until = Instant::now() + PATIENCE;
        loop {
            let ended = self.child.try_wait()?;
            while self.master.is_some() && self.look()? {}
            if let Some(status) = ended {
                return Ok(status);
            }
            if Instant::now() >= until {
                bail!("it does not end: {:?}", String::from_utf8_lossy(&self.output[self.seen..]));
            }
        }
    }

    /// Reads until the program has ended, and checks that the terminal is as before; its exit code.
    ///
    /// # Errors
    /// When it does not end in time, or the terminal is not as before.
    pub fn finish(&mut self) -> Result<Option<i32>> {
        let status = self.wait()?;
        let printed = String::from_utf8_lossy(&self.output[self.seen..]).into_owned();
        ensure!(self.is_as_before()?, "the terminal is not as before, {status}: {printed:?}");
        Ok(status.code())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing may be left of a test that failed; one that went well has waited.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A terminal of 24 lines of 80: the user's side, and the programs'.
///
/// # Errors
/// When there is none.
pub fn open_terminal() -> Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    set_size(&master, 24, 80)?;
    Ok((master, slave))
}

fn set_size(terminal: impl std::os::fd::AsFd, ws_row: u16, ws_col: u16) -> Result<()> {
    Ok(tcsetwinsize(terminal, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// All modes and keys of a terminal, to be compared.
///
/// # Errors
/// When it cannot be asked.
pub fn modes_of(terminal: impl std::os::fd::AsFd) -> Result<String> {
    let modes = tcgetattr(terminal)?;
    Ok(format!("{modes:?}"))
}
