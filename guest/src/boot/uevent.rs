//! The kernel's announcements of devices, to wait for one without guessing a time.

use std::cell::OnceCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The multicast group of the kernel's own announcements.
const KERNEL_GROUP: u32 = 1;

/// A subscription to the announcements, made when something is first waited for: mostly everything is
/// there already.
#[derive(Debug, Default)]
pub struct Uevents(OnceCell<OwnedFd>);

impl Uevents {
    /// Calls `look` now and after every announcement until it finds something. `None` when
    /// `patience` has run out.
    ///
    /// # Errors
    /// Those of `look`, and when the kernel has no such socket or it fails.
    pub fn wait_for<T>(
        &self,
        patience: Duration,
        mut look: impl FnMut() -> io::Result<Option<T>>,
    ) -> io::Result<Option<T>> {
        if self.0.get().is_none()
            && let Some(found) = look()?
        {
            return Ok(Some(found));
        }
        let socket = self.subscribed()?;
        let deadline = Instant::now() + patience;
        loop {
            drain(socket)?;
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut ready = [PollFd::new(socket, PollFlags::IN)];
            match poll(&mut ready, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What happens from the first call on is announced; whoever waits looks once more after it.
    fn subscribed(&self) -> io::Result<&OwnedFd> {
        if let Some(socket) = self.0.get() {
            return Ok(socket);
        }
        let socket = subscribe()?;
        Ok(self.0.get_or_init(|| socket))
    }
}

fn subscribe() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        flags,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    Ok(socket)
}

fn drain(socket: &OwnedFd) -> io::Result<()> {
    let mut announcement = [0; 4096];
    loop {
        match recv(socket.as_raw_fd(), &mut announcement, MsgFlags::MSG_DONTWAIT) {
            // Announcements that did not fit into the socket are as good as read ones.
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}
