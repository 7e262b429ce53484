//! The commands of a guest: which there are, which there were, and the rules for all of them.
//!
//! ```text
//!   Exec ─► Jobs ─► launch ─► Job ◄─ pump ─► pipes
//!   File, Attach ─┘            ▲ ◄─ files ─► a file
//!                              └─ stream (one at a time)
//! ```
//!
//! # Invariants
//! 1. At most [`MAX_JOBS`] jobs are kept, ended ones included: only `Release` forgets a job.
//! 2. An id is used once. The last [`REMEMBERED`] are remembered; ids are random, so an older one
//!    does not come back by itself.
//! 3. Why a command was not executed can be asked for again, as long as it is among the last
//!    [`MAX_JOBS`] failures: the link may have broken before the answer.

mod files;
pub mod job;
pub mod output;
mod pump;
pub mod stdin;
pub mod stream;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use matchlock_wire::message::{ExecFailure, ExecFailureKind, ExecStart, FileStart, JobId};

use crate::boot::console;
use crate::launch::Launcher;
use job::Job;
use rustix::process::Pid;

/// How many jobs there may be at once.
pub const MAX_JOBS: usize = 64;

/// How many used ids are remembered.
pub const REMEMBERED: usize = 16 * 1024;

/// All jobs of a guest.
#[derive(Debug)]
pub struct Jobs {
    launcher: Launcher,
    jobs: RefCell<HashMap<JobId, Rc<Job>>>,
    used: RefCell<UsedIds>,
    failures: RefCell<VecDeque<(JobId, ExecFailure)>>,
    closed: Cell<bool>,
    scratch: RefCell<Vec<u8>>,
}

#[derive(Debug, Default)]
struct UsedIds {
    known: HashSet<JobId>,
    order: VecDeque<JobId>,
}

impl UsedIds {
    /// False if the id was used before.
    fn add(&mut self, id: JobId) -> bool {
        if !self.known.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

fn failure(kind: ExecFailureKind, message: &str) -> ExecFailure {
    ExecFailure { kind, message: message.to_owned() }
}

impl Jobs {
    /// No jobs yet.
    pub fn new(launcher: Launcher) -> Rc<Self> {
        Rc::new(Self {
            launcher,
            jobs: RefCell::default(),
            used: RefCell::default(),
            failures: RefCell::default(),
            closed: Cell::new(false),
            scratch: RefCell::default(),
        })
    }

    /// Starts a command as a new job. Whether it is executed shows later, in the job.
    ///
    /// # Errors
    /// When the request is wrong, or the guest cannot take it.
    pub fn exec(self: &Rc<Self>, start: &ExecStart) -> Result<Rc<Job>, ExecFailure> {
        let (launched, command) = self.begin(start.job, || self.launcher.launch(start))?;
        let (job, pipes) = pump::split(start.job, launched);
        self.jobs.borrow_mut().insert(job.id, Rc::clone(&job));
        let pump = pump::run(Rc::clone(self), Rc::clone(&job), command, pipes);
        tokio::task::spawn_local(pump);
        Ok(job)
    }

    /// Opens files as a new job.
    ///
    /// # Errors
    /// When the request is wrong, the files cannot be opened, or the guest cannot take it.
    pub fn file(self: &Rc<Self>, start: &FileStart) -> Result<Rc<Job>, ExecFailure> {
        let opened = self.begin(start.job, || files::open(&start.op))?;
        let job = Rc::new(Job::new(start.job, None, opened.takes_stdin(), None));
        self.jobs.borrow_mut().insert(job.id, Rc::clone(&job));
        tokio::task::spawn_local(files::run(Rc::clone(self), Rc::clone(&job), opened));
        Ok(job)
    }

    /// Begins a new job, if its id is new and there is room. What fails is remembered under its id.
    fn begin<T>(
        &self,
        id: JobId,
        begin: impl FnOnce() -> Result<T, ExecFailure>,
    ) -> Result<T, ExecFailure> {
        if self.closed.get() {
            let message = "the guest is shutting down";
            return Err(failure(ExecFailureKind::Unavailable, message));
        }
        if !self.used.borrow_mut().add(id) {
            let message = "this job id was used before";
            return Err(failure(ExecFailureKind::Request, message));
        }
        let result = if self.jobs.borrow().len() < MAX_JOBS {
            begin()
        } else {
            let message = format!("the guest has {MAX_JOBS} jobs already");
            Err(failure(ExecFailureKind::Unavailable, &message))
        };
        result.inspect_err(|failure| self.remember_failure(id, failure.clone()))
    }

    /// A job that is to be continued.
    ///
    /// # Errors
    /// Why it was not executed, or that there is no such job.
    pub fn find(&self, id: JobId) -> Result<Rc<Job>, ExecFailure> {
        if let Some(job) = self.jobs.borrow().get(&id) {
            return Ok(Rc::clone(job));
        }
        let failures = self.failures.borrow();
        let known = failures.iter().find(|(failed, _)| *failed == id);
        Err(known.map_or_else(
            || failure(ExecFailureKind::Request, "there is no such job"),
            |(_, failure)| failure.clone(),
        ))
    }

    /// Ends a job: kills what runs, forgets the rest. An unknown one is ended already.
    pub fn release(&self, id: JobId) {
        if let Some(job) = self.jobs.borrow_mut().remove(&id) {
            job.release();
        }
    }

    /// Refuses new jobs from now on, and hangs up on those with a terminal: a shell that talks to
    /// somebody takes no notice of the SIGTERM that will come. Commands that want another signal
    /// get it now; their small inits are answered.
    pub fn close(&self) -> Vec<Pid> {
        self.closed.set(true);
        for job in self.jobs.borrow().values().filter(|job| job.has_terminal()) {
            if let Err(error) = job.signal(libc::SIGHUP) {
                console::failure("cannot hang up a terminal", &error);
            }
        }
        let mut told = Vec::new();
        for job in self.jobs.borrow().values() {
            match job.stop() {
                Ok(init) => told.extend(init),
                // It gets SIGTERM with all others.
                Err(error) => console::failure("cannot send a command its signal", &error),
            }
        }
        told
    }

    /// Whether new jobs are refused: the guest shuts down.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// How many jobs there are.
    pub fn count(&self) -> usize {
        self.jobs.borrow().len()
    }

    /// The command of this job was not executed, so there is no job.
    fn start_failed(&self, job: &Job, failure: ExecFailure) {
        self.jobs.borrow_mut().remove(&job.id);
        self.remember_failure(job.id, failure);
    }

    fn remember_failure(&self, id: JobId, failure: ExecFailure) {
        let mut failures = self.failures.borrow_mut();
        if failures.len() == MAX_JOBS {
            failures.pop_front();
        }
        failures.push_back((id, failure));
    }

    /// Lends the one buffer that all pumps read into.
    fn with_scratch<T>(&self, size: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut scratch = self.scratch.borrow_mut();
        scratch.resize(size, 0);
        work(&mut scratch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_refused_as_long_as_they_are_remembered() {
        let id = |n: usize| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            JobId(bytes)
        };
        let mut used = UsedIds::default();
        assert!(used.add(id(0)));
        assert!(!used.add(id(0)));
        assert!((1..=REMEMBERED).all(|n| used.add(id(n))));
        assert!(!used.add(id(1)));
        assert!(used.add(id(0)), "the oldest was forgotten");
        assert_eq!(used.known.len(), REMEMBERED);
        assert_eq!(used.order.len(), REMEMBERED);
    }
}
