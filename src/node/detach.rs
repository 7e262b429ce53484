//! `run -d`: the VM's owner as a process of its own, which outlives the one that was asked.
//!
//! ```text
//!  run -d (asks)                         the same program, same arguments (owns)
//!    │ spawn: stdin = socket, stdout = /dev/null, stderr = pipe   │
//!    │──────────────────────────────────────────────────────────► │ a session of its own
//!    │ ◄───────────────────────── what it says on stderr ──────── │ boots the VM
//!    │ SIGINT, SIGTERM, SIGHUP ──────────────────────────────────►│
//!    │                                                            │ the command has started:
//!    │ ◄───────────────────────── the VM's id, on the socket ──── │ stderr = logs/owner.log
//!    ▼ prints the id, exits 0                                     ▼ as `run --rm=false`
//! ```
//!
//! # Invariants
//! 1. The id is told only once the command runs. What fails before is said, in the owner's own words
//!    and with its exit code, by the process that was asked.
//! 2. Until then the owner ends with that process: an id that nobody has read is no use to anybody.
//!    The end of the socket is a SIGHUP to the owner, which takes its VM down as for any other.
//! 3. The owner runs the very image that whoever asked has found or pulled: it looks up no name.
//! 4. From then on the owner needs nothing of it: no descriptor, no terminal, no session.
//!
//! # When things go wrong
//! * **The asking process is killed** before the id: the owner gets its SIGHUP and cleans up.
//! * **The owner is killed** before the id: the socket ends; its VM is left to the kernel and to
//!   `matchlock gc`, as after any SIGKILL, and whoever asked is told so.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use matchlock_host::guest_link::{ExecEvent, ExecSession};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use rustix::process::{Pid, Signal, getpid, kill_process, setsid};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::images::Chosen;
use super::signals::{Interrupt, Interrupts};
use super::stderr;

/// Tells the owner's process what it is. Hypervisors get an environment of their own.
const VARIABLE: &str = "MATCHLOCK_DETACHED";

/// Tells the owner's process which image it is to run; see [`Chosen`](super::images::Chosen).
pub const IMAGE_VARIABLE: &str = "MATCHLOCK_DETACHED_IMAGE";

/// The owner's name in lists of processes.
const NAME: &str = "matchlock";

/// How much of an owner's words a session passes on.
const WORDS_BYTES: u64 = 4096;

/// The longest line that an owner sends: a VM's id.
const ID_BYTES: u64 = 64;

/// How long the owner's words wait for a reader of our stderr that is busy.
const STDERR_WAIT: Duration = Duration::from_secs(2);

/// What became of the owner.
#[derive(Debug)]
pub enum Detached {
    /// Its VM's command runs.
    Started(VmId),
    /// It has ended before that, and said why.
    Ended(ExitStatus),
}

fn failed(doing: &str) -> impl Fn(io::Error) -> Failure + '_ {
    move |error| Failure::from_error(FailureKind::Host, &error).context(doing)
}

/// Starts the program as an owner; our end of the socket.
fn spawn(
    arguments: impl IntoIterator<Item = OsString>,
    prepare: impl FnOnce(&mut Command),
) -> io::Result<(UnixStream, Child)> {
    let (ours, its) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let ours = UnixStream::from_std(ours)?;
    let name = std::env::args_os().next().unwrap_or_else(|| "matchlock".into());
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(name)
        .args(arguments)
        .env(VARIABLE, "1")
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    prepare(&mut command);
    Ok((ours, command.spawn()?))
}

/// Starts an owner with these arguments of the program, for a session: no signal is passed on, and
/// dropping this before its answer takes the owner down, as the end of whoever asked does.
///
/// # Errors
/// When it could not be started, and in its own words when it has ended before its VM was up.
pub async fn start_for_session(
    arguments: Vec<OsString>,
    prepare: impl FnOnce(&mut Command),
) -> Result<VmId, Failure> {
    let starting = failed("could not start the VM's owner");
    let (ours, mut owner) = spawn(arguments, prepare).map_err(&starting)?;
    let mut words = owner.stderr.take();
    let listening = tokio::spawn(async move {
        let mut said = Vec::new();
        if let Some(words) = &mut words {
            words.take(WORDS_BYTES).read_to_end(&mut said).await?;
        }
        io::Result::Ok(String::from_utf8_lossy(&said).trim().to_owned())
    });
    let told = read_id(ours).await.map_err(failed("lost the VM's owner"))?;
    if !told.is_empty() {
        // Its own words go to its log by now.
        listening.abort();
        let id = told.trim_end().parse();
        // Nobody but init is left to wait for it; until then this process is.
        tokio::spawn(async move { owner.wait().await });
        return id.map_err(|e| Failure::from_error(FailureKind::Internal, &e));
    }
    let status = owner.wait().await.map_err(&starting)?;
    let said = listening.await.map_err(|e| Failure::from_error(FailureKind::Internal, &e))?;
    let said = said.map_err(&starting)?;
    let said = said.strip_prefix("matchlock: ").unwrap_or(&said);
    let text =
        if said.is_empty() { format!("the VM's owner ended: {status}") } else { said.into() };
    Err(Failure::new(FailureKind::Host, text))
}

/// Starts an owner of a VM of this image with our own arguments, and waits until its command runs or it has ended.
///
/// # Errors
/// When it could not be started, or answered something else.
pub async fn start(image: &Chosen, interrupts: &mut Interrupts) -> Result<Detached, Failure> {
    let starting = failed("could not start the VM's owner");
    let (ours, mut owner) = spawn(std::env::args_os().skip(1), |command| {
        command.env(IMAGE_VARIABLE, image.to_string());
    })
    .map_err(&starting)?;
    let repeating = tokio::spawn(repeat(owner.stderr.take()));
    let (told, is_ending) =
        wait_for_id(ours, &owner, interrupts).await.map_err(failed("lost the VM's owner"))?;
    // A signal that it got beside telling its id ends the VM all the same.
    if told.is_empty() || is_ending {
        let status = wait_for_end(&mut owner, interrupts).await.map_err(&starting)?;
        repeating.await.map_err(|e| Failure::from_error(FailureKind::Internal, &e))?;
        return Ok(Detached::Ended(status));
    }
    repeating.abort();
    let id = told.trim_end().parse();
    id.map(Detached::Started).map_err(|e| Failure::from_error(FailureKind::Internal, &e))
}

/// Repeats what the owner says as ours, until it says no more here.
async fn repeat(words: Option<ChildStderr>) {
    let Some(mut words) = words else { return };
    let mut chunk = [0; 4096];
    while let Ok(read) = words.read(&mut chunk).await {
        if read == 0 {
            return;
        }
        stderr::write(&String::from_utf8_lossy(&chunk[..read]), STDERR_WAIT);
    }
}

/// The line that the owner sends, empty if it closed the socket instead; and whether a signal was passed
/// on to it meanwhile.
async fn wait_for_id(
    socket: UnixStream,
    owner: &Child,
    interrupts: &mut Interrupts,
) -> io::Result<(String, bool)> {
    let mut reading = std::pin::pin!(read_id(socket));
    let mut is_ending = false;
    loop {
        tokio::select! {
            read = &mut reading => return Ok((read?, is_ending)),
            which = interrupts.next() => {
                forward(owner, which);
                is_ending = true;
            }
        }
    }
}

async fn read_id(socket: UnixStream) -> io::Result<String> {
    let mut line = String::new();
    match BufReader::new(socket).take(ID_BYTES).read_line(&mut line).await {
        // Its end was closed with bytes of ours unread, or it was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(String::new()),
        Err(error) => Err(error),
        Ok(_) => Ok(line),
    }
}

async fn wait_for_end(owner: &mut Child, interrupts: &mut Interrupts) -> io::Result<ExitStatus> {
    loop {
        let which = tokio::select! {
            status = owner.wait() => return status,
            which = interrupts.next() => which,
        };
        forward(owner, which);
    }
}

/// Passes a signal on. The owner is our child and not waited for yet: its pid is its own.
fn forward(owner: &Child, which: Interrupt) {
    let pid = owner.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    let Some(pid) = pid else { return };
    let signal = match which {
        Interrupt::Hangup => Signal::HUP,
        Interrupt::Interrupt => Signal::INT,
        Interrupt::Quit => Signal::QUIT,
        Interrupt::Terminate => Signal::TERM,
    };
    if let Err(error) = kill_process(pid, signal) {
        tracing::warn!(%error, "a signal did not reach the VM's owner");
    }
}

/// The exit code of an owner that ended before its command ran; an error when it was killed. A signal
/// that was passed on may have come before its handlers were there, and so before anything was made.
///
/// # Errors
/// When another signal ended it.
pub fn exit_code(status: ExitStatus, passed_on: Option<Interrupt>) -> Result<u8, Failure> {
    let ended_by = |which: &Interrupt| status.signal() == Some(which.number().into());
    match (status.code().and_then(|code| u8::try_from(code).ok()), passed_on.filter(ended_by)) {
        (Some(code), _) => Ok(code),
        (None, Some(which)) => Ok(which.exit_code()),
        (None, None) => {
            let text = format!(
                "the VM's owner was killed by signal {}; run `matchlock gc`",
                status.signal().unwrap_or_default()
            );
            Err(Failure::new(FailureKind::Host, text))
        }
    }
}

/// The owner's end of the socket.
#[derive(Debug)]
pub struct Asker {
    socket: StdUnixStream,
    image: Option<Chosen>,
    /// Ends the watch over the one who asked.
    told: CancellationToken,
}

impl Asker {
    /// Leaves the session of whoever asked and watches over them; `None` in a process that nobody
    /// started for this.
    ///
    /// # Errors
    /// When stdin is not the socket, or a session of our own cannot be had.
    pub fn of_this_process() -> Result<Option<Self>, Failure> {
        if std::env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        let detaching = failed("could not detach");
        // Started from /proc/self/exe, it would be called `exe` in every list of processes.
        std::fs::write("/proc/self/comm", NAME).map_err(&detaching)?;
        setsid().map_err(|e| detaching(e.into()))?;
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(&detaching)?;
        let nothing = OpenOptions::new().read(true).open("/dev/null").map_err(&detaching)?;
        rustix::stdio::dup2_stdin(&nothing).map_err(|e| detaching(e.into()))?;
        let socket = StdUnixStream::from(stdin);
        let watched = socket.try_clone().map_err(&detaching)?;
        watched.set_nonblocking(true).map_err(&detaching)?;
        let watched = UnixStream::from_std(watched).map_err(&detaching)?;
        let told = CancellationToken::new();
        tokio::spawn(watch(watched, told.clone()));
        let image = std::env::var(IMAGE_VARIABLE).ok();
        let image = image.map(|text| text.parse()).transpose()?;
        Ok(Some(Self { socket, image, told }))
    }

    /// The image that they have found, or pulled.
    #[must_use]
    pub const fn image(&self) -> Option<&Chosen> {
        self.image.as_ref()
    }

    /// Cancelled once the id is told.
    #[must_use]
    pub fn told(&self) -> CancellationToken {
        self.told.clone()
    }

    /// Tells the id, and needs nobody any more: from now on our own words go to `log`.
    ///
    /// # Errors
    /// When the log cannot be written, or nobody is there to read the id.
    pub async fn tell(self, id: VmId, log: &Path) -> Result<(), Failure> {
        let doing = format!("could not write {}", log.display());
        keep_words(log).map_err(failed(&doing))?;
        self.told.cancel();
        let telling = failed("could not tell the VM's id");
        let mut socket = UnixStream::from_std(self.socket).map_err(&telling)?;
        socket.write_all(format!("{id}\n").as_bytes()).await.map_err(&telling)
    }
}

/// The same session; once its command has started, the id is told.
#[must_use]
pub fn tell_when_started(
    session: ExecSession,
    asker: Asker,
    id: VmId,
    log: PathBuf,
) -> ExecSession {
    when_started(session, async move {
        if let Err(failure) = asker.tell(id, &log).await {
            tracing::error!(vm_id = %id, %failure, "nobody knows of this VM: it is taken down");
            hang_up();
        }
    })
}

/// The same session; once its command has started, this is done before anybody hears of it.
#[must_use]
pub fn when_started(
    session: ExecSession,
    then: impl Future<Output = ()> + Send + 'static,
) -> ExecSession {
    let ExecSession { stdin, signals, size, events: mut happening } = session;
    let (happened, events) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut then = Some(then);
        loop {
            let event = tokio::select! {
                // Nobody follows the command any more: dropping its events releases it.
                () = happened.closed() => return,
                event = happening.recv() => event,
            };
            let Some(event) = event else { return };
            if matches!(event, Ok(ExecEvent::Started))
                && let Some(then) = then.take()
            {
                then.await;
            }
            if happened.send(event).await.is_err() {
                return;
            }
        }
    });
    ExecSession { stdin, signals, size, events }
}

/// Interrupts ourselves when whoever asked has gone before the id was told.
async fn watch(mut socket: UnixStream, told: CancellationToken) {
    let mut nothing = [0; 1];
    tokio::select! {
        biased;
        () = told.cancelled() => return,
        // They never write.
        _end = socket.read(&mut nothing) => {}
    }
    tracing::debug!("whoever asked for this VM has gone");
    hang_up();
}

/// Ends this process as a hang-up would.
fn hang_up() {
    if let Err(error) = kill_process(getpid(), Signal::HUP) {
        tracing::error!(%error, "could not interrupt this process");
    }
}

fn keep_words(log: &Path) -> io::Result<()> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    rustix::stdio::dup2_stderr(&file)?;
    Ok(())
}
