//! Reaps this process's children and tells their owners.
//!
//! ```text
//!  launch ── watch(pid) ──► table ◄── SIGCHLD: waitpid(pid, WNOHANG) of each entry
//!                             └─► oneshot: raw status, to the job
//! ```
//!
//! # Invariants
//! 1. A child is entered in the same turn of the loop in which it was cloned, so none is missed.
//! 2. Only a child that was not reaped is signalled: its pid cannot be anybody else's.
//! 3. As PID 1 everything is reaped, also children that nobody watches; elsewhere (in tests) only
//!    the watched ones, because the others have another owner.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, oneshot};

use crate::boot::console;

/// The children that are awaited.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: RefCell<HashMap<Pid, oneshot::Sender<WaitStatus>>>,
    one_gone: Notify,
}

impl Reaper {
    /// Starts reaping in the current `LocalSet`.
    ///
    /// # Errors
    /// When SIGCHLD cannot be received.
    pub fn start() -> io::Result<Rc<Self>> {
        let mut children = signal(SignalKind::child())?;
        let reaper = Rc::new(Self::default());
        let weak = Rc::downgrade(&reaper);
        tokio::task::spawn_local(async move {
            while children.recv().await.is_some() {
                let Some(reaper) = weak.upgrade() else { return };
                reaper.reap();
            }
        });
        Ok(reaper)
    }

    /// Watches a child that was just cloned; the answer is its end.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<WaitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.watched.borrow_mut().insert(pid, sender);
        receiver
    }

    /// Kills a watched child. One that is gone already is killed as well as can be.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self, pid: Pid) -> io::Result<()> {
        if !self.watched.borrow().contains_key(&pid) {
            return Ok(());
        }
        kill_process(pid, Signal::KILL).map_err(io::Error::from)
    }

    /// Waits until no watched child is left.
    pub async fn all_gone(&self) {
        while !self.watched.borrow().is_empty() {
            self.one_gone.notified().await;
        }
    }

    fn reap(&self) {
        let pids: Vec<Pid> = self.watched.borrow().keys().copied().collect();
        for pid in pids {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Ok(Some((_, status))) => self.gone(pid, status),
                Ok(None) => {}
                // Without its status we only know that it is gone: dropping the sender says so.
                Err(error) => {
                    console::line(format_args!("cannot reap process {pid}: {error}"));
                    self.watched.borrow_mut().remove(&pid);
                    self.one_gone.notify_one();
                }
            }
        }
        if std::process::id() == 1 {
            self.reap_strangers();
        }
    }

    fn reap_strangers(&self) {
        loop {
            match waitpid(None, WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.gone(pid, status),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(error) => {
                    console::line(format_args!("cannot reap: {error}"));
                    return;
                }
            }
        }
    }

    fn gone(&self, pid: Pid, status: WaitStatus) {
        let owner = self.watched.borrow_mut().remove(&pid);
        if owner.is_some_and(|owner| owner.send(status).is_err()) {
            // A job that was released no longer waits for its end.
        }
        self.one_gone.notify_one();
    }
}
