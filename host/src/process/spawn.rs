//! The thread that starts children, and reaps them.
//!
//! ```text
//!   spawn(spec).await ─► job ─┐                       ┌─► Child (identity, pidfd, exit)
//!                             ▼                       │
//!              thread "matchlock-spawn": poll(wake, pidfd…) ── wait() ─► exit of each child
//! ```
//!
//! # Invariants
//! 1. One thread starts all children: their parent-death signal fires when it ends, that is when
//!    the process ends or the last [`Spawner`] is dropped.
//! 2. The same thread reaps them, so none stays a zombie, whoever forgets it.
//! 3. A child that nobody received (the caller was cancelled) is killed.
//! 4. A child has ended when whatever it had started in its group is gone, too (see `group`).
//!
//! # Failure
//! When the thread fails, its children die with it and each [`Child`] says that it has ended with
//! an unknown status; further spawns are refused.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use matchlock_failpoints::{Area, Injected};
use matchlock_model::identity::ProcessIdentity;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::ProcessError;
use super::before_exec::before_exec;
use super::group::{Group, LOOK_AGAIN};
use super::linux::identity_of_child;

/// What to start.
#[derive(Debug)]
pub struct ChildSpec {
    /// The program: an absolute path.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its whole environment: nothing of ours is inherited, it may hold secrets.
    pub env: Vec<(OsString, OsString)>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Kept open until it was spawned: `cwd` may be a path through this descriptor.
    pub cwd_fd: Option<OwnedFd>,
    /// Where its stdout and stderr go.
    pub log: File,
    /// The descriptors that it inherits besides, under the numbers that they have here. Ours are
    /// closed once it runs.
    pub inherit: Vec<OwnedFd>,
    /// The largest file that it may write. Further writes fail with EFBIG; it gets no signal.
    pub max_file_bytes: Option<u64>,
}

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// There is no such program.
    #[error("there is no program {program}")]
    NotFound {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its working directory cannot be used.
    #[error("could not use {cwd} as the working directory of {program}")]
    WorkingDirectory {
        /// The program.
        program: PathBuf,
        /// The directory.
        cwd: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("could not start {program}")]
    Failed {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The thread that starts children could not be started or has ended.
    #[error("the thread that starts child processes is not running")]
    NoThread(#[source] Option<io::Error>),
}

/// On the thread that starts children. After `start` the child runs and nobody has it yet.
pub const POINTS: Area = Area::new("spawn", &["start"]);

impl From<Injected> for SpawnError {
    fn from(injected: Injected) -> Self {
        Self::Failed { program: PathBuf::new(), source: injected.into() }
    }
}

/// Starts children. All clones share one thread; when the last is dropped, its children are
/// killed.
#[derive(Debug, Clone)]
pub struct Spawner {
    handle: Arc<Handle>,
}

/// Reaches the thread; dropping it ends the thread.
#[derive(Debug)]
struct Handle {
    jobs: Mutex<mpsc::Sender<Job>>,
    wake: OwnedFd,
}

/// A child to start, and who waits for it.
struct Job {
    spec: ChildSpec,
    reply: oneshot::Sender<Result<Unclaimed, SpawnError>>,
}

impl Spawner {
    /// Starts the thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn new() -> Result<Self, SpawnError> {
        let failed = |error: io::Error| SpawnError::NoThread(Some(error));
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let reader = wake.try_clone().map_err(failed)?;
        let (jobs, queue) = mpsc::channel();
        std::thread::Builder::new()
            .name("matchlock-spawn".to_owned())
            .spawn(move || Thread { queue, wake: reader, children: Vec::new() }.run())
            .map_err(failed)?;
        Ok(Self { handle: Arc::new(Handle { jobs: Mutex::new(jobs), wake }) })
    }

    /// Starts a child and returns when it runs its program. A caller that is cancelled leaves no
    /// child.
    ///
    /// # Errors
    /// When it could not be started; then nothing runs.
    pub async fn spawn(&self, spec: ChildSpec) -> Result<Child, SpawnError> {
        let (reply, answer) = oneshot::channel();
        self.handle
            .jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(Job { spec, reply })
            .map_err(|_| SpawnError::NoThread(None))?;
        wake(&self.handle.wake).map_err(|error| SpawnError::NoThread(Some(error)))?;
        answer.await.map_err(|_| SpawnError::NoThread(None))?.map(Unclaimed::claim)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Replacing the sender disconnects the queue: that is the order to end.
        let (nobody, _) = mpsc::channel();
        *self.jobs.get_mut().unwrap_or_else(PoisonError::into_inner) = nobody;
        if let Err(error) = wake(&self.wake) {
            tracing::error!(%error, "could not wake the thread that starts children");
        }
    }
}

/// Makes the eventfd readable.
fn wake(eventfd: &OwnedFd) -> io::Result<()> {
    match rustix::io::write(eventfd, &1_u64.to_ne_bytes()) {
        // EAGAIN: the counter is full, so it is readable.
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildExit {
    /// With this status.
    Status(ExitStatus),
    /// It is gone, but its status could not be had.
    Unknown,
}

impl fmt::Display for ChildExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => status.fmt(f),
            Self::Unknown => f.write_str("unknown status"),
        }
    }
}

/// A child that was started. Clones mean the same child. Dropping it leaves it running; it is
/// reaped when it ends.
#[derive(Debug, Clone)]
pub struct Child {
    identity: ProcessIdentity,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<ChildExit>>,
}

impl Child {
    /// Which process it is.
    #[must_use]
    pub const fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Waits until it has ended and was reaped.
    pub async fn wait(&self) -> ChildExit {
        let mut exit = self.exit.clone();
        // The sender is gone without a word only if the thread failed; its end killed the child.
        exit.wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit)
            .unwrap_or(ChildExit::Unknown)
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn try_wait(&self) -> Option<ChildExit> {
        *self.exit.borrow()
    }

    /// Sends SIGKILL and does not wait. Gone already is success.
    ///
    /// # Errors
    /// When the signal was refused.
    pub fn send_kill(&self) -> Result<(), ProcessError> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(ProcessError::Signal {
                pid: self.identity.pid,
                signal: Signal::KILL.as_raw(),
                source: errno.into(),
            }),
        }
    }

    /// SIGKILL, then waits until it is gone and reaped.
    ///
    /// # Errors
    /// When the signal was refused, or it is still there after `deadline`.
    pub async fn kill(&self, deadline: Duration) -> Result<ChildExit, ProcessError> {
        self.send_kill()?;
        timeout(deadline, self.wait())
            .await
            .map_err(|_| ProcessError::WillNotDie { pid: self.identity.pid, waited: deadline })
    }
}

/// A child on its way to the caller: killed if it never gets there.
struct Unclaimed(Option<Child>);

impl Unclaimed {
    fn claim(mut self) -> Child {
        // `None` only while it is being dropped.
        match self.0.take() {
            Some(child) => child,
            None => unreachable!("a child is claimed once"),
        }
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(child) = self.0.take()
            && let Err(error) = child.send_kill()
        {
            tracing::error!(%error, "could not kill a child whose caller had gone");
        }
    }
}

/// A child as the thread keeps it.
struct Tracked {
    process: std::process::Child,
    group: Group,
    pidfd: Arc<OwnedFd>,
    exit: watch::Sender<Option<ChildExit>>,
}

/// The state of the thread.
struct Thread {
    queue: mpsc::Receiver<Job>,
    wake: OwnedFd,
    children: Vec<Tracked>,
}

impl Thread {
    fn run(mut self) {
        loop {
            if self.take_jobs().is_err() {
                break;
            }
            self.wait_for_event();
            self.reap();
        }
        // Nobody can reach us any more: what still runs ends now, and is reaped.
        for child in &self.children {
            match pidfd_send_signal(&child.pidfd, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => tracing::error!(%errno, "could not kill a child at the end"),
            }
        }
        while !self.children.is_empty() {
            self.wait_for_event();
            self.reap();
        }
    }

    /// Starts what was asked for. `Err` when all callers are gone.
    fn take_jobs(&mut self) -> Result<(), mpsc::TryRecvError> {
        loop {
            match self.queue.try_recv() {
                Ok(job) => self.serve(job),
                Err(mpsc::TryRecvError::Empty) => return Ok(()),
                Err(gone) => return Err(gone),
            }
        }
    }

    fn serve(&mut self, job: Job) {
        if job.reply.is_closed() {
            return;
        }
        let started = self.start(job.spec);
        // A caller that has gone drops the answer, and `Unclaimed` ends the child.
        drop(job.reply.send(started));
    }

    fn start(&mut self, spec: ChildSpec) -> Result<Unclaimed, SpawnError> {
        POINTS.before("start")?;
        let (tracked, child) = start(spec)?;
        self.children.push(tracked);
        let unclaimed = Unclaimed(Some(child));
        POINTS.after("start")?;
        Ok(unclaimed)
    }

    /// Sleeps until there is a job or a child has ended.
    fn wait_for_event(&self) {
        let running = self.children.iter().filter(|child| !child.group.is_ending());
        let mut events: Vec<PollFd<'_>> = std::iter::once(&self.wake)
            .chain(running.map(|child| &*child.pidfd))
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        let is_any_ending = self.children.iter().any(|child| child.group.is_ending());
        let limit = is_any_ending.then_some(LOOK_AGAIN);
        match poll(&mut events, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => tracing::error!(%errno, "could not wait for children"),
        }
        match rustix::io::read(&self.wake, &mut [0_u8; 8]) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => tracing::error!(%errno, "could not read the wake-up counter"),
        }
    }

    /// Collects the children that have ended.
    fn reap(&mut self) {
        self.children.retain_mut(|child| match child.group.exit(&mut child.process) {
            None => true,
            Some(exit) => {
                child.exit.send_replace(Some(exit));
                false
            }
        });
    }
}

/// Starts a child on the calling thread.
fn start(spec: ChildSpec) -> Result<(Tracked, Child), SpawnError> {
    let failed = |source| SpawnError::Failed { program: spec.program.clone(), source };
    let log = spec.log.try_clone().map_err(failed)?;
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        .env_clear()
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .current_dir(&spec.cwd)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    let parent = rustix::process::getpid();
    let inherit: Vec<RawFd> = spec.inherit.iter().map(AsRawFd::as_raw_fd).collect();
    let max_file_bytes = spec.max_file_bytes;
    // SAFETY: the closure runs between fork and exec and makes system calls only; it neither
    // allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || before_exec(parent, &inherit, max_file_bytes));
    }
    let mut process = command.spawn().map_err(|source| name_failure(&spec, source))?;
    // Only this thread reaps, so the pid means this child until then.
    match adopt(&process) {
        Ok((pid, identity, pidfd)) => {
            let pidfd = Arc::new(pidfd);
            let (sender, exit) = watch::channel(None);
            let child = Child { identity, pidfd: Arc::clone(&pidfd), exit };
            Ok((Tracked { process, group: Group::of(pid), pidfd, exit: sender }, child))
        }
        Err(source) => {
            // Killed by pid, which is safe for the same reason; without a pidfd it cannot be kept.
            for step in [process.kill(), process.wait().map(drop)] {
                if let Err(error) = step {
                    tracing::error!(%error, "could not end a child that could not be adopted");
                }
            }
            Err(failed(source))
        }
    }
}

/// Opens a pidfd of a child that was just started, and reads its identity.
fn adopt(process: &std::process::Child) -> io::Result<(Pid, ProcessIdentity, OwnedFd)> {
    let pid = i32::try_from(process.id()).map_err(io::Error::other)?;
    let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
    Ok((raw, identity_of_child(pid)?, pidfd))
}

/// Tells a missing program from a missing directory: the kernel says ENOENT for both.
fn name_failure(spec: &ChildSpec, source: io::Error) -> SpawnError {
    let program = spec.program.clone();
    if source.kind() != io::ErrorKind::NotFound {
        return SpawnError::Failed { program, source };
    }
    match spec.cwd.metadata() {
        Ok(_) => SpawnError::NotFound { program, source },
        Err(source) => SpawnError::WorkingDirectory { program, cwd: spec.cwd.clone(), source },
    }
}
