//! For tests: the commands of the mini guest. They outlive their streams, as a guest's do.
//!
//! `echo ARGS`, `cat`, `exit N`, `flood N` (counted 8-byte numbers), `drip N` (one byte per message,
//! stdout and stderr in turn), `sleep` (until a signal), `deaf` (never reads its stdin, until a
//! signal), `trap` (prints each signal as a byte, until signal 9), `sizes` (prints the lines and
//! columns of its terminal, now and whenever it is told, until a signal).
//!
//! What the host does wrong about a job is kept in [`MiniJobs::violations`].

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::{SinkExt, StreamExt};
use matchlock_wire::frame::{Codec, FrameError, MAX_CHUNK_BYTES};
use matchlock_wire::message::{
    Bytes, ExecAttach, ExecFailure, ExecFailureKind, ExecInput, ExecOutput, ExecStart, ExitStatus,
    FileOp, FileStart, JOB_WINDOW_BYTES, JobId, OutputStream, TerminalSize,
};
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::sync::watch;
use tokio_util::codec::FramedWrite;

use super::fake_files;
use super::mini_guest::{Inputs, MiniGuest, Stream, counted};

/// The last two are how files are read, listed and written.
const COMMANDS: [&str; 11] =
    ["echo", "cat", "exit", "flood", "drip", "sleep", "deaf", "trap", "sizes", "%print", "%write"];

type Outputs = FramedWrite<WriteHalf<Stream>, Codec<(), ExecOutput>>;

/// What a guest does with the next attachments.
#[derive(Debug, Default)]
pub(super) enum AttachAnswer {
    #[default]
    Honest,
    /// Says this.
    Lie(ExecOutput),
    Silence,
}

/// The jobs of a guest, and what tests want to know of them.
#[derive(Debug, Default)]
pub(super) struct MiniJobs {
    jobs: Mutex<HashMap<JobId, Arc<MiniJob>>>,
    used: Mutex<HashSet<JobId>>,
    failures: Mutex<HashMap<JobId, ExecFailure>>,
    /// The commands that were executed.
    pub(super) executed: AtomicUsize,
    /// The attachments that were asked for.
    pub(super) attached: watch::Sender<usize>,
    pub(super) violations: Mutex<Vec<String>>,
    pub(super) attach_answer: Mutex<AttachAnswer>,
    /// Loses so many requests for a command, unseen.
    pub(super) lose_execs: AtomicUsize,
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    /// Executes commands and does not say so.
    pub(super) mute: Mutex<bool>,
    /// Reads no more of what comes for jobs, after the message that it waits for.
    pub(super) frozen: watch::Sender<bool>,
}

impl MiniJobs {
    /// Forgets the jobs, but not their ids.
    pub(super) fn forget(&self) {
        self.jobs.lock().unwrap().clear();
    }
}

#[derive(Debug, Default)]
struct State {
    attachment: usize,
    released: bool,
    exit: Option<ExitStatus>,
    pieces: VecDeque<(u64, OutputStream, Vec<u8>)>,
    base: u64,
    sent: u64,
    end: u64,
    stdin: Vec<u8>,
    taken: u64,
    stdin_ended: bool,
    signals: VecDeque<i32>,
    has_terminal: bool,
    sizes: VecDeque<TerminalSize>,
}

#[derive(Debug, Default)]
struct MiniJob {
    state: watch::Sender<State>,
}

impl State {
    fn acknowledge(&mut self, offset: u64) {
        self.base = self.base.max(offset);
        let whole = |(at, _, data): &(u64, OutputStream, Vec<u8>)| at + data.len() as u64;
        while self.pieces.front().is_some_and(|piece| whole(piece) <= self.base) {
            self.pieces.pop_front();
        }
    }

    /// Takes a message of the host's; says what is wrong with it.
    fn input(&mut self, input: ExecInput) -> Result<(), String> {
        let received = self.taken + self.stdin.len() as u64;
        match input {
            ExecInput::Stdin { offset, .. } | ExecInput::StdinEof { offset }
                if offset != received =>
            {
                return Err(format!("stdin at {offset}, expected {received}"));
            }
            ExecInput::Stdin { .. } if self.stdin_ended => return Err("after the end".to_owned()),
            ExecInput::Stdin { data, .. } => self.stdin.extend(data),
            ExecInput::StdinEof { .. } => self.stdin_ended = true,
            ExecInput::Signal(signal) => self.signals.push_back(signal),
            ExecInput::Resize(_) if !self.has_terminal => {
                return Err("a size without a terminal".to_owned());
            }
            ExecInput::Resize(size) => self.sizes.push_back(size),
            ExecInput::Ack { offset } if offset > self.sent => {
                return Err(format!("output {offset} acknowledged, {} sent", self.sent));
            }
            ExecInput::Ack { offset } => self.acknowledge(offset),
            ExecInput::Release => self.released = true,
        }
        if self.stdin.len() as u64 > JOB_WINDOW_BYTES {
            return Err("more stdin than the window".to_owned());
        }
        if self.exit.is_some() {
            self.close_stdin();
        }
        Ok(())
    }

    fn close_stdin(&mut self) {
        self.taken += self.stdin.len() as u64;
        self.stdin.clear();
    }

    /// The next message for a stream that has sent so much.
    fn next(&self, stdin_acked: u64, exit_sent: bool) -> Option<ExecOutput> {
        if self.taken > stdin_acked {
            return Some(ExecOutput::StdinAck { offset: self.taken });
        }
        let at = self.pieces.partition_point(|(at, _, data)| at + data.len() as u64 <= self.sent);
        if let Some((at, stream, data)) = self.pieces.get(at) {
            let known = usize::try_from(self.sent - at).expect("small");
            let data = data[known..].to_vec();
            return Some(ExecOutput::Output { stream: *stream, offset: self.sent, data });
        }
        self.exit.filter(|_| !exit_sent).map(ExecOutput::Exited)
    }
}

fn failure(kind: ExecFailureKind, message: String) -> ExecFailure {
    ExecFailure { kind, message }
}

impl MiniGuest {
    pub(super) async fn exec(
        self: Arc<Self>,
        start: ExecStart,
        mut inputs: Inputs,
        writer: WriteHalf<Stream>,
    ) -> Result<(), FrameError> {
        let lose = |left: usize| left.checked_sub(1);
        if self.jobs.lose_execs.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose).is_ok() {
            while inputs.next().await.is_some() {}
            return Ok(());
        }
        let name = start.argv.first().map(|name| String::from_utf8_lossy(&name.0).into_owned());
        let name = name.unwrap_or_default();
        let refused = if !self.jobs.used.lock().unwrap().insert(start.job) {
            Some(failure(ExecFailureKind::Request, "this job id was used before".to_owned()))
        } else if COMMANDS.contains(&name.as_str()) {
            None
        } else {
            let refused = failure(ExecFailureKind::NotFound, format!("{name}: not found"));
            self.jobs.failures.lock().unwrap().insert(start.job, refused.clone());
            Some(refused)
        };
        if let Some(refused) = refused {
            return refuse(refused, inputs, writer).await;
        }
        self.jobs.executed.fetch_add(1, Ordering::SeqCst);
        let job = Arc::new(MiniJob::default());
        if let Some(terminal) = &start.terminal {
            job.state.send_modify(|state| {
                state.has_terminal = true;
                state.sizes.push_back(terminal.size);
            });
        }
        self.jobs.jobs.lock().unwrap().insert(start.job, job.clone());
        self.running.send_modify(|running| *running += 1);
        let files = Arc::clone(&self.jobs.files);
        tokio::spawn(Command { job: job.clone(), files }.run_until_released(start.clone()));
        self.converse(start.job, &job, ExecOutput::Started, inputs, writer).await
    }

    /// A file is read, listed or written by a command.
    pub(super) async fn file(
        self: Arc<Self>,
        start: FileStart,
        inputs: Inputs,
        writer: WriteHalf<Stream>,
    ) -> Result<(), FrameError> {
        let argv: Vec<Bytes> = match start.op {
            FileOp::Write { path, offset, .. } => {
                let offset = offset.map(|offset| offset.to_string()).unwrap_or_default();
                vec!["%write".into(), (*path).into(), (*offset).into()]
            }
            FileOp::Read { path, offset, length } => {
                self.print(matchlock_model::file::FileOp::Read { path, offset, length })
            }
            FileOp::List { path } => self.print(matchlock_model::file::FileOp::List { path }),
        };
        let stdin = true;
        let (job, env) = (start.job, vec![]);
        let start = ExecStart {
            job,
            argv,
            env,
            cwd: None,
            user: None,
            stdin,
            terminal: None,
            stop_signal: None,
        };
        self.exec(start, inputs, writer).await
    }

    fn print(&self, op: matchlock_model::file::FileOp) -> Vec<Bytes> {
        match fake_files::print(&self.jobs.files.lock().unwrap(), &op) {
            Ok(printed) => vec!["%print".into(), Bytes(printed)],
            Err(refusal) => vec![(*refusal.message).into()],
        }
    }

    pub(super) async fn attach(
        self: Arc<Self>,
        attach: ExecAttach,
        mut inputs: Inputs,
        writer: WriteHalf<Stream>,
    ) -> Result<(), FrameError> {
        self.jobs.attached.send_modify(|attached| *attached += 1);
        let lie = match &*self.jobs.attach_answer.lock().unwrap() {
            AttachAnswer::Honest => None,
            AttachAnswer::Lie(lie) => Some(Some(lie.clone())),
            AttachAnswer::Silence => Some(None),
        };
        if let Some(lie) = lie {
            let mut outputs = Outputs::new(writer, Codec::default());
            if let Some(lie) = lie {
                outputs.send(lie).await?;
            }
            while inputs.next().await.is_some() {}
            return Ok(());
        }
        let found = self.jobs.jobs.lock().unwrap().get(&attach.job).cloned();
        let Some(job) = found else {
            let known = self.jobs.failures.lock().unwrap().get(&attach.job).cloned();
            let unknown = || failure(ExecFailureKind::Request, "there is no such job".to_owned());
            return refuse(known.unwrap_or_else(unknown), inputs, writer).await;
        };
        let mut stdin_offset = 0;
        let mut right = true;
        job.state.send_modify(|state| {
            right = (state.base..=state.end).contains(&attach.output_offset);
            state.acknowledge(attach.output_offset);
            state.sent = attach.output_offset;
            state.stdin.clear();
            state.stdin_ended = false;
            stdin_offset = state.taken;
        });
        if !right {
            self.violation(format!("attached at {}", attach.output_offset));
        }
        let greeting = ExecOutput::Attached { stdin_offset };
        self.converse(attach.job, &job, greeting, inputs, writer).await
    }

    fn violation(&self, what: String) {
        self.jobs.violations.lock().unwrap().push(what);
    }

    async fn converse(
        &self,
        id: JobId,
        job: &MiniJob,
        greeting: ExecOutput,
        mut inputs: Inputs,
        writer: WriteHalf<Stream>,
    ) -> Result<(), FrameError> {
        let mut mine = 0;
        job.state.send_modify(|state| {
            state.attachment += 1;
            mine = state.attachment;
        });
        let mut outputs = Outputs::new(writer, Codec::default());
        let mut frozen = self.jobs.frozen.subscribe();
        let receiving = async {
            while let Some(input) = inputs.next().await {
                let input = input?;
                let mut result = Ok(());
                job.state.send_modify(|state| result = state.input(input));
                if let Err(what) = result {
                    self.violation(what);
                    return Err(io::Error::other("a violation").into());
                }
                if job.state.borrow().released {
                    self.release(id, job);
                    return Ok(());
                }
                drop(frozen.wait_for(|frozen| !frozen).await);
            }
            Ok(())
        };
        let mute = *self.jobs.mute.lock().unwrap();
        let sending = async {
            if mute {
                return std::future::pending().await;
            }
            send(job, mine, greeting, &mut outputs).await
        };
        let result = tokio::select! {
            biased;
            result = receiving => result,
            result = sending => result,
        };
        outputs.into_inner().shutdown().await?;
        result
    }

    fn release(&self, id: JobId, job: &MiniJob) {
        if self.jobs.jobs.lock().unwrap().remove(&id).is_some() {
            self.running.send_modify(|running| *running -= 1);
            if job.state.borrow().exit.is_none() {
                self.killed.send_modify(|killed| *killed += 1);
            }
        }
    }

    /// A signal from within the guest, for all commands.
    pub(super) fn signal_all(&self, signal: i32) {
        for job in self.jobs.jobs.lock().unwrap().values() {
            job.state.send_modify(|state| state.signals.push_back(signal));
        }
    }
}

async fn refuse(
    refused: ExecFailure,
    mut inputs: Inputs,
    writer: WriteHalf<Stream>,
) -> Result<(), FrameError> {
    let mut outputs = Outputs::new(writer, Codec::default());
    outputs.send(ExecOutput::Failed(refused)).await?;
    outputs.into_inner().shutdown().await?;
    while inputs.next().await.is_some() {}
    Ok(())
}

/// Sends what there is, until another stream has taken over.
async fn send(
    job: &MiniJob,
    mine: usize,
    greeting: ExecOutput,
    outputs: &mut Outputs,
) -> Result<(), FrameError> {
    let mut stdin_acked = match &greeting {
        ExecOutput::Attached { stdin_offset } => *stdin_offset,
        _ => 0,
    };
    let mut exit_sent = false;
    outputs.send(greeting).await?;
    let mut states = job.state.subscribe();
    loop {
        let message = {
            let ready = |state: &State| {
                state.attachment != mine || state.next(stdin_acked, exit_sent).is_some()
            };
            let state = states.wait_for(|state| ready(state)).await.expect("the job is kept");
            if state.attachment != mine {
                return Ok(());
            }
            state.next(stdin_acked, exit_sent).expect("it was ready")
        };
        match &message {
            ExecOutput::StdinAck { offset } => stdin_acked = *offset,
            ExecOutput::Output { data, .. } => {
                job.state.send_modify(|state| state.sent += data.len() as u64);
            }
            _ => exit_sent = true,
        }
        outputs.send(message).await?;
    }
}

struct Command {
    job: Arc<MiniJob>,
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Command {
    async fn run_until_released(self, start: ExecStart) {
        let mut states = self.job.state.subscribe();
        tokio::select! {
            status = self.run(&start) => self.job.state.send_modify(|state| {
                state.exit = Some(status);
                state.close_stdin();
            }),
            _ = states.wait_for(|state| state.released) => {}
        }
    }

    async fn run(&self, start: &ExecStart) -> ExitStatus {
        let args: Vec<_> =
            start.argv.iter().map(|arg| String::from_utf8_lossy(&arg.0).into_owned()).collect();
        let number = || args[1].parse::<usize>().expect("a number");
        match args[0].as_str() {
            "echo" => {
                let line = format!("{}\n", args[1..].join(" "));
                self.print(OutputStream::Stdout, line.as_bytes()).await;
            }
            "cat" => self.cat().await,
            "%print" => self.print(OutputStream::Stdout, &start.argv[1].0).await,
            "%write" => self.write(&args[1], args[2].parse().ok()).await,
            "exit" => return ExitStatus::Code(u8::try_from(number()).expect("a code")),
            "flood" => {
                for start in (0..number()).step_by(MAX_CHUNK_BYTES) {
                    let end = number().min(start + MAX_CHUNK_BYTES);
                    self.print(OutputStream::Stdout, &counted(start, end)).await;
                }
            }
            "drip" => {
                for index in 0..number() {
                    let stream = [OutputStream::Stdout, OutputStream::Stderr][index % 2];
                    self.print(stream, &counted(index, index + 1)).await;
                }
            }
            "trap" => loop {
                let signal = self.signal().await;
                if signal == 9 {
                    return ExitStatus::Signal(9);
                }
                self.print(OutputStream::Stdout, &[signal]).await;
            },
            "sizes" => return self.sizes().await,
            _ => return ExitStatus::Signal(self.signal().await),
        }
        ExitStatus::Code(0)
    }

    async fn wait(&self, until: impl FnMut(&State) -> bool) {
        let mut states = self.job.state.subscribe();
        drop(states.wait_for(until).await.expect("the job is here"));
    }

    async fn signal(&self) -> u8 {
        self.wait(|state| !state.signals.is_empty()).await;
        let mut signal = None;
        self.job.state.send_modify(|state| signal = state.signals.pop_front());
        u8::try_from(signal.expect("nobody else takes signals")).expect("a signal")
    }

    async fn sizes(&self) -> ExitStatus {
        loop {
            self.wait(|state| !state.sizes.is_empty() || !state.signals.is_empty()).await;
            let mut size = None;
            self.job.state.send_modify(|state| size = state.sizes.pop_front());
            let Some(TerminalSize { rows, cols }) = size else {
                return ExitStatus::Signal(self.signal().await);
            };
            self.print(OutputStream::Stdout, format!("{rows} {cols}\n").as_bytes()).await;
        }
    }

    async fn cat(&self) {
        while let Some(data) = self.read_stdin().await {
            self.print(OutputStream::Stdout, &data).await;
        }
    }

    async fn write(&self, path: &str, offset: Option<u64>) {
        let mut at = fake_files::open(&mut self.files.lock().unwrap(), path, offset);
        while let Some(data) = self.read_stdin().await {
            at = fake_files::write(&mut self.files.lock().unwrap(), path, at, &data);
        }
    }

    /// Some of stdin; `None` at its end.
    async fn read_stdin(&self) -> Option<Vec<u8>> {
        self.wait(|state| !state.stdin.is_empty() || state.stdin_ended).await;
        let mut data = Vec::new();
        let mut over = false;
        self.job.state.send_modify(|state| {
            let count = state.stdin.len().min(10_000);
            data.extend(state.stdin.drain(..count));
            state.taken += count as u64;
            // Without data it may be that the host has begun to send again meanwhile.
            over = count == 0 && state.stdin_ended;
        });
        (!over).then_some(data)
    }

    async fn print(&self, stream: OutputStream, text: &[u8]) {
        for chunk in text.chunks(MAX_CHUNK_BYTES) {
            let len = chunk.len() as u64;
            self.wait(|state| state.end + len - state.base <= JOB_WINDOW_BYTES).await;
            self.job.state.send_modify(|state| {
                state.pieces.push_back((state.end, stream, chunk.to_vec()));
                state.end += len;
            });
        }
    }
}
