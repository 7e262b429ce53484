//! What the actors need from outside: host implementations, the store, time and chance.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use matchlock_host::firewall::Firewall;
use matchlock_host::guest_link::LinkConnector;
use matchlock_host::hypervisor::Hypervisor;
use matchlock_host::netlock::NetworkLocks;
use matchlock_host::owner_lock::OwnerLocks;
use matchlock_host::process::Processes;
use matchlock_host::rootfs::{Rootfs, VmPaths};
use matchlock_host::snapshot::Snapshots;
use matchlock_host::tap::Taps;
use matchlock_model::failure::Failure;
use matchlock_model::id::{InstallId, Mark, OwnerEpoch, VmId};
use matchlock_model::record::{LifecycleRecord, VmRecord, VmRemains, VmSummary};
use matchlock_model::subnet::SubnetPool;
use matchlock_store::{BadRow, ReadError, ReadPool};

use crate::db_writer::{DbHandle, WRITE_LIMIT};
use crate::subnet_allocator::SubnetHandle;

/// Answers on the owner's socket of a VM. The node implements it; the actors only say when.
#[async_trait]
pub trait OwnerServer: Send + Sync {
    /// Listens on the VM's owner socket until the guard is dropped.
    ///
    /// # Errors
    /// When the socket cannot be made.
    async fn serve(&self, vm: VmId, paths: &VmPaths) -> Result<ServeGuard, Failure>;
}

/// Ends the serving of a VM's owner socket when dropped.
pub type ServeGuard = Box<dyn Send + Sync>;

/// Reads rows; what each answers is said at [`ReadPool`], which is the one outside of simulations.
#[async_trait]
pub trait Rows: Send + Sync {
    /// The VM's row.
    async fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, ReadError>;

    /// All VMs.
    async fn vms(&self) -> Result<Vec<Result<VmSummary, BadRow>>, ReadError>;

    /// The ids of all VMs.
    async fn vm_ids(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError>;

    /// The VMs that somebody wants removed.
    async fn vms_to_remove(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError>;

    /// What cleaning the VM up needs to know of it.
    async fn remains(&self, vm: VmId) -> Result<Option<VmRemains>, ReadError>;

    /// Whether any VM, removed or not, has or may have had a network.
    async fn any_network(&self) -> Result<bool, ReadError>;

    /// Which owner the VM has; `None` when it has no row.
    async fn owner_epoch(&self, vm: VmId) -> Result<Option<OwnerEpoch>, ReadError>;

    /// The VM's latest lifecycle row.
    async fn lifecycle_head(&self, vm: VmId) -> Result<Option<LifecycleRecord>, ReadError>;

    /// All lifecycle rows of a VM, oldest first.
    async fn history(&self, vm: VmId) -> Result<Vec<LifecycleRecord>, ReadError>;
}

#[async_trait]
impl Rows for ReadPool {
    async fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, ReadError> {
        Self::vm(self, vm).await
    }

    async fn vms(&self) -> Result<Vec<Result<VmSummary, BadRow>>, ReadError> {
        Self::vms(self).await
    }

    async fn vm_ids(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        Self::vm_ids(self).await
    }

    async fn vms_to_remove(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        Self::vms_to_remove(self).await
    }

    async fn remains(&self, vm: VmId) -> Result<Option<VmRemains>, ReadError> {
        Self::remains(self, vm).await
    }

    async fn any_network(&self) -> Result<bool, ReadError> {
        Self::any_network(self).await
    }

    async fn owner_epoch(&self, vm: VmId) -> Result<Option<OwnerEpoch>, ReadError> {
        Self::owner_epoch(self, vm).await
    }

    async fn lifecycle_head(&self, vm: VmId) -> Result<Option<LifecycleRecord>, ReadError> {
        Self::lifecycle_head(self, vm).await
    }

    async fn history(&self, vm: VmId) -> Result<Vec<LifecycleRecord>, ReadError> {
        Self::history(self, vm).await
    }
}

/// How long things may take, and how many there may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// VMs that one node owns at once.
    pub vms: usize,
    /// From the hypervisor's start to the agent's answer.
    pub boot: Duration,
    /// For a restored guest to go on, and for its agent to answer then: less than a boot, or it boots.
    pub restore: Duration,
    /// From a ping to the record that the guest does not answer.
    pub hang: Duration,
    /// From SIGKILL to the process being gone.
    pub kill: Duration,
    /// Beyond the guest's own grace: syncing, unmounting, powering off.
    pub power_off: Duration,
    /// From cancelling an operation to its end. Longer than a write may take: an operation that waits
    /// for a record ends by itself, and the hypervisor is then taken down in order.
    pub cancel: Duration,
    /// For all TAPs together that crashed VMs left, before a subnet is chosen without waiting for
    /// them.
    pub reap: Duration,
    /// For another process that cleans the same VM up, before that is the answer.
    pub cleaner: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vms: 256,
            // Software emulation on a loaded machine: a boot takes 3 s of CPU, 20 may share two.
            boot: Duration::from_secs(120),
            restore: Duration::from_secs(20),
            hang: Duration::from_secs(30),
            kill: Duration::from_secs(10),
            power_off: Duration::from_secs(10),
            cancel: WRITE_LIMIT + Duration::from_secs(3),
            reap: Duration::from_secs(20),
            cleaner: Duration::from_secs(5),
        }
    }
}

/// What the actors need from outside.
#[derive(Clone)]
pub struct Deps {
    /// This installation.
    pub install: InstallId,
    /// `$MATCHLOCK_HOME/vms`.
    pub vms_dir: PathBuf,
    /// Launches machines.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Connects to guests.
    pub connector: Arc<dyn LinkConnector>,
    /// What VMs may go on from.
    pub snapshots: Arc<dyn Snapshots>,
    /// VMs' files.
    pub rootfs: Arc<dyn Rootfs>,
    /// VMs' TAPs, and what this host uses of the IPv4 space.
    pub taps: Arc<dyn Taps>,
    /// VMs' firewall tables.
    pub firewall: Arc<dyn Firewall>,
    /// The lock for choosing subnets.
    pub network_locks: Arc<dyn NetworkLocks>,
    /// Where subnets are taken from; or why nobody can say, which ends only what needs one.
    pub subnet_pool: Result<Arc<SubnetPool>, Failure>,
    /// Grants subnets.
    pub subnets: SubnetHandle,
    /// Processes of this host.
    pub processes: Arc<dyn Processes>,
    /// VMs' owner locks.
    pub locks: Arc<dyn OwnerLocks>,
    /// VMs' owner sockets.
    pub owner_server: Arc<dyn OwnerServer>,
    /// Writes rows.
    pub db: DbHandle,
    /// Reads rows.
    pub reader: Arc<dyn Rows>,
    /// The memory that a new VM may use, in MiB; asked at admission.
    pub available_memory_mb: Arc<dyn Fn() -> Result<u64, Failure> + Send + Sync>,
    /// The time.
    pub now: fn() -> Timestamp,
    /// A random number, for ids.
    pub random_u32: Arc<dyn Fn() -> Result<u32, Failure> + Send + Sync>,
    /// How long things may take.
    pub limits: Limits,
}

impl fmt::Debug for Deps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deps").field("install", &self.install).finish_non_exhaustive()
    }
}

impl Deps {
    /// The paths of a VM.
    #[must_use]
    pub fn paths(&self, vm: VmId) -> VmPaths {
        VmPaths::new(&self.vms_dir, vm)
    }

    /// The mark of a VM.
    #[must_use]
    pub fn mark(&self, vm: VmId) -> Mark {
        Mark { install: self.install.clone(), vm }
    }
}
