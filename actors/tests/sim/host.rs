//! The host's side of one node: files, links, tables, locks, processes.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use matchlock_actors::deps::{OwnerServer, ServeGuard};
use matchlock_host::firewall::{
    Firewall, FirewallError, FirewallHandle, FirewallSpec, ObservedFirewall, ObservedTable,
    Obstacle,
};
use matchlock_host::netlock::{HeldNetworkLock, NetworkLockError, NetworkLocks};
use matchlock_host::owner_lock::{HeldLock, OwnerLockError, OwnerLocks};
use matchlock_host::process::{
    CpuShare, MarkedProcess, NamespaceSighting, ProcessError, Processes,
};
use matchlock_host::rootfs::{ObservedFiles, Rootfs, RootfsError, VmPaths};
use matchlock_host::tap::{HostSubnet, ObservedTap, TapError, TapHandle, TapSpec, Taps};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use tokio::time::{sleep, timeout};

use super::faults::{Act, Fault};
use super::world::{Proc, Tenure, lock};

/// The node, as what the host offers to it.
#[derive(Clone)]
pub(crate) struct Host(pub(crate) Arc<Proc>);

fn vm_of(paths: &VmPaths) -> Option<VmId> {
    paths.dir.file_name()?.to_str()?.parse().ok()
}

fn vm_of_tap(tap: &str) -> Option<VmId> {
    format!("vm-{}", tap.strip_prefix("fc-")?).parse().ok()
}

fn file(source: io::Error) -> RootfsError {
    RootfsError::File { doing: "work on", path: "/fake".into(), source }
}

fn tap(source: io::Error) -> TapError {
    TapError::Kernel { doing: "work on a link".into(), source }
}

fn tables(source: io::Error) -> FirewallError {
    FirewallError::Kernel { doing: "work on tables".into(), source }
}

#[async_trait]
impl Rootfs for Host {
    async fn create_dir(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        let work = || self.0.sim.rootfs.create_dir(paths);
        self.0.act(Act::CreateDir, vm_of(paths), work, file).await
    }

    async fn create_disk(&self, paths: &VmPaths, size_mb: u64) -> Result<(), RootfsError> {
        let work = || self.0.sim.rootfs.create_disk(paths, size_mb);
        self.0.act(Act::CreateDisk, vm_of(paths), work, file).await
    }

    async fn remove_disk(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        let work = || self.0.sim.rootfs.remove_disk(paths);
        self.0.act(Act::RemoveDisk, vm_of(paths), work, file).await
    }

    async fn remove_sockets(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        let work = || self.0.sim.rootfs.remove_sockets(paths);
        self.0.act(Act::RemoveSockets, vm_of(paths), work, file).await
    }

    async fn remove_dir(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        let work = || self.0.sim.rootfs.remove_dir(paths);
        self.0.act(Act::RemoveDir, vm_of(paths), work, file).await
    }

    fn list_dirs(&self, vms_dir: &Path) -> Result<Vec<VmId>, RootfsError> {
        self.0.act_now(Act::ListDirs, None, || self.0.sim.rootfs.list_dirs(vms_dir), file)
    }

    fn list_strangers(&self, vms_dir: &Path) -> Result<Vec<std::path::PathBuf>, RootfsError> {
        self.0.act_now(Act::ListDirs, None, || self.0.sim.rootfs.list_strangers(vms_dir), file)
    }

    fn observe(&self, paths: &VmPaths) -> Result<ObservedFiles, RootfsError> {
        let work = || self.0.sim.rootfs.observe(paths);
        self.0.act_now(Act::ObserveFiles, vm_of(paths), work, file)
    }
}

#[async_trait]
impl OwnerServer for Host {
    async fn serve(&self, vm: VmId, paths: &VmPaths) -> Result<ServeGuard, Failure> {
        let work = || -> BoxFuture<'_, _> {
            async {
                self.0.sim.rootfs.add_file(&paths.owner_socket());
                Ok(())
            }
            .boxed()
        };
        let failed = |e: io::Error| Failure::new(FailureKind::Host, e.to_string());
        self.0.act(Act::ServeOwner, Some(vm), work, failed).await?;
        Ok(Box::new(()))
    }
}

#[async_trait]
impl Taps for Host {
    async fn create(&self, spec: &TapSpec) -> Result<TapHandle, TapError> {
        let work = || -> BoxFuture<'_, _> {
            async {
                self.0.sim.check_address(spec.mark.vm, spec.gateway);
                lock(&self.0.taps).push(spec.name());
                let handle = self.0.sim.taps.create(spec).await?;
                if self.0.sim.persistent_taps {
                    self.0.sim.taps.set_persistent(&spec.name());
                }
                Ok(handle)
            }
            .boxed()
        };
        self.0.act(Act::CreateTap, Some(spec.mark.vm), work, tap).await
    }

    async fn observe(&self, name: &str) -> Result<Option<ObservedTap>, TapError> {
        let work = || self.0.sim.taps.observe(name);
        self.0.act(Act::ObserveTap, vm_of_tap(name), work, tap).await
    }

    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTap>, TapError> {
        self.0.act(Act::ListTaps, None, || self.0.sim.taps.list_marked(install), tap).await
    }

    async fn list_alike(&self) -> Result<Vec<ObservedTap>, TapError> {
        self.0.act(Act::ListTaps, None, || self.0.sim.taps.list_alike(), tap).await
    }

    async fn remove(&self, name: &str, mark: &Mark) -> Result<(), TapError> {
        let work = || self.0.sim.taps.remove(name, mark);
        self.0.act(Act::RemoveTap, Some(mark.vm), work, tap).await
    }

    async fn host_subnets(&self) -> Result<Vec<HostSubnet>, TapError> {
        self.0.act(Act::HostSubnets, None, || self.0.sim.taps.host_subnets(), tap).await
    }
}

#[async_trait]
impl Firewall for Host {
    async fn apply(&self, spec: &FirewallSpec) -> Result<FirewallHandle, FirewallError> {
        let firewall = self.0.sim.firewall.in_process(self.0.identity.clone());
        let work = || firewall.apply(spec);
        self.0.act(Act::ApplyFirewall, Some(spec.mark.vm), work, tables).await
    }

    async fn release(&self, handle: FirewallHandle) -> Result<(), FirewallError> {
        let vm = vm_of_tap(handle.tap());
        // It can be given away once only; a fault before that closes its socket all the same.
        let handle = std::sync::Mutex::new(Some(handle));
        let work = || -> BoxFuture<'_, _> {
            let handle = lock(&handle).take();
            async move {
                match handle {
                    Some(handle) => self.0.sim.firewall.release(handle).await,
                    None => Ok(()),
                }
            }
            .boxed()
        };
        self.0.act(Act::ReleaseFirewall, vm, work, tables).await
    }

    async fn observe(&self, tap: &str) -> Result<ObservedFirewall, FirewallError> {
        let work = || self.0.sim.firewall.observe(tap);
        self.0.act(Act::ObserveFirewall, vm_of_tap(tap), work, tables).await
    }

    async fn list_marked(&self, install: &InstallId) -> Result<Vec<ObservedTable>, FirewallError> {
        let work = || self.0.sim.firewall.list_marked(install);
        self.0.act(Act::ListFirewall, None, work, tables).await
    }

    async fn list_alike(&self) -> Result<Vec<ObservedTable>, FirewallError> {
        self.0.act(Act::ListFirewall, None, || self.0.sim.firewall.list_alike(), tables).await
    }

    async fn remove(&self, tap: &str, mark: &Mark) -> Result<(), FirewallError> {
        let work = || self.0.sim.firewall.remove(tap, mark);
        self.0.act(Act::RemoveFirewall, Some(mark.vm), work, tables).await
    }

    async fn remove_from(
        &self,
        tap: &str,
        mark: &Mark,
        holder: &ProcessIdentity,
    ) -> Result<(), FirewallError> {
        let work = || self.0.sim.firewall.remove_from(tap, mark, holder);
        self.0.act(Act::RemoveFirewall, Some(mark.vm), work, tables).await
    }

    async fn obstacles(&self) -> Result<Vec<Obstacle>, FirewallError> {
        self.0.act(Act::Obstacles, None, || self.0.sim.firewall.obstacles(), tables).await
    }

    fn ip_forward(&self) -> Result<bool, FirewallError> {
        self.0.sim.firewall.ip_forward()
    }

    fn enable_ip_forward(&self) -> Result<bool, FirewallError> {
        self.0.sim.firewall.enable_ip_forward()
    }
}

/// A held lock, of a VM or of the network; the kernel takes it back when its process dies.
struct Held {
    of: Arc<Proc>,
    vm: Option<VmId>,
    tenure: Tenure,
    /// Of who cleans the VM up, not of its owner.
    cleaner: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        let sim = &self.of.sim;
        if let Some(vm) = self.vm {
            let mut locks = lock(if self.cleaner { &sim.cleaners } else { &sim.locks });
            if locks.get(&vm) == Some(&self.tenure) {
                locks.remove(&vm);
                if !self.cleaner {
                    self.of.note(format_args!("unlocks {vm}"));
                }
            }
        } else {
            lock(&sim.network_lock).take_if(|tenure| *tenure == self.tenure);
            sim.network_lock_freed.notify_waiters();
        }
    }
}

impl OwnerLocks for Host {
    fn try_acquire(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        let work = || {
            let tenure = Tenure { pid: self.0.pid, token: self.0.sim.token() };
            let mut locks = lock(&self.0.sim.locks);
            if locks.contains_key(&vm) {
                return Err(OwnerLockError::Held { vm });
            }
            locks.insert(vm, tenure);
            self.0.note(format_args!("locks {vm}"));
            let held: HeldLock =
                Box::new(Held { of: Arc::clone(&self.0), vm: Some(vm), tenure, cleaner: false });
            Ok(held)
        };
        self.0.act_now(Act::TryLock, Some(vm), work, lock_file)
    }

    fn try_acquire_cleaner(&self, vm: VmId) -> Result<HeldLock, OwnerLockError> {
        let mut cleaners = lock(&self.0.sim.cleaners);
        if cleaners.contains_key(&vm) {
            return Err(OwnerLockError::Held { vm });
        }
        let tenure = Tenure { pid: self.0.pid, token: self.0.sim.token() };
        cleaners.insert(vm, tenure);
        Ok(Box::new(Held { of: Arc::clone(&self.0), vm: Some(vm), tenure, cleaner: true }))
    }

    fn is_being_cleaned(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        Ok(lock(&self.0.sim.cleaners).contains_key(&vm))
    }

    fn is_held(&self, vm: VmId) -> Result<bool, OwnerLockError> {
        let work = || Ok(lock(&self.0.sim.locks).contains_key(&vm));
        self.0.act_now(Act::IsHeld, Some(vm), work, lock_file)
    }
}

fn lock_file(source: io::Error) -> OwnerLockError {
    OwnerLockError::File { path: "/fake/vm.locks".into(), source }
}

#[async_trait]
impl NetworkLocks for Host {
    async fn acquire(&self, patience: Duration) -> Result<HeldNetworkLock, NetworkLockError> {
        let work = || -> BoxFuture<'_, _> {
            async {
                let got = timeout(patience, self.wait_for_network_lock()).await;
                got.map_err(|_| NetworkLockError::Held { waited: patience, holder: None })
            }
            .boxed()
        };
        self.0.act(Act::NetworkLock, None, work, NetworkLockError::Socket).await
    }
}

impl Host {
    async fn wait_for_network_lock(&self) -> HeldNetworkLock {
        loop {
            let freed = self.0.sim.network_lock_freed.notified();
            {
                let mut held = lock(&self.0.sim.network_lock);
                if held.is_none() {
                    let tenure = Tenure { pid: self.0.pid, token: self.0.sim.token() };
                    *held = Some(tenure);
                    return Box::new(Held {
                        of: Arc::clone(&self.0),
                        vm: None,
                        tenure,
                        cleaner: false,
                    });
                }
            }
            freed.await;
            self.0.gate().await;
        }
    }

    /// SIGKILL to a process, whichever way it was found.
    pub(crate) async fn kill_process(
        &self,
        vm: Option<VmId>,
        identity: &ProcessIdentity,
        deadline: Duration,
    ) -> Result<(), ProcessError> {
        let sim = &self.0.sim;
        self.0.gate().await;
        let _in_flight = self.0.enter(Act::Kill, vm);
        let fault = self.0.draw(Act::Kill, vm);
        if let Some(Fault::Late(wakes)) = fault {
            // It waits for a disk that does not answer: the signal counts once that does.
            if let Some(vm) = vm {
                sim.check(self.0.pid, Act::Kill, vm);
            }
            let pid = identity.pid;
            if wakes > deadline {
                let (this, identity) = (Arc::clone(&self.0), identity.clone());
                tokio::spawn(async move {
                    sleep(wakes).await;
                    this.note(format_args!("process {} ends at last", identity.pid));
                    this.sim.end(&identity);
                });
                sleep(deadline).await;
                return Err(ProcessError::WillNotDie { pid, waited: deadline });
            }
            sleep(wakes).await;
            self.0.gate().await;
            sim.end(identity);
            return Ok(());
        }
        let look = |source| ProcessError::Look { pid: identity.pid, source };
        let work = || sim.processes.kill(identity, deadline);
        let killed = self.0.act_with(fault, Act::Kill, vm, work, look).await;
        sim.reap();
        killed
    }
}

fn listing(source: io::Error) -> ProcessError {
    ProcessError::List(source)
}

#[async_trait]
impl Processes for Host {
    fn own_identity(&self) -> Result<ProcessIdentity, ProcessError> {
        let work = || Ok(self.0.identity.clone());
        self.0.act_now(Act::OwnIdentity, None, work, listing)
    }

    fn own_namespaces(&self) -> Result<Namespaces, ProcessError> {
        let work = || self.0.sim.processes.own_namespaces();
        self.0.act_now(Act::OwnNamespaces, None, work, listing)
    }

    fn sees_all_processes(&self) -> Result<bool, ProcessError> {
        Ok(true)
    }

    fn look_for_network_namespace(
        &self,
        namespace: &str,
    ) -> Result<NamespaceSighting, ProcessError> {
        self.0.sim.processes.look_for_network_namespace(namespace)
    }

    fn is_alive(&self, identity: &ProcessIdentity) -> Result<bool, ProcessError> {
        let work = || self.0.sim.processes.is_alive(identity);
        self.0.act_now(Act::IsAlive, None, work, listing)
    }

    fn cpu_share(&self, identity: &ProcessIdentity) -> Result<Option<CpuShare>, ProcessError> {
        let work = || self.0.sim.processes.cpu_share(identity);
        self.0.act_now(Act::IsAlive, None, work, listing)
    }

    fn find_marked(&self) -> Result<Vec<MarkedProcess>, ProcessError> {
        let work = || self.0.sim.processes.find_marked();
        self.0.act_now(Act::FindMarked, None, work, listing)
    }

    async fn kill(
        &self,
        identity: &ProcessIdentity,
        deadline: Duration,
    ) -> Result<(), ProcessError> {
        let marked = self.0.sim.processes.find_marked()?;
        let process = marked.into_iter().find(|process| process.identity == *identity);
        if process.as_ref().is_some_and(|process| process.mark.install != self.0.sim.install) {
            self.0.sim.trace.broken(format_args!("law 8: p{} kills {process:?}", self.0.pid));
        }
        self.kill_process(process.map(|process| process.mark.vm), identity, deadline).await
    }
}
