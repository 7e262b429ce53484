//! One node: a tree of actors over the host, and how it is asked.

use std::sync::Arc;
use std::time::Duration;

use matchlock_actors::db_writer::{
    DbHandle, DbWriterArgs, QUEUE_WAIT, Runner, ThreadSlot, join_thread,
};
use matchlock_actors::deps::{Deps, Limits};
use matchlock_actors::fleet::{FleetMsg, VmHandle};
use matchlock_actors::handle::CallError;
use matchlock_actors::images::ImagesArgs;
use matchlock_actors::reconciler::{ReconcilerMsg, Target, VmReport};
use matchlock_actors::root::{Root, RootArgs, RootMsg, Services, Slots};
use matchlock_actors::subnet_allocator::SubnetHandle;
use matchlock_actors::vm::{CreateVm, StartMode};
use matchlock_host::image::{ImageDirs, ImportLimits};
use matchlock_host::registry::RegistrySettings;
use matchlock_host::snapshot::Snapshots as _;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::image::ImageConfig;
use matchlock_model::reconcile::Goal;
use matchlock_model::spec::{NetworkInput, VmSpec, VmSpecInput};
use matchlock_model::subnet::SubnetPool;
use matchlock_model::vm::StopMode;
use ractor::{Actor, ActorCell, ActorRef};

use super::faults::Act;
use super::host::Host;
use super::store;
use super::world::{Proc, Sim, now};

/// How many ids there are: so few that some are drawn twice.
pub(crate) const IDS: u32 = 40;

/// How long an answer may take, whatever goes wrong: the longest of a node's own limits is that of
/// a write, twice (once for each life of the writer).
pub(crate) const ANSWER: Duration = Duration::from_secs(600);

/// A node.
pub(crate) struct Node {
    pub(crate) process: Arc<Proc>,
    services: Services,
    root: ActorRef<RootMsg>,
    writer: ThreadSlot,
}

fn limits() -> Limits {
    Limits {
        vms: 256,
        boot: Duration::from_secs(30),
        restore: Duration::from_secs(3),
        hang: Duration::from_secs(30),
        reap: Duration::from_secs(20),
        kill: Duration::from_secs(3),
        power_off: Duration::from_secs(5),
        cancel: Duration::from_secs(5),
        cleaner: Duration::from_secs(5),
    }
}

fn deps(host: &Host, services: &Services) -> Deps {
    let process = Arc::clone(&host.0);
    let memory = move || {
        let failed = |e: std::io::Error| Failure::new(FailureKind::Host, e.to_string());
        process.act_now(Act::Memory, None, || Ok(100_000), failed)
    };
    let process = Arc::clone(&host.0);
    let random = move || {
        let failed = |e: std::io::Error| Failure::new(FailureKind::Host, e.to_string());
        let id = 1 + u32::try_from(process.sim.rng().below(IDS.into())).unwrap();
        process.act_now(Act::RandomId, None, || Ok(id), failed)
    };
    let host = Arc::new(host.clone());
    Deps {
        install: host.0.sim.install.clone(),
        vms_dir: Sim::vms_dir(),
        hypervisor: host.clone(),
        connector: host.clone(),
        snapshots: host.clone(),
        rootfs: host.clone(),
        taps: host.clone(),
        firewall: host.clone(),
        network_locks: host.clone(),
        subnet_pool: Ok(Arc::new(SubnetPool::default())),
        subnets: SubnetHandle(services.subnet_allocator.clone()),
        processes: host.clone(),
        locks: host.clone(),
        owner_server: host.clone(),
        db: DbHandle(services.db_writer.clone()),
        reader: host,
        available_memory_mb: Arc::new(memory),
        now,
        random_u32: Arc::new(random),
        limits: limits(),
    }
}

impl Node {
    /// Boots a node; `None` when it could not.
    pub(crate) async fn boot(sim: &Arc<Sim>) -> Option<Self> {
        let process = Proc::new(sim);
        let slots = Slots::default();
        let services = slots.services();
        let (open, pace) = store::writer(&process);
        let writer = Runner::simulated(pace);
        let args = RootArgs {
            slots,
            db_writer: DbWriterArgs { open, thread: Arc::clone(&writer), queue_wait: QUEUE_WAIT },
            deps: deps(&Host(Arc::clone(&process)), &services),
            images: ImagesArgs {
                dirs: ImageDirs::new(&sim.home),
                limits: ImportLimits::default(),
                registries: RegistrySettings::default(),
                now,
            },
        };
        let Ok((root, joined)) = Actor::spawn(None, Root, args).await else {
            process.die();
            return None;
        };
        process.set_root(root.get_cell());
        // A node whose root has ended exits.
        let of = Arc::clone(&process);
        tokio::spawn(async move {
            let ended = joined.await;
            of.note(format_args!("its root has ended ({})", ended.is_ok()));
            of.die();
        });
        Some(Self { process, services, root, writer })
    }

    pub(crate) async fn create(
        &self,
        ephemeral: bool,
        start: StartMode,
    ) -> Result<Result<VmHandle, Failure>, CallError> {
        let create = Box::new(CreateVm {
            spec: spec(ephemeral),
            image: ImageConfig::default(),
            base_disk: "/fake/base.erofs".into(),
            lease: None,
            guest_lease: None,
            kernel: "/fake/kernel".into(),
            initramfs: "/fake/initramfs".into(),
            start,
        });
        let message = |reply| FleetMsg::CreateVm { create, reply };
        self.services.fleet.call(message, ANSWER).await
    }

    pub(crate) async fn stop(
        &self,
        id: VmId,
        mode: StopMode,
    ) -> Result<Result<VmHandle, Failure>, CallError> {
        let message = |reply| FleetMsg::StopVm { id, mode, reply };
        self.services.fleet.call(message, ANSWER).await
    }

    pub(crate) async fn stop_all(&self, mode: StopMode) -> Result<Vec<VmHandle>, CallError> {
        let message = |reply| FleetMsg::StopAll { mode, reply };
        self.services.fleet.call(message, ANSWER).await
    }

    /// Whether the link to a VM's guest is had.
    pub(crate) async fn link(&self, id: VmId) -> Result<Result<(), Failure>, CallError> {
        let message = |reply| FleetMsg::OpenLink { id, reply };
        Ok(self.services.fleet.call(message, ANSWER).await?.map(drop))
    }

    pub(crate) async fn reconcile(
        &self,
        target: Target,
        goal: Goal,
    ) -> Result<Result<Vec<VmReport>, Failure>, CallError> {
        let message = |reply| ReconcilerMsg::Reconcile { target, goal, progress: None, reply };
        self.services.reconciler.call(message, Duration::from_secs(3600)).await
    }

    /// The services, in the order of their last start.
    pub(crate) fn children(&self) -> Vec<ActorCell> {
        sorted(self.root.get_cell().get_children())
    }

    /// The VM actors, in the order of their last start.
    pub(crate) fn vm_actors(&self) -> Vec<ActorCell> {
        sorted(self.children().iter().flat_map(ActorCell::get_children).collect())
    }

    /// Removes what nobody can use of snapshots, as `gc` does; whether it could.
    pub(crate) async fn sweep(&self) -> bool {
        let swept = Host(Arc::clone(&self.process)).sweep().await;
        self.process.note(format_args!("swept {:?}", swept.as_ref().ok()));
        swept.is_ok()
    }

    /// Ends the services in order; whether they did.
    pub(crate) async fn shutdown(&self) -> bool {
        let message = |reply| RootMsg::Shutdown { reply };
        let answered = self.root.call(message, Some(ANSWER)).await;
        let done = matches!(answered, Ok(ractor::rpc::CallResult::Success(())));
        done && join_thread(&self.writer).await.is_ok()
    }

    /// SIGKILL.
    pub(crate) fn crash(&self) {
        self.process.die();
    }
}

/// ractor keeps children in a map with a random order.
fn sorted(mut cells: Vec<ActorCell>) -> Vec<ActorCell> {
    cells.sort_by_key(|cell| cell.get_id().pid());
    cells
}

fn spec(ephemeral: bool) -> VmSpec {
    VmSpec::check(VmSpecInput {
        image: "fake".into(),
        command: vec![b"echo".to_vec()],
        entrypoint: None,
        env: Vec::new(),
        workdir: None,
        user: None,
        hostname: None,
        add_hosts: Vec::new(),
        network: NetworkInput::default(),
        cpus: 1.0,
        memory_mb: 256,
        disk_size_mb: 64,
        timeout: None,
        graceful_shutdown: Some(Duration::from_millis(100)),
        stdin: false,
        terminal: None,
        privileged: false,
        remove: ephemeral,
        host_cpus: 4,
    })
    .unwrap()
}
