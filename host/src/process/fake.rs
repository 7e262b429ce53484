//! Processes in memory, for tests of what is built on [`Processes`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_model::id::Mark;
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::{CpuShare, MarkedProcess, NamespaceSighting, ProcessError, Processes};

/// The boot id of the fake host.
const BOOT_ID: &str = "00000000-0000-4000-8000-000000000000";

/// A table of processes. Clones share it.
#[derive(Debug, Clone)]
pub struct FakeProcesses {
    table: Arc<Mutex<Table>>,
    /// Wakes in the order of waiting, so that a simulation replays; a `watch` does not.
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Table {
    own: ProcessIdentity,
    namespaces: Namespaces,
    next_pid: i32,
    next_ticks: u64,
    running: BTreeMap<i32, Entry>,
    immortal: BTreeSet<i32>,
    refused: BTreeSet<i32>,
    panics: BTreeSet<i32>,
    sightings: BTreeMap<String, NamespaceSighting>,
    hidden: BTreeSet<i32>,
    list_fails: bool,
    share: CpuShare,
    kills: Vec<ProcessIdentity>,
}

#[derive(Debug)]
struct Entry {
    identity: ProcessIdentity,
    mark: Option<Mark>,
    cwd: Option<PathBuf>,
}

impl Default for FakeProcesses {
    fn default() -> Self {
        let own = ProcessIdentity { pid: 1000, start_ticks: 1, boot_id: BOOT_ID.to_owned() };
        let this = Entry { identity: own.clone(), mark: None, cwd: None };
        Self {
            table: Arc::new(Mutex::new(Table {
                running: BTreeMap::from([(own.pid, this)]),
                own,
                namespaces: Namespaces { net: "4:1".to_owned(), pid: "4:2".to_owned() },
                next_pid: 1001,
                next_ticks: 2,
                immortal: BTreeSet::new(),
                refused: BTreeSet::new(),
                panics: BTreeSet::new(),
                hidden: BTreeSet::new(),
                sightings: BTreeMap::new(),
                list_fails: false,
                share: CpuShare::default(),
                kills: Vec::new(),
            })),
            changed: Arc::default(),
        }
    }
}

impl FakeProcesses {
    /// A host on which only this process runs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process with a new pid.
    pub fn add(&self, mark: Option<Mark>, cwd: Option<PathBuf>) -> ProcessIdentity {
        let pid = {
            let mut table = self.table();
            table.next_pid += 1;
            table.next_pid
        };
        self.add_as(pid, mark, cwd)
    }

    /// Starts a process with this pid, as a later process may get the pid of an earlier one.
    pub fn add_as(&self, pid: i32, mark: Option<Mark>, cwd: Option<PathBuf>) -> ProcessIdentity {
        let mut table = self.table();
        table.next_ticks += 1;
        let start_ticks = table.next_ticks;
        let identity = ProcessIdentity { pid, start_ticks, boot_id: BOOT_ID.to_owned() };
        table.running.insert(pid, Entry { identity: identity.clone(), mark, cwd });
        identity
    }

    /// Ends a process, as if by itself.
    pub fn end(&self, identity: &ProcessIdentity) {
        let mut table = self.table();
        if table.running.get(&identity.pid).is_some_and(|entry| entry.identity == *identity) {
            table.running.remove(&identity.pid);
        }
        drop(table);
        self.changed.notify_waiters();
    }

    /// Waits until a process has ended, whether or not it can be looked at.
    pub async fn ended(&self, identity: &ProcessIdentity) {
        let runs = || {
            let table = self.table();
            table.running.get(&identity.pid).is_some_and(|entry| entry.identity == *identity)
        };
        loop {
            // Before the look: a change right after it is noticed.
            let changed = self.changed.notified();
            if !runs() {
                return;
            }
            changed.await;
        }
    }

    /// From now on SIGKILL does (not) end this pid; [`end`](Self::end) does.
    pub fn set_immortal(&self, pid: i32, immortal: bool) {
        set(&mut self.table().immortal, pid, immortal);
    }

    /// From now on signals to this pid are (not) refused with EPERM.
    pub fn set_refused(&self, pid: i32, refused: bool) {
        set(&mut self.table().refused, pid, refused);
    }

    /// From now on whoever wants to end this pid panics (no longer).
    pub fn set_panics(&self, pid: i32, panics: bool) {
        set(&mut self.table().panics, pid, panics);
    }

    /// From now on this pid can(not) be looked at.
    pub fn set_hidden(&self, pid: i32, hidden: bool) {
        set(&mut self.table().hidden, pid, hidden);
    }

    /// From now on the list of processes can(not) be read.
    pub fn set_list_fails(&self, fails: bool) {
        self.table().list_fails = fails;
    }

    /// Says how much of the CPUs each process got.
    pub fn set_cpu_share(&self, share: CpuShare) {
        self.table().share = share;
    }

    /// Changes what [`Processes::own_namespaces`] says.
    pub fn set_namespaces(&self, namespaces: Namespaces) {
        self.table().namespaces = namespaces;
    }

    /// Says what is seen of this network namespace; of others it is that they are there.
    pub fn set_sighting(&self, namespace: &str, sighting: NamespaceSighting) {
        self.table().sightings.insert(namespace.to_owned(), sighting);
    }

    /// Who got SIGKILL so far, in order.
    #[must_use]
    pub fn kills(&self) -> Vec<ProcessIdentity> {
        self.table().kills.clone()
    }
}

fn set(pids: &mut BTreeSet<i32>, pid: i32, member: bool) {
    if member {
        pids.insert(pid);
    } else {
        pids.remove(&pid);
    }
}

/// The error of a pid that cannot be looked at.
fn hidden(pid: i32) -> ProcessError {
    ProcessError::Look { pid, source: io::ErrorKind::PermissionDenied.into() }
}

#[async_trait]
impl Processes for FakeProcesses {
    fn own_identity(&self) -> Result<ProcessIdentity, ProcessError> {
        Ok(self.table().own.clone())
    }

    fn own_namespaces(&self) -> Result<Namespaces, ProcessError> {
        Ok(self.table().namespaces.clone())
    }

    fn sees_all_processes(&self) -> Result<bool, ProcessError> {
        Ok(false)
    }

    fn look_for_network_namespace(
        &self,
        namespace: &str,
    ) -> Result<NamespaceSighting, ProcessError> {
        let sighting = self.table().sightings.get(namespace).copied();
        Ok(sighting.unwrap_or(NamespaceSighting::There))
    }

    fn is_alive(&self, identity: &ProcessIdentity) -> Result<bool, ProcessError> {
        let table = self.table();
        if identity.boot_id != BOOT_ID {
            return Ok(false);
        }
        if table.hidden.contains(&identity.pid) {
            return Err(hidden(identity.pid));
        }
        Ok(table.running.get(&identity.pid).is_some_and(|entry| entry.identity == *identity))
    }

    fn cpu_share(&self, identity: &ProcessIdentity) -> Result<Option<CpuShare>, ProcessError> {
        if !self.is_alive(identity)? {
            return Ok(None);
        }
        Ok(Some(self.table().share))
    }

    fn find_marked(&self) -> Result<Vec<MarkedProcess>, ProcessError> {
        let table = self.table();
        if table.list_fails {
            return Err(ProcessError::List(io::ErrorKind::PermissionDenied.into()));
        }
        let mut found = Vec::new();
        for entry in table.running.values() {
            let Some(mark) = &entry.mark else { continue };
            if table.hidden.contains(&entry.identity.pid) {
                return Err(hidden(entry.identity.pid));
            }
            let (identity, mark) = (entry.identity.clone(), mark.clone());
            found.push(MarkedProcess { identity, mark, cwd: entry.cwd.clone() });
        }
        Ok(found)
    }

    async fn kill(
        &self,
        identity: &ProcessIdentity,
        deadline: Duration,
    ) -> Result<(), ProcessError> {
        let pid = identity.pid;
        if !self.is_alive(identity)? {
            return Ok(());
        }
        let panics = self.table().panics.contains(&pid);
        assert!(!panics, "injected panic");
        {
            let mut table = self.table();
            if table.refused.contains(&pid) {
                let source = io::ErrorKind::PermissionDenied.into();
                return Err(ProcessError::Signal { pid, signal: 9, source });
            }
            table.kills.push(identity.clone());
            if !table.immortal.contains(&pid) {
                table.running.remove(&pid);
            }
        }
        self.changed.notify_waiters();
        timeout(deadline, self.ended(identity))
            .await
            .map_err(|_| ProcessError::WillNotDie { pid, waited: deadline })
    }
}
