//! From `/init` in the initramfs to the agent in the guest's root.
//!
//! ```text
//!  proc, sys, dev ─► console ─► modules ─► pts, shm, mqueue, run, tmp, cgroup ─► loopback ─┐
//!    ┌──────────────────────────────────────────────────────────────────────────────────────┘
//!    ├───────────────────────────►┬─► disks ─► overlay ─► switch root, all mounts move ─► port ─► agent
//!    └ hold (only of a template) ─┘
//! ```
//!
//! # Invariants
//! 1. Nothing of the image runs, and nothing in it is needed, before the agent is ready.
//! 2. What no two guests have differently is done before the hold: a restored guest has it.
//! 3. Boot is one straight line: no thread, no retry, waits end with an event or a deadline.
//!
//! # Failure
//! See the crate: one `fatal` line, then the end of PID 1. What a guest can do without is a
//! `warning` line.

pub mod console;
pub mod devices;
pub mod hold;
pub mod modules;
pub mod mounts;
pub mod network;
pub mod process;
pub mod rootfs;
pub mod uevent;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use matchlock_wire::message::AgentInfo;
use nix::time::{ClockId, clock_gettime};
use tokio::task::LocalSet;

use crate::agent::Agent;
use crate::cgroup::Cgroups;
use crate::configure::GuestMachine;
use crate::jobs::Jobs;
use crate::launch::Launcher;
use crate::port::{Port, PortError};
use crate::reaper::Reaper;
use crate::{session, shutdown};
use hold::HoldError;
use modules::ModuleError;
use uevent::Uevents;

/// How long a device may take to come up: a hypervisor that starves, not a timing.
const DEVICE_PATIENCE: Duration = Duration::from_secs(30);

/// Why the guest could not boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system could not be mounted.
    #[error("cannot mount {kind} on {target}")]
    Mount {
        /// Where.
        target: PathBuf,
        /// The kind of file system.
        kind: String,
        /// Why.
        source: io::Error,
    },
    /// A mount point could not be made.
    #[error("cannot make the directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no console.
    #[error("cannot use /dev/console")]
    Console(#[source] io::Error),
    /// A kernel module is unusable.
    #[error("the kernel modules could not be loaded")]
    Modules(#[from] ModuleError),
    /// A disk is missing.
    #[error("there is no disk with serial {serial:?} after {waited:?}")]
    NoDisk {
        /// Its serial number.
        serial: String,
        /// How long it was awaited.
        waited: Duration,
    },
    /// Disks could not be looked for.
    #[error("cannot look for disks")]
    LookForDisk {
        /// Why.
        source: io::Error,
    },
    /// The writable layer is unusable.
    #[error("cannot use the writable layer")]
    Layer {
        /// Why.
        source: io::Error,
    },
    /// The way into the new root is barred.
    #[error("cannot {what}")]
    Switch {
        /// The step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The guest was on hold and cannot go on.
    #[error("the guest cannot be held")]
    Hold(#[from] HoldError),
    /// This process could not be prepared.
    #[error("cannot prepare the agent's process")]
    Process(#[source] io::Error),
    /// The event loop did not start.
    #[error("cannot start the event loop")]
    Runtime(#[source] io::Error),
    /// There is no link to the host.
    #[error("there is no link to the host")]
    Port(#[from] PortError),
    /// The link broke for good.
    #[error("the link to the host broke for good")]
    Link(#[source] io::Error),
    /// The link ended although it cannot.
    #[error("the link to the host ended")]
    LinkEnded,
}

/// The program: the init and agent of a guest. Anything but PID 1 is refused.
pub fn main() -> ! {
    let started_us = since_boot_us();
    if std::process::id() != 1 {
        console::line(format_args!(
            "this is the init of a Matchlock guest and runs only as process 1 of one"
        ));
        std::process::exit(2)
    }
    match boot(started_us) {
        Ok(never) => match never {},
        Err(error) => console::fatal(&error),
    }
}

fn boot(started_us: u64) -> Result<std::convert::Infallible, BootError> {
    // What an init that goes on after a hold has behind it is not done again.
    let port = hold::resumed_port(std::env::args_os().skip(1));
    let uevents = Uevents::default();
    if port.is_none() {
        mounts::mount_needed()?;
        console::attach().map_err(|errno| BootError::Console(errno.into()))?;
        modules::load_all(Path::new("/modules"))?;
        mounts::mount_usual();
        set_up_kernel();
        if hold::is_wanted()? {
            match hold::hold(&uevents, DEVICE_PATIENCE)? {}
        }
    }
    let layer = rootfs::assemble(&uevents, DEVICE_PATIENCE)?;
    rootfs::switch()?;
    process::prepare_agent().map_err(BootError::Process)?;
    let cgroups = find_cgroups()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BootError::Runtime)?;
    LocalSet::new().block_on(&runtime, run(started_us, &uevents, &layer, cgroups, port))
}

/// What the kernel keeps beside its file systems, and no two guests have differently.
fn set_up_kernel() {
    if let Err(error) = network::loopback_up() {
        console::line(format_args!("warning: no loopback device: {error}"));
    }
    let warn = |controller: &str, error: &io::Error| {
        console::line(format_args!("warning: cannot enable the {controller} controller: {error}"));
    };
    if let Err(error) = Cgroups::set_up(Path::new(mounts::CGROUPS), warn) {
        console::line(format_args!("warning: no control groups: {error}"));
    }
}

/// The control groups that were set up. That there are none was said then.
fn find_cgroups() -> Result<Option<Cgroups>, BootError> {
    Cgroups::find(Path::new(mounts::CGROUPS)).map_err(BootError::Process)
}

async fn run(
    started_us: u64,
    uevents: &Uevents,
    layer: &OwnedFd,
    cgroups: Option<Cgroups>,
    port: Option<OwnedFd>,
) -> Result<std::convert::Infallible, BootError> {
    let reaper = Reaper::start().map_err(BootError::Runtime)?;
    let group = match cgroups.as_ref().map(Cgroups::open_jobs).transpose() {
        Ok(group) => group,
        Err(error) => return Err(BootError::Process(error)),
    };
    let port = match port {
        Some(open) => Port::adopt(open)?,
        None => Port::open(uevents, DEVICE_PATIENCE)?,
    };
    let info = AgentInfo {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        init_started_us: started_us,
        agent_ready_us: since_boot_us(),
    };
    let jobs = Jobs::new(Launcher::new(group, std::rc::Rc::clone(&reaper)));
    let (agent, mut orders) = Agent::new(info, jobs, Box::new(GuestMachine::new(cgroups)));
    let mut link = tokio::task::spawn_local(session::serve(port, agent));
    tokio::select! {
        Some(order) = orders.recv() => shutdown::run(order, &reaper, layer).await,
        ended = &mut link => match ended {
            Ok(Ok(())) | Err(_) => Err(BootError::LinkEnded),
            Ok(Err(error)) => Err(BootError::Link(error)),
        },
    }
}

/// The time since the machine started, in microseconds.
fn since_boot_us() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        u64::try_from(std::time::Duration::from(time).as_micros()).unwrap_or(u64::MAX)
    })
}
