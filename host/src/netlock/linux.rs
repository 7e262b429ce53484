//! The lock as an abstract unix socket: the kernel keeps their names per network namespace, lets
//! each be bound once, and frees it with the socket.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream as BlockingStream};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_failpoints::{Area, Injected};
use rustix::net::sockopt;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::{HeldNetworkLock, Holder, NetworkLockError, NetworkLocks};

/// The socket's name.
const NAME: &[u8] = b"matchlock-subnets";

/// What a crash may come between.
pub const POINTS: Area = Area::new("netlock", &["acquire"]);

impl From<Injected> for NetworkLockError {
    fn from(injected: Injected) -> Self {
        Self::Socket(injected.into())
    }
}

/// How long to wait at most before trying again. A holder's end is seen at once, but not when its
/// queue of waiters is full, or when it had not begun to listen.
const RETRY: Duration = Duration::from_millis(20);

/// The lock of the process's network namespace.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinuxNetworkLocks;

impl LinuxNetworkLocks {
    /// The lock of the process's network namespace.
    #[must_use]
    pub const fn new() -> Self {
        Self
    }
}

fn address() -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(NAME)
}

/// The lock, or `None` when somebody holds it.
fn try_acquire() -> io::Result<Option<UnixListener>> {
    match UnixListener::bind_addr(&address()?) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error),
    }
}

/// A connection to the holder, and who that is; `None` when it has just gone, does not listen yet,
/// or has too many waiters.
fn connect() -> Option<(UnixStream, Holder)> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    let address = SocketAddrUnix::new_abstract_name(NAME).ok()?;
    rustix::net::connect(&socket, &address).ok()?;
    let peer = sockopt::socket_peercred(&socket).ok()?;
    let holder = Holder { pid: peer.pid.as_raw_pid(), uid: peer.uid.as_raw() };
    Some((UnixStream::from_std(BlockingStream::from(socket)).ok()?, holder))
}

/// Waits until the holder's end closes, but not long.
async fn wait_for(holder: Option<UnixStream>, deadline: Instant) {
    // Not all waiters at the same moment: half of it is chance. Without random bytes they come at
    // the same moment after all, and one of them gets the lock.
    let mut random = [0];
    if getrandom::fill(&mut random).is_err() {
        random = [0];
    }
    let pause = RETRY.mul_f64(0.5 + f64::from(random[0]) / 512.0);
    let until = deadline.min(Instant::now() + pause);
    let closed = async {
        match holder {
            // The holder never writes: whatever comes is the end.
            Some(mut stream) => drop(stream.read(&mut [0]).await),
            None => std::future::pending().await,
        }
    };
    drop(timeout_at(until, closed).await);
}

#[async_trait]
impl NetworkLocks for LinuxNetworkLocks {
    async fn acquire(&self, patience: Duration) -> Result<HeldNetworkLock, NetworkLockError> {
        POINTS.before("acquire")?;
        let begun = Instant::now();
        let mut last_holder = None;
        loop {
            if let Some(listener) = try_acquire().map_err(NetworkLockError::Socket)? {
                POINTS.after("acquire")?;
                return Ok(Box::new(listener));
            }
            let (stream, holder) = connect().unzip();
            last_holder = holder.or(last_holder);
            if begun.elapsed() >= patience {
                return Err(NetworkLockError::Held {
                    waited: begun.elapsed(),
                    holder: last_holder,
                });
            }
            wait_for(stream, begun + patience).await;
        }
    }
}
