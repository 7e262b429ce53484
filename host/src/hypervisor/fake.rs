//! A hypervisor in memory, for tests of what is built on [`Hypervisor`].
//!
//! Its machines are processes of a [`FakeProcesses`], so that whoever looks for marked processes
//! finds them, and whoever kills those ends the machines.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::id::VmId;
use matchlock_model::identity::ProcessIdentity;
use sha2::Digest as _;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::{
    ExitReason, Hypervisor, HypervisorError, Machine, MachineExit, MachineSpec, Nic, Saved, Start,
};
use crate::process::{FakeProcesses, Processes};

/// What the memory of every fake machine is saved as.
const MEMORY: &[u8] = b"the memory of a fake machine";

/// What happens to a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaunchFault {
    /// It fails.
    Fails,
    /// It takes this long.
    Late(Duration),
    /// It never returns and starts nothing.
    Never,
    /// The machine starts, and ends at once by itself.
    DiesAtOnce,
    /// One that is to boot starts, and the launch fails all the same.
    LeavesOneThatBoots,
    /// One that is to go on from a snapshot starts, and the launch fails all the same.
    LeavesOneThatRestores,
}

/// Launches machines in memory. Clones share them.
#[derive(Debug, Clone)]
pub struct FakeHypervisor {
    processes: FakeProcesses,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    fault: Option<LaunchFault>,
    missing: bool,
    launches: Vec<MachineSpec>,
    machines: Vec<Arc<FakeMachine>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHypervisor {
    /// A hypervisor whose machines are processes of this table.
    #[must_use]
    pub fn new(processes: FakeProcesses) -> Self {
        Self { processes, state: Arc::default() }
    }

    /// Disturbs launches from now on, or (with `None`) no longer.
    pub fn set_launch_fault(&self, fault: Option<LaunchFault>) {
        lock(&self.state).fault = fault;
    }

    /// From now on the program is (not) missing.
    pub fn set_missing(&self, missing: bool) {
        lock(&self.state).missing = missing;
    }

    /// What was asked to be launched so far, in order. Without the NICs: a record of one would
    /// hold its TAP open; see [`FakeMachine::nic`].
    #[must_use]
    pub fn launches(&self) -> Vec<MachineSpec> {
        lock(&self.state).launches.clone()
    }

    /// The machine that was launched last for a VM, whether or not it still runs.
    #[must_use]
    pub fn machine(&self, vm: VmId) -> Option<Arc<FakeMachine>> {
        let state = lock(&self.state);
        state.machines.iter().rev().find(|machine| machine.spec.mark.vm == vm).cloned()
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    fn backend(&self) -> &'static str {
        "fake"
    }

    fn acceleration(&self) -> &'static str {
        "fake"
    }

    fn check(&self) -> Result<(), HypervisorError> {
        if lock(&self.state).missing {
            return Err(HypervisorError::NotInstalled {
                program: "fake".to_owned(),
                package: "fake",
                variable: "FAKE",
            });
        }
        Ok(())
    }

    async fn fingerprint(&self, spec: &MachineSpec) -> Result<String, HypervisorError> {
        self.check()?;
        Ok(format!("fake {} {}", spec.vcpus, spec.memory_mb))
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, HypervisorError> {
        let fault = {
            let mut state = lock(&self.state);
            state.launches.push(without_nic(spec));
            state.fault
        };
        self.check()?;
        match fault {
            Some(LaunchFault::Fails) => {
                let source = io::Error::other("injected fault");
                return Err(HypervisorError::Io { doing: "launch".to_owned(), source });
            }
            Some(LaunchFault::Late(delay)) => tokio::time::sleep(delay).await,
            Some(LaunchFault::Never) => std::future::pending().await,
            Some(
                LaunchFault::DiesAtOnce
                | LaunchFault::LeavesOneThatBoots
                | LaunchFault::LeavesOneThatRestores,
            )
            | None => {}
        }
        let cwd = Some(spec.paths.dir.clone());
        let machine = Arc::new(FakeMachine {
            identity: self.processes.add(Some(spec.mark.clone()), cwd),
            processes: self.processes.clone(),
            spec: without_nic(spec),
            inner: Mutex::new(Inner { nic: spec.nic.clone(), ..Inner::default() }),
            dialled: Notify::new(),
        });
        lock(&self.state).machines.push(Arc::clone(&machine));
        // The kernel closes what a process held when it ends, whoever looks.
        let held = Arc::clone(&machine);
        tokio::spawn(async move {
            held.processes.ended(&held.identity).await;
            let nic = lock(&held.inner).nic.take();
            drop(nic);
        });
        let is_left = match spec.start {
            Start::Boot => fault == Some(LaunchFault::LeavesOneThatBoots),
            Start::Restore(_) => fault == Some(LaunchFault::LeavesOneThatRestores),
            Start::Hold => false,
        };
        if is_left {
            let source = io::Error::other("injected fault, after the start");
            return Err(HypervisorError::Io { doing: "launch".to_owned(), source });
        }
        if fault == Some(LaunchFault::DiesAtOnce) {
            machine.end(ExitReason::Died("injected fault".to_owned()));
        }
        if let Start::Restore(memory) = &spec.start
            && !is_whole(memory)
        {
            machine.end(ExitReason::Died("load of migration failed".to_owned()));
        }
        Ok(machine)
    }
}

fn is_whole(memory: &File) -> bool {
    let mut found = [0; MEMORY.len() + 1];
    memory.read_at(&mut found, 0).is_ok_and(|read| found.get(..read) == Some(MEMORY))
}

fn without_nic(spec: &MachineSpec) -> MachineSpec {
    MachineSpec { nic: None, ..spec.clone() }
}

/// A machine in memory. A test is its guest.
pub struct FakeMachine {
    identity: ProcessIdentity,
    processes: FakeProcesses,
    spec: MachineSpec,
    inner: Mutex<Inner>,
    dialled: Notify,
}

#[derive(Default)]
struct Inner {
    reason: Option<ExitReason>,
    exit: Option<MachineExit>,
    links: VecDeque<UnixStream>,
    nic: Option<Nic>,
    console: Vec<String>,
}

impl fmt::Debug for FakeMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeMachine").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl FakeMachine {
    /// What it was made of, but for its NIC.
    #[must_use]
    pub const fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Its NIC. It holds its TAP open, and its firewall there, until its end.
    #[must_use]
    pub fn nic(&self) -> Option<Nic> {
        lock(&self.inner).nic.clone()
    }

    /// Ends it by itself for this reason.
    pub fn end(&self, reason: ExitReason) {
        lock(&self.inner).reason.get_or_insert(reason);
        self.processes.end(&self.identity);
    }

    /// From now on SIGKILL does (not) end it; [`end`](Self::end) does.
    pub fn set_immortal(&self, immortal: bool) {
        self.processes.set_immortal(self.identity.pid, immortal);
    }

    /// Prints a line on its console.
    pub fn print(&self, line: &str) {
        lock(&self.inner).console.push(line.to_owned());
    }

    /// The guest's end of the next connection to its link port.
    pub async fn accept_link(&self) -> UnixStream {
        loop {
            let dialled = self.dialled.notified();
            if let Some(stream) = lock(&self.inner).links.pop_front() {
                return stream;
            }
            dialled.await;
        }
    }

    fn ended() -> HypervisorError {
        let source = io::ErrorKind::ConnectionRefused.into();
        HypervisorError::Io { doing: "connect to the machine's link.sock".to_owned(), source }
    }
}

#[async_trait]
impl Machine for FakeMachine {
    fn identity(&self) -> ProcessIdentity {
        self.identity.clone()
    }

    async fn open_link(&self) -> Result<UnixStream, HypervisorError> {
        if !self.processes.is_alive(&self.identity)? {
            return Err(Self::ended());
        }
        let (ours, theirs) = UnixStream::pair().map_err(|source| HypervisorError::Io {
            doing: "make a pair of sockets".to_owned(),
            source,
        })?;
        lock(&self.inner).links.push_back(theirs);
        self.dialled.notify_one();
        Ok(ours)
    }

    async fn wait_exit(&self) -> MachineExit {
        self.processes.ended(&self.identity).await;
        let nic = lock(&self.inner).nic.take();
        drop(nic);
        let mut inner = lock(&self.inner);
        // Connections that the guest never took end with it.
        inner.links.clear();
        let reason = inner.reason.clone().unwrap_or_else(|| ExitReason::Died(String::new()));
        let status = match reason {
            ExitReason::Killed | ExitReason::Died(_) => "signal: 9 (SIGKILL)",
            ExitReason::PowerOff | ExitReason::Reset | ExitReason::GuestPanic(_) => {
                "exit status: 0"
            }
        };
        inner.exit.get_or_insert(MachineExit { reason, status: status.to_owned() }).clone()
    }

    async fn kill(&self, deadline: Duration) -> Result<(), HypervisorError> {
        let first = {
            let mut inner = lock(&self.inner);
            let first = inner.reason.is_none() && self.processes.is_alive(&self.identity)?;
            if first {
                inner.reason = Some(ExitReason::Killed);
            }
            first
        };
        let killed = self.processes.kill(&self.identity, deadline).await;
        if killed.is_err() && first {
            // It lives on; what ends it later is another reason.
            lock(&self.inner).reason = None;
        }
        killed.map_err(HypervisorError::from)
    }

    async fn save(&self, mut to: File) -> Result<Saved, HypervisorError> {
        if !self.processes.is_alive(&self.identity)? {
            return Err(Self::ended());
        }
        to.write_all(MEMORY)
            .map_err(|source| HypervisorError::Io { doing: "save".to_owned(), source })?;
        let sha256 = hex::encode(sha2::Sha256::digest(MEMORY));
        Ok(Saved { bytes: MEMORY.len() as u64, sha256 })
    }

    fn console_tail(&self, max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        let inner = lock(&self.inner);
        let start = inner.console.len().saturating_sub(max_lines);
        Ok(inner.console.get(start..).unwrap_or_default().to_vec())
    }
}
