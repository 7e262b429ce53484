//! Looking at what is left of VMs, which changes nothing: the half of the reconciler that needs no
//! tree, no writer and no lock.
//!
//! # Invariants
//! 1. Nothing is written, taken, made or removed here.
//! 2. "Could not look" is an error, never "nothing there".

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::{self, StreamExt as _};
use matchlock_failpoints::mutated;
use matchlock_host::firewall::{Firewall, FirewallError};
use matchlock_host::owner_lock::OwnerLocks;
use matchlock_host::process::{MarkedProcess, Processes};
use matchlock_host::rootfs::{Rootfs, VmPaths};
use matchlock_host::tap::Taps;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{InstallId, Mark, OwnerEpoch, VmId};
use matchlock_model::reconcile::{Finding, Goal, Observed};
use matchlock_model::record::{LifecycleRecord, VmRecord, VmRemains, VmSummary};
use matchlock_store::{BadRow, ReadError};

use super::network;
use super::report::{Outcome, Stranger, VmReport};
use crate::deps::{Deps, Rows};

/// How many VMs are looked at, or cleaned up, at the same time.
pub(super) const AT_ONCE: usize = 32;

/// What looking needs of the world.
#[derive(Clone)]
pub struct Sight {
    /// This installation.
    pub install: InstallId,
    /// `$MATCHLOCK_HOME/vms`.
    pub vms_dir: PathBuf,
    /// VMs' files.
    pub rootfs: Arc<dyn Rootfs>,
    /// VMs' TAPs.
    pub taps: Arc<dyn Taps>,
    /// VMs' firewall tables.
    pub firewall: Arc<dyn Firewall>,
    /// Processes of this host.
    pub processes: Arc<dyn Processes>,
    /// VMs' owner locks.
    pub locks: Arc<dyn OwnerLocks>,
    /// Reads rows.
    pub reader: Arc<dyn Rows>,
}

impl fmt::Debug for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sight").field("install", &self.install).finish_non_exhaustive()
    }
}

impl Deps {
    /// What looking needs of it.
    #[must_use]
    pub fn sight(&self) -> Sight {
        Sight {
            install: self.install.clone(),
            vms_dir: self.vms_dir.clone(),
            rootfs: Arc::clone(&self.rootfs),
            taps: Arc::clone(&self.taps),
            firewall: Arc::clone(&self.firewall),
            processes: Arc::clone(&self.processes),
            locks: Arc::clone(&self.locks),
            reader: Arc::clone(&self.reader),
        }
    }
}

/// The rows where nothing was ever stored.
#[derive(Debug, Clone, Copy)]
pub struct NoRows;

#[async_trait]
impl Rows for NoRows {
    async fn vm(&self, _vm: VmId) -> Result<Option<VmRecord>, ReadError> {
        Ok(None)
    }

    async fn vms(&self) -> Result<Vec<Result<VmSummary, BadRow>>, ReadError> {
        Ok(Vec::new())
    }

    async fn vm_ids(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        Ok(Vec::new())
    }

    async fn vms_to_remove(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        Ok(Vec::new())
    }

    async fn remains(&self, _vm: VmId) -> Result<Option<VmRemains>, ReadError> {
        Ok(None)
    }

    async fn any_network(&self) -> Result<bool, ReadError> {
        Ok(false)
    }

    async fn owner_epoch(&self, _vm: VmId) -> Result<Option<OwnerEpoch>, ReadError> {
        Ok(None)
    }

    async fn lifecycle_head(&self, _vm: VmId) -> Result<Option<LifecycleRecord>, ReadError> {
        Ok(None)
    }

    async fn history(&self, _vm: VmId) -> Result<Vec<LifecycleRecord>, ReadError> {
        Ok(Vec::new())
    }
}

pub(super) fn host(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error)
}

impl Sight {
    pub(super) fn paths(&self, vm: VmId) -> VmPaths {
        VmPaths::new(&self.vms_dir, vm)
    }

    pub(super) fn mark(&self, vm: VmId) -> Mark {
        Mark { install: self.install.clone(), vm }
    }

    /// Processes that carry our installation's mark; those of others are not ours to see.
    pub(super) fn marked(&self) -> Result<Vec<MarkedProcess>, Failure> {
        let mut marked = self.processes.find_marked().map_err(|e| host(&e))?;
        if !mutated("anybodys_processes") {
            marked.retain(|process| process.mark.install == self.install);
        }
        Ok(marked)
    }

    /// Every VM that has a row, a directory, a marked process, a TAP or a table.
    pub(super) async fn all_ids(&self) -> Result<BTreeSet<VmId>, Failure> {
        let marked = self.marked()?;
        let rows = self.reader.vm_ids().await.map_err(|e| host(&e))?;
        let dirs = self.rootfs.list_dirs(&self.vms_dir).map_err(|e| host(&e))?;
        // Without its id a row belongs to no VM that could be looked for; `gc` tells which those are.
        let of_rows = rows.into_iter().flatten();
        let of_processes = marked.iter().map(|process| process.mark.vm);
        let of_network = network::marked_ids(self).await?;
        Ok(of_rows.chain(dirs).chain(of_processes).chain(of_network).collect())
    }

    /// What is left of a VM; `marked` are all marked processes, as they were when nobody could begin
    /// another any more.
    pub(super) async fn observe(
        &self,
        vm: VmId,
        row: Option<&VmRemains>,
        marked: &[MarkedProcess],
    ) -> Result<Observed, Failure> {
        let mut hypervisors: Vec<_> = marked
            .iter()
            .filter(|process| process.mark.vm == vm)
            .map(|process| process.identity.clone())
            .collect();
        if let Some(recorded) = row.and_then(|row| row.hypervisor.as_ref())
            && !hypervisors.contains(recorded)
            && self.is_in_our_pid_namespace(row)?
            && self.processes.is_alive(recorded).map_err(|e| host(&e))?
        {
            hypervisors.push(recorded.clone());
        }
        let files = self.rootfs.observe(&self.paths(vm)).map_err(|e| host(&e))?;
        let (tap, firewall) = network::observe(self, vm, row).await?;
        Ok(Observed {
            owner_lives: false,
            hypervisors,
            tap,
            firewall,
            subnet: row.is_some_and(|row| row.holds_subnet),
            sockets: files.sockets,
            rootfs: files.rootfs,
            dir: files.dir,
        })
    }

    /// A pid that was recorded in another pid namespace means nothing here: that is "could not look",
    /// unless this host was booted since, or we see the processes of all namespaces: then its mark
    /// has found it.
    fn is_in_our_pid_namespace(&self, row: Option<&VmRemains>) -> Result<bool, Failure> {
        let Some(row) = row else { return Ok(true) };
        let Some(recorded) = row.namespaces.as_ref() else { return Ok(true) };
        let ours = self.processes.own_namespaces().map_err(|e| host(&e))?;
        let boot_id = self.processes.own_identity().map_err(|e| host(&e))?.boot_id;
        let booted_since =
            row.hypervisor.as_ref().is_some_and(|recorded| recorded.boot_id != boot_id);
        if recorded.pid == ours.pid || booted_since {
            return Ok(true);
        }
        if self.processes.sees_all_processes().map_err(|e| host(&e))? {
            return Ok(false);
        }
        let text = format!(
            "could not look at the hypervisor: it was started in another pid namespace ({}, here \
             {})",
            recorded.pid, ours.pid
        );
        Err(Failure::new(FailureKind::Host, text))
    }
}

/// What `gc --dry-run` sees: for each VM, or one, what it left and what would be done. Nothing is
/// locked, so it may have changed before anybody acts on it. With `force_running` also what would be
/// done once a running VM is stopped.
///
/// # Errors
/// When it could not look at all; what could not be looked at of one VM is in its report.
pub async fn survey(
    sight: &Sight,
    target: Option<VmId>,
    goal: Goal,
    force_running: bool,
) -> Result<Vec<VmReport>, Failure> {
    let ids = match target {
        Some(vm) => BTreeSet::from([vm]),
        None => sight.all_ids().await?,
    };
    let marked = &sight.marked()?;
    let looked = stream::iter(ids)
        .map(|vm| async move {
            let seen = look(sight, vm, goal, force_running, marked).await;
            let (outcome, finding) =
                seen.unwrap_or_else(|failure| (Outcome::not_seen(failure), None));
            VmReport { vm, outcome, finding }
        })
        .buffered(AT_ONCE);
    Ok(looked.collect().await)
}

async fn look(
    sight: &Sight,
    vm: VmId,
    goal: Goal,
    force_running: bool,
    marked: &[MarkedProcess],
) -> Result<(Outcome, Option<Finding>), Failure> {
    if sight.locks.is_being_cleaned(vm).map_err(|e| host(&e))? {
        return Ok((Outcome::BeingCleaned, None));
    }
    let owner_lives = sight.locks.is_held(vm).map_err(|e| host(&e))?;
    if owner_lives && !force_running {
        return Ok((Outcome::Running, None));
    }
    let row = sight.reader.remains(vm).await.map_err(|e| host(&e))?;
    let observed = sight.observe(vm, row.as_ref(), marked).await?;
    if row.is_none() && observed == Observed::default() {
        return Ok((Outcome::Unknown, None));
    }
    let finding = Finding::new(vm, goal, row.as_ref(), observed)
        .map_err(|refusal| Failure::from_error(FailureKind::Internal, &refusal))?;
    Ok((Outcome::Planned, Some(Finding { owner_lives, ..finding })))
}

/// Whether this installation may ever have made a table.
async fn had_network(sight: &Sight) -> Result<bool, Failure> {
    sight.reader.any_network().await.map_err(|e| host(&e))
}

/// What looks like ours and cannot be told to be: it is left alone.
///
/// # Errors
/// When it could not look.
pub async fn strangers(sight: &Sight) -> Result<Vec<Stranger>, Failure> {
    let mut found = Vec::new();
    for tap in sight.taps.list_alike().await.map_err(|e| host(&e))? {
        if tap.mark.is_none() {
            let why = tap.alias.map_or_else(
                || "it has a name of ours, but no alias that says whose it is".to_owned(),
                |alias| format!("it has a name of ours, but its alias is {alias:?}"),
            );
            found.push(Stranger { what: format!("link {}", tap.name), why });
        }
    }
    match sight.firewall.list_alike().await {
        Ok(tables) => {
            found.extend(tables.into_iter().filter(|table| table.mark.is_none()).map(|table| {
                let why = table.comment.map_or_else(
                    || "it has a name of ours, but no comment that says whose it is".to_owned(),
                    |comment| format!("it has a name of ours, but its comment is {comment:?}"),
                );
                Stranger { what: format!("table {}", table.name), why }
            }))
        }
        // Nobody without the right has made any; that they were not looked for is told where the
        // marked ones are.
        Err(FirewallError::NotPermitted { .. }) if !had_network(sight).await? => {}
        Err(error) => return Err(host(&error)),
    }
    for path in sight.rootfs.list_strangers(&sight.vms_dir).map_err(|e| host(&e))? {
        let why = "it is no VM's directory".to_owned();
        found.push(Stranger { what: path.display().to_string(), why });
    }
    Ok(found)
}
