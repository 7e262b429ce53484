//! Answers other processes of the same user on each VM's owner socket.
//!
//! # Invariants
//! 1. Only this user (and root) is served: mode 0600, and the peer's credentials are checked.
//! 2. A client that goes away takes its command with it; it harms nothing else.
//! 3. Whoever asks is heard: what waits or runs for others holds no place of the clients that have not
//!    said yet what they want, so a kill gets through however many commands run.
//! 4. All of it is bounded: [`MAX_CLIENTS`] at the door, as many commands, as many that wait for a
//!    command's place, as many kills of each kind. What is beyond that is refused, at the door it waits.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::{SinkExt, StreamExt};
use matchlock_actors::deps::{OwnerServer, ServeGuard};
use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_host::rootfs::VmPaths;
use matchlock_host::socket;
use matchlock_model::exec::{ExecSpec, OutputStream};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::vm::StopMode;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc};
use tokio::time::timeout;
use tokio_util::codec::Framed;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::client::NodeClient;
use super::protocol::{Ended, Frame, FrameCodec, Request, STDIN_FRAMES};
use crate::points::{OWNER, injected};

/// How many clients a VM serves at once, of each kind.
pub const MAX_CLIENTS: usize = 64;

/// How long a client may take to say what it wants; its place is another's then.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

type Connection = Framed<UnixStream, FrameCodec>;

/// Serves the owner sockets of this node's VMs.
#[derive(Debug)]
pub struct OwnerSockets {
    client: NodeClient,
    kills: TaskTracker,
}

impl OwnerSockets {
    /// Serves by asking this node. `kills` are those that have not been answered yet: a process that
    /// ends with its VM waits for them, so that whoever asked is told.
    #[must_use]
    pub const fn new(client: NodeClient, kills: TaskTracker) -> Self {
        Self { client, kills }
    }
}

/// Ends the serving when dropped.
struct Guard(#[expect(dead_code, reason = "held for its drop")] DropGuard);

#[async_trait]
impl OwnerServer for OwnerSockets {
    async fn serve(&self, vm: VmId, paths: &VmPaths) -> Result<ServeGuard, Failure> {
        let path = paths.owner_socket();
        let failed = |e: io::Error| {
            Failure::from_error(FailureKind::Host, &e)
                .context(format_args!("could not listen on {}", path.display()))
        };
        let listener = socket::listen(&path).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        let cancel = CancellationToken::new();
        let places = Arc::new(Places::new(self.kills.clone()));
        tokio::spawn(accept(vm, listener, self.client.clone(), places, cancel.clone()));
        Ok(Box::new(Guard(cancel.drop_guard())))
    }
}

/// The places that a VM has for clients.
#[derive(Debug)]
struct Places {
    /// Of those that have not said yet what they want.
    door: Arc<Semaphore>,
    commands: Semaphore,
    /// Of commands that wait for a place.
    queue: Semaphore,
    kills: Semaphore,
    /// Apart from those that ask the guest: they may take as long as it has grace.
    forced_kills: Semaphore,
    /// The kills of all VMs of the node that have not been answered yet.
    unanswered: TaskTracker,
}

impl Places {
    fn new(unanswered: TaskTracker) -> Self {
        let places = || Semaphore::new(MAX_CLIENTS);
        Self {
            door: Arc::new(places()),
            commands: places(),
            queue: places(),
            kills: places(),
            forced_kills: places(),
            unanswered,
        }
    }

    /// A command's place, once there is one.
    async fn command(&self) -> Result<SemaphorePermit<'_>, Failure> {
        if let Ok(place) = self.commands.try_acquire() {
            return Ok(place);
        }
        let _waiting = self.queue.try_acquire().map_err(|_| full("wait for a command's place"))?;
        let place = self.commands.acquire().await;
        place.map_err(|e| Failure::from_error(FailureKind::Internal, &e))
    }

    fn kill(&self, force: bool) -> Result<SemaphorePermit<'_>, Failure> {
        let kills = if force { &self.forced_kills } else { &self.kills };
        kills.try_acquire().map_err(|_| full("wait for the VM's end"))
    }
}

fn full(what: &str) -> Failure {
    Failure::new(FailureKind::Busy, format!("{MAX_CLIENTS} others {what}; try again later"))
}

async fn accept(
    vm: VmId,
    listener: UnixListener,
    client: NodeClient,
    places: Arc<Places>,
    cancel: CancellationToken,
) {
    loop {
        // A client beyond the limit waits in the listener's queue.
        let Ok(door) = Arc::clone(&places.door).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(vm_id = %vm, %error, "could not accept a client");
                // Out of descriptors, most likely: give others time to close some.
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        if !is_allowed(&stream) {
            tracing::warn!(vm_id = %vm, "a client of another user was refused");
            continue;
        }
        let (client, places) = (client.clone(), Arc::clone(&places));
        tokio::spawn(async move {
            if let Err(error) = answer(vm, stream, &client, &places, door).await {
                tracing::debug!(vm_id = %vm, %error, "a client went away");
            }
        });
    }
}

/// Whether the peer is this user, or root.
pub(super) fn is_allowed(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

async fn answer(
    vm: VmId,
    stream: UnixStream,
    client: &NodeClient,
    places: &Places,
    door: OwnedSemaphorePermit,
) -> io::Result<()> {
    let mut connection = Framed::new(stream, FrameCodec::default());
    let first = timeout(REQUEST_LIMIT, connection.next()).await?;
    drop(door);
    match first.transpose()? {
        Some(Frame::Request(Request::Exec(spec))) => {
            let place = places.command().await;
            connection.send(Frame::Heard).await?;
            match place {
                Ok(_place) => exec(vm, connection, client, spec).await,
                Err(full) => connection.send(Frame::Ended(Ended::Failed(full))).await,
            }
        }
        // Whether anybody waits for it or not: it was asked for.
        Some(Frame::Request(Request::Kill { force })) => {
            let _unanswered = places.unanswered.token();
            let heard = connection.send(Frame::Heard).await;
            let result = match places.kill(force) {
                Ok(_place) => kill(vm, client, force).await,
                Err(full) => Err(full),
            };
            heard?;
            connection.send(Frame::Killed(result)).await
        }
        Some(other) => Err(unexpected(other)),
        None => Ok(()),
    }
}

async fn kill(vm: VmId, client: &NodeClient, force: bool) -> Result<(), Failure> {
    let mode = if force { StopMode::Force } else { StopMode::Graceful(client.grace(vm).await?) };
    OWNER.before("kill").map_err(injected)?;
    client.stop_vm(vm, mode).await?;
    OWNER.after("kill").map_err(injected)
}

async fn exec(
    vm: VmId,
    mut connection: Connection,
    client: &NodeClient,
    spec: ExecSpec,
) -> io::Result<()> {
    let session = match client.exec(vm, spec).await {
        Ok(session) => session,
        Err(failure) => return connection.send(Frame::Ended(Ended::Failed(failure))).await,
    };
    OWNER.before("exec")?;
    carry(connection, session).await?;
    Ok(OWNER.after("exec")?)
}

fn unexpected(what: impl std::fmt::Debug) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unexpected frame {what:?}"))
}

/// Carries the streams until the command ends or the client goes away.
async fn carry(connection: Connection, session: ExecSession) -> io::Result<()> {
    let (mut to_client, mut from_client) = connection.split();
    let ExecSession { stdin, signals, size, mut events } = session;
    let (waiting, mut to_take) = mpsc::channel(STDIN_FRAMES + 1);
    let (taken, mut newly_taken) = mpsc::channel(STDIN_FRAMES + 1);
    // Reads on, whether the command does or not: a signal and the client's end must be seen.
    let listen = async move {
        while let Some(frame) = from_client.next().await.transpose()? {
            let input = match frame {
                Frame::Stdin(data) => StdinInput::Data(data),
                Frame::StdinEof => StdinInput::Eof,
                Frame::Signal(number) => {
                    if let Err(error) = signals.try_send(number) {
                        tracing::debug!(%error, "a signal for a command that takes none");
                    }
                    continue;
                }
                Frame::Resize(to) => {
                    size.send_replace(to);
                    continue;
                }
                other => return Err(unexpected(other)),
            };
            // More than it may send is the client's fault.
            waiting.try_send(input).map_err(|e| unexpected(e.to_string()))?;
        }
        Ok(())
    };
    let feed = async move {
        while let Some(input) = to_take.recv().await {
            // A command that has closed its stdin takes everything.
            let closed = stdin.send(input).await.is_err();
            if taken.send(()).await.is_err() {
                break;
            }
            if closed {
                tracing::trace!("stdin of a command that reads no more");
            }
        }
        std::future::pending::<io::Result<()>>().await
    };
    let print = async move {
        loop {
            let frame = tokio::select! {
                Some(()) = newly_taken.recv() => Frame::StdinTaken,
                event = events.recv() => match event {
                    Some(event) => to_frame(event),
                    None => return Ok(()),
                },
            };
            to_client.send(frame).await?;
        }
    };
    // Whichever ends first ends all; dropping the events releases the command.
    tokio::select! {
        result = listen => result,
        result = feed => result,
        result = print => result,
    }
}

fn to_frame(event: Result<ExecEvent, LinkError>) -> Frame {
    match event {
        Ok(ExecEvent::Started) => Frame::Started,
        Ok(ExecEvent::Output(OutputStream::Stdout, data)) => Frame::Stdout(data),
        Ok(ExecEvent::Output(OutputStream::Stderr, data)) => Frame::Stderr(data),
        Ok(ExecEvent::Refused(refusal)) => Frame::Ended(Ended::Refused(refusal)),
        Ok(ExecEvent::Exited(status)) => Frame::Ended(Ended::Exited(status)),
        Err(lost) => Frame::Ended(Ended::Failed(Failure::from_error(FailureKind::Guest, &lost))),
    }
}

#[cfg(test)]
mod tests;
