//! A link to the agent: in each session one stream per request, one per command.
//!
//! # Invariants
//! 1. At most [`MAX_JOBS`] commands and [`MAX_REQUESTS`] requests use a stream at once, so the
//!    guest's limit of [`matchlock_wire::MAX_STREAMS`] is never met. A stream counts until the
//!    guest has ended its side.
//! 2. Every request has a deadline. One that passed it, or whose caller has left, is read to its
//!    end in the background.
//! 3. Dropping the link and all its commands ends the session.
//! 4. A request is made in one session and fails with it; one that is made while there is none waits
//!    for the next, within its deadline. Commands go from session to session (see [`super::job`]),
//!    and keep their slots while there is none.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use futures::StreamExt;
use matchlock_model::exec::{ExecSpec, TerminalSize};
use matchlock_model::file::FileOp;
use matchlock_model::guest::{AgentInfo, GuestConfig};
use matchlock_wire::MAX_STREAMS;
use matchlock_wire::frame::{FrameError, MAX_FRAME_BYTES};
use matchlock_wire::message::{JobId, Reply, Request, Shutdown};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::codec::FramedRead;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::codec::{self, Limited};
use super::driver::{Ending, Mux};
use super::job::{Caller, EVENT_SLOTS, Job};
use super::line::stream_cut;
use super::sessions::Sessions;
use super::stream::{self, LinkStream};
use super::{ExecSession, GuestLink, LinkError, connect, files};
use crate::hypervisor::Machine;

/// The most commands at once.
pub const MAX_JOBS: usize = 60;

/// The most other requests at once; two streams stay free for what is just being closed.
const MAX_REQUESTS: usize = 2;

const _: () = assert!(MAX_JOBS + MAX_REQUESTS < MAX_STREAMS);

/// How long the guest may take for a reply.
pub(super) const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// How long a command waits for another one to end before it is refused.
const SLOT_WAIT: Duration = Duration::from_secs(1);

/// How long the guest may take to answer a ping: whoever asks decides how long is too long.
const PING_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

const STDIN_SLOTS: usize = 4;
const SIGNAL_SLOTS: usize = 16;

/// Asks the agent things that have one answer.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    mux: Mux,
    slots: Arc<Semaphore>,
}

impl Requests {
    /// Requests over this session.
    pub(super) fn new(mux: Mux) -> Self {
        Self { mux, slots: Arc::new(Semaphore::new(MAX_REQUESTS)) }
    }

    /// Opens streams on this session.
    pub(super) fn mux(&self) -> &Mux {
        &self.mux
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// When the link fails or ends, or the deadline passes.
    pub(super) async fn ask(
        &self,
        what: &'static str,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, LinkError> {
        let request = codec::encode(request).map_err(|error| unsendable(what, &error))?;
        let answered = async {
            let slot = slot_of(&self.slots).await?;
            let stream = self.mux.open().await?;
            let (reply, answer) = oneshot::channel();
            tokio::spawn(exchange(self.mux.ending().clone(), stream, slot, request, reply));
            match answer.await {
                Ok(result) => result,
                Err(_) => Err(self.mux.ending().ended().await),
            }
        };
        timeout(deadline, answered)
            .await
            .unwrap_or(Err(LinkError::Timeout { what, waited: deadline }))
    }

    /// As [`Self::ask`], for requests whose answer is `Done`.
    async fn order(&self, what: &'static str, request: Request) -> Result<(), LinkError> {
        match self.ask(what, request, REQUEST_DEADLINE).await? {
            Reply::Done => Ok(()),
            Reply::Failed(message) => {
                Err(LinkError::Refused { what, message: codec::clean(&message) })
            }
            Reply::Hello(_) => Err(self.wrong_reply(what)),
        }
    }

    /// Ends the link over a reply that does not fit its request.
    pub(super) fn wrong_reply(&self, what: &'static str) -> LinkError {
        let what = format!("it answered {what} with another request's reply");
        self.mux.ending().end(LinkError::Protocol { what })
    }
}

/// One request and its reply. Holds its slot, but not the session.
async fn exchange(
    ending: Arc<Ending>,
    stream: LinkStream,
    slot: OwnedSemaphorePermit,
    request: BytesMut,
    reply: oneshot::Sender<Result<Reply, LinkError>>,
) {
    let (read_half, mut writer) = tokio::io::split(stream);
    let mut reader = FramedRead::new(read_half, Limited::<Reply>::new(codec::MAX_REPLY_FRAME));
    let written = writer.write_all(&request).await;
    let answer = match (written, reader.next().await) {
        (_, Some(Ok(answer))) => Ok(answer),
        (Ok(()), Some(Err(error))) => match codec::violation_of(&error) {
            Some(violation) => Err(ending.end(violation)),
            None => Err(ending.end(stream_cut(&ending, CLOSED).await)),
        },
        (Ok(()), None) | (Err(_), _) => Err(ending.end(stream_cut(&ending, CLOSED).await)),
    };
    let answered = answer.is_ok();
    if reply.send(answer).is_err() {
        tracing::debug!("the guest answered a request after its deadline");
    }
    if answered {
        if let Err(error) = writer.shutdown().await {
            tracing::trace!(%error, "a request's stream was closed by the guest first");
        }
        stream::drain(reader.get_mut()).await;
    }
    drop(slot);
}

const CLOSED: &str = "it closed a request's stream";

async fn slot_of(slots: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, LinkError> {
    // Nobody closes the semaphores.
    slots
        .clone()
        .acquire_owned()
        .await
        .map_err(|error| LinkError::Lost { cause: error.to_string() })
}

fn unsendable(what: &'static str, error: &FrameError) -> LinkError {
    let message = match error {
        FrameError::TooLong { len } => {
            format!("it is too long: {len} bytes, the link carries {MAX_FRAME_BYTES}")
        }
        other => codec::with_sources(other),
    };
    LinkError::Refused { what, message }
}

/// A [`GuestLink`] over one session after the other.
#[derive(Debug)]
pub(super) struct YamuxLink {
    sessions: Arc<Sessions>,
    /// Held by whoever begins a session.
    beginning: Mutex<()>,
    agent: AgentInfo,
    job_slots: Arc<Semaphore>,
    /// Cancelled with this link: jobs that are only saying goodbye then do not keep the session.
    orphaned: CancellationToken,
    _orphaning: DropGuard,
}

impl YamuxLink {
    /// A link that begins with this session, with what its agent has answered.
    pub(super) fn new(first: Requests, agent: AgentInfo) -> Self {
        let orphaned = CancellationToken::new();
        Self {
            sessions: Arc::new(Sessions::new(first, orphaned.child_token())),
            beginning: Mutex::new(()),
            agent,
            job_slots: Arc::new(Semaphore::new(MAX_JOBS)),
            _orphaning: orphaned.clone().drop_guard(),
            orphaned,
        }
    }

    /// Starts a job with this request.
    async fn start(
        &self,
        what: &'static str,
        id: JobId,
        request: Request,
        has_stdin: bool,
        terminal: Option<TerminalSize>,
    ) -> Result<ExecSession, LinkError> {
        let request = codec::encode(request).map_err(|error| unsendable(what, &error))?;
        let (stdin, stdin_receiver) = mpsc::channel(STDIN_SLOTS);
        let (signals, signal_receiver) = mpsc::channel(SIGNAL_SLOTS);
        let (event_sender, events) = mpsc::channel(EVENT_SLOTS);
        let size = watch::Sender::new(terminal.unwrap_or_default());
        let sizes = terminal.map(|_| size.subscribe());
        let session = ExecSession { stdin, signals, size, events };
        let taken = async {
            let slot = self.job_slot(what).await?;
            let (accepted, taken) = oneshot::channel();
            let caller = Caller {
                request: request.freeze(),
                accepted: Some(accepted),
                stdin: has_stdin.then_some(stdin_receiver),
                signals: Some(signal_receiver),
                signal: None,
                sizes,
            };
            let job = Job {
                sessions: self.sessions.clone(),
                id,
                caller,
                events: event_sender,
                orphaned: self.orphaned.clone(),
                slot,
            };
            tokio::spawn(job.run());
            match taken.await {
                Ok(()) => Ok(()),
                Err(_) => Err(self.sessions.over().await),
            }
        };
        // An error drops the session, and with it the receiver: the job releases itself.
        in_time(what, taken).await?;
        Ok(session)
    }

    async fn job_slot(&self, what: &'static str) -> Result<OwnedSemaphorePermit, LinkError> {
        match timeout(SLOT_WAIT, slot_of(&self.job_slots)).await {
            Ok(slot) => slot,
            Err(_) => Err(LinkError::Refused {
                what,
                message: format!("too many commands at once ({MAX_JOBS})"),
            }),
        }
    }
}

const COMMAND: &str = "the command";
const FILE: &str = "the file";

/// A request's deadline counts from the call: waiting for a session is a part of it.
async fn in_time<T>(
    what: &'static str,
    work: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    timeout(REQUEST_DEADLINE, work)
        .await
        .unwrap_or(Err(LinkError::Timeout { what, waited: REQUEST_DEADLINE }))
}

#[async_trait]
impl GuestLink for YamuxLink {
    fn agent(&self) -> &AgentInfo {
        &self.agent
    }

    async fn configure(&self, config: &GuestConfig) -> Result<(), LinkError> {
        const WHAT: &str = "the configuration";
        let order = async {
            let session = self.sessions.live().await?;
            session.order(WHAT, Request::Configure(codec::configure(config))).await
        };
        in_time(WHAT, order).await
    }

    async fn exec(&self, spec: &ExecSpec) -> Result<ExecSession, LinkError> {
        let id = job_id()?;
        let request = Request::Exec(codec::exec_start(id, spec));
        let size = spec.terminal.as_ref().map(|terminal| terminal.size);
        self.start(COMMAND, id, request, spec.stdin, size).await
    }

    async fn file(&self, op: &FileOp) -> Result<ExecSession, LinkError> {
        let id = job_id()?;
        let request = Request::File(files::file_start(id, op));
        self.start(FILE, id, request, matches!(op, FileOp::Write { .. }), None).await
    }

    async fn shutdown(&self, grace: Duration) -> Result<(), LinkError> {
        const WHAT: &str = "the shutdown";
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let order = async {
            let session = self.sessions.live().await?;
            session.order(WHAT, Request::Shutdown(Shutdown { grace_ms })).await
        };
        in_time(WHAT, order).await
    }

    async fn ping(&self) -> Result<(), LinkError> {
        const WHAT: &str = "a ping";
        let session = in_time(WHAT, self.sessions.live()).await?;
        match session.ask(WHAT, Request::Hello, PING_DEADLINE).await? {
            Reply::Hello(_) => Ok(()),
            Reply::Failed(message) => {
                Err(LinkError::Refused { what: WHAT, message: codec::clean(&message) })
            }
            Reply::Done => Err(session.wrong_reply(WHAT)),
        }
    }

    async fn reconnect(&self, machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        let begun = async {
            let _beginning = self.beginning.lock().await;
            self.sessions.may_begin()?;
            if self.sessions.current().mux().ending().now().is_none() {
                // Somebody else was faster.
                return Ok(());
            }
            let (session, _) = tokio::select! {
                begun = connect::begin(machine, deadline) => begun?,
                () = self.sessions.given_up() => return self.sessions.may_begin(),
            };
            // It may have been given up in the last moment: then the session ends here.
            self.sessions.may_begin()?;
            self.sessions.replace(session);
            Ok(())
        };
        timeout(deadline, begun)
            .await
            .unwrap_or(Err(LinkError::Timeout { what: connect::HANDSHAKE, waited: deadline }))
    }

    fn give_up(&self) {
        self.sessions.give_up();
    }

    async fn closed(&self) -> LinkError {
        // The session's handle is not kept meanwhile: waiting keeps no session alive.
        let ending = self.sessions.current().mux().ending().clone();
        ending.ended().await
    }
}

fn job_id() -> Result<JobId, LinkError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| no_random(&error))?;
    Ok(JobId(id))
}

/// The kernel gave no random bytes: nothing that needs an unguessable name can be done.
pub(super) fn no_random(error: &getrandom::Error) -> LinkError {
    LinkError::Lost { cause: format!("this host gave no random bytes: {error}") }
}
