//! Sessions over a unix socket: each client has one of its own.
//!
//! # Invariants
//! 1. Only this user (and root) is served: the socket has mode 0600, and the peer's credentials are
//!    checked.
//! 2. At most [`MAX_CLIENTS`] sessions at once; a further client waits in the socket's queue.
//! 3. What lies in the socket's place is replaced only if it is a socket on which nobody listens. Our
//!    own is removed at the end, unless somebody has put another one there. Whoever looks and then acts
//!    holds a lock on the directory meanwhile: of two that start at once one listens, and the other
//!    says so.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use matchlock_host::socket;
use matchlock_model::failure::{Failure, FailureKind};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::session::{RpcHost, SessionEnd, Why, serve};
use crate::node::serve::is_allowed;

/// How many clients are served at once.
pub(super) const MAX_CLIENTS: usize = 64;

/// How long others may look and bind in the socket's directory, and how often that is looked at.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(5);

const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// A socket that is listened on.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: which file is ours.
    file: (u64, u64),
}

impl Listener {
    /// Listens at this path.
    ///
    /// # Errors
    /// When somebody listens there already, something else is there, or the socket cannot be made.
    pub async fn bind(path: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::from_error(FailureKind::Host, &error)
                .context(format_args!("could not listen on {}", path.display()))
        };
        let path = std::path::absolute(path).map_err(failed)?;
        let _lock = lock_directory_of(&path).await.map_err(failed)?;
        see_that_it_is_free(&path).await.map_err(failed)?;
        let listener = socket::listen(&path).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        let file = identity(&path).map_err(failed)?;
        Ok(Self { listener, path, file })
    }

    /// Serves clients until it is to stop and all their sessions have ended; what is left of their
    /// VMs.
    ///
    /// # Errors
    /// When the socket could not be removed.
    pub async fn serve(self, host: Arc<RpcHost>, stop: CancellationToken) -> Result<(), Failure> {
        let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
        let sessions = TaskTracker::new();
        loop {
            let accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                () = stop.cancelled() => break,
                accepted = accepted => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "could not accept a client");
                    // Out of descriptors, most likely: give others time to close some.
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
            };
            if !is_allowed(&stream) {
                tracing::warn!("a client of another user was refused");
                continue;
            }
            let (host, stop) = (Arc::clone(&host), stop.clone());
            sessions.spawn(async move {
                let (reader, writer) = stream.into_split();
                tell(&serve(host, reader, writer, &stop).await);
                drop(slot);
            });
        }
        sessions.close();
        sessions.wait().await;
        self.remove().await.map_err(|error| {
            Failure::from_error(FailureKind::Host, &error)
                .context(format_args!("could not remove {}", self.path.display()))
        })
    }

    async fn remove(&self) -> io::Result<()> {
        let _lock = lock_directory_of(&self.path).await?;
        match identity(&self.path) {
            Ok(file) if file == self.file => std::fs::remove_file(&self.path),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn tell(end: &SessionEnd) {
    for line in &end.left {
        tracing::warn!("{line}");
    }
    if let Why::Lost(why) = &end.why {
        tracing::info!(%why, "a session ended");
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Keeps others that start or end here away as long as it is held. It needs no file of its own, and
/// goes with its process.
async fn lock_directory_of(path: &Path) -> io::Result<File> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let directory = File::open(parent)?;
    let give_up = Instant::now() + LOCK_LIMIT;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < give_up => {
                tokio::time::sleep(LOCK_POLL).await;
            }
            Err(Errno::WOULDBLOCK) => {
                let text = format!("another process holds a lock on {}", parent.display());
                return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn see_that_it_is_free(path: &Path) -> io::Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::other("what is there is no socket"));
    }
    match socket::connect(path).await {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
        // Left by one that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_socket_that_nobody_listens_on_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path).await.unwrap_err();
        assert!(error.message.contains("is no socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();

        let first = Listener::bind(&path).await.unwrap();
        let error = Listener::bind(&path).await.unwrap_err();
        assert!(error.message.contains("another process listens"), "{error}");
        drop(first);
        let second = Listener::bind(&path).await.unwrap();
        second.remove().await.unwrap();
        assert!(!path.try_exists().unwrap());
        second.remove().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_many_that_start_at_once_on_a_stale_socket_one_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        for _ in 0..20 {
            // Dropped without being removed: stale.
            let starting = (0..8).map(|_| {
                let path = path.clone();
                tokio::spawn(async move { Listener::bind(&path).await })
            });
            let bound = futures::future::join_all(starting.collect::<Vec<_>>()).await;
            let listening = bound.into_iter().map(Result::unwrap).filter(Result::is_ok);
            let listening: Vec<_> = listening.collect();
            assert_eq!(listening.len(), 1);
            assert!(socket::connect(&path).await.is_ok(), "it is the one at the path");
        }
    }
}
