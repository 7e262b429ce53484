//! Hypervisors: launch one for a VM, watch it, end it.
//!
//! ```text
//!   launch ──► Machine ──┬─ open_link()   bytes to the guest's agent
//!                        ├─ wait_exit()   why it ended: power-off, reset, panic, a signal, an error
//!                        ├─ save()        its memory, for others to go on from
//!                        ├─ kill()        SIGKILL through a pidfd, waits until it is gone
//!                        └─ console_tail()  the last lines of the guest's console
//! ```
//!
//! # Invariants
//! 1. The process carries the VM's mark in its argv and has the VM's directory as its cwd.
//! 2. It dies with the process that launched it.
//! 3. Its exit status proves nothing: the reason comes from QMP's SHUTDOWN event and, for a guest
//!    panic, from the console.
//! 4. Nothing that a user supplied is on the guest's kernel command line.
//! 5. `kill` of a machine that is gone is success.
//! 6. A machine holds its TAP open as long as it lives, and nothing here does after the launch.
//!
//! 7. A machine that is to be saved, and one that goes on from what was saved, have the same devices,
//!    memory and kernel command line; what is behind the devices may differ.
//!
//! # Failure
//! A launch that fails leaves no process: what was spawned is killed before the error is returned.
//! Dropping the launch future half-way does the same.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::id::Mark;
use matchlock_model::identity::ProcessIdentity;
use tokio::net::UnixStream;

use crate::firewall::FirewallHandle;
use crate::process::{ProcessError, SpawnError};
use crate::rootfs::VmPaths;

mod fake;
mod qemu;

pub use fake::{FakeHypervisor, FakeMachine, LaunchFault};
pub use qemu::{Acceleration, POINTS, Qemu, QemuOptions};

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// The mark for its argv.
    pub mark: Mark,
    /// The VM's paths.
    pub paths: VmPaths,
    /// The guest kernel, an uncompressed ELF with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The image: an EROFS file, attached read-only.
    pub base_disk: PathBuf,
    /// The number of virtual CPUs.
    pub vcpus: u32,
    /// The guest's memory in MiB.
    pub memory_mb: u64,
    /// The NIC, if it has one.
    pub nic: Option<Nic>,
    /// How it begins.
    pub start: Start,
}

/// How a machine begins.
#[derive(Debug, Clone, Default)]
pub enum Start {
    /// It boots.
    #[default]
    Boot,
    /// It boots as far as no two machines differ, and waits to be saved.
    Hold,
    /// It goes on from the memory of a machine that was held, once it is told to.
    Restore(Arc<File>),
}

/// What was saved of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// How many bytes.
    pub bytes: u64,
    /// Their SHA-256, in hex.
    pub sha256: String,
}

/// A NIC on a TAP that is open already: a hypervisor needs no privilege for it.
#[derive(Debug, Clone)]
pub struct Nic {
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The largest packet, in bytes: the guest's driver takes it over and accepts no larger one.
    pub mtu: u16,
    /// The TAP. The hypervisor gets a descriptor of its own, so a TAP that is not persistent
    /// goes with it once all others are closed; this one is closed by dropping it.
    pub tap: Arc<OwnedFd>,
    /// What keeps the NIC's firewall there. The hypervisor holds the socket of its own and does not
    /// use it: once this is dropped, the tables go with the machine, whatever its owner does.
    pub firewall: Option<Arc<FirewallHandle>>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineExit {
    /// Why.
    pub reason: ExitReason,
    /// The hypervisor process's exit status, as text (`exit status: 0`, `signal: 9 (SIGKILL)`).
    pub status: String,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself (a reboot, a triple fault).
    Reset,
    /// The guest's kernel panicked; the line of the panic from the console.
    GuestPanic(String),
    /// We killed it.
    Killed,
    /// The hypervisor ended by itself or was killed by somebody else; the end of what it printed.
    Died(String),
}

impl fmt::Display for MachineExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            ExitReason::PowerOff => f.write_str("the guest powered off"),
            ExitReason::Reset => f.write_str("the guest reset itself"),
            ExitReason::GuestPanic(line) => write!(f, "the guest's kernel panicked: {line}"),
            ExitReason::Killed => f.write_str("the hypervisor was stopped by Matchlock"),
            ExitReason::Died(printed) if printed.is_empty() => {
                write!(f, "the hypervisor died ({})", self.status)
            }
            ExitReason::Died(printed) => {
                write!(f, "the hypervisor died ({}): {printed}", self.status)
            }
        }
    }
}

/// Why a machine could not be launched or ended.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The program is not installed.
    #[error("{program} is not installed: install {package}, or name the program in {variable}")]
    NotInstalled {
        /// The program.
        program: String,
        /// The Debian package.
        package: &'static str,
        /// The environment variable that names another.
        variable: &'static str,
    },
    /// A file that it needs is missing or cannot be read.
    #[error("could not read the {what} {path}")]
    File {
        /// What it is, e.g. `guest kernel`.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It could not be spawned.
    #[error("could not start the hypervisor")]
    Spawn(#[from] SpawnError),
    /// Its process could not be looked at or ended.
    #[error("could not control the hypervisor's process")]
    Process(#[from] ProcessError),
    /// Its control channel failed.
    #[error("the hypervisor's control channel failed: {what}")]
    Control {
        /// What was being done.
        what: String,
    },
    /// A socket or file in the VM's directory failed.
    #[error("could not {doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why.
        source: io::Error,
    },
    /// It ended before it was of use.
    #[error("{0}")]
    Ended(MachineExit),
}

/// Launches machines.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// The name in `vm_lifecycle.backend`.
    fn backend(&self) -> &'static str;

    /// How it runs guests, for people: `kvm`, `tcg`, `fake`.
    fn acceleration(&self) -> &'static str;

    /// Checks, before anything is made, that it could launch: the program is there and runs.
    ///
    /// # Errors
    /// What is missing and how to get it.
    fn check(&self) -> Result<(), HypervisorError>;

    /// What must be the same for a saved machine to be restored, besides the machine's own
    /// specification: the program, and all that is said to it.
    ///
    /// # Errors
    /// When the program is missing or cannot be looked at.
    async fn fingerprint(&self, spec: &MachineSpec) -> Result<String, HypervisorError>;

    /// Starts a machine. Returns when its process runs; the guest's agent is awaited through the
    /// link.
    ///
    /// # Errors
    /// When it cannot be started; then no process is left.
    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, HypervisorError>;
}

/// A machine that was launched.
#[async_trait]
pub trait Machine: Send + Sync {
    /// The hypervisor's process.
    fn identity(&self) -> ProcessIdentity;

    /// A new connection to the guest's link port. It may be opened before the guest is up: bytes
    /// wait. Only one connection is served at a time.
    ///
    /// # Errors
    /// When the socket is gone, i.e. the machine has ended.
    async fn open_link(&self) -> Result<UnixStream, HypervisorError>;

    /// Waits until the machine has ended and says why. May be called often and by many; each
    /// gets the same answer.
    async fn wait_exit(&self) -> MachineExit;

    /// SIGKILL, then waits until the process is gone and reaped.
    ///
    /// # Errors
    /// When it is still there after `deadline` or could not be looked at.
    async fn kill(&self, deadline: Duration) -> Result<(), HypervisorError>;

    /// Saves the memory and the devices' state of a machine into a file, from where the file is at.
    /// The machine stands still afterwards and is of no more use.
    ///
    /// # Errors
    /// When it could not be saved as a whole, or has ended.
    async fn save(&self, to: File) -> Result<Saved, HypervisorError>;

    /// The last lines of the guest's console, at most `max_lines`, oldest first, without control
    /// characters.
    ///
    /// # Errors
    /// When the console's log cannot be read.
    fn console_tail(&self, max_lines: usize) -> Result<Vec<String>, HypervisorError>;
}
