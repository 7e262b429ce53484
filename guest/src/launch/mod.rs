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
mod user;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use matchlock_wire::message::{ExecFailure, ExecFailureKind, ExecStart};
use nix::sys::resource::{Resource, getrlimit};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitStatus};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::reaper::Reaper;
pub use command::Command;
pub use diagnose::explain;
pub use report::{Report, Step};

/// How much a pipe of a command holds, where the kernel allows it.
const PIPE_BYTES: usize = 1024 * 1024;

/// How many files a command may open, and what it may raise that to: as under systemd.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// What commands are launched with.
#[derive(Debug)]
pub struct Launcher {
    cgroup: Option<OwnedFd>,
    reaper: Rc<Reaper>,
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
    /// To the command's stdin, if it has one.
    pub stdin: Option<pipe::Sender>,
    /// From the command's stdout.
    pub stdout: pipe::Receiver,
    /// From the command's stderr.
    pub stderr: pipe::Receiver,
}

/// A running command, to be signalled.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    control: OwnedFd,
    reaper: Rc<Reaper>,
}

impl Process {
    /// Sends a signal to the command's process group; SIGKILL to everything in its namespace.
    ///
    /// # Errors
    /// When the number is no signal, or the kernel refuses. A command that has ended is no error.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        if number == libc::SIGKILL {
            return self.kill();
        }
        match u8::try_from(number) {
            Ok(byte @ 1..=64) => match rustix::io::write(&self.control, &[byte]) {
                Ok(_) | Err(rustix::io::Errno::PIPE) => Ok(()),
                Err(error) => Err(error.into()),
            },
            _ => Err(io::ErrorKind::InvalidInput.into()),
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

/// The ends of a command's pipes that its side of the clone uses.
#[derive(Debug)]
struct ChildEnds {
    status: OwnedFd,
    control: OwnedFd,
    report: OwnedFd,
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// The ends that the agent keeps.
#[derive(Debug)]
struct AgentEnds {
    status: OwnedFd,
    control: OwnedFd,
    report: OwnedFd,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Launcher {
    /// A launcher that puts commands into the control group, if there is one.
    pub fn new(cgroup: Option<OwnedFd>, reaper: Rc<Reaper>) -> Self {
        Self { cgroup, reaper }
    }

    /// Checks and prepares a command and clones its small init.
    ///
    /// # Errors
    /// When the request is wrong, or the guest lacks what it takes.
    pub fn launch(&self, start: &ExecStart) -> Result<(Launched, Command), ExecFailure> {
        let command = Command::prepare(start)?;
        let launched = self.clone_init(&command).map_err(|error| ExecFailure {
            kind: ExecFailureKind::Unavailable,
            message: format!("cannot start a process: {error}"),
        })?;
        Ok((launched, command))
    }

    fn clone_init(&self, command: &Command) -> io::Result<Launched> {
        let (agent, child) = make_pipes(command.has_stdin())?;
        // The agent's ends join the reactor first: nothing may fail once the child is there.
        let report = receiver(agent.report)?;
        let stdout = receiver(agent.stdout)?;
        let stderr = receiver(agent.stderr)?;
        let stdin = agent.stdin.map(pipe::Sender::from_owned_fd_unchecked).transpose()?;
        let pid = clone_into(command, &child, self.cgroup.as_ref())?;
        let ended = self.reaper.watch(pid);
        drop(child);
        let process = Process { pid, control: agent.control, reaper: Rc::clone(&self.reaper) };
        Ok(Launched { process, ended, report, status: agent.status, stdin, stdout, stderr })
    }
}

fn receiver(fd: OwnedFd) -> io::Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd_unchecked(fd)
}

fn make_pipes(with_stdin: bool) -> io::Result<(AgentEnds, ChildEnds)> {
    let (status_read, status_write) = pipe_pair()?;
    let (control_read, control_write) = pipe_pair()?;
    let (report_read, report_write) = pipe_pair()?;
    let (stdout_read, stdout_write) = pipe_pair()?;
    let (stderr_read, stderr_write) = pipe_pair()?;
    let (stdin_read, stdin_write) = if with_stdin {
        let (read, write) = pipe_pair()?;
        (read, Some(write))
    } else {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty())?;
        (above_stdio(null)?, None)
    };
    for end in [&stdout_read, &stderr_read].into_iter().chain(&stdin_write) {
        enlarge(end)?;
    }
    for end in [&status_read, &control_write, &report_read]
        .into_iter()
        .chain([&stdout_read, &stderr_read])
        .chain(&stdin_write)
    {
        let flags = rustix::fs::fcntl_getfl(end)?;
        rustix::fs::fcntl_setfl(end, flags | OFlags::NONBLOCK)?;
    }
    let agent = AgentEnds {
        status: status_read,
        control: control_write,
        report: report_read,
        stdin: stdin_write,
        stdout: stdout_read,
        stderr: stderr_read,
    };
    let child = ChildEnds {
        status: status_write,
        control: control_read,
        report: report_write,
        stdin: stdin_read,
        stdout: stdout_write,
        stderr: stderr_write,
    };
    Ok((agent, child))
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

fn clone_into(command: &Command, ends: &ChildEnds, cgroup: Option<&OwnedFd>) -> io::Result<Pid> {
    let argv = command.argv_pointers();
    let envp = command.env_pointers();
    let raw = |fd: &OwnedFd| fd.as_fd().as_raw_fd();
    let mut keep: [RawFd; 6] = [
        raw(&ends.status),
        raw(&ends.control),
        raw(&ends.report),
        raw(&ends.stdin),
        raw(&ends.stdout),
        raw(&ends.stderr),
    ];
    keep.sort_unstable();
    let plan = init::Plan {
        argv: &argv,
        envp: &envp,
        name: command.name(),
        search: command.search_path(),
        cwd: command.cwd(),
        files: file_limit()?,
        identity: command.identity(),
        status: raw(&ends.status),
        control: raw(&ends.control),
        report: raw(&ends.report),
        stdin: raw(&ends.stdin),
        stdout: raw(&ends.stdout),
        stderr: raw(&ends.stderr),
        keep,
    };
    namespace::clone_init(&plan, cgroup)
}
