//! The virtio-serial port as an asynchronous byte stream.
//!
//! ```text
//!  tokio ── AsyncFd(epoll) ── edges ── /dev/vportNpM ◄──► QEMU's chardev
//! ```
//!
//! The port itself is not in tokio's reactor: its HUP is a state that comes and goes with the
//! host, and tokio never forgets a HUP. A private epoll object holds the port edge-triggered, and
//! the reactor holds that object.
//!
//! # Invariants
//! 1. A system call is tried before an edge is awaited, in both directions.
//! 2. Whoever consumes an edge serves the other direction as well: a reader that finds nothing
//!    tries the pending write.
//! 3. After 64 KiB moved without a pause the port yields once, so one busy link does not
//!    keep the jobs from running.
//! 4. At most 32 KiB are held back for writing.
//!
//! # Failure
//! No host: a read is the end, a write is `BrokenPipe` and forgets what was held back. A port that
//! is gone fails for good.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use matchlock_wire::PORT_NAME;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::boot::uevent::Uevents;
use crate::session::Line;

/// The most that one write to the port takes.
const WRITE_BYTES: usize = 32 * 1024;

/// How much is moved before the port yields.
const BUDGET_BYTES: usize = 64 * 1024;

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// No port of that name came up in time.
    #[error("there is no virtio port named {PORT_NAME} after {waited:?}")]
    Missing {
        /// How long it was awaited.
        waited: Duration,
    },
    /// Ports could not be looked for.
    #[error("cannot look for virtio ports")]
    Look(#[source] io::Error),
    /// The port could not be opened.
    #[error("cannot open the virtio port {path}")]
    Open {
        /// Its device node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be watched.
    #[error("cannot watch the virtio port")]
    Watch(#[source] io::Error),
}

/// Finds the link's port by its name, waits for it if need be, and opens it, not blocking.
///
/// # Errors
/// When it does not come up within `patience`, or cannot be opened.
pub fn open_file(uevents: &Uevents, patience: Duration) -> Result<OwnedFd, PortError> {
    let path = uevents
        .wait_for(patience, find)
        .map_err(PortError::Look)?
        .ok_or(PortError::Missing { waited: patience })?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|errno| PortError::Open { path, source: errno.into() })
}

/// The open port.
#[derive(Debug)]
pub struct Port {
    events: AsyncFd<OwnedFd>,
    file: OwnedFd,
    out: Vec<u8>,
    written: usize,
    moved: usize,
}

impl Port {
    /// Finds the link's port by its name, waits for it if need be, and opens it.
    ///
    /// # Errors
    /// When it does not come up within `patience`, or cannot be opened.
    pub fn open(uevents: &Uevents, patience: Duration) -> Result<Self, PortError> {
        Self::adopt(open_file(uevents, patience)?)
    }

    /// Takes the port over from [`open_file`].
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn adopt(file: OwnedFd) -> Result<Self, PortError> {
        Self::watch(file).map_err(PortError::Watch)
    }

    fn watch(file: OwnedFd) -> io::Result<Self> {
        // One that was handed over an exec is for nobody else.
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC)?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &file, epoll::EventData::new_u64(0), edges)?;
        // SAFETY: the descriptor is owned by what registers it, and nothing else closes it.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }
            .map_err(io::Error::from)?;
        Ok(Self { events, file, out: Vec::new(), written: 0, moved: 0 })
    }

    /// Ready after an edge of the port, in either direction.
    fn poll_edge(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.events.poll_read_ready(cx))?;
            let mut edge = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }];
            if epoll::wait(self.events.get_ref(), &mut edge, Some(&NO_WAIT))? > 0 {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
        }
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut state = [PollFd::new(&self.file, PollFlags::OUT)];
        poll(&mut state, Some(&NO_WAIT))?;
        Ok(state[0].revents().contains(PollFlags::HUP))
    }

    /// Whether it is time to let others run; the caller then returns `Pending`.
    fn budget_spent(&mut self, cx: &Context<'_>) -> bool {
        if self.moved < BUDGET_BYTES {
            return false;
        }
        self.moved = 0;
        cx.waker().wake_by_ref();
        true
    }

    /// Writes what is held back, as far as the port takes it now. True when all is written.
    fn drain(&mut self) -> io::Result<bool> {
        while self.written < self.out.len() {
            match rustix::io::write(&self.file, &self.out[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    self.moved += count;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if self.hung_up()? {
                        self.forget_output();
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                    return Ok(false);
                }
                Err(error) => {
                    self.forget_output();
                    return Err(error.into());
                }
            }
        }
        self.forget_output();
        Ok(true)
    }

    fn forget_output(&mut self) {
        self.out.clear();
        self.written = 0;
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.budget_spent(cx) {
                return Poll::Pending;
            }
            if self.drain()? {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_edge(cx))?;
        }
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let port = self.get_mut();
        loop {
            if port.budget_spent(cx) {
                return Poll::Pending;
            }
            match rustix::io::read(&port.file, buffer.initialize_unfilled()) {
                Ok(count) => {
                    buffer.advance(count);
                    port.moved += count;
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
            // The edge that brought us here may have been one for the writer.
            let pending = port.out.len() - port.written;
            if pending > 0 {
                // An error shows again in the writer's own call, for which it is woken.
                let progress = port.drain().is_err() || port.out.len() - port.written < pending;
                if progress {
                    cx.waker().wake_by_ref();
                }
            }
            ready!(port.poll_edge(cx))?;
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let port = self.get_mut();
        if port.out.len() >= WRITE_BYTES {
            ready!(port.poll_drain(cx))?;
        }
        let count = bytes.len().min(WRITE_BYTES - port.out.len());
        port.out.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_drain(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

impl Line for Port {
    fn poll_reopened(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.hung_up()? {
            ready!(self.poll_edge(cx))?;
        }
        Poll::Ready(Ok(true))
    }
}

/// Looks for the port once. Its name arrives from the hypervisor some time after the port.
fn find() -> io::Result<Option<PathBuf>> {
    let ports = match fs::read_dir("/sys/class/virtio-ports") {
        Ok(ports) => ports,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for port in ports {
        let port = port?;
        match fs::read_to_string(port.path().join("name")) {
            Ok(name) if name.trim_end() == PORT_NAME => {
                return Ok(Some(PathBuf::from("/dev").join(port.file_name())));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
