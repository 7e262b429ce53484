//! The process group of a child: itself, and what it has started and not put elsewhere.
//!
//! A program that is named instead of ours may be a script that starts ours and waits: killed, it would
//! leave it running. So the group is killed when its leader has ended, and the leader is gone when all
//! of it is.
//!
//! # Invariants
//! 1. The group is killed before its leader is reaped: until then its number is no other's.
//!
//! # Failure
//! One that cannot be killed, or does not end, is told and not waited for any longer than
//! [`PATIENCE`]; it carries the mark of its VM, and `matchlock gc` finds it by that.

use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process_group, test_kill_process_group, waitid,
};

use super::spawn::ChildExit;

/// How long what was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often it is looked at meanwhile.
pub(super) const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

/// The group that a child leads.
#[derive(Debug)]
pub(super) struct Group {
    leader: Pid,
    /// How the leader has ended, and when that was seen.
    ended: Option<(ChildExit, Instant)>,
}

impl Group {
    pub(super) const fn of(leader: Pid) -> Self {
        Self { leader, ended: None }
    }

    /// Whether the leader was reaped, and others are waited for.
    pub(super) const fn is_ending(&self) -> bool {
        self.ended.is_some()
    }

    /// How the leader has ended; `None` as long as anybody of the group is there.
    pub(super) fn exit(&mut self, leader: &mut Child) -> Option<ChildExit> {
        if self.ended.is_none() {
            self.ended = self.reap(leader).map(|exit| (exit, Instant::now()));
        }
        let (exit, since) = self.ended?;
        let is_over = match test_kill_process_group(self.leader) {
            Err(Errno::SRCH) => true,
            Ok(()) | Err(Errno::PERM) if since.elapsed() < PATIENCE => false,
            left => {
                let pid = self.leader.as_raw_nonzero();
                tracing::error!(pid, ?left, "what a child has started does not end");
                true
            }
        };
        is_over.then_some(exit)
    }

    /// Kills what the leader leaves, and reaps it; `None` while it runs.
    fn reap(&self, leader: &mut Child) -> Option<ChildExit> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = self.leader.as_raw_nonzero();
        match waitid(WaitId::Pid(self.leader), options) {
            Ok(None) => return None,
            // The zombie is of the group, so there is somebody.
            Ok(Some(_)) => {
                if let Err(error) = kill_process_group(self.leader, Signal::KILL) {
                    tracing::error!(pid, %error, "could not kill what a child has started");
                }
            }
            Err(error) => tracing::error!(pid, %error, "could not look at a child"),
        }
        match leader.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(ChildExit::Status(status)),
            Err(error) => {
                tracing::error!(pid, %error, "could not collect a child");
                Some(ChildExit::Unknown)
            }
        }
    }
}
