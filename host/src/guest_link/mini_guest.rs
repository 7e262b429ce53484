//! For tests: a small agent over the real wire, and a machine whose link leads to it.
//!
//! What its commands do: see [`super::mini_jobs`].

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::{SinkExt, StreamExt};
use matchlock_model::identity::ProcessIdentity;
use matchlock_wire::frame::{Codec, FrameError};
use matchlock_wire::message::{AgentInfo, Configure, ExecInput, Reply, Request};
use matchlock_wire::resync::{self, Hunter};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, watch};
use tokio_util::codec::{FramedRead, FramedWrite};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use super::mini_jobs::MiniJobs;
use crate::hypervisor::{ExitReason, HypervisorError, Machine, MachineExit, Saved};

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

    /// A machine with a mini guest, whose n-th link is cut after the n-th number of bytes, both
    /// directions together; links beyond that are not cut.
    pub(super) fn cutting(budgets: Vec<usize>) -> (Self, Arc<MiniGuest>) {
        let guest = Arc::new(MiniGuest::default());
        let served = guest.clone();
        let budgets = Mutex::new(budgets.into_iter());
        let machine = Self::new(move |stream| {
            let budget = budgets.lock().unwrap().next().unwrap_or(usize::MAX);
            let served = served.clone();
            async move {
                let (near, far) = UnixStream::pair().expect("a socket pair");
                let serving = tokio::spawn(served.serve(far));
                forward(stream, near, budget).await;
                serving.abort();
            }
        });
        (machine, guest)
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

    async fn save(&self, _to: std::fs::File) -> Result<Saved, HypervisorError> {
        Err(HypervisorError::Control { what: "nobody saves it".to_owned() })
    }

    fn console_tail(&self, _max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        Ok(Vec::new())
    }
}

/// Passes bytes on in both directions until so many have passed or one side has ended.
async fn forward(one: UnixStream, other: UnixStream, budget: usize) {
    let left = AtomicUsize::new(budget);
    let (one_reader, one_writer) = one.into_split();
    let (other_reader, other_writer) = other.into_split();
    tokio::select! {
        () = pass_on(one_reader, other_writer, &left) => {}
        () = pass_on(other_reader, one_writer, &left) => {}
    }
}

async fn pass_on(mut reader: OwnedReadHalf, mut writer: OwnedWriteHalf, left: &AtomicUsize) {
    let mut buffer = vec![0; 8 * 1024];
    while let Ok(read @ 1..) = reader.read(&mut buffer).await {
        let allowed = left.load(Ordering::SeqCst).min(read);
        left.fetch_sub(allowed, Ordering::SeqCst);
        if writer.write_all(&buffer[..allowed]).await.is_err() || allowed < read {
            return;
        }
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
    /// The commands, and what is made of their streams.
    pub(super) jobs: MiniJobs,
}

pub(super) type Stream = Compat<yamux::Stream>;
pub(super) type Inputs = FramedRead<ReadHalf<Stream>, Codec<ExecInput, ()>>;

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
            Request::Attach(attach) => {
                let inputs = requests.map_decoder(|_| Codec::default());
                return self.attach(attach, inputs, replies.into_inner()).await;
            }
            Request::File(start) => {
                let inputs = requests.map_decoder(|_| Codec::default());
                return self.file(start, inputs, replies.into_inner()).await;
            }
            Request::Exec(start) => {
                let inputs = requests.map_decoder(|_| Codec::default());
                return self.exec(start, inputs, replies.into_inner()).await;
            }
        };
        replies.send(reply).await
    }
}

/// The bytes from `start` to `end` of the endless sequence of counted 8-byte numbers.
pub(super) fn counted(start: usize, end: usize) -> Vec<u8> {
    let first = start / 8;
    let mut bytes: Vec<u8> = (first..end.div_ceil(8)).flat_map(usize::to_le_bytes).collect();
    bytes.truncate(end - first * 8);
    bytes.split_off(start - first * 8)
}
