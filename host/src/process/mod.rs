//! Processes: which one exactly, signals that cannot hit another, and children that die with us.
//!
//! # Invariants
//! 1. A process is known by pid, start time and boot id ([`ProcessIdentity`]). A signal goes
//!    through a pidfd that was opened first and whose process was then compared.
//! 2. Children are started by one thread ([`Spawner`]) that lives as long as the node, because
//!    the parent-death signal fires when the *thread* that spawned ends.
//! 3. A child has its own process group, only the descriptors that it was given, and dies with
//!    its parent (`PR_SET_PDEATHSIG`, parent checked again after it).
//! 4. "Already gone" is success; "could not look" is an error, and so is EPERM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::id::Mark;
use matchlock_model::identity::{Namespaces, ProcessIdentity};

mod before_exec;
mod fake;
mod group;
mod linux;
mod namespaces;
mod spawn;

pub use fake::FakeProcesses;
pub(crate) use linux::boot_id;
pub use linux::{LinuxProcesses, POINTS};
pub use spawn::POINTS as SPAWN_POINTS;
pub use spawn::{Child, ChildExit, ChildSpec, SpawnError, Spawner};

/// Forbids core dumps of this process and its children: they would hold what the guest and its
/// commands hold, secrets included. One byte, not none: a limit of 1 also keeps the kernel from
/// piping a dump to a program, which a limit of 0 does not.
///
/// # Errors
/// When the kernel refuses.
pub fn forbid_core_dumps() -> io::Result<()> {
    let limit = rustix::process::Rlimit { current: Some(1), maximum: Some(1) };
    match rustix::process::setrlimit(rustix::process::Resource::Core, limit) {
        // Somebody has set a lower hard limit already, and we may not raise it: as good.
        Err(rustix::io::Errno::PERM) => Ok(()),
        result => Ok(result?),
    }
}

/// Why a process could not be looked at or ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The kernel did not let us look.
    #[error("could not look at process {pid}")]
    Look {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// The kernel did not let us list the processes.
    #[error("could not list the processes of this host")]
    List(#[source] io::Error),
    /// The signal was refused.
    #[error("could not send signal {signal} to process {pid}")]
    Signal {
        /// The process.
        pid: i32,
        /// The signal's number.
        signal: i32,
        /// Why.
        source: io::Error,
    },
    /// It got SIGKILL and is still there.
    #[error("process {pid} is still there {waited:?} after SIGKILL")]
    WillNotDie {
        /// The process.
        pid: i32,
        /// How long it was given.
        waited: Duration,
    },
    /// The identity was recorded in another pid namespace, so its pid means nothing here.
    #[error("process {pid} was recorded in another pid namespace ({recorded}, here {here})")]
    OtherNamespace {
        /// The recorded pid.
        pid: i32,
        /// The recorded namespace.
        recorded: String,
        /// Ours.
        here: String,
    },
}

/// A process of this host that carries a mark of ours in its argv, or runs below a VM directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkedProcess {
    /// Which process.
    pub identity: ProcessIdentity,
    /// The mark from its argv.
    pub mark: Mark,
    /// Its working directory, if it could be read.
    pub cwd: Option<PathBuf>,
}

/// What is seen of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamespaceSighting {
    /// A thread is in it, a file of any mount namespace or an open descriptor keeps it, or this
    /// process does not see all processes of the host. A number that was given to a new namespace
    /// counts too.
    There,
    /// Nothing that could be seen is in it, but some process could not be looked at.
    Unseen,
    /// Nothing is in it or keeps it. (A socket alone might: that is seen nowhere.)
    Gone,
}

/// How much of this host's CPUs a process got, all of its threads together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuShare {
    /// How long it ran.
    pub had: Duration,
    /// How long it could have run and waited for a CPU.
    pub waited: Duration,
}

/// Looking at processes and ending them.
#[async_trait]
pub trait Processes: Send + Sync {
    /// This process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    fn own_identity(&self) -> Result<ProcessIdentity, ProcessError>;

    /// The namespaces of this process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    fn own_namespaces(&self) -> Result<Namespaces, ProcessError>;

    /// Whether this process sees every process of the host: it is in the first pid namespace,
    /// whose process list holds those of all others too.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    fn sees_all_processes(&self) -> Result<bool, ProcessError>;

    /// Whether a network namespace, as `device:inode`, is still there.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    fn look_for_network_namespace(
        &self,
        namespace: &str,
    ) -> Result<NamespaceSighting, ProcessError>;

    /// Whether exactly this process still exists (a zombie counts as gone).
    ///
    /// # Errors
    /// When it could not be looked at; that is not "gone".
    fn is_alive(&self, identity: &ProcessIdentity) -> Result<bool, ProcessError>;

    /// How much of the CPUs exactly this process got so far; `None` when it is gone.
    ///
    /// # Errors
    /// When it could not be looked at.
    fn cpu_share(&self, identity: &ProcessIdentity) -> Result<Option<CpuShare>, ProcessError>;

    /// All processes with a mark in an argument of their argv (`-name <mark>`, `--id <mark>`):
    /// each argument is compared whole, or as the part of a comma-separated `-name` value.
    ///
    /// # Errors
    /// When the process list could not be read. A process that ends meanwhile is left out.
    fn find_marked(&self) -> Result<Vec<MarkedProcess>, ProcessError>;

    /// SIGKILL to exactly this process, then waits until it is gone. Gone already is success; a
    /// pid that now belongs to another process is success too, and that process is not touched.
    ///
    /// # Errors
    /// When it could not be looked at, the signal was refused, or it is still there after
    /// `deadline`.
    async fn kill(
        &self,
        identity: &ProcessIdentity,
        deadline: Duration,
    ) -> Result<(), ProcessError>;
}
