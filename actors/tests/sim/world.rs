//! One host in memory: what processes of Matchlock do to it, disturbed by faults, watched by laws.
//!
//! The host's state is that of the fakes of `matchlock-host`; each node ([`Proc`]) reaches it
//! through wrappers of its own, so that a node that was killed acts no more, whatever of its tasks
//! is still there: an operation of a dead node never returns.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use jiff::Timestamp;
use matchlock_host::firewall::FakeFirewall;
use matchlock_host::hypervisor::{FakeHypervisor, FakeMachine, Machine as _};
use matchlock_host::process::{FakeProcesses, Processes as _};
use matchlock_host::rootfs::{FakeRootfs, VmPaths};
use matchlock_host::snapshot::FakeSnapshots;
use matchlock_host::tap::FakeTaps;
use matchlock_host::tap::tap_name;
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_model::identity::ProcessIdentity;
use matchlock_store::{ReadConn, open_state};
use ractor::ActorCell;
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::faults::{Act, Fault, Kind, Plan};
use super::laws::Laws;
use super::machine::{Guest, LinkState};
use super::rng::Rng;
use super::snapshots::SnapshotLaws;
use super::trace::Trace;

/// What an injected panic says; the hook in `main` keeps it quiet.
pub(crate) const PANIC: &str = "sim: injected panic";

/// How long a hypervisor outlives its parent at most: the kernel releases locks and descriptors
/// before it sends the parent-death signal.
const DEATH_SIGNAL: Duration = Duration::from_millis(50);

thread_local! {
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The virtual time.
pub(crate) fn now() -> Timestamp {
    let passed = BEGAN.get().map_or(Duration::ZERO, |began| began.elapsed());
    Timestamp::from_second(1_700_000_000).unwrap() + passed
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who holds a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tenure {
    pub(crate) pid: i32,
    pub(crate) token: u64,
}

/// A machine that was launched.
pub(crate) struct Launched {
    pub(crate) vm: VmId,
    pub(crate) pid: i32,
    pub(crate) machine: Arc<FakeMachine>,
    pub(crate) guest: Guest,
    pub(crate) links: Vec<Arc<LinkState>>,
}

impl Launched {
    /// The TAP that it holds as long as it lives.
    fn tap_held(&self) -> Option<String> {
        self.machine.nic().map(|_| tap_name(self.vm))
    }
}

/// The host.
pub(crate) struct Sim {
    pub(crate) trace: Trace,
    rng: Mutex<Rng>,
    pub(crate) plan: Mutex<Plan>,
    pub(crate) laws: Mutex<Laws>,
    pub(crate) install: InstallId,
    pub(crate) processes: FakeProcesses,
    pub(crate) hypervisor: FakeHypervisor,
    pub(crate) rootfs: FakeRootfs,
    pub(crate) taps: FakeTaps,
    pub(crate) firewall: FakeFirewall,
    pub(crate) snapshots: FakeSnapshots,
    pub(crate) snapshot_laws: Mutex<SnapshotLaws>,
    /// A kernel without dead-man's switches: TAPs stay until they are removed.
    pub(crate) persistent_taps: bool,
    pub(crate) locks: Mutex<BTreeMap<VmId, Tenure>>,
    /// Who cleans a VM up.
    pub(crate) cleaners: Mutex<BTreeMap<VmId, Tenure>>,
    pub(crate) network_lock: Mutex<Option<Tenure>>,
    pub(crate) network_lock_freed: Notify,
    pub(crate) machines: Mutex<Vec<Launched>>,
    pub(crate) rows: Mutex<ReadConn>,
    tokens: AtomicU64,
    pub(crate) home: PathBuf,
    dir: Mutex<Option<TempDir>>,
}

impl Sim {
    pub(crate) fn new(seed: u64, replayed: bool) -> Arc<Self> {
        BEGAN.set(Some(Instant::now()));
        let mut rng = Rng::new(seed);
        let dir = directory();
        let home = dir.path().to_owned();
        drop(open_state(&home).unwrap());
        let processes = FakeProcesses::new();
        let firewall =
            if rng.chance(30) { FakeFirewall::with_plain_tables() } else { FakeFirewall::new() };
        let plan = Plan::new(&mut rng);
        let persistent_taps = rng.chance(30);
        let sim = Arc::new(Self {
            trace: Trace::new(replayed),
            plan: Mutex::new(plan),
            laws: Mutex::default(),
            install: InstallId::from_bytes([1; 8]),
            hypervisor: FakeHypervisor::new(processes.clone()),
            processes,
            rootfs: FakeRootfs::new(),
            taps: FakeTaps::new(),
            firewall,
            snapshots: FakeSnapshots::default(),
            snapshot_laws: Mutex::default(),
            persistent_taps,
            locks: Mutex::default(),
            cleaners: Mutex::default(),
            network_lock: Mutex::default(),
            network_lock_freed: Notify::new(),
            machines: Mutex::default(),
            rows: Mutex::new(ReadConn::open(&home).unwrap().unwrap()),
            tokens: AtomicU64::new(1),
            rng: Mutex::new(rng),
            home,
            dir: Mutex::new(Some(dir)),
        });
        sim.settle_strangers();
        sim
    }

    pub(crate) fn rng(&self) -> MutexGuard<'_, Rng> {
        lock(&self.rng)
    }

    pub(crate) fn token(&self) -> u64 {
        self.tokens.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn vms_dir() -> PathBuf {
        PathBuf::from("/fake/vms")
    }

    pub(crate) fn paths(vm: VmId) -> VmPaths {
        VmPaths::new(&Self::vms_dir(), vm)
    }

    pub(crate) fn mark(&self, vm: VmId) -> Mark {
        Mark { install: self.install.clone(), vm }
    }

    /// What ended takes along what it held open; waits for nothing.
    pub(crate) fn reap(&self) {
        for launched in lock(&self.machines).iter_mut() {
            let identity = launched.machine.identity();
            if self.processes.is_alive(&identity).unwrap() {
                continue;
            }
            // That it ended makes the fake let go of its NIC.
            assert!(launched.machine.wait_exit().now_or_never().is_some());
            for link in launched.links.drain(..) {
                link.end("the machine closed the connection");
            }
        }
    }

    /// Removes the database, whoever of the dead still holds something of this host.
    pub(crate) fn close(&self) {
        lock(&self.dir).take().unwrap().close().unwrap();
    }

    /// Ends a process, by whatever.
    pub(crate) fn end(&self, identity: &ProcessIdentity) {
        self.processes.end(identity);
        self.reap();
    }
}

/// A directory in memory if there is one: thousands of small databases are made here.
fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A process that is a node of Matchlock.
pub(crate) struct Proc {
    pub(crate) pid: i32,
    pub(crate) identity: ProcessIdentity,
    pub(crate) sim: Arc<Sim>,
    alive: AtomicBool,
    /// SIGSTOP: what it is about to do waits.
    frozen: AtomicBool,
    thawed: Notify,
    /// The TAPs that it made.
    pub(crate) taps: Mutex<Vec<String>>,
    /// The tree in it, until it ends with it.
    root: Mutex<Option<ActorCell>>,
}

/// An operation on a VM that was begun and has not returned.
pub(crate) struct InFlight {
    sim: Arc<Sim>,
    id: u64,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        lock(&self.sim.laws).leave(self.id);
    }
}

impl Proc {
    pub(crate) fn new(sim: &Arc<Sim>) -> Arc<Self> {
        let identity = sim.processes.add(None, None);
        let pid = identity.pid;
        sim.trace.note(format_args!("p{pid} starts"));
        Arc::new(Self {
            pid,
            identity,
            sim: Arc::clone(sim),
            alive: AtomicBool::new(true),
            frozen: AtomicBool::new(false),
            thawed: Notify::new(),
            taps: Mutex::default(),
            root: Mutex::default(),
        })
    }

    /// This tree ends with the process.
    pub(crate) fn set_root(&self, root: ActorCell) {
        *lock(&self.root) = Some(root);
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// Nothing of a dead process goes on, and nothing of a frozen one until it is thawed.
    pub(crate) async fn gate(&self) {
        loop {
            let thawed = self.thawed.notified();
            if !self.is_alive() {
                std::future::pending::<()>().await;
            }
            if !self.is_frozen() {
                return;
            }
            thawed.await;
        }
    }

    /// SIGSTOP. What cannot wait (it looks, or takes a lock) was done just before.
    pub(crate) fn freeze(&self) {
        if !self.frozen.swap(true, Ordering::Relaxed) {
            self.note("is frozen");
            self.sim.trace.count("freeze");
        }
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        if self.frozen.swap(false, Ordering::Relaxed) {
            self.note("goes on");
            self.thawed.notify_waiters();
        }
    }

    pub(crate) fn note(&self, event: impl std::fmt::Display) {
        self.sim.trace.note(format_args!("p{} {event}", self.pid));
    }

    pub(crate) fn draw(&self, act: Act, vm: Option<VmId>) -> Option<Fault> {
        let fault = lock(&self.sim.plan).draw(&mut self.sim.rng(), act, vm);
        if let Some(fault) = fault {
            self.note(format_args!("fault {act:?} {} {fault:?}", shown(vm)));
            self.sim.trace.count(format!("fault {}", name(fault)));
        }
        fault
    }

    pub(crate) fn enter(&self, act: Act, vm: Option<VmId>) -> InFlight {
        let id = self.sim.token();
        if let Some(vm) = vm
            && matches!(act.kind(), Kind::Build | Kind::Undo)
        {
            self.sim.begin(self.pid, act, vm);
            let other = lock(&self.sim.laws).enter(id, self.pid, vm, act);
            // What an overruled owner had begun may still be under way.
            if let Some(other) = other
                && !self.sim.is_overruled(vm)
                && !(act == Act::Kill && self.sim.is_given_up(self.pid, vm))
            {
                let text = format!("{vm}: {act:?} of p{} while {other} is under way", self.pid);
                self.sim.trace.broken(text);
            }
        }
        InFlight { sim: Arc::clone(&self.sim), id }
    }

    /// Does an operation, or what is drawn for it.
    pub(crate) async fn act<'a, T: Send, E: Send>(
        self: &Arc<Self>,
        act: Act,
        vm: Option<VmId>,
        work: impl Fn() -> BoxFuture<'a, Result<T, E>> + Send + Sync,
        failed: impl Fn(io::Error) -> E + Send + Sync,
    ) -> Result<T, E> {
        self.gate().await;
        let _in_flight = self.enter(act, vm);
        let fault = self.draw(act, vm);
        self.act_with(fault, act, vm, work, failed).await
    }

    /// Does an operation as its fault allows.
    pub(crate) async fn act_with<'a, T: Send, E: Send>(
        &self,
        fault: Option<Fault>,
        act: Act,
        vm: Option<VmId>,
        work: impl Fn() -> BoxFuture<'a, Result<T, E>> + Send + Sync,
        failed: impl Fn(io::Error) -> E + Send + Sync,
    ) -> Result<T, E> {
        let injected = || failed(io::Error::other("injected fault"));
        match fault {
            None => self.carry_out(act, vm, &work).await,
            Some(Fault::Fails) => Err(injected()),
            Some(Fault::LostReply) => {
                self.carry_out(act, vm, &work).await?;
                Err(injected())
            }
            Some(Fault::Late(delay)) => {
                sleep(delay).await;
                self.gate().await;
                self.carry_out(act, vm, &work).await
            }
            Some(Fault::LateReply(delay)) => {
                let result = self.carry_out(act, vm, &work).await;
                sleep(delay).await;
                self.gate().await;
                result
            }
            Some(Fault::Twice) => {
                self.carry_out(act, vm, &work).await?;
                self.carry_out(act, vm, &work).await
            }
            Some(Fault::Never) => std::future::pending().await,
            Some(Fault::Panic) => panic!("{PANIC}"),
            Some(Fault::PanicAfter) => {
                drop(self.carry_out(act, vm, &work).await?);
                panic!("{PANIC}")
            }
        }
    }

    async fn carry_out<'a, T, E>(
        &self,
        act: Act,
        vm: Option<VmId>,
        work: &(impl Fn() -> BoxFuture<'a, Result<T, E>> + Send + Sync),
    ) -> Result<T, E> {
        if let Some(vm) = vm {
            self.sim.check(self.pid, act, vm);
        }
        let result = work().await;
        if !matches!(act.kind(), Kind::Look | Kind::Now) {
            let how = if result.is_ok() { "ok" } else { "error" };
            self.note(format_args!("{act:?} {} {how}", shown(vm)));
        }
        self.sim.trace.count(format!("{act:?}"));
        result
    }

    /// The same for an operation that cannot wait.
    pub(crate) fn act_now<T, E: Debug>(
        &self,
        act: Act,
        vm: Option<VmId>,
        work: impl FnOnce() -> Result<T, E>,
        failed: impl FnOnce(io::Error) -> E,
    ) -> Result<T, E> {
        if !self.is_alive() {
            return Err(failed(io::Error::other("this process is dead")));
        }
        match self.draw(act, vm) {
            Some(Fault::Panic | Fault::PanicAfter) => panic!("{PANIC}"),
            Some(_) => Err(failed(io::Error::other("injected fault"))),
            None => {
                self.sim.trace.count(format!("{act:?}"));
                work()
            }
        }
    }

    /// What the kernel does when the process ends, however it ends.
    pub(crate) fn die(self: &Arc<Self>) {
        if !self.alive.swap(false, Ordering::Relaxed) {
            return;
        }
        self.thaw();
        self.note("dies");
        let root = lock(&self.root).take();
        if let Some(root) = root {
            root.kill();
        }
        let sim = &self.sim;
        lock(&sim.laws).forget(self.pid);
        sim.end_snapshots_of(self);
        lock(&sim.locks).retain(|_, tenure| tenure.pid != self.pid);
        lock(&sim.cleaners).retain(|_, tenure| tenure.pid != self.pid);
        lock(&sim.network_lock).take_if(|tenure| tenure.pid == self.pid);
        sim.network_lock_freed.notify_waiters();
        // Where there is a hypervisor, it has what keeps the tables there.
        let held: BTreeSet<_> = lock(&sim.machines).iter().filter_map(Launched::tap_held).collect();
        for tap in lock(&self.taps).iter().filter(|tap| !held.contains(*tap)) {
            sim.firewall.end_owner(tap);
        }
        let delay = sim.rng().up_to(DEATH_SIGNAL);
        let this = Arc::clone(self);
        // Parent-death signals come after the descriptors and locks are gone.
        tokio::spawn(async move {
            sleep(delay).await;
            this.end_children();
        });
    }

    fn end_children(&self) {
        let sim = &self.sim;
        let children: Vec<_> = lock(&sim.machines)
            .iter()
            .filter(|launched| launched.pid == self.pid)
            .map(|launched| launched.machine.identity())
            .collect();
        for child in children {
            sim.end(&child);
        }
        for tap in lock(&self.taps).iter() {
            sim.firewall.end_owner(tap);
            sim.taps.close(tap);
        }
        self.note("its hypervisors are gone");
    }
}

fn name(fault: Fault) -> &'static str {
    match fault {
        Fault::Fails => "fails",
        Fault::LostReply => "lost reply",
        Fault::Late(_) => "late",
        Fault::LateReply(_) => "late reply",
        Fault::Twice => "twice",
        Fault::Never => "never",
        Fault::Panic => "panic",
        Fault::PanicAfter => "panic after",
    }
}

pub(crate) fn shown(vm: Option<VmId>) -> String {
    vm.map_or_else(|| "-".to_owned(), |vm| vm.to_string())
}
