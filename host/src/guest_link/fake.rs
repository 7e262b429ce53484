//! A guest in this process that keeps the laws of [`GuestLink`] without a wire, for tests of what
//! is above it. The conformance suite runs on it and on the real link.
//!
//! What a command does is decided by its name ([`FakeConnector::set_command`]). Known from the
//! start: `echo`, `cat`, `exit N`, `flood N`, `sleep` (until a signal), `sizes`. Others are not found.
//! Files are kept in memory ([`super::fake_files`]).
//!
//! # Invariants
//! 1. A session ends when its machine closes the transport, when told to ([`FakeConnector::lose`]),
//!    and when the link is dropped. Commands wait for the next one; their last event is the cause
//!    when there will be none.
//! 2. A command whose receiver is dropped is gone from [`FakeConnector::running`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use matchlock_model::exec::{
    ExecRefusal, ExecRefusalKind, ExecSpec, ExitStatus, OutputStream, TerminalSize,
};
use matchlock_model::file::FileOp;
use matchlock_model::guest::{AgentInfo, GuestConfig};
use matchlock_model::identity::ProcessIdentity;
use matchlock_wire::frame::MAX_CHUNK_BYTES;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::codec;
use super::driver::Ending;
use super::fake_files;
use super::{ExecEvent, ExecSession, GuestLink, LinkConnector, LinkError, StdinInput};
use crate::hypervisor::Machine;

/// How a fake guest takes a connection.
#[derive(Debug, Clone)]
pub enum FakeReadiness {
    /// It answers.
    Ready,
    /// Connecting fails.
    Fails(LinkError),
    /// Connecting fails, once.
    FailsOnce(LinkError),
    /// The hypervisor is killed meanwhile, once.
    KilledOnce,
    /// It never answers: connecting lasts until its deadline.
    Never,
}

/// What a command of a fake guest does.
#[derive(Debug, Clone)]
pub enum FakeCommand {
    /// Prints its arguments and a newline.
    Echo,
    /// Copies stdin to stdout.
    Cat,
    /// Exits with its argument.
    Exit,
    /// Prints as many zero bytes as its argument says.
    Flood,
    /// Runs until it gets a signal and dies of it.
    UntilSignal,
    /// Prints the lines and columns of its terminal, now and when they change, until a signal.
    Sizes,
    /// Prints this and ends.
    Print(Bytes, ExitStatus),
    /// Writes its stdin to this file, from this offset on.
    Write(String, Option<u64>),
    /// Cannot be started.
    Refuse(ExecRefusal),
}

/// How often a hung guest sees whether it is back.
const HUNG_POLL: Duration = Duration::from_millis(5);

/// What happened when a guest was asked to shut down.
type OnShutdown = Box<dyn Fn(&ProcessIdentity) + Send + Sync>;

struct Guest {
    script: Mutex<Script>,
    on_shutdown: Mutex<Option<OnShutdown>>,
    running: AtomicUsize,
}

struct Script {
    readiness: FakeReadiness,
    commands: HashMap<Vec<u8>, FakeCommand>,
    configured: Vec<GuestConfig>,
    executed: Vec<ExecSpec>,
    shutdowns: Vec<Duration>,
    links: Vec<Arc<Ending>>,
    hung: bool,
    files: BTreeMap<String, Vec<u8>>,
}

/// Connects to fake guests. Clones share everything.
#[derive(Clone)]
pub struct FakeConnector {
    guest: Arc<Guest>,
}

impl fmt::Debug for FakeConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeConnector").field("running", &self.running()).finish_non_exhaustive()
    }
}

impl Default for FakeConnector {
    fn default() -> Self {
        let commands = [
            ("echo", FakeCommand::Echo),
            ("cat", FakeCommand::Cat),
            ("exit", FakeCommand::Exit),
            ("flood", FakeCommand::Flood),
            ("sleep", FakeCommand::UntilSignal),
            ("sizes", FakeCommand::Sizes),
        ];
        let script = Script {
            readiness: FakeReadiness::Ready,
            commands: commands.map(|(name, does)| (name.into(), does)).into(),
            configured: Vec::new(),
            executed: Vec::new(),
            shutdowns: Vec::new(),
            links: Vec::new(),
            hung: false,
            files: BTreeMap::new(),
        };
        Self {
            guest: Arc::new(Guest {
                script: Mutex::new(script),
                on_shutdown: Mutex::new(None),
                running: AtomicUsize::new(0),
            }),
        }
    }
}

impl FakeConnector {
    /// How the next connections are taken.
    pub fn set_readiness(&self, readiness: FakeReadiness) {
        self.guest.script().readiness = readiness;
    }

    /// What the command of this name does from now on.
    pub fn set_command(&self, name: &str, does: FakeCommand) {
        self.guest.script().commands.insert(name.into(), does);
    }

    /// What is called when a guest is asked to shut down, with its machine's identity: a fake
    /// hypervisor powers the machine off here.
    pub fn on_shutdown(&self, call: impl Fn(&ProcessIdentity) + Send + Sync + 'static) {
        *lock(&self.guest.on_shutdown) = Some(Box::new(call));
    }

    /// Whether guests answer no ping from now on.
    pub fn set_hung(&self, hung: bool) {
        self.guest.script().hung = hung;
    }

    /// Ends all sessions.
    pub fn lose(&self, cause: &LinkError) {
        for link in self.guest.script().links.drain(..) {
            link.end(cause.clone());
        }
    }

    /// All configurations so far.
    #[must_use]
    pub fn configured(&self) -> Vec<GuestConfig> {
        self.guest.script().configured.clone()
    }

    /// All commands so far.
    #[must_use]
    pub fn executed(&self) -> Vec<ExecSpec> {
        self.guest.script().executed.clone()
    }

    /// The graces of all shutdowns so far.
    #[must_use]
    pub fn shutdowns(&self) -> Vec<Duration> {
        self.guest.script().shutdowns.clone()
    }

    /// How many commands run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.guest.running.load(Ordering::SeqCst)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    fn script(&self) -> MutexGuard<'_, Script> {
        lock(&self.script)
    }

    async fn begin_session(
        &self,
        machine: &dyn Machine,
        deadline: Duration,
        given_up: &CancellationToken,
    ) -> Result<Arc<Ending>, LinkError> {
        let transport = machine
            .open_link()
            .await
            .map_err(|error| LinkError::Lost { cause: codec::with_sources(&error) })?;
        let readiness = self.script().readiness.clone();
        match readiness {
            FakeReadiness::Ready => {}
            FakeReadiness::Fails(error) => return Err(error),
            FakeReadiness::FailsOnce(error) => {
                self.script().readiness = FakeReadiness::Ready;
                return Err(error);
            }
            FakeReadiness::KilledOnce => {
                self.script().readiness = FakeReadiness::Ready;
                let killed = machine.kill(deadline).await;
                let cause = killed.map_or_else(|error| error.to_string(), |()| "killed".to_owned());
                return Err(LinkError::Lost { cause });
            }
            FakeReadiness::Never => {
                tokio::time::sleep(deadline).await;
                return Err(LinkError::Timeout { what: "the handshake", waited: deadline });
            }
        }
        let ending = Arc::new(Ending::new());
        self.script().links.push(ending.clone());
        tokio::spawn(watch_transport(transport, ending.clone(), given_up.clone()));
        Ok(ending)
    }
}

#[async_trait]
impl LinkConnector for FakeConnector {
    async fn connect(
        &self,
        machine: &dyn Machine,
        deadline: Duration,
    ) -> Result<Arc<dyn GuestLink>, LinkError> {
        let given_up = CancellationToken::new();
        let session = self.guest.begin_session(machine, deadline, &given_up).await?;
        Ok(Arc::new(FakeLink {
            guest: self.guest.clone(),
            agent: AgentInfo {
                agent_version: "0.0.0-fake".to_owned(),
                kernel_release: "0.0.0-fake".to_owned(),
                init_started_us: 1,
                agent_ready_us: 2,
            },
            machine: machine.identity(),
            session: watch::Sender::new(session),
            terminate: CancellationToken::new(),
            _dropped: given_up.clone().drop_guard(),
            given_up,
        }))
    }

    async fn held(&self, machine: &dyn Machine, _deadline: Duration) -> Result<(), LinkError> {
        on_hold(machine).await
    }

    async fn resume(&self, machine: &dyn Machine, _deadline: Duration) -> Result<(), LinkError> {
        on_hold(machine).await
    }
}

/// A guest is on hold at once, and goes on at once, unless its machine has ended.
async fn on_hold(machine: &dyn Machine) -> Result<(), LinkError> {
    let opened = machine.open_link().await;
    opened.map(drop).map_err(|error| LinkError::Lost { cause: error.to_string() })
}

/// Ends the link with its transport or its handle.
async fn watch_transport(
    mut transport: UnixStream,
    ending: Arc<Ending>,
    dropped: CancellationToken,
) {
    let mut scrap = [0; 64];
    let closed = async { while let Ok(1..) = transport.read(&mut scrap).await {} };
    let cause = tokio::select! {
        () = closed => "the machine closed the connection",
        () = dropped.cancelled() => "this side has closed it",
        _ = ending.ended() => return,
    };
    ending.end(LinkError::Lost { cause: cause.to_owned() });
}

struct FakeLink {
    guest: Arc<Guest>,
    agent: AgentInfo,
    machine: ProcessIdentity,
    /// The session's end; replaced by the next session.
    session: watch::Sender<Arc<Ending>>,
    /// Cancelled when there will be no other session.
    given_up: CancellationToken,
    /// Cancelled at shutdown: commands get SIGTERM.
    terminate: CancellationToken,
    _dropped: DropGuard,
}

impl FakeLink {
    fn alive(&self) -> Result<(), LinkError> {
        self.session.borrow().now().map_or(Ok(()), Err)
    }

    fn start(
        &self,
        does: FakeCommand,
        args: Vec<Vec<u8>>,
        has_stdin: bool,
        terminal: Option<TerminalSize>,
    ) -> ExecSession {
        let (stdin, stdin_receiver) = mpsc::channel(4);
        let (signals, signal_receiver) = mpsc::channel(16);
        let (event_sender, events) = mpsc::channel(4);
        let size = watch::Sender::new(terminal.unwrap_or_default());
        let command = Command {
            args,
            stdin: has_stdin.then_some(stdin_receiver),
            signals: signal_receiver,
            sizes: terminal.map(|_| size.subscribe()),
            terminate: self.terminate.clone(),
            events: event_sender,
        };
        let ended = last_end(self.session.subscribe(), self.given_up.clone());
        tokio::spawn(command.run(does, ended, self.guest.clone()));
        ExecSession { stdin, signals, size, events }
    }
}

#[async_trait]
impl GuestLink for FakeLink {
    fn agent(&self) -> &AgentInfo {
        &self.agent
    }

    async fn configure(&self, config: &GuestConfig) -> Result<(), LinkError> {
        self.alive()?;
        self.guest.script().configured.push(config.clone());
        Ok(())
    }

    async fn file(&self, op: &FileOp) -> Result<ExecSession, LinkError> {
        self.alive()?;
        let does = match op {
            FileOp::Write { path, offset, .. } => FakeCommand::Write(path.clone(), *offset),
            op => match fake_files::print(&self.guest.script().files, op) {
                Ok(printed) => FakeCommand::Print(printed.into(), ExitStatus::Code(0)),
                Err(refusal) => FakeCommand::Refuse(refusal),
            },
        };
        let stdin = matches!(op, FileOp::Write { .. });
        Ok(self.start(does, Vec::new(), stdin, None))
    }

    async fn exec(&self, spec: &ExecSpec) -> Result<ExecSession, LinkError> {
        self.alive()?;
        let name = spec.argv.first().cloned().unwrap_or_default();
        let does = {
            let mut script = self.guest.script();
            script.executed.push(spec.clone());
            script.commands.get(&name).cloned()
        };
        let does = does.unwrap_or_else(|| {
            let message = format!("{}: not found", String::from_utf8_lossy(&name));
            FakeCommand::Refuse(ExecRefusal { kind: ExecRefusalKind::NotFound, message })
        });
        let args = spec.argv.get(1..).unwrap_or_default().to_vec();
        let size = spec.terminal.as_ref().map(|terminal| terminal.size);
        Ok(self.start(does, args, spec.stdin, size))
    }

    async fn shutdown(&self, grace: Duration) -> Result<(), LinkError> {
        self.alive()?;
        self.guest.script().shutdowns.push(grace);
        self.terminate.cancel();
        if let Some(call) = &*lock(&self.guest.on_shutdown) {
            call(&self.machine);
        }
        Ok(())
    }

    async fn ping(&self) -> Result<(), LinkError> {
        self.alive()?;
        let back = async {
            while self.guest.script().hung {
                tokio::time::sleep(HUNG_POLL).await;
            }
        };
        tokio::select! {
            lost = self.closed() => Err(lost),
            () = back => Ok(()),
        }
    }

    async fn closed(&self) -> LinkError {
        let session = self.session.borrow().clone();
        session.ended().await
    }

    async fn reconnect(&self, machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        let last = self.session.borrow().clone();
        if let Some(cause @ LinkError::Protocol { .. }) = last.now() {
            return Err(cause);
        }
        if self.given_up.is_cancelled() {
            return Err(last.end(LinkError::Lost { cause: "it was given up".to_owned() }));
        }
        let session = self.guest.begin_session(machine, deadline, &self.given_up).await?;
        self.session.send_replace(session);
        Ok(())
    }

    fn give_up(&self) {
        self.given_up.cancel();
    }
}

/// Waits until a session has ended after which there will be none.
async fn last_end(
    mut session: watch::Receiver<Arc<Ending>>,
    given_up: CancellationToken,
) -> LinkError {
    loop {
        let ending = session.borrow_and_update().clone();
        let cause = ending.ended().await;
        if matches!(cause, LinkError::Protocol { .. }) {
            return cause;
        }
        let goes_on = tokio::select! {
            () = given_up.cancelled() => false,
            changed = session.changed() => changed.is_ok(),
        };
        if !goes_on {
            return cause;
        }
    }
}

struct Command {
    args: Vec<Vec<u8>>,
    stdin: Option<mpsc::Receiver<StdinInput>>,
    signals: mpsc::Receiver<i32>,
    sizes: Option<watch::Receiver<TerminalSize>>,
    terminate: CancellationToken,
    events: mpsc::Sender<Result<ExecEvent, LinkError>>,
}

/// The receiver of the events is gone.
struct Gone;

impl Command {
    async fn run(
        mut self,
        does: FakeCommand,
        ended: impl Future<Output = LinkError>,
        guest: Arc<Guest>,
    ) {
        guest.running.fetch_add(1, Ordering::SeqCst);
        let events = self.events.clone();
        let last = tokio::select! {
            last = self.act(does, &guest) => last.map(Ok),
            cause = ended => Ok(Err(cause)),
            () = events.closed() => Err(Gone),
        };
        drop(self);
        if let Ok(last) = last
            && events.send(last).await.is_err()
        {
            tracing::trace!("a fake command's receiver has left before its last event");
        }
        guest.running.fetch_sub(1, Ordering::SeqCst);
    }

    /// Does what the command does; returns its last event.
    async fn act(&mut self, does: FakeCommand, guest: &Guest) -> Result<ExecEvent, Gone> {
        if let FakeCommand::Refuse(refusal) = does {
            return Ok(ExecEvent::Refused(refusal));
        }
        self.tell(ExecEvent::Started).await?;
        let status = match does {
            FakeCommand::Echo => {
                let mut line = self.args.join(&b' ');
                line.push(b'\n');
                self.print(line.into()).await?;
                ExitStatus::Code(0)
            }
            FakeCommand::Cat => self.cat().await?,
            FakeCommand::Exit => ExitStatus::Code(self.number().unwrap_or(0)),
            FakeCommand::Flood => {
                self.print(vec![0; self.number().unwrap_or(0)].into()).await?;
                ExitStatus::Code(0)
            }
            FakeCommand::UntilSignal => tokio::select! {
                Some(signal) = self.signals.recv() => died_of(signal),
                () = self.terminate.cancelled() => died_of(15),
            },
            FakeCommand::Sizes => self.sizes().await?,
            FakeCommand::Print(text, status) => {
                self.print(text).await?;
                status
            }
            FakeCommand::Write(path, offset) => self.write(path, offset, guest).await,
            FakeCommand::Refuse(refusal) => return Ok(ExecEvent::Refused(refusal)),
        };
        Ok(ExecEvent::Exited(status))
    }

    async fn write(&mut self, path: String, offset: Option<u64>, guest: &Guest) -> ExitStatus {
        let mut at = fake_files::open(&mut guest.script().files, &path, offset);
        let Some(mut stdin) = self.stdin.take() else { return ExitStatus::Code(1) };
        loop {
            match stdin.recv().await {
                Some(StdinInput::Data(data)) => {
                    at = fake_files::write(&mut guest.script().files, &path, at, &data);
                }
                Some(StdinInput::Eof) | None => return ExitStatus::Code(0),
            }
        }
    }

    async fn cat(&mut self) -> Result<ExitStatus, Gone> {
        let Some(mut stdin) = self.stdin.take() else {
            return Ok(ExitStatus::Code(0));
        };
        loop {
            tokio::select! {
                biased;
                Some(signal) = self.signals.recv() => return Ok(died_of(signal)),
                () = self.terminate.cancelled() => return Ok(died_of(15)),
                input = stdin.recv() => match input {
                    Some(StdinInput::Data(data)) => self.print(data).await?,
                    Some(StdinInput::Eof) | None => return Ok(ExitStatus::Code(0)),
                },
            }
        }
    }

    async fn sizes(&mut self) -> Result<ExitStatus, Gone> {
        let Some(mut sizes) = self.sizes.take() else {
            return Ok(ExitStatus::Code(1));
        };
        loop {
            let TerminalSize { rows, cols } = *sizes.borrow_and_update();
            self.print(format!("{rows} {cols}\n").into()).await?;
            let changed = async {
                if sizes.changed().await.is_err() {
                    std::future::pending().await
                }
            };
            tokio::select! {
                Some(signal) = self.signals.recv() => return Ok(died_of(signal)),
                () = self.terminate.cancelled() => return Ok(died_of(15)),
                () = changed => {}
            }
        }
    }

    fn number<T: std::str::FromStr>(&self) -> Option<T> {
        std::str::from_utf8(self.args.first()?).ok()?.parse().ok()
    }

    async fn print(&self, mut text: Bytes) -> Result<(), Gone> {
        while !text.is_empty() {
            let chunk = text.split_to(text.len().min(MAX_CHUNK_BYTES));
            self.tell(ExecEvent::Output(OutputStream::Stdout, chunk)).await?;
        }
        Ok(())
    }

    async fn tell(&self, event: ExecEvent) -> Result<(), Gone> {
        self.events.send(Ok(event)).await.map_err(|_| Gone)
    }
}

fn died_of(signal: i32) -> ExitStatus {
    ExitStatus::Signal(u8::try_from(signal).unwrap_or(u8::MAX))
}
