//! The link to the agent in a guest: configure it, run commands, shut it down.
//!
//! ```text
//!   UnixStream (virtio-serial) ─ resync handshake ─ yamux client ─ one stream per request or job
//!     connect ──────────────────► guard ─► driver ─┬─► session   hello, configure, shutdown
//!     (reconnect: once more)      (ledger)         └─► job       exec: output, stdin, signals
//! ```
//!
//! # Invariants
//! 1. Ready is the agent's answer to the handshake, never a timer.
//! 2. A hostile guest can at worst lose its own link: every length, count and rate is bounded; a
//!    stream opened by the guest, a flood of control frames or a malformed message ends the
//!    session with a named cause. Small frames are legal: they are held back, not punished.
//! 3. A session that failed takes its jobs' streams with it, not the jobs: they go on in the
//!    guest. When the session was lost they wait here for the next one and attach to it by id and
//!    offset: no byte is lost or comes twice, no command is executed and no signal sent twice.
//! 4. A slow reader of a job blocks that job only, and the command behind it.
//! 5. The session lives as long as its [`GuestLink`] or a command whose events are still received;
//!    after that the transport is closed, so that the guest sees it. Without its [`GuestLink`] there
//!    is no other session after it.
//! 6. What the host holds for a command does not grow with the number of sessions.
//!
//! # Failure
//! Every failure of the transport or the protocol ends the session, once, with one cause that all
//! requests and [`GuestLink::closed`] report. Commands report it as their last event when it is the
//! last session: after a violation, or when the link was given up or dropped. A request that is made
//! while there is no session waits for one until its deadline, and fails with the cause when there
//! will be none. A command that the guest refuses, a
//! request that is answered with a failure or too late, end nothing else.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use matchlock_model::exec::{ExecRefusal, ExecSpec, ExitStatus, OutputStream, TerminalSize};
use matchlock_model::file::FileOp;
use matchlock_model::guest::{AgentInfo, GuestConfig};
use tokio::sync::{mpsc, watch};

mod attach;
mod codec;
mod connect;
mod driver;
mod fake;
mod fake_files;
mod files;
mod guard;
mod hold;
mod job;
mod ledger;
mod line;
mod output;
mod scanner;
mod session;
mod sessions;
mod stdin;
mod stream;

pub use connect::YamuxConnector;
pub use fake::{FakeCommand, FakeConnector, FakeReadiness};
pub use files::FileEntries;
pub use session::MAX_JOBS;

#[cfg(test)]
mod attack_tests;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod mini_guest;
#[cfg(test)]
mod mini_jobs;
#[cfg(test)]
mod reconnect_tests;
#[cfg(test)]
mod tests;

/// Why the link or a request over it failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The transport ended or failed.
    #[error("the link to the guest was lost: {cause}")]
    Lost {
        /// What ended it.
        cause: String,
    },
    /// The guest broke the protocol, so the link was cut.
    #[error("the guest broke the link's protocol: {what}")]
    Protocol {
        /// What it did.
        what: String,
    },
    /// The guest speaks another version.
    #[error(
        "the guest's agent speaks protocol version {guest}, this matchlock speaks {host}: rebuild the guest bundle (make guest)"
    )]
    Version {
        /// The guest's version.
        guest: u16,
        /// Ours.
        host: u16,
    },
    /// The guest did not answer in time.
    #[error("the guest did not answer {what} within {waited:?}")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// The guest says that it failed.
    #[error("the guest refused {what}: {message}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its words.
        message: String,
    },
}

impl LinkError {
    /// A lost transport.
    #[must_use]
    pub fn from_io(error: &io::Error) -> Self {
        Self::Lost { cause: error.to_string() }
    }
}

/// A session with a guest's agent.
#[async_trait]
pub trait GuestLink: Send + Sync {
    /// What the agent said of itself.
    fn agent(&self) -> &AgentInfo;

    /// Tells the guest its hostname, hosts, DNS and the host's clock.
    ///
    /// # Errors
    /// When the link fails or the guest refuses.
    async fn configure(&self, config: &GuestConfig) -> Result<(), LinkError>;

    /// Starts a command. Returns once the guest has taken the request; whether it was executed is
    /// the session's first event.
    ///
    /// # Errors
    /// When the link fails.
    async fn exec(&self, spec: &ExecSpec) -> Result<ExecSession, LinkError>;

    /// Reads, writes or lists files. It is carried as a command is: `Started` says that the file is
    /// open, its contents are stdout or stdin; a failure after the start is a line on stderr and the
    /// exit code 1. Dropping the session's events leaves a file that is written as far as it is.
    ///
    /// # Errors
    /// When the link fails.
    async fn file(&self, op: &FileOp) -> Result<ExecSession, LinkError>;

    /// Asks the guest to end its commands, sync, unmount and power off; returns when it has begun.
    ///
    /// # Errors
    /// When the link fails or the guest refuses.
    async fn shutdown(&self, grace: Duration) -> Result<(), LinkError>;

    /// Waits until the agent has answered that it is there.
    ///
    /// # Errors
    /// When the link fails.
    async fn ping(&self) -> Result<(), LinkError>;

    /// Waits until the session has ended and says why.
    async fn closed(&self) -> LinkError;

    /// Begins a new session over the machine's link after the last one has ended. Commands go on
    /// where they were: no byte is lost or comes twice.
    ///
    /// # Errors
    /// When the transport fails, the guest broke the protocol before, `deadline` passes, or the link
    /// was given up.
    async fn reconnect(
        &self,
        machine: &dyn crate::hypervisor::Machine,
        deadline: Duration,
    ) -> Result<(), LinkError>;

    /// Says that there will be no session after this one: commands that wait for one end with the
    /// cause of its end.
    fn give_up(&self);
}

/// Something that happened to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It was executed.
    Started,
    /// It could not be started; nothing follows.
    Refused(ExecRefusal),
    /// It printed.
    Output(OutputStream, Bytes),
    /// It has ended and everything it printed was delivered; nothing follows.
    Exited(ExitStatus),
}

/// Something for a command's stdin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StdinInput {
    /// Bytes, at any length; they are cut to what a frame carries.
    Data(Bytes),
    /// No more stdin. Dropping the sender means the same.
    Eof,
}

/// A command that runs in a guest.
///
/// `stdin` is bounded: sending waits while the command does not read. `events` is bounded: a
/// receiver that does not receive blocks the command. The channel of events ends after the last
/// event, or with an error when the link has ended for good; a lost session that another one follows
/// shows in nothing but time, and in a signal that was on its way and may be lost. Dropping `events` releases the job: the guest
/// kills the command with all its children.
#[derive(Debug)]
pub struct ExecSession {
    /// To the command's stdin; closed from the start when the command has none.
    pub stdin: mpsc::Sender<StdinInput>,
    /// Signals for the command's process group; they overtake stdin that still waits.
    pub signals: mpsc::Sender<i32>,
    /// The size of the command's terminal; changing it resizes the terminal. Nobody listens when the
    /// command has none.
    pub size: watch::Sender<TerminalSize>,
    /// From the command.
    pub events: mpsc::Receiver<Result<ExecEvent, LinkError>>,
}

/// Connects links.
#[async_trait]
pub trait LinkConnector: Send + Sync {
    /// Shakes hands over this machine's link and waits for the agent's answer.
    ///
    /// # Errors
    /// When the transport fails, the versions differ, or `deadline` passes.
    async fn connect(
        &self,
        machine: &dyn crate::hypervisor::Machine,
        deadline: Duration,
    ) -> Result<Arc<dyn GuestLink>, LinkError>;

    /// Waits until the guest of a machine that is to be saved is on hold.
    ///
    /// # Errors
    /// When the transport fails, the versions differ, or `deadline` passes.
    async fn held(
        &self,
        machine: &dyn crate::hypervisor::Machine,
        deadline: Duration,
    ) -> Result<(), LinkError>;

    /// Tells the guest of a restored machine to go on as a machine of its own, and waits until it does.
    ///
    /// # Errors
    /// When the transport fails, the versions differ, or `deadline` passes.
    async fn resume(
        &self,
        machine: &dyn crate::hypervisor::Machine,
        deadline: Duration,
    ) -> Result<(), LinkError>;
}
