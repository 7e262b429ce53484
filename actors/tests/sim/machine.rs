//! Hypervisors, and the guests in them.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use matchlock_host::guest_link::{ExecSession, GuestLink, LinkConnector, LinkError};
use matchlock_host::hypervisor::{
    ExitReason, FakeMachine, Hypervisor, HypervisorError, Machine, MachineExit, MachineSpec, Saved,
    Start,
};
use matchlock_host::rootfs::VmPaths;
use matchlock_model::exec::ExecSpec;
use matchlock_model::file::FileOp;
use matchlock_model::guest::{AgentInfo, GuestConfig};
use matchlock_model::id::VmId;
use matchlock_model::identity::ProcessIdentity;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::faults::Act;
use super::host::Host;
use super::world::{Launched, Sim, lock};

fn control(source: io::Error) -> HypervisorError {
    HypervisorError::Io { doing: "work on the machine".into(), source }
}

#[async_trait]
impl Hypervisor for Host {
    fn backend(&self) -> &'static str {
        "fake"
    }

    fn acceleration(&self) -> &'static str {
        "fake"
    }

    fn check(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn fingerprint(&self, spec: &MachineSpec) -> Result<String, HypervisorError> {
        let work = || -> BoxFuture<'_, _> {
            async {
                let version = lock(&self.0.sim.snapshot_laws).version;
                let of = self.0.sim.hypervisor.fingerprint(spec).await?;
                Ok(format!("{of} v{version}"))
            }
            .boxed()
        };
        self.0.act(Act::Fingerprint, Some(spec.mark.vm), work, control).await
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, HypervisorError> {
        let work = || -> BoxFuture<'_, _> { self.start(spec).boxed() };
        self.0.act(Act::Launch, Some(spec.mark.vm), work, control).await
    }
}

impl Host {
    async fn start(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, HypervisorError> {
        let (sim, vm) = (&self.0.sim, spec.mark.vm);
        sim.check_start(&self.0, vm, &spec.start);
        let launched = sim.hypervisor.launch(spec).await?;
        let machine = sim.hypervisor.machine(vm).expect("it was just launched");
        assert_eq!(machine.identity(), launched.identity());
        sockets(sim, &spec.paths);
        let (pid, inner) = (self.0.pid, Arc::clone(&machine));
        lock(&sim.machines).push(Launched {
            vm,
            pid,
            machine,
            guest: Guest::of(&spec.start),
            links: Vec::new(),
        });
        Ok(Arc::new(SimMachine { host: self.clone(), vm, inner }))
    }
}

/// How far a guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    /// It boots, and goes on by itself.
    Free,
    /// It boots to be saved.
    ToBeHeld,
    /// It waits to be saved.
    Held,
    /// It was saved.
    Saved,
    /// It was restored, and waits until it may go on.
    Restored,
}

impl Guest {
    const fn of(start: &Start) -> Self {
        match start {
            Start::Boot => Self::Free,
            Start::Hold => Self::ToBeHeld,
            Start::Restore(_) => Self::Restored,
        }
    }
}

/// What a hypervisor makes when it starts.
fn sockets(sim: &Sim, paths: &VmPaths) {
    sim.rootfs.add_file(&paths.link_socket());
    sim.rootfs.add_file(&paths.qmp_socket());
}

/// A machine, as the node that launched it has it.
struct SimMachine {
    host: Host,
    vm: VmId,
    inner: Arc<FakeMachine>,
}

#[async_trait]
impl Machine for SimMachine {
    fn identity(&self) -> ProcessIdentity {
        self.inner.identity()
    }

    async fn open_link(&self) -> Result<UnixStream, HypervisorError> {
        Err(control(io::Error::other("no wire in a simulation")))
    }

    async fn wait_exit(&self) -> MachineExit {
        let exit = self.inner.wait_exit().await;
        self.host.0.gate().await;
        exit
    }

    async fn kill(&self, deadline: Duration) -> Result<(), HypervisorError> {
        let identity = self.inner.identity();
        Ok(self.host.kill_process(Some(self.vm), &identity, deadline).await?)
    }

    async fn save(&self, to: File) -> Result<Saved, HypervisorError> {
        let (sim, identity) = (&self.host.0.sim, self.inner.identity());
        let to = &to;
        let work = || -> BoxFuture<'_, _> {
            async move {
                let guest = sim.guest(&self.inner.identity());
                sim.note_save(self.vm, self.host.0.pid, guest, to);
                let takes = sim.rng().up_to(Duration::from_secs(2));
                sleep(takes).await;
                self.host.0.gate().await;
                let file = to.try_clone().map_err(control)?;
                let saved = self.inner.save(file).await?;
                sim.note_saved(to);
                sim.set_guest(&self.inner.identity(), Guest::Saved);
                Ok(saved)
            }
            .boxed()
        };
        self.host.0.act(Act::Save, sim.vm_of(&identity), work, control).await
    }

    fn console_tail(&self, max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        self.inner.console_tail(max_lines)
    }
}

/// A link's end, and who waits for it.
#[derive(Debug, Default)]
pub(crate) struct LinkState {
    cause: Mutex<Option<LinkError>>,
    ended: Notify,
}

impl LinkState {
    pub(crate) fn end(&self, cause: &str) {
        lock(&self.cause).get_or_insert_with(|| LinkError::Lost { cause: cause.to_owned() });
        self.ended.notify_waiters();
    }

    fn alive(&self) -> Result<(), LinkError> {
        lock(&self.cause).clone().map_or(Ok(()), Err)
    }

    async fn closed(&self) -> LinkError {
        loop {
            let ended = self.ended.notified();
            if let Some(cause) = lock(&self.cause).clone() {
                return cause;
            }
            ended.await;
        }
    }
}

fn lost(source: io::Error) -> LinkError {
    LinkError::from_io(&source)
}

#[async_trait]
impl LinkConnector for Host {
    async fn connect(
        &self,
        machine: &dyn Machine,
        deadline: Duration,
    ) -> Result<Arc<dyn GuestLink>, LinkError> {
        let identity = machine.identity();
        let sim = &self.0.sim;
        let vm = sim.vm_of(&identity);
        let work = || -> BoxFuture<'_, Result<Arc<dyn GuestLink>, LinkError>> {
            async {
                let boot = sim.rng().up_to(Duration::from_secs(4));
                sleep(boot.min(deadline)).await;
                self.0.gate().await;
                let state = sim.add_link(&identity)?;
                let state = Mutex::new(state);
                let link = SimLink { host: self.clone(), vm, identity: identity.clone(), state };
                Ok(Arc::new(link) as Arc<dyn GuestLink>)
            }
            .boxed()
        };
        let asked = self.0.act(Act::Connect, vm, work, lost);
        tokio::time::timeout(deadline, asked)
            .await
            .unwrap_or_else(|_| Err(LinkError::Timeout { what: "the handshake", waited: deadline }))
    }

    async fn held(&self, machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        let (sim, identity) = (&self.0.sim, machine.identity());
        let work = || -> BoxFuture<'_, _> {
            async {
                let boot = sim.rng().up_to(Duration::from_secs(4));
                sleep(boot.min(deadline)).await;
                self.0.gate().await;
                sim.hold(&identity)
            }
            .boxed()
        };
        let asked = self.0.act(Act::Hold, sim.vm_of(&identity), work, lost);
        tokio::time::timeout(deadline, asked)
            .await
            .unwrap_or(Err(LinkError::Timeout { what: "the guest", waited: deadline }))
    }

    async fn resume(&self, machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        let (sim, identity) = (&self.0.sim, machine.identity());
        let work = || -> BoxFuture<'_, _> {
            async {
                let takes = sim.rng().up_to(Duration::from_millis(200));
                sleep(takes).await;
                self.0.gate().await;
                self.go_on(&identity).await
            }
            .boxed()
        };
        let asked = self.0.act(Act::Resume, sim.vm_of(&identity), work, lost);
        let resumed = tokio::time::timeout(deadline, asked)
            .await
            .unwrap_or(Err(LinkError::Timeout { what: "the guest", waited: deadline }));
        sim.trace.count(if resumed.is_ok() { "restored" } else { "not restored" });
        resumed
    }
}

impl Host {
    /// Lets a guest that was restored go on; some hang, and some die.
    async fn go_on(&self, identity: &ProcessIdentity) -> Result<(), LinkError> {
        let sim = &self.0.sim;
        let vm = sim.living(identity)?;
        sim.check_goes_on(vm, &sim.start_of(identity));
        let fate = if lock(&sim.plan).on { sim.rng().below(20) } else { 20 };
        match fate {
            0 => std::future::pending().await,
            1 => {
                sim.end(identity);
                Err(LinkError::Lost { cause: "the machine has ended".into() })
            }
            _ => {
                sim.set_guest(identity, Guest::Free);
                Ok(())
            }
        }
    }
}

impl Sim {
    fn vm_of(&self, identity: &ProcessIdentity) -> Option<VmId> {
        let machines = lock(&self.machines);
        machines.iter().find(|l| l.machine.identity() == *identity).map(|l| l.vm)
    }

    /// The VM of a machine that lives.
    fn living(&self, identity: &ProcessIdentity) -> Result<VmId, LinkError> {
        use matchlock_host::process::Processes as _;
        let vm = self.vm_of(identity).filter(|_| self.processes.is_alive(identity).unwrap());
        vm.ok_or_else(|| LinkError::Lost { cause: "the machine has ended".into() })
    }

    fn with_launched<T>(&self, of: &ProcessIdentity, work: impl FnOnce(&mut Launched) -> T) -> T {
        let mut machines = lock(&self.machines);
        let launched = machines.iter_mut().find(|l| l.machine.identity() == *of);
        work(launched.expect("it was launched"))
    }

    fn guest(&self, of: &ProcessIdentity) -> Guest {
        self.with_launched(of, |launched| launched.guest)
    }

    fn set_guest(&self, of: &ProcessIdentity, guest: Guest) {
        self.with_launched(of, |launched| launched.guest = guest);
    }

    fn start_of(&self, machine: &ProcessIdentity) -> Start {
        self.with_launched(machine, |launched| launched.machine.spec().start.clone())
    }

    /// A guest has come to where it waits to be saved.
    fn hold(&self, identity: &ProcessIdentity) -> Result<(), LinkError> {
        let vm = self.living(identity)?;
        match self.guest(identity) {
            Guest::ToBeHeld | Guest::Held => self.set_guest(identity, Guest::Held),
            other => self.trace.broken(format_args!("{vm} is held, and is {other:?}")),
        }
        Ok(())
    }

    /// A session with a machine that still lives.
    fn add_link(&self, identity: &ProcessIdentity) -> Result<Arc<LinkState>, LinkError> {
        use matchlock_host::process::Processes as _;
        let alive = self.processes.is_alive(identity).unwrap();
        let mut machines = lock(&self.machines);
        let launched = machines.iter_mut().find(|l| l.machine.identity() == *identity);
        match launched {
            Some(launched) if alive => {
                if launched.guest != Guest::Free {
                    let text = format!("{} gets a link, and is {:?}", launched.vm, launched.guest);
                    self.trace.broken(text);
                }
                let link = Arc::new(LinkState::default());
                launched.links.push(Arc::clone(&link));
                Ok(link)
            }
            _ => Err(LinkError::Lost { cause: "the machine has ended".into() }),
        }
    }

    /// Something happens to the guest that was launched last for this VM; whether it lives.
    pub(crate) fn disturb_guest(&self, vm: VmId, what: u64) -> bool {
        use matchlock_host::process::Processes as _;
        let found = {
            let machines = lock(&self.machines);
            let launched = machines.iter().rev().find(|launched| launched.vm == vm);
            launched.map(|launched| (Arc::clone(&launched.machine), launched.links.clone()))
        };
        let Some((machine, links)) = found else { return false };
        if !self.processes.is_alive(&machine.identity()).unwrap() {
            return false;
        }
        let reason = match what {
            0 => {
                links.iter().for_each(|link| link.end("cut"));
                return true;
            }
            1 => ExitReason::PowerOff,
            2 => ExitReason::Reset,
            3 => ExitReason::GuestPanic("Kernel panic - not syncing: simulated".into()),
            _ => ExitReason::Died("killed by somebody else".into()),
        };
        machine.end(reason);
        self.reap();
        true
    }
}

struct SimLink {
    host: Host,
    vm: Option<VmId>,
    identity: ProcessIdentity,
    state: Mutex<Arc<LinkState>>,
}

impl SimLink {
    fn session(&self) -> Arc<LinkState> {
        Arc::clone(&lock(&self.state))
    }
}

/// What every guest says of itself.
static AGENT: std::sync::LazyLock<AgentInfo> = std::sync::LazyLock::new(|| AgentInfo {
    agent_version: "sim".into(),
    kernel_release: "sim".into(),
    init_started_us: 1,
    agent_ready_us: 2,
});

#[async_trait]
impl GuestLink for SimLink {
    fn agent(&self) -> &AgentInfo {
        &AGENT
    }

    async fn configure(&self, _config: &GuestConfig) -> Result<(), LinkError> {
        let work = || -> BoxFuture<'_, _> { async { self.session().alive() }.boxed() };
        self.host.0.act(Act::Configure, self.vm, work, lost).await
    }

    async fn exec(&self, _spec: &ExecSpec) -> Result<ExecSession, LinkError> {
        Err(LinkError::Lost { cause: "no commands in a simulation".into() })
    }

    async fn file(&self, _op: &FileOp) -> Result<ExecSession, LinkError> {
        Err(LinkError::Lost { cause: "no files in a simulation".into() })
    }

    async fn shutdown(&self, _grace: Duration) -> Result<(), LinkError> {
        let work = || -> BoxFuture<'_, _> {
            async {
                self.session().alive()?;
                let (sim, identity) = (Arc::clone(&self.host.0.sim), self.identity.clone());
                let takes = sim.rng().up_to(Duration::from_secs(8));
                let (vm, obeys) = (self.vm, sim.rng().chance(80));
                tokio::spawn(async move {
                    sleep(takes).await;
                    if obeys && sim.vm_of(&identity).is_some() {
                        sim.trace
                            .note(format_args!("guest {} powers off", super::world::shown(vm)));
                        sim.end(&identity);
                    }
                });
                Ok(())
            }
            .boxed()
        };
        self.host.0.act(Act::Shutdown, self.vm, work, lost).await
    }

    async fn ping(&self) -> Result<(), LinkError> {
        self.session().alive()
    }

    async fn reconnect(&self, _machine: &dyn Machine, deadline: Duration) -> Result<(), LinkError> {
        let sim = &self.host.0.sim;
        let work = || -> BoxFuture<'_, _> {
            async {
                let takes = sim.rng().up_to(Duration::from_secs(1));
                sleep(takes).await;
                self.host.0.gate().await;
                let session = sim.add_link(&self.identity)?;
                *lock(&self.state) = session;
                Ok(())
            }
            .boxed()
        };
        let asked = self.host.0.act(Act::Connect, self.vm, work, lost);
        tokio::time::timeout(deadline, asked)
            .await
            .unwrap_or(Err(LinkError::Timeout { what: "the handshake", waited: deadline }))
    }

    fn give_up(&self) {}

    async fn closed(&self) -> LinkError {
        let cause = self.session().closed().await;
        self.host.0.gate().await;
        cause
    }
}
