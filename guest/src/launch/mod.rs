//! Starts one command: everything is prepared here, then a small init is cloned that runs it.
//!
//! ```text
//!  agent ── clone3(new pid + mount namespace, jobs cgroup) ─► small init ── fork ─► command
//!    ▲  report: why it did not start; closed by a successful execve ────────────────┘
//!    ▲  status: how the command ended (4 bytes) ────────┘  │
//!    └─ control: signals for the command's group ─────────►┘
//! ```
//!
//! # Invariants
//! 1. Between clone and execve nothing is allocated and no lock is taken: the process that clones
//!    may have other threads (tests do).
//! 2. The small init holds no end of the command's stdio.
//! 3. All signals are blocked around the clone, so no handler of the agent runs in the child.
//! 4. The child enters the reaper's table before the loop can turn.
//! 5. A command with a [`Terminal`] leads a session whose controlling terminal it is; all three of
//!    its streams are that terminal.
//!
//! # Failure
//! What fails before the clone is an [`ExecFailure`] at once; what fails after it arrives through
//! the report pipe and is explained by [`explain`].

mod accounts;
mod command;
mod diagnose;
mod init;
mod namespace;
mod report;
mod terminal;
mod user;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use matchlock_wire::message::{ExecFailure, ExecFailureKind, ExecStart};
use nix::sys::resource::{Resource, getrlimit};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitStatus};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::reaper::Reaper;
pub use command::Command;
pub use diagnose::explain;
pub use report::{Report, Step};
pub use terminal::Terminal;

/// How much a pipe of a command holds, where the kernel allows it.
const PIPE_BYTES: usize = 1024 * 1024;

/// The signals of Linux, and the one that a command gets at a shutdown unless it wants another.
const SIGNALS: std::ops::RangeInclusive<u8> = 1..=64;
const TERM: u8 = 15;

/// How many files a command may open, and what it may raise that to: as under systemd.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// What commands are launched with.
#[derive(Debug)]
pub struct Launcher {
    cgroup: Option<OwnedFd>,
    reaper: Rc<Reaper>,
    ignored: Vec<libc::c_int>,
}

/// A command whose small init has been cloned.
#[derive(Debug)]
pub struct Launched {
    /// The small init, and through it the command.
    pub process: Process,
    /// The init's end, and with it the end of everything in its namespace.
    pub ended: oneshot::Receiver<WaitStatus>,
    /// Closed without a word once the command is executed.
    pub report: pipe::Receiver,
    /// Holds the command's raw wait status once the init has ended.
    pub status: OwnedFd,
    /// To the command's stdin, if the host sends one.
    pub stdin: Option<End>,
    /// From the command's stdout.
    pub stdout: End,
    /// From the command's stderr; a terminal has no other output.
    pub stderr: Option<End>,
    /// The command's terminal, if it has one.
    pub terminal: Option<Rc<Terminal>>,
}

/// The agent's end of one of a command's streams. Never blocks.
#[derive(Debug)]
pub enum End {
    /// Of a pipe.
    Pipe(AsyncFd<OwnedFd>),
    /// Of a terminal, which has one end for everything.
    Terminal(Rc<Terminal>),
}

impl End {
    /// What is read or written.
    pub fn fd(&self) -> &AsyncFd<OwnedFd> {
        match self {
            Self::Pipe(fd) => fd,
            Self::Terminal(terminal) => terminal.master(),
        }
    }
}

/// A running command, to be signalled.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    control: OwnedFd,
    reaper: Rc<Reaper>,
    /// What it is told at a shutdown; `None` means SIGTERM, as everybody.
    stop_signal: Option<u8>,
}

impl Process {
    /// Tells a command that wants another signal than SIGTERM that the guest shuts down; answers the
    /// pid of its small init. `None` for any other command: it gets what everybody gets.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn stop(&self) -> io::Result<Option<Pid>> {
        let Some(number) = self.stop_signal else { return Ok(None) };
        self.signal(i32::from(number))?;
        Ok(Some(self.pid))
    }

    /// Sends a signal to the command's process group; SIGKILL to everything in its namespace.
    ///
    /// # Errors
    /// When the number is no signal, or the kernel refuses. A command that has ended is no error.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        if number == libc::SIGKILL {
            return self.kill();
        }
        match u8::try_from(number) {
            Ok(byte) if SIGNALS.contains(&byte) => {
                match rustix::io::write(&self.control, &[byte]) {
                    Ok(_) | Err(rustix::io::Errno::PIPE) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// [`signal`](Self::signal) for a command that has this terminal: it has the signal before any
    /// key that comes later. SIGHUP then goes to the foreground too, in this order: the command must
    /// not see the foreground end without knowing why.
    ///
    /// # Errors
    /// As [`signal`](Self::signal), and when the terminal cannot be asked.
    pub fn signal_at(&self, terminal: &Terminal, number: i32) -> io::Result<()> {
        // The init passes a signal on when it gets to it, which may be later.
        let sent = match Signal::from_named_raw(number) {
            None | Some(Signal::KILL) => false,
            Some(signal) => terminal.signal_leader(self.pid, signal)?,
        };
        if !sent {
            self.signal(number)?;
        }
        if number == Signal::HUP.as_raw() {
            terminal.signal_foreground(Signal::HUP)
        } else {
            Ok(())
        }
    }

    /// Kills the command and everything in its namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> io::Result<()> {
        self.reaper.kill(self.pid)
    }
}

/// The descriptors that the command's side of the clone uses.
#[derive(Debug)]
struct ChildEnds {
    status: OwnedFd,
    control: OwnedFd,
    report: OwnedFd,
    stdio: ChildStdio,
}

/// What becomes the command's stdin, stdout and stderr.
#[derive(Debug)]
enum ChildStdio {
    Pipes([OwnedFd; 3]),
    Terminal(Rc<Terminal>),
}

impl ChildStdio {
    fn raw(&self) -> [RawFd; 3] {
        match self {
            Self::Pipes(ends) => ends.each_ref().map(AsRawFd::as_raw_fd),
            Self::Terminal(terminal) => [terminal.slave().as_raw_fd(); 3],
        }
    }
}

/// The agent's ends of the streams.
#[derive(Debug)]
struct AgentStdio {
    stdin: Option<End>,
    stdout: End,
    stderr: Option<End>,
    terminal: Option<Rc<Terminal>>,
}

impl Launcher {
    /// A launcher that puts commands into the control group, if there is one.
    pub fn new(cgroup: Option<OwnedFd>, reaper: Rc<Reaper>) -> Self {
        Self { cgroup, reaper, ignored: init::ignored_signals() }
    }

    /// Checks and prepares a command and clones its small init.
    ///
    /// # Errors
    /// When the request is wrong, or the guest lacks what it takes.
    pub fn launch(&self, start: &ExecStart) -> Result<(Launched, Command), ExecFailure> {
        let stop_signal = start.stop_signal.filter(|number| *number != TERM);
        if stop_signal.is_some_and(|number| !SIGNALS.contains(&number)) {
            let message = "the signal that stops the command is none".to_owned();
            return Err(ExecFailure { kind: ExecFailureKind::Request, message });
        }
        let command = Command::prepare(start)?;
        let launched = self.clone_init(&command, stop_signal).map_err(|error| ExecFailure {
            kind: ExecFailureKind::Unavailable,
            message: format!("cannot start a process: {error}"),
        })?;
        Ok((launched, command))
    }

    fn clone_init(&self, command: &Command, stop_signal: Option<u8>) -> io::Result<Launched> {
        let (status, status_end) = pipe_pair()?;
        let (control_end, control) = pipe_pair()?;
        let (report, report_end) = pipe_pair()?;
        for end in [&status, &control, &report] {
            never_block(end)?;
        }
        // The agent's ends join the reactor first: nothing may fail once the child is there.
        let report = pipe::Receiver::from_owned_fd_unchecked(report)?;
        let (agent, stdio) = match command.terminal() {
            Some(size) => {
                let terminal = Rc::new(Terminal::open(size, command.identity().uid)?);
                on_terminal(terminal, command.has_stdin())
            }
            None => make_pipes(command.has_stdin())?,
        };
        let child =
            ChildEnds { status: status_end, control: control_end, report: report_end, stdio };
        let pid = clone_into(command, &child, self.cgroup.as_ref(), &self.ignored)?;
        let ended = self.reaper.watch(pid);
        drop(child);
        let process = Process { pid, control, reaper: Rc::clone(&self.reaper), stop_signal };
        let AgentStdio { stdin, stdout, stderr, terminal } = agent;
        Ok(Launched { process, ended, report, status, stdin, stdout, stderr, terminal })
    }
}

fn on_terminal(terminal: Rc<Terminal>, with_stdin: bool) -> (AgentStdio, ChildStdio) {
    let end = || End::Terminal(Rc::clone(&terminal));
    let (stdin, stdout) = (with_stdin.then(end), end());
    let child = ChildStdio::Terminal(Rc::clone(&terminal));
    (AgentStdio { stdin, stdout, stderr: None, terminal: Some(terminal) }, child)
}

fn make_pipes(with_stdin: bool) -> io::Result<(AgentStdio, ChildStdio)> {
    let (stdout, stdout_end) = pipe_pair()?;
    let (stderr, stderr_end) = pipe_pair()?;
    let (stdin, stdin_end) = if with_stdin {
        let (read, write) = pipe_pair()?;
        (Some(pipe_end(write, Interest::WRITABLE)?), read)
    } else {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty())?;
        (None, above_stdio(null)?)
    };
    let agent = AgentStdio {
        stdin,
        stdout: pipe_end(stdout, Interest::READABLE)?,
        stderr: Some(pipe_end(stderr, Interest::READABLE)?),
        terminal: None,
    };
    Ok((agent, ChildStdio::Pipes([stdin_end, stdout_end, stderr_end])))
}

fn pipe_end(fd: OwnedFd, interest: Interest) -> io::Result<End> {
    enlarge(&fd)?;
    never_block(&fd)?;
    Ok(End::Pipe(join_reactor(fd, interest)?))
}

fn join_reactor(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open until it is dropped, and stays the same.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

fn never_block(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

fn pipe_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((above_stdio(read)?, above_stdio(write)?))
}

/// The child moves its ends to 0, 1 and 2, so none of them may be one of these.
fn above_stdio(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() > libc::STDERR_FILENO {
        return Ok(fd);
    }
    Ok(rustix::io::fcntl_dupfd_cloexec(&fd, 3)?)
}

/// A larger pipe saves turns of both sides. Not being allowed one is no failure.
fn enlarge(end: &OwnedFd) -> io::Result<()> {
    match rustix::pipe::fcntl_setpipe_size(end, PIPE_BYTES) {
        Ok(_) | Err(rustix::io::Errno::PERM | rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The usual limit of a command; never more than the agent has itself.
fn file_limit() -> io::Result<libc::rlimit> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(libc::rlimit { rlim_cur: OPEN_FILES.0.min(most), rlim_max: OPEN_FILES.1.min(most) })
}

fn clone_into(
    command: &Command,
    ends: &ChildEnds,
    cgroup: Option<&OwnedFd>,
    ignored: &[libc::c_int],
) -> io::Result<Pid> {
    let argv = command.argv_pointers();
    let envp = command.env_pointers();
    let [status, control, report] =
        [&ends.status, &ends.control, &ends.report].map(AsRawFd::as_raw_fd);
    let [stdin, stdout, stderr] = ends.stdio.raw();
    let mut keep: [RawFd; 6] = [status, control, report, stdin, stdout, stderr];
    keep.sort_unstable();
    let plan = init::Plan {
        argv: &argv,
        envp: &envp,
        name: command.name(),
        search: command.search_path(),
        cwd: command.cwd(),
        ignored,
        files: file_limit()?,
        identity: command.identity(),
        status,
        control,
        report,
        stdin,
        stdout,
        stderr,
        keep,
        terminal: command.terminal().is_some(),
    };
    namespace::clone_init(&plan, cgroup)
}
