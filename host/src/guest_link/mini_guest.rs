//! For tests: a small agent over the real wire, and a machine whose link leads to it.
//!
//! Its commands: `echo ARGS`, `cat`, `exit N`, `flood N` (counted 8-byte numbers), `drip N` (one
//! byte per message, stdout and stderr in turn), `sleep` (until a signal), `deaf` (never reads
//! its stdin, until a signal).

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{io, sync::Arc};

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::{SinkExt, StreamExt};
use matchlock_model::identity::ProcessIdentity;
use matchlock_wire::frame::{Codec, FrameError, MAX_CHUNK_BYTES};
use matchlock_wire::message::{
    AgentInfo, Configure, ExecFailure, ExecFailureKind, ExecInput, ExecOutput, ExecStart,
    ExitStatus, JOB_WINDOW_BYTES, OutputStream, Reply, Request,
};
use matchlock_wire::resync::{self, Hunter};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::codec::{FramedRead, FramedWrite};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use crate::hypervisor::{ExitReason, HypervisorError, Machine, MachineExit};

type Serve = dyn Fn(UnixStream) -> BoxFuture<'static, ()> + Send + Sync;

/// A machine whose link is served by a function; each `open_link` starts it anew.
pub(super) struct TestMachine {
    serve: Box<Serve>,
    tasks: Mutex<Vec<tokio::task::AbortHandle>>,
}

impl TestMachine {
    pub(super) fn new<F>(serve: impl Fn(UnixStream) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self { serve: Box::new(move |stream| Box::pin(serve(stream))), tasks: Mutex::default() }
    }

    /// A machine with a mini guest.
    pub(super) fn with_guest() -> (Self, Arc<MiniGuest>) {
        let guest = Arc::new(MiniGuest::default());
        let served = guest.clone();
        (Self::new(move |stream| served.clone().serve(stream)), guest)
    }

    /// The machine's end: its links close.
    pub(super) fn end(&self) {
        for task in self.tasks.lock().unwrap().drain(..) {
            task.abort();
        }
    }
}

#[async_trait]
impl Machine for TestMachine {
    fn identity(&self) -> ProcessIdentity {
        ProcessIdentity { pid: 1, start_ticks: 1, boot_id: "test".to_owned() }
    }

    async fn open_link(&self) -> Result<UnixStream, HypervisorError> {
        let (host, guest) = UnixStream::pair().expect("a socket pair");
        let task = tokio::spawn((self.serve)(guest));
        self.tasks.lock().unwrap().push(task.abort_handle());
        Ok(host)
    }

    async fn wait_exit(&self) -> MachineExit {
        MachineExit { reason: ExitReason::Killed, status: String::new() }
    }

    async fn kill(&self, _deadline: Duration) -> Result<(), HypervisorError> {
        self.end();
        Ok(())
    }

    fn console_tail(&self, _max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        Ok(Vec::new())
    }
}

/// Takes the host's hello and acknowledges it.
pub(super) async fn answer_hello(stream: UnixStream) -> BufReader<UnixStream> {
    let mut stream = BufReader::new(stream);
    let mut hunter = Hunter::for_hello();
    let nonce = loop {
        let byte = stream.read_u8().await.expect("a hello");
        if let (_, Some(greeting)) = hunter.feed(&[byte]) {
            break greeting.nonce;
        }
    };
    stream.write_all(&resync::acknowledgement(&nonce)).await.expect("an acknowledgement");
    stream
}

/// What the agent was told, and what it does.
#[derive(Debug, Default)]
pub(super) struct MiniGuest {
    pub(super) configured: Mutex<Vec<Configure>>,
    pub(super) shutdowns: AtomicUsize,
    /// Commands that run.
    pub(super) running: watch::Sender<usize>,
    /// Connections that are served.
    pub(super) sessions: AtomicUsize,
    pub(super) ended: Notify,
    /// Commands that were released before their end.
    pub(super) killed: watch::Sender<usize>,
}

type Stream = Compat<yamux::Stream>;
type Inputs = FramedRead<ReadHalf<Stream>, Codec<ExecInput, ()>>;

impl MiniGuest {
    /// Serves one connection until it ends.
    pub(super) async fn serve(self: Arc<Self>, stream: UnixStream) {
        self.session(answer_hello(stream).await).await;
    }

    /// Serves a connection after its handshake.
    pub(super) async fn session(self: Arc<Self>, stream: BufReader<UnixStream>) {
        self.sessions.fetch_add(1, Ordering::SeqCst);
        let mut config = yamux::Config::default();
        config.set_max_num_streams(64).set_max_connection_receive_window(Some(64 * 256 * 1024));
        let mut session = yamux::Connection::new(stream.compat(), config, yamux::Mode::Server);
        let mut streams = tokio::task::JoinSet::new();
        while let Some(Ok(stream)) = std::future::poll_fn(|cx| session.poll_next_inbound(cx)).await
        {
            let guest = self.clone();
            streams.spawn(async move {
                if let Err(error) = guest.stream(stream.compat()).await {
                    tracing::trace!(%error, "mini guest: stream ended");
                }
            });
        }
        self.sessions.fetch_sub(1, Ordering::SeqCst);
        self.ended.notify_one();
    }

    async fn stream(self: Arc<Self>, stream: Stream) -> Result<(), FrameError> {
        let (reader, writer) = tokio::io::split(stream);
        let mut requests = FramedRead::new(reader, Codec::<Request, ()>::default());
        let mut replies = FramedWrite::new(writer, Codec::<(), Reply>::default());
        let Some(request) = requests.next().await else { return Ok(()) };
        let reply = match request? {
            Request::Hello => Reply::Hello(AgentInfo {
                agent_version: "0.1.0\x1b[0m".to_owned(),
                kernel_release: "6.1.0-test".to_owned(),
                init_started_us: 10,
                agent_ready_us: 20,
            }),
            Request::Configure(config) if config.hostname == "bad" => {
                Reply::Failed("no such\nhost".to_owned())
            }
            Request::Configure(config) => {
                self.configured.lock().unwrap().push(config);
                Reply::Done
            }
            Request::Shutdown(_) => {
                self.shutdowns.fetch_add(1, Ordering::SeqCst);
                Reply::Done
            }
            Request::Attach(_) => Reply::Failed("not here".to_owned()),
            Request::Exec(start) => {
                let inputs = requests.map_decoder(|_| Codec::default());
                return self.exec(start, inputs, replies.into_inner()).await;
            }
        };
        replies.send(reply).await
    }

    async fn exec(
        &self,
        start: ExecStart,
        mut inputs: Inputs,
        writer: WriteHalf<Stream>,
    ) -> Result<(), FrameError> {
        let (stdin_sender, stdin) = mpsc::unbounded_channel();
        let (signal_sender, signals) = mpsc::unbounded_channel();
        let acked = watch::Sender::new(0);
        let mut command = Command {
            outputs: FramedWrite::new(writer, Codec::default()),
            stdin,
            signals,
            acked: acked.subscribe(),
            offset: 0,
        };
        let released = async {
            let mut stdin_sender = Some(stdin_sender);
            while let Some(input) = inputs.next().await {
                match input? {
                    ExecInput::Stdin { data, .. } => {
                        if let Some(sender) = &stdin_sender {
                            sender.send(data).ok();
                        }
                    }
                    ExecInput::StdinEof { .. } => stdin_sender = None,
                    ExecInput::Signal(signal) => {
                        signal_sender.send(signal).ok();
                    }
                    ExecInput::Ack { offset } => {
                        acked.send_replace(offset);
                    }
                    ExecInput::Release => return Ok(()),
                }
            }
            Ok(())
        };
        self.running.send_modify(|running| *running += 1);
        let result = {
            tokio::pin!(released);
            tokio::select! {
                biased;
                result = &mut released => {
                    self.killed.send_modify(|killed| *killed += 1);
                    result
                }
                result = command.run(&start) => match result {
                    Ok(()) => released.await,
                    Err(error) => Err(error),
                },
            }
        };
        self.running.send_modify(|running| *running -= 1);
        result
    }
}

struct Command {
    outputs: FramedWrite<WriteHalf<Stream>, Codec<(), ExecOutput>>,
    stdin: mpsc::UnboundedReceiver<Vec<u8>>,
    signals: mpsc::UnboundedReceiver<i32>,
    acked: watch::Receiver<u64>,
    offset: u64,
}

impl Command {
    async fn run(&mut self, start: &ExecStart) -> Result<(), FrameError> {
        let args: Vec<_> =
            start.argv.iter().map(|arg| String::from_utf8_lossy(&arg.0).into_owned()).collect();
        let number = || args[1].parse::<usize>().expect("a number");
        if !["echo", "cat", "exit", "flood", "drip", "sleep", "deaf"].contains(&args[0].as_str()) {
            let kind = ExecFailureKind::NotFound;
            let failure = ExecFailure { kind, message: format!("{}: not found", args[0]) };
            return self.outputs.send(ExecOutput::Failed(failure)).await;
        }
        self.outputs.send(ExecOutput::Started).await?;
        let status = match args[0].as_str() {
            "echo" => {
                self.print(OutputStream::Stdout, format!("{}\n", args[1..].join(" ")).as_bytes())
                    .await?;
                ExitStatus::Code(0)
            }
            "cat" => self.cat().await?,
            "exit" => ExitStatus::Code(u8::try_from(number()).expect("a code")),
            "flood" => {
                for block in 0..number().div_ceil(MAX_CHUNK_BYTES) {
                    let start = block * MAX_CHUNK_BYTES;
                    let end = number().min(start + MAX_CHUNK_BYTES);
                    self.print(OutputStream::Stdout, &counted(start, end)).await?;
                }
                ExitStatus::Code(0)
            }
            "drip" => {
                for index in 0..number() {
                    let stream = [OutputStream::Stdout, OutputStream::Stderr][index % 2];
                    self.print(stream, &counted(index, index + 1)).await?;
                }
                ExitStatus::Code(0)
            }
            _ => {
                let signal = self.signals.recv().await.expect("a signal");
                ExitStatus::Signal(u8::try_from(signal).expect("a signal"))
            }
        };
        self.outputs.send(ExecOutput::Exited(status)).await
    }

    async fn cat(&mut self) -> Result<ExitStatus, FrameError> {
        let mut taken = 0;
        while let Some(data) = self.stdin.recv().await {
            self.print(OutputStream::Stdout, &data).await?;
            taken += data.len() as u64;
            self.outputs.send(ExecOutput::StdinAck { offset: taken }).await?;
        }
        Ok(ExitStatus::Code(0))
    }

    async fn print(&mut self, stream: OutputStream, text: &[u8]) -> Result<(), FrameError> {
        for chunk in text.chunks(MAX_CHUNK_BYTES) {
            let end = self.offset + chunk.len() as u64;
            self.acked
                .wait_for(|acked| end - acked <= JOB_WINDOW_BYTES)
                .await
                .map_err(|_| io::Error::other("released"))?;
            let output = ExecOutput::Output { stream, offset: self.offset, data: chunk.to_vec() };
            self.outputs.send(output).await?;
            self.offset = end;
        }
        Ok(())
    }
}

/// The bytes from `start` to `end` of the endless sequence of counted 8-byte numbers.
pub(super) fn counted(start: usize, end: usize) -> Vec<u8> {
    let first = start / 8;
    let mut bytes: Vec<u8> = (first..end.div_ceil(8)).flat_map(usize::to_le_bytes).collect();
    bytes.truncate(end - first * 8);
    bytes.split_off(start - first * 8)
}
