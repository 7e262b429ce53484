//! Our stdin, for a command: read by a thread of its own, and no further than the command goes.
//!
//! # Invariants
//! 1. Nothing is read after [`Feeder`] is dropped: what is typed then is for the next program. (A
//!    read that another reader of the same terminal has forestalled cannot be taken back.)
//! 2. The flags of the file are not changed: they belong to everybody who has it open.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;

use bytes::Bytes;
use matchlock_host::guest_link::StdinInput;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::{mpsc, oneshot};

/// How much is read at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Reads until it is dropped, or until the end, which is the end of the channel too.
#[derive(Debug)]
pub struct Feeder {
    /// Its closing ends the thread.
    _stop: OwnedFd,
    ended: Option<oneshot::Receiver<()>>,
}

impl Feeder {
    /// Begins to read.
    ///
    /// # Errors
    /// When there is no thread or descriptor to be had.
    pub fn start(to: mpsc::Sender<StdinInput>) -> io::Result<Self> {
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let (end, ended) = oneshot::channel();
        let read = move || {
            if feed(&to, &stopped) && end.send(()).is_err() {
                tracing::trace!("stdin has ended after its command");
            }
        };
        thread::Builder::new().name("stdin".to_owned()).spawn(read)?;
        Ok(Self { _stop: stop, ended: Some(ended) })
    }

    /// Waits until stdin has ended, or could not be read further; once.
    pub async fn ended(&mut self) {
        if let Some(ended) = &mut self.ended {
            let result = ended.await;
            self.ended = None;
            if result.is_ok() {
                return;
            }
        }
        // It was the command that took no more.
        std::future::pending().await
    }
}

/// Reads on. True at the end of stdin, false when nobody wants any more of it.
fn feed(to: &mpsc::Sender<StdinInput>, stopped: &OwnedFd) -> bool {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = match next(&mut chunk, stopped) {
            Ok(Some(read)) => read,
            Ok(None) => return false,
            Err(error) => {
                // A terminal that is gone has no more to say; that is no fault.
                if error.raw_os_error() != Some(Errno::IO.raw_os_error()) {
                    tracing::warn!(%error, "could not read stdin");
                }
                return true;
            }
        };
        let data = Bytes::copy_from_slice(chunk.get(..read).unwrap_or_default());
        if data.is_empty() {
            return true;
        }
        // The command may end without reading all of it.
        if to.blocking_send(StdinInput::Data(data)).is_err() {
            return false;
        }
    }
}

/// Our stdin, for whoever reads it on a thread of its own.
#[derive(Debug)]
pub struct Stdin {
    stopped: OwnedFd,
}

/// Ends a read of [`Stdin`] that waits, and all later ones, by being dropped.
#[derive(Debug)]
pub struct StopReading {
    _stop: OwnedFd,
}

impl Stdin {
    /// To be read from, until the other is dropped.
    ///
    /// # Errors
    /// When there is no descriptor to be had.
    pub fn until_dropped() -> io::Result<(Self, StopReading)> {
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Self { stopped }, StopReading { _stop: stop }))
    }
}

impl io::Read for Stdin {
    /// Answers [`io::ErrorKind::Interrupted`] once it is stopped: who reads asks then why.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        next(buffer, &self.stopped)?.ok_or_else(|| io::ErrorKind::Interrupted.into())
    }
}

/// The next bytes; `None` when nobody wants any more.
fn next(chunk: &mut [u8], stopped: &OwnedFd) -> io::Result<Option<usize>> {
    let stdin = rustix::stdio::stdin();
    loop {
        let mut ready =
            [PollFd::new(stopped, PollFlags::IN), PollFd::from_borrowed_fd(stdin, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let [stopped, readable] = &ready;
        if !stopped.revents().is_empty() {
            return Ok(None);
        }
        if readable.revents().is_empty() {
            continue;
        }
        match rustix::io::read(stdin, &mut *chunk) {
            Ok(read) => return Ok(Some(read)),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
