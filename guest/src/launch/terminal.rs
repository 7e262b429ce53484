//! A command's pseudo-terminal, as the agent holds it.
//!
//! ```text
//!   host ◄─ output ── master ◄──── line discipline ◄──── slave ── stdin, stdout, stderr
//!   host ── keys ───► (agent) ───► echo, ^C, ^Z, ^D ───► (command, its controlling terminal)
//! ```
//!
//! # Invariants
//! 1. It is one of the devpts that is mounted on `/dev/pts`, so the command finds it by its name,
//!    and it belongs to the command's user.
//! 2. The agent keeps an end of both sides: a command that has closed all of its own may open it
//!    again, and nothing that it printed before its end is lost.
//! 3. When the last [`Rc`](std::rc::Rc) goes, so does the master, and the kernel hangs the terminal
//!    up: the session's leader gets SIGHUP, and whoever still holds the slave reads its end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use matchlock_wire::message::TerminalSize;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Winsize, tcgetattr, tcgetpgrp,
    tcgetsid, tcsetattr, tcsetwinsize,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes new terminals of the devpts that is mounted there.
const MULTIPLEXER: &str = "/dev/pts/ptmx";

/// The terminal of a command.
#[derive(Debug)]
pub struct Terminal {
    master: AsyncFd<OwnedFd>,
    slave: OwnedFd,
}

impl Terminal {
    /// A new terminal for this user.
    ///
    /// # Errors
    /// When the kernel has none to give.
    pub(super) fn open(size: TerminalSize, user: u32) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let master = super::above_stdio(rustix::fs::open(MULTIPLEXER, flags, Mode::empty())?)?;
        unlockpt(&master)?;
        let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = super::above_stdio(ioctl_tiocgptpeer(&master, peer)?)?;
        // The group is the mount's, as for any other terminal.
        rustix::fs::fchown(&slave, Some(Uid::from_raw(user)), None::<Gid>)?;
        let mut modes = tcgetattr(&slave)?;
        // Erasing a character erases all of its bytes.
        modes.input_modes |= InputModes::IUTF8;
        tcsetattr(&slave, OptionalActions::Now, &modes)?;
        let both = Interest::READABLE | Interest::WRITABLE;
        let terminal = Self { master: super::join_reactor(master, both)?, slave };
        terminal.resize(size)?;
        Ok(terminal)
    }

    /// The agent's side.
    pub fn master(&self) -> &AsyncFd<OwnedFd> {
        &self.master
    }

    /// The command's side.
    pub(super) fn slave(&self) -> &OwnedFd {
        &self.slave
    }

    /// Sets the size. The foreground group gets SIGWINCH if it is another one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let TerminalSize { rows: ws_row, cols: ws_col } = size;
        let size = Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }

    /// The keys that mean the end of input now. After a line that was begun the first one only
    /// hands it over, so it takes two.
    ///
    /// # Errors
    /// When the terminal cannot be asked.
    pub fn end_of_file(&self, line_begun: bool) -> io::Result<Vec<u8>> {
        let modes = tcgetattr(&self.master)?;
        let key = modes.special_codes[SpecialCodeIndex::VEOF];
        let in_lines = modes.local_modes.contains(LocalModes::ICANON);
        Ok(vec![key; if in_lines && line_begun { 2 } else { 1 }])
    }

    /// Sends a signal to the group of the session's leader, if that is the child of this init: a
    /// command that has given its terminal away is not found by it. Whether it was sent.
    ///
    /// # Errors
    /// When the terminal cannot be asked or the kernel refuses.
    pub fn signal_leader(&self, init: Pid, signal: Signal) -> io::Result<bool> {
        match self.leader()? {
            Some(leader) if parent(leader)? == Some(init) => send(leader, signal).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Sends a signal to the foreground group, unless that is the group of the session's leader,
    /// which is signalled in another way. Nobody in the foreground is no error.
    ///
    /// # Errors
    /// When the terminal cannot be asked or the kernel refuses.
    pub fn signal_foreground(&self, signal: Signal) -> io::Result<()> {
        match self.foreground()? {
            Some(group) if self.leader()? != Some(group) => send(group, signal),
            _ => Ok(()),
        }
    }

    /// Tells the foreground group that the terminal goes; dropping it tells the leader.
    ///
    /// # Errors
    /// When the terminal cannot be asked or the kernel refuses.
    pub fn hang_up(&self) -> io::Result<()> {
        let Some(group) = self.foreground()? else { return Ok(()) };
        send(group, Signal::HUP)?;
        // A stopped process could not act on it.
        send(group, Signal::CONT)
    }

    fn foreground(&self) -> io::Result<Option<Pid>> {
        of_session(tcgetpgrp(self.master.as_fd()))
    }

    fn leader(&self) -> io::Result<Option<Pid>> {
        of_session(tcgetsid(self.master.as_fd()))
    }
}

/// The parent of a process; `None` if the process is gone.
fn parent(process: Pid) -> io::Result<Option<Pid>> {
    let status = match fs::read_to_string(format!("/proc/{process}/status")) {
        Ok(status) => status,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => return Ok(None),
        Err(error) => return Err(error),
    };
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(parent.and_then(|pid| pid.trim().parse().ok()).and_then(Pid::from_raw))
}

fn send(group: Pid, signal: Signal) -> io::Result<()> {
    match kill_process_group(group, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Before its command has made its session, and after its end, a terminal has none.
fn of_session(answer: rustix::io::Result<Pid>) -> io::Result<Option<Pid>> {
    match answer {
        Ok(pid) => Ok(Some(pid)),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::SRCH | Errno::IO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
