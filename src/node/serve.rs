//! Answers other processes of the same user on each VM's owner socket.
//!
//! # Invariants
//! 1. Only this user (and root) is served: mode 0600, and the peer's credentials are checked.
//! 2. A client that goes away takes its command with it; it harms nothing else.
//! 3. At most [`MAX_CLIENTS`] clients per VM at once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::{SinkExt, StreamExt};
use matchlock_actors::deps::{OwnerServer, ServeGuard};
use matchlock_host::guest_link::{ExecEvent, ExecSession, StdinInput};
use matchlock_host::rootfs::VmPaths;
use matchlock_host::socket;
use matchlock_model::exec::{ExecSpec, OutputStream};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::vm::StopMode;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::codec::Framed;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::client::NodeClient;
use super::protocol::{Ended, Frame, FrameCodec, Request};

/// How many clients a VM serves at once.
pub const MAX_CLIENTS: usize = 64;

const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

type Connection = Framed<UnixStream, FrameCodec>;

/// Serves the owner sockets of this node's VMs.
#[derive(Debug)]
pub struct OwnerSockets {
    client: NodeClient,
}

impl OwnerSockets {
    /// Serves by asking this node.
    #[must_use]
    pub const fn new(client: NodeClient) -> Self {
        Self { client }
    }
}

/// Ends the serving when dropped.
struct Guard(#[expect(dead_code, reason = "held for its drop")] DropGuard);

#[async_trait]
impl OwnerServer for OwnerSockets {
    async fn serve(&self, vm: VmId, paths: &VmPaths) -> Result<ServeGuard, Failure> {
        let path = paths.owner_socket();
        let failed = |e: std::io::Error| {
            Failure::from_error(FailureKind::Host, &e)
                .context(format_args!("could not listen on {}", path.display()))
        };
        let listener = socket::listen(&path).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        let cancel = CancellationToken::new();
        tokio::spawn(accept(vm, listener, self.client.clone(), cancel.clone()));
        Ok(Box::new(Guard(cancel.drop_guard())))
    }
}

async fn accept(vm: VmId, listener: UnixListener, client: NodeClient, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        // A client beyond the limit waits in the listener's queue.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
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
        let client = client.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(vm, stream, &client).await {
                tracing::debug!(vm_id = %vm, %error, "a client went away");
            }
            drop(slot);
        });
    }
}

fn is_allowed(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

async fn answer(vm: VmId, stream: UnixStream, client: &NodeClient) -> std::io::Result<()> {
    let mut connection = Framed::new(stream, FrameCodec::default());
    match connection.next().await.transpose()? {
        Some(Frame::Request(Request::Exec(spec))) => exec(vm, connection, client, spec).await,
        Some(Frame::Request(Request::Kill { force })) => {
            let result = kill(vm, client, force).await;
            connection.send(Frame::Killed(result)).await
        }
        Some(other) => {
            let text = format!("expected a request, got {other:?}");
            Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text))
        }
        None => Ok(()),
    }
}

async fn kill(vm: VmId, client: &NodeClient, force: bool) -> Result<(), Failure> {
    let mode = if force { StopMode::Force } else { StopMode::Graceful(client.grace(vm).await?) };
    client.stop_vm(vm, mode).await.map(drop)
}

async fn exec(
    vm: VmId,
    mut connection: Connection,
    client: &NodeClient,
    spec: ExecSpec,
) -> std::io::Result<()> {
    let session = match client.exec(vm, spec).await {
        Ok(session) => session,
        Err(failure) => return connection.send(Frame::Ended(Ended::Failed(failure))).await,
    };
    carry(connection, session).await
}

/// Carries the streams until the command ends or the client goes away.
async fn carry(connection: Connection, session: ExecSession) -> std::io::Result<()> {
    let (mut to_client, mut from_client) = connection.split();
    let ExecSession { stdin, signals, mut events } = session;
    let feed = async move {
        while let Some(frame) = from_client.next().await.transpose()? {
            match frame {
                Frame::Stdin(data) => drop(stdin.send(StdinInput::Data(data)).await),
                Frame::StdinEof => drop(stdin.send(StdinInput::Eof).await),
                Frame::Signal(number) => drop(signals.send(number).await),
                other => {
                    let text = format!("unexpected frame {other:?}");
                    return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
                }
            }
        }
        Ok(())
    };
    let print = async move {
        while let Some(event) = events.recv().await {
            let frame = match event {
                Ok(ExecEvent::Started) => Frame::Started,
                Ok(ExecEvent::Output(OutputStream::Stdout, data)) => Frame::Stdout(data),
                Ok(ExecEvent::Output(OutputStream::Stderr, data)) => Frame::Stderr(data),
                Ok(ExecEvent::Refused(refusal)) => Frame::Ended(Ended::Refused(refusal)),
                Ok(ExecEvent::Exited(status)) => Frame::Ended(Ended::Exited(status)),
                Err(lost) => {
                    Frame::Ended(Ended::Failed(Failure::from_error(FailureKind::Guest, &lost)))
                }
            };
            to_client.send(frame).await?;
        }
        Ok(())
    };
    // Whichever ends first ends both; dropping the events releases the command.
    tokio::select! {
        result = feed => result,
        result = print => result,
    }
}
