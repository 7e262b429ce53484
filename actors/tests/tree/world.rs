//! A host in memory, a store on disk, and a tree over both.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_actors::db_writer::{
    DbHandle, DbWriterArgs, QUEUE_WAIT, Store, ThreadSlot, join_thread,
};
use matchlock_actors::deps::{Deps, Limits, OwnerServer, ServeGuard};
use matchlock_actors::fleet::{FleetMsg, VmHandle};
use matchlock_actors::images::ImagesArgs;
use matchlock_actors::reconciler::{ReconcilerMsg, Target, VmReport};
use matchlock_actors::root::{Root, RootArgs, RootMsg, Services, Slots};
use matchlock_actors::subnet_allocator::SubnetHandle;
use matchlock_actors::vm::{CreateVm, StartMode};
use matchlock_host::firewall::FakeFirewall;
use matchlock_host::guest_link::{FakeConnector, LinkError};
use matchlock_host::hypervisor::{ExitReason, FakeHypervisor};
use matchlock_host::image::{ImageDirs, ImportLimits};
use matchlock_host::netlock::{FakeNetworkLocks, NetworkLocks};
use matchlock_host::owner_lock::FakeOwnerLocks;
use matchlock_host::process::{FakeProcesses, Processes as _};
use matchlock_host::registry::RegistrySettings;
use matchlock_host::rootfs::{FakeRootfs, VmPaths};
use matchlock_host::snapshot::FakeSnapshots;
use matchlock_host::tap::FakeTaps;
use matchlock_model::failure::Failure;
use matchlock_model::id::{InstallId, VmId};
use matchlock_model::image::ImageConfig;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::spec::{NetworkInput, VmSpec, VmSpecInput};
use matchlock_model::subnet::SubnetPool;
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;
use matchlock_store::{ReadPool, open_state};
use ractor::{Actor, ActorCell, ActorRef, RpcReplyPort};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Long enough for a loaded machine; never a measure of speed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Puts something between a writer and its store.
pub(crate) type WrapStore = fn(Box<dyn Store>) -> Box<dyn Store>;

/// What installations on one host share, and what tells them apart.
pub(crate) struct Host {
    pub(crate) install: u8,
    pub(crate) first_id: u32,
    /// From a ping to the record of a hang.
    pub(crate) hang: Duration,
    /// From cancelling an operation to its end.
    pub(crate) cancel: Duration,
    /// Its VMs have no NIC.
    pub(crate) no_network: bool,
    /// What its VMs' subnets are taken of.
    pub(crate) subnets: SubnetPool,
    pub(crate) taps: FakeTaps,
    pub(crate) network_locks: Arc<dyn NetworkLocks>,
}

impl Default for Host {
    fn default() -> Self {
        let network_locks = Arc::new(FakeNetworkLocks::default());
        Self {
            install: 1,
            first_id: 1,
            // A loaded machine answers later than at once.
            hang: Duration::from_millis(500),
            cancel: Duration::from_millis(300),
            no_network: false,
            subnets: SubnetPool::default(),
            taps: FakeTaps::default(),
            network_locks,
        }
    }
}

struct NoServer;

#[async_trait]
impl OwnerServer for NoServer {
    async fn serve(&self, _vm: VmId, _paths: &VmPaths) -> Result<ServeGuard, Failure> {
        Ok(Box::new(()))
    }
}

pub(crate) struct World {
    pub(crate) hypervisor: FakeHypervisor,
    pub(crate) connector: FakeConnector,
    pub(crate) snapshots: FakeSnapshots,
    pub(crate) rootfs: FakeRootfs,
    pub(crate) taps: FakeTaps,
    pub(crate) firewall: FakeFirewall,
    pub(crate) processes: FakeProcesses,
    pub(crate) locks: FakeOwnerLocks,
    pub(crate) deps: Deps,
    services: Services,
    root: ActorRef<RootMsg>,
    joined: JoinHandle<()>,
    writer: ThreadSlot,
    no_network: bool,
    _home: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with_memory(100_000).await
    }

    pub(crate) async fn with_memory(memory_mb: u64) -> Self {
        Self::with(memory_mb, |store| store, Host::default()).await
    }

    /// A tree whose writer writes through what this makes of its store.
    pub(crate) async fn with_store(wrap: WrapStore) -> Self {
        Self::with(100_000, wrap, Host::default()).await
    }

    /// Another installation in the same network namespace. Its ids are others.
    pub(crate) async fn beside(&self) -> Self {
        let (taps, network_locks) = (self.taps.clone(), Arc::clone(&self.deps.network_locks));
        let host = Host { install: 2, first_id: 101, taps, network_locks, ..Host::default() };
        Self::with(100_000, |store| store, host).await
    }

    pub(crate) async fn with(memory_mb: u64, wrap: WrapStore, host: Host) -> Self {
        let home = tempfile::tempdir().unwrap();
        drop(open_state(home.path()).unwrap());
        let slots = Slots::default();
        let services = slots.services();
        let processes = FakeProcesses::new();
        let hypervisor = FakeHypervisor::new(processes.clone());
        let connector = FakeConnector::default();
        let Host { install, first_id, hang, cancel, no_network, subnets, taps, network_locks } =
            host;
        let firewall = FakeFirewall::default().in_process(processes.own_identity().unwrap());
        let snapshots = FakeSnapshots::default();
        let (rootfs, locks) = (FakeRootfs::new(), FakeOwnerLocks::default());
        power_off_on_shutdown(&connector, &hypervisor);
        let ids = AtomicU32::new(first_id);
        let deps = Deps {
            install: InstallId::from_bytes([install; 8]),
            vms_dir: PathBuf::from("/fake/vms"),
            hypervisor: Arc::new(hypervisor.clone()),
            connector: Arc::new(connector.clone()),
            snapshots: Arc::new(snapshots.clone()),
            rootfs: Arc::new(rootfs.clone()),
            processes: Arc::new(processes.clone()),
            taps: Arc::new(taps.clone()),
            firewall: Arc::new(firewall.clone()),
            network_locks,
            subnet_pool: Ok(Arc::new(subnets)),
            subnets: SubnetHandle(services.subnet_allocator.clone()),
            locks: Arc::new(locks.clone()),
            owner_server: Arc::new(NoServer),
            db: DbHandle(services.db_writer.clone()),
            reader: Arc::new(ReadPool::open(home.path()).unwrap().unwrap()),
            available_memory_mb: Arc::new(move || Ok(memory_mb)),
            now: jiff::Timestamp::now,
            random_u32: Arc::new(move || Ok(ids.fetch_add(1, Ordering::Relaxed))),
            limits: Limits {
                vms: 20_000,
                boot: Duration::from_secs(30),
                hang,
                kill: Duration::from_millis(300),
                restore: Duration::from_millis(300),
                power_off: Duration::from_millis(300),
                cancel,
                reap: Duration::from_secs(1),
                cleaner: Duration::from_millis(300),
            },
        };
        let (writer, path) = (ThreadSlot::default(), home.path().to_owned());
        let args = RootArgs {
            slots,
            db_writer: DbWriterArgs {
                open: Arc::new(move || Ok(wrap(Box::new(open_state(&path)?)))),
                thread: Arc::clone(&writer),
                queue_wait: QUEUE_WAIT,
            },
            deps: deps.clone(),
            images: ImagesArgs {
                dirs: ImageDirs::new(home.path()),
                limits: ImportLimits::default(),
                registries: RegistrySettings::default(),
                now: jiff::Timestamp::now,
            },
        };
        let (root, joined) = Actor::spawn(None, Root, args).await.unwrap();
        Self {
            hypervisor,
            connector,
            snapshots,
            rootfs,
            taps,
            firewall,
            processes,
            locks,
            deps,
            services,
            root,
            joined,
            writer,
            no_network,
            _home: home,
        }
    }

    pub(crate) async fn create(&self, ephemeral: bool) -> Result<VmHandle, Failure> {
        self.create_as(StartMode::Warm, ephemeral).await
    }

    pub(crate) async fn create_as(
        &self,
        start: StartMode,
        ephemeral: bool,
    ) -> Result<VmHandle, Failure> {
        let create = Box::new(CreateVm {
            spec: spec(ephemeral, self.no_network),
            image: ImageConfig::default(),
            base_disk: "/fake/base.erofs".into(),
            lease: None,
            guest_lease: None,
            kernel: "/fake/kernel".into(),
            initramfs: "/fake/initramfs".into(),
            start,
        });
        let message = |reply| FleetMsg::CreateVm { create, reply };
        self.services.fleet.call(message, PATIENCE).await.unwrap()
    }

    pub(crate) async fn running(&self, ephemeral: bool) -> VmHandle {
        let mut vm = self.create(ephemeral).await.unwrap();
        reaches(&mut vm, |view| view.phase == Phase::Running || view.settled).await;
        assert_eq!(vm.view.borrow().cause, None);
        vm
    }

    pub(crate) async fn stop(&self, id: VmId, mode: StopMode) -> Result<VmHandle, Failure> {
        let message = |reply| FleetMsg::StopVm { id, mode, reply };
        self.services.fleet.call(message, PATIENCE).await.unwrap()
    }

    pub(crate) async fn link(
        &self,
        id: VmId,
    ) -> Result<matchlock_actors::fleet::RunningVm, Failure> {
        let message = |reply| FleetMsg::OpenLink { id, reply };
        self.services.fleet.call(message, PATIENCE).await.unwrap()
    }

    pub(crate) async fn reconcile(&self, target: Target, goal: Goal) -> Vec<VmReport> {
        self.ask_reconciler(|reply| ReconcilerMsg::Reconcile {
            target,
            goal,
            progress: None,
            reply,
        })
        .await
    }

    pub(crate) async fn ask_reconciler(
        &self,
        message: impl FnOnce(RpcReplyPort<Result<Vec<VmReport>, Failure>>) -> ReconcilerMsg,
    ) -> Vec<VmReport> {
        self.services.reconciler.call(message, PATIENCE).await.unwrap().unwrap()
    }

    /// The distinct phases of a VM's history, in order.
    pub(crate) async fn phases(&self, id: VmId) -> Vec<Phase> {
        let history = self.deps.reader.history(id).await.unwrap();
        let mut phases: Vec<Phase> = history.iter().map(|record| record.phase).collect();
        phases.dedup();
        phases
    }

    pub(crate) fn paths(&self, id: VmId) -> VmPaths {
        self.deps.paths(id)
    }

    /// Nothing of any VM is left: no process, no link, no table, no file, no lock, no row.
    pub(crate) async fn assert_nothing_left(&self) {
        use matchlock_host::firewall::Firewall as _;
        use matchlock_host::process::Processes as _;
        use matchlock_host::tap::Taps as _;
        assert_eq!(self.processes.find_marked().unwrap(), []);
        assert_eq!(self.taps.list_marked(&self.deps.install).await.unwrap(), []);
        assert_eq!(self.firewall.list_marked(&self.deps.install).await.unwrap(), []);
        assert_eq!(self.rootfs.existing(), Vec::<PathBuf>::new());
        assert!(self.deps.reader.vms().await.unwrap().is_empty());
        for number in 1..20 {
            self.lock_is_free(VmId::new(number)).await;
        }
    }

    /// The entry is dropped a moment after the last view.
    pub(crate) async fn lock_is_free(&self, id: VmId) {
        use matchlock_host::owner_lock::OwnerLocks as _;
        let freed = async {
            while self.locks.is_held(id).unwrap() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, freed).await.unwrap();
    }

    /// The actors below the root, by what they are: a service's own children are VMs.
    pub(crate) fn children(&self) -> Vec<ActorCell> {
        self.root.get_cell().get_children()
    }

    pub(crate) fn vm_actors(&self) -> Vec<ActorCell> {
        self.children().iter().flat_map(ActorCell::get_children).collect()
    }

    pub(crate) async fn shutdown(self) {
        let message = |reply| RootMsg::Shutdown { reply };
        let answered = self.root.call(message, Some(PATIENCE)).await.unwrap();
        assert!(matches!(answered, ractor::rpc::CallResult::Success(())));
        timeout(PATIENCE, self.joined).await.unwrap().unwrap();
        join_thread(&self.writer).await.unwrap();
    }
}

/// A guest that is asked to shut down powers its machine off.
fn power_off_on_shutdown(connector: &FakeConnector, hypervisor: &FakeHypervisor) {
    use matchlock_host::hypervisor::Machine as _;
    let hypervisor = hypervisor.clone();
    connector.on_shutdown(move |identity| {
        for spec in hypervisor.launches() {
            if let Some(machine) = hypervisor.machine(spec.mark.vm)
                && machine.identity() == *identity
            {
                machine.end(ExitReason::PowerOff);
            }
        }
    });
}

fn spec(ephemeral: bool, no_network: bool) -> VmSpec {
    VmSpec::check(VmSpecInput {
        image: "fake".into(),
        command: vec![b"echo".to_vec()],
        entrypoint: None,
        env: Vec::new(),
        workdir: None,
        user: None,
        hostname: None,
        add_hosts: Vec::new(),
        network: NetworkInput { no_network, ..NetworkInput::default() },
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

pub(crate) async fn reaches(vm: &mut VmHandle, is_so: impl FnMut(&VmView) -> bool) -> VmView {
    let view = timeout(PATIENCE, vm.view.wait_for(is_so)).await;
    view.expect("in time").expect("while somebody looks after it").clone()
}

pub(crate) async fn settled(vm: &mut VmHandle) -> VmView {
    reaches(vm, |view| view.settled).await
}

pub(crate) fn lost() -> LinkError {
    LinkError::Lost { cause: "a test cut it".into() }
}
