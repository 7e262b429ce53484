//! Both ends of a link for tests: an agent in this process, and a host that dials, shakes hands, opens streams. As plain as can be, so that what is
//! tested is the guest.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use matchlock_guest::agent::{Agent, Machine, ShutdownOrder};
use matchlock_guest::configure::ConfigureError;
use matchlock_guest::jobs::Jobs;
use matchlock_guest::launch::Launcher;
use matchlock_guest::reaper::Reaper;
use matchlock_guest::session::{self, Line};
use matchlock_wire::frame::Codec;
use matchlock_wire::message::{
    AgentInfo, Bytes, Configure, ExecAttach, ExecInput, ExecOutput, ExecStart, FileStart,
    JOB_WINDOW_BYTES, JobId, OutputStream, Reply, Request,
};
use matchlock_wire::resync::{Greeting, Hunter, hello};
use matchlock_wire::{MAX_STREAMS, SPLIT_SEND_BYTES, STREAM_WINDOW_BYTES};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, LocalSet};
use tokio_util::codec::{Encoder, FramedRead};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

/// No step of a test takes longer, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("this took too long")
}

/// Runs a test in an event loop like the agent's.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, work)
}

/// The guest's side of a line. A host that hangs up can be followed by another one.
struct Plug {
    line: UnixStream,
    next: mpsc::Receiver<UnixStream>,
}

impl AsyncRead for Plug {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Plug {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().line).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_shutdown(cx)
    }
}

impl Line for Plug {
    fn poll_reopened(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.next.poll_recv(cx).map(|next| match next {
            Some(line) => {
                self.line = line;
                Ok(true)
            }
            None => Ok(false),
        })
    }
}

/// The host's side of a line that outlives its users, as a virtio port does: the guest does not
/// notice that one has followed another.
#[derive(Clone)]
pub(crate) struct Glued(Rc<RefCell<UnixStream>>);

impl AsyncRead for Glued {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Glued {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// An agent in this process, without a machine around it.
pub(crate) struct Guest {
    plugs: mpsc::Sender<UnixStream>,
    pub(crate) jobs: Rc<Jobs>,
    pub(crate) orders: mpsc::Receiver<ShutdownOrder>,
}

/// Takes every configuration but one for `refused`.
struct NoMachine;

impl Machine for NoMachine {
    fn configure(&self, config: &Configure) -> Result<(), ConfigureError> {
        if config.hostname == "refused" {
            return Err(ConfigureError::Hostname {
                hostname: config.hostname.clone(),
                source: io::Error::other("not today"),
            });
        }
        Ok(())
    }
}

impl Guest {
    /// Starts an agent and plugs a first line in.
    pub(crate) fn start() -> (Self, Glued) {
        let reaper = Reaper::start().unwrap();
        let jobs = Jobs::new(Launcher::new(None, reaper));
        let info = AgentInfo {
            agent_version: "test".into(),
            kernel_release: "test".into(),
            init_started_us: 1,
            agent_ready_us: 2,
        };
        let (agent, orders) = Agent::new(info, Rc::clone(&jobs), Box::new(NoMachine));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (plugs, next) = mpsc::channel(1);
        let plug = Plug { line: theirs, next };
        tokio::task::spawn_local(async move { session::serve(plug, agent).await.unwrap() });
        let guest = Self { plugs, jobs, orders };
        (guest, Glued(Rc::new(RefCell::new(ours))))
    }

    /// An agent with a session.
    pub(crate) async fn with_host() -> (Self, Host) {
        let (guest, line) = Self::start();
        let (host, _) = Host::dial(line, 1).await;
        (guest, host)
    }

    /// A line for the next host, once the one before has hung up.
    pub(crate) async fn plug(&self) -> Glued {
        let (ours, theirs) = UnixStream::pair().unwrap();
        in_time(self.plugs.send(theirs)).await.unwrap();
        Glued(Rc::new(RefCell::new(ours)))
    }
}

/// A session, seen from the host.
pub(crate) struct Host {
    opener: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    driver: JoinHandle<()>,
}

/// Shakes hands with a fresh nonce. Returns the greeting, the stale bytes before it, and what was
/// read beyond it.
pub(crate) async fn greet<T>(
    line: &mut T,
    nonce: [u8; 16],
) -> io::Result<(Greeting, usize, Vec<u8>)>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut hunter = Hunter::for_acknowledgement();
    let mut buffer = vec![0; 64 * 1024];
    let (mut reader, mut writer) = tokio::io::split(line);
    let bytes = hello(&nonce);
    let write = async {
        writer.write_all(&bytes).await?;
        writer.flush().await
    };
    let read = async {
        loop {
            let count = reader.read(&mut buffer).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let (taken, greeting) = hunter.feed(rest);
                rest = &rest[taken..];
                if let Some(greeting) = greeting.filter(|found| found.nonce == nonce) {
                    return Ok((greeting, hunter.stale_bytes(), rest.to_vec()));
                }
            }
        }
    };
    let (written, read) = tokio::join!(write, read);
    written?;
    read
}

/// A line whose first bytes were read already.
struct Resumed<T>(VecDeque<u8>, T);

impl<T: AsyncRead + Unpin> AsyncRead for Resumed<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let line = self.get_mut();
        if line.0.is_empty() {
            return Pin::new(&mut line.1).poll_read(cx, buffer);
        }
        let count = line.0.len().min(buffer.remaining());
        buffer.put_slice(&line.0.drain(..count).collect::<Vec<_>>());
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Resumed<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().1).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().1).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().1).poll_shutdown(cx)
    }
}

impl Host {
    /// Shakes hands and starts a session. Also returns how many stale bytes came before it.
    pub(crate) async fn dial<T>(mut line: T, nonce: u8) -> (Self, usize)
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let (greeting, stale, rest) = in_time(greet(&mut line, [nonce; 16])).await.unwrap();
        assert_eq!(greeting.version, matchlock_wire::PROTOCOL_VERSION);
        let mut config = Config::default();
        config
            .set_max_num_streams(MAX_STREAMS)
            .set_max_connection_receive_window(Some(MAX_STREAMS * STREAM_WINDOW_BYTES))
            .set_split_send_size(SPLIT_SEND_BYTES)
            .set_read_after_close(true);
        let line = Resumed(rest.into(), line).compat();
        let connection = Connection::new(line, config, Mode::Client);
        let (opener, requests) = mpsc::channel(1);
        let driver = tokio::task::spawn_local(drive(connection, requests));
        (Self { opener, driver }, stale)
    }

    /// Drops the connection without a word, wherever it is.
    pub(crate) async fn vanish(self) {
        self.driver.abort();
        assert!(self.driver.await.unwrap_err().is_cancelled());
    }

    async fn open(&self, request: Request) -> Compat<yamux::Stream> {
        let (sender, receiver) = oneshot::channel();
        self.opener.send(sender).await.unwrap();
        let mut stream = in_time(receiver).await.unwrap().compat();
        send(&mut stream, request).await.unwrap();
        stream
    }

    /// Sends a request that is not about a job.
    pub(crate) async fn ask(&self, request: Request) -> Reply {
        let stream = self.open(request).await;
        let mut replies = FramedRead::new(stream, Codec::<Reply, ()>::default());
        let reply = in_time(replies.next()).await.unwrap().unwrap();
        assert!(in_time(replies.next()).await.is_none());
        reply
    }

    /// Starts a command.
    pub(crate) async fn exec(&self, start: ExecStart) -> Job {
        Job::new(self.open(Request::Exec(start)).await)
    }

    /// Opens files.
    pub(crate) async fn files(&self, start: FileStart) -> Job {
        Job::new(self.open(Request::File(start)).await)
    }

    /// Continues a job.
    pub(crate) async fn attach(&self, job: JobId, output_offset: u64) -> Job {
        let request = Request::Attach(ExecAttach { job, output_offset });
        let mut attached = Job::new(self.open(request).await);
        attached.offset = output_offset;
        attached
    }
}

async fn drive<T>(
    mut connection: Connection<T>,
    mut requests: mpsc::Receiver<oneshot::Sender<yamux::Stream>>,
) where
    T: futures::AsyncRead + futures::AsyncWrite + Unpin,
{
    poll_fn(|cx| {
        while let Poll::Ready(Some(request)) = requests.poll_recv(cx) {
            match connection.poll_new_outbound(cx) {
                Poll::Ready(Ok(stream)) => drop(request.send(stream)),
                other => panic!("no new stream: {other:?}"),
            }
        }
        match connection.poll_next_inbound(cx) {
            Poll::Ready(Some(Ok(stream))) => panic!("the guest opened {stream}"),
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
}

async fn send<W: AsyncWrite + Unpin, M: serde::Serialize>(
    writer: &mut W,
    message: M,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut bytes = bytes::BytesMut::new();
    Codec::<(), M>::default().encode(message, &mut bytes)?;
    writer.write_all(&bytes).await?;
    writer.flush().await?;
    Ok(())
}

type Outputs = FramedRead<ReadHalf<Compat<yamux::Stream>>, Codec<ExecOutput, ()>>;

/// A job's stream, seen from the host.
pub(crate) struct Job {
    outputs: Outputs,
    writer: WriteHalf<Compat<yamux::Stream>>,
    /// How much output has come.
    pub(crate) offset: u64,
    /// How much stdin the guest has taken.
    pub(crate) stdin_taken: u64,
    /// Stdout so far.
    pub(crate) stdout: Vec<u8>,
    /// Stderr so far.
    pub(crate) stderr: Vec<u8>,
}

impl Job {
    fn new(stream: Compat<yamux::Stream>) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self {
            outputs: FramedRead::new(reader, Codec::default()),
            writer,
            offset: 0,
            stdin_taken: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, input: ExecInput) {
        in_time(send(&mut self.writer, input)).await.unwrap();
    }

    /// The next message; `None` at the end of the stream, however it came.
    pub(crate) async fn next(&mut self) -> Option<ExecOutput> {
        let message = in_time(self.outputs.next()).await?.ok()?;
        match &message {
            ExecOutput::Output { stream, offset, data } => {
                assert_eq!(*offset, self.offset, "output has a gap");
                self.offset += data.len() as u64;
                match stream {
                    OutputStream::Stdout => self.stdout.extend(data),
                    OutputStream::Stderr => self.stderr.extend(data),
                }
            }
            ExecOutput::StdinAck { offset } => {
                assert!(*offset > self.stdin_taken);
                self.stdin_taken = *offset;
            }
            ExecOutput::Attached { stdin_offset } => self.stdin_taken = *stdin_offset,
            _ => {}
        }
        Some(message)
    }

    /// Takes and acknowledges everything up to the end of the command.
    pub(crate) async fn finish(&mut self) -> ExecOutput {
        loop {
            match self.next().await.expect("the stream ended first") {
                ExecOutput::Output { .. } => {
                    let offset = self.offset;
                    self.send(ExecInput::Ack { offset }).await;
                }
                last @ (ExecOutput::Exited(_) | ExecOutput::Failed(_)) => return last,
                _ => {}
            }
        }
    }

    /// Like [`Self::finish`], and sends all of `input` to stdin, within the window.
    pub(crate) async fn feed(&mut self, input: &[u8]) -> ExecOutput {
        let end = self.feed_until(input, u64::MAX).await;
        end.expect("no end to be had")
    }

    /// Like [`Self::feed`], but gives up after `limit` bytes of output.
    pub(crate) async fn feed_until(&mut self, input: &[u8], limit: u64) -> Option<ExecOutput> {
        let limit = self.offset.saturating_add(limit);
        let mut sent = self.stdin_taken;
        let mut ended = false;
        while self.offset < limit {
            let room = (JOB_WINDOW_BYTES - (sent - self.stdin_taken)).min(20_000);
            let from = usize::try_from(sent).unwrap();
            let to = input.len().min(from + usize::try_from(room).unwrap());
            if to > from {
                let data = input[from..to].to_vec();
                self.send(ExecInput::Stdin { offset: sent, data }).await;
                sent = to as u64;
                continue;
            }
            if from == input.len() && !ended {
                self.send(ExecInput::StdinEof { offset: sent }).await;
                ended = true;
            }
            match self.next().await.expect("the stream ended first") {
                ExecOutput::Output { .. } => {
                    let offset = self.offset;
                    self.send(ExecInput::Ack { offset }).await;
                }
                last @ (ExecOutput::Exited(_) | ExecOutput::Failed(_)) => return Some(last),
                _ => {}
            }
        }
        None
    }

    /// Releases the job and waits for the guest to close the stream.
    pub(crate) async fn release(mut self) {
        self.send(ExecInput::Release).await;
        while self.next().await.is_some() {}
    }
}

/// A request to run `argv`.
pub(crate) fn start(job: u8, argv: &[&str]) -> ExecStart {
    ExecStart {
        job: JobId([job; 16]),
        argv: argv.iter().map(|argument| Bytes::from(*argument)).collect(),
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    }
}
