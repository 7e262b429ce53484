//! The only place that names Linux implementations.

use std::sync::Arc;

use matchlock_actors::db_writer::DbHandle;
use matchlock_actors::deps::{Deps, Limits, Rows};
use matchlock_actors::reconciler::Sight;
use matchlock_actors::root::Services;
use matchlock_actors::subnet_allocator::SubnetHandle;
use matchlock_host::facts;
use matchlock_host::firewall::LinuxFirewall;
use matchlock_host::guest_link::YamuxConnector;
use matchlock_host::hypervisor::{Qemu, QemuOptions};
use matchlock_host::netlock::LinuxNetworkLocks;
use matchlock_host::owner_lock::{LinuxOwnerLocks, OwnerLocks};
use matchlock_host::process::{LinuxProcesses, Processes, Spawner};
use matchlock_host::rootfs::LinuxRootfs;
use matchlock_host::snapshot::LinuxSnapshots;
use matchlock_host::tap::LinuxTaps;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::InstallId;
use matchlock_store::ReadPool;
use tokio_util::task::TaskTracker;

use super::client::NodeClient;
use super::config::NodeConfig;
use super::serve::OwnerSockets;

fn host(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error)
}

/// The owner locks of an installation, also for those who only look.
///
/// # Errors
/// When what lies in the place of the lock file is no lock file.
pub(crate) fn owner_locks(config: &NodeConfig) -> Result<Arc<dyn OwnerLocks>, Failure> {
    Ok(Arc::new(LinuxOwnerLocks::open(&config.home).map_err(|e| host(&e))?))
}

/// What looking at what VMs left needs, made of this host. Makes nothing there.
///
/// # Errors
/// When this process, or the lock file, cannot be looked at.
pub(crate) fn sight(
    config: &NodeConfig,
    install: InstallId,
    reader: Arc<dyn Rows>,
) -> Result<Sight, Failure> {
    Ok(Sight {
        install,
        vms_dir: config.vms_dir(),
        rootfs: Arc::new(LinuxRootfs::new()),
        taps: Arc::new(LinuxTaps::new()),
        firewall: Arc::new(LinuxFirewall::new()),
        processes: Arc::new(LinuxProcesses::new().map_err(|e| host(&e))?),
        locks: owner_locks(config)?,
        reader,
    })
}

/// Processes of this host, for those who only look.
///
/// # Errors
/// When they cannot be looked at.
pub(crate) fn processes() -> Result<Arc<dyn Processes>, Failure> {
    Ok(Arc::new(LinuxProcesses::new().map_err(|e| host(&e))?))
}

/// What the actors of this process need, made of this host. `kills` are those of others that are
/// not answered yet.
pub(super) fn deps(
    config: &NodeConfig,
    install: InstallId,
    reader: ReadPool,
    services: &Services,
    kills: &TaskTracker,
) -> Result<Deps, Failure> {
    let spawner = Spawner::new().map_err(|e| host(&e))?;
    let options = QemuOptions { cache: config.cache.clone(), ..QemuOptions::default() };
    let mut limits = Limits::default();
    if let Some(boot) = config.boot_timeout {
        limits.boot = boot;
        limits.restore = limits.restore.min(boot / 2);
    }
    if let Some(hang) = config.hang_timeout {
        limits.hang = hang;
    }
    Ok(Deps {
        install,
        vms_dir: config.vms_dir(),
        hypervisor: Arc::new(Qemu::new(spawner, options)),
        connector: Arc::new(YamuxConnector),
        snapshots: Arc::new(LinuxSnapshots::new(&config.cache)),
        rootfs: Arc::new(LinuxRootfs::new()),
        taps: Arc::new(LinuxTaps::new()),
        firewall: Arc::new(LinuxFirewall::new()),
        network_locks: Arc::new(LinuxNetworkLocks::new()),
        subnet_pool: match &config.subnet_pool {
            Ok(pool) => Ok(Arc::new(pool.clone())),
            Err(bad) => Err(Failure::from_error(FailureKind::Input, bad)),
        },
        subnets: SubnetHandle(services.subnet_allocator.clone()),
        processes: processes()?,
        locks: owner_locks(config)?,
        owner_server: Arc::new(OwnerSockets::new(NodeClient::new(services.clone()), kills.clone())),
        db: DbHandle(services.db_writer.clone()),
        reader: Arc::new(reader),
        available_memory_mb: Arc::new(|| facts::available_memory_mb().map_err(|e| host(&e))),
        now: jiff::Timestamp::now,
        random_u32: Arc::new(|| getrandom::u32().map_err(|e| host(&e))),
        limits,
    })
}
