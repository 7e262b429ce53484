//! What of a VM outlives a life of its actor.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use matchlock_host::firewall::FirewallHandle;
use matchlock_host::guest_bundle::BundleLease;
use matchlock_host::guest_link::GuestLink;
use matchlock_host::hypervisor::{Machine, MachineSpec, Nic, Start};
use matchlock_host::image::BlobLease;
use matchlock_host::rootfs::VmPaths;
use matchlock_host::snapshot::{Draft, Snapshot};
use matchlock_host::tap::TapHandle;
use matchlock_model::failure::Failure;
use matchlock_model::id::{Generation, OwnerEpoch, VmId};
use matchlock_model::image::ImageConfig;
use matchlock_model::phase::Phase;
use matchlock_model::record::{Cleanup, CleanupEntry, CleanupStatus, CleanupStep};
use matchlock_model::spec::VmSpec;
use matchlock_model::subnet::Subnet;
use matchlock_model::view::{Timings, VmView};
use matchlock_store::WriteOp;
use tokio::sync::watch;
use tokio::time::Instant;

use super::phases::{PhaseFollower, PhaseLog};
use crate::budget::RestartBudget;
use crate::deps::{Deps, ServeGuard};

/// How a VM begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartMode {
    /// From a snapshot, if there is one that fits; otherwise it boots.
    #[default]
    Warm,
    /// It boots.
    Cold,
    /// It boots as far as all of its kind are the same, to be saved for others.
    Template {
        /// Also where there is a snapshot already that is of use.
        anew: bool,
    },
}

/// A VM to create.
#[derive(Debug)]
pub struct CreateVm {
    /// What it is to be.
    pub spec: VmSpec,
    /// How its image wants to be run.
    pub image: ImageConfig,
    /// The image's EROFS file.
    pub base_disk: PathBuf,
    /// Keeps the image from being removed while the VM runs.
    pub lease: Option<BlobLease>,
    /// Keeps the guest bundle from being removed while the VM lives.
    pub guest_lease: Option<Arc<BundleLease>>,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// How it begins.
    pub start: StartMode,
}

/// What of a VM outlives a life of its actor. Kept by Fleet, shared with effects.
pub struct VmContext {
    /// The VM.
    pub id: VmId,
    /// What it was asked to be.
    pub create: CreateVm,
    /// Its files.
    pub paths: VmPaths,
    /// Which owner we are; every write carries it.
    pub epoch: OwnerEpoch,
    /// The world.
    pub deps: Deps,
    held: Mutex<Held>,
    view: watch::Sender<VmView>,
    phases: PhaseLog,
}

/// What is held at the moment.
struct Held {
    machine: Option<Arc<dyn Machine>>,
    launched_at: Option<Instant>,
    /// Of a template: the snapshot that it makes. As long as it is here nobody else makes one.
    draft: Option<Draft>,
    /// What this VM could not go on from though it is whole, until it has booted.
    suspect: Option<Snapshot>,
    link: Option<Arc<dyn GuestLink>>,
    server: Option<ServeGuard>,
    subnet: Option<Subnet>,
    /// Until the hypervisor has it: then our descriptor is closed.
    tap: Option<TapHandle>,
    /// Until the hypervisor has it. The kernel removes the tables when nobody has it any more.
    firewall: Option<FirewallHandle>,
    /// Whether tables were made, whoever holds them now.
    has_firewall: bool,
    relinks: RestartBudget,
    /// Cleanup entries that are to be written with the next record.
    cleanup: Cleanup,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            machine: None,
            launched_at: None,
            draft: None,
            suspect: None,
            link: None,
            server: None,
            subnet: None,
            tap: None,
            firewall: None,
            has_firewall: false,
            relinks: RestartBudget::for_link(),
            cleanup: Cleanup::default(),
        }
    }
}

impl fmt::Debug for VmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmContext").field("id", &self.id).finish_non_exhaustive()
    }
}

impl VmContext {
    /// A VM whose row was just inserted, and its view.
    #[must_use]
    pub fn new(
        id: VmId,
        create: CreateVm,
        epoch: OwnerEpoch,
        deps: Deps,
        view: watch::Sender<VmView>,
    ) -> Self {
        let paths = deps.paths(id);
        let phases = PhaseLog::new(view.borrow().phase);
        Self { id, create, paths, epoch, deps, held: Mutex::default(), view, phases }
    }

    // A poisoned lock holds whole values: each is replaced in one assignment.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine, if one was launched and not yet seen to be gone.
    #[must_use]
    pub fn machine(&self) -> Option<Arc<dyn Machine>> {
        self.held().machine.clone()
    }

    /// When the machine was launched.
    #[must_use]
    pub fn launched_at(&self) -> Option<Instant> {
        self.held().launched_at
    }

    pub(crate) fn set_machine(&self, machine: Option<Arc<dyn Machine>>, launched_at: Instant) {
        let mut held = self.held();
        held.machine = machine;
        held.launched_at = Some(launched_at);
    }

    /// Does something with the snapshot that a template makes, once it is being launched.
    pub(crate) fn with_draft<T>(&self, work: impl FnOnce(&Draft) -> T) -> Option<T> {
        self.held().draft.as_ref().map(work)
    }

    pub(crate) fn set_draft(&self, draft: Draft) {
        // Dropped outside the lock: that removes files.
        let old = self.held().draft.replace(draft);
        drop(old);
    }

    /// The snapshot that a template makes. Dropping it removes files.
    pub(crate) fn take_draft(&self) -> Option<Draft> {
        self.held().draft.take()
    }

    /// Keeps in mind what the VM could not go on from. Nothing is held of it.
    pub(crate) fn set_suspect(&self, mut suspect: Snapshot) {
        suspect.release();
        self.held().suspect = Some(suspect);
    }

    /// What the VM could not go on from.
    pub(crate) fn take_suspect(&self) -> Option<Snapshot> {
        self.held().suspect.take()
    }

    /// The link to the guest, once it is there.
    #[must_use]
    pub fn link(&self) -> Option<Arc<dyn GuestLink>> {
        self.held().link.clone()
    }

    pub(crate) fn set_link(&self, link: Option<Arc<dyn GuestLink>>) {
        let old = std::mem::replace(&mut self.held().link, link);
        if let Some(old) = old {
            // Whoever still holds it waits for no other session.
            old.give_up();
        }
    }

    /// Whether the link may be begun anew once more.
    pub(crate) fn may_relink(&self) -> bool {
        self.held().relinks.spend(Instant::now()).is_some()
    }

    pub(crate) fn set_server(&self, server: Option<ServeGuard>) {
        // Dropped outside the lock: ending a server may run code of the node.
        let old = std::mem::replace(&mut self.held().server, server);
        drop(old);
    }

    /// The VM's subnet, once it has one.
    #[must_use]
    pub fn subnet(&self) -> Option<Subnet> {
        self.held().subnet
    }

    pub(crate) fn set_network(&self, tap: TapHandle, subnet: Subnet) {
        let mut held = self.held();
        (held.tap, held.subnet) = (Some(tap), Some(subnet));
    }

    /// The TAP, if the hypervisor did not take it. Dropping it takes tens of milliseconds.
    pub(crate) fn take_tap(&self) -> Option<TapHandle> {
        self.held().tap.take()
    }

    pub(crate) fn set_firewall(&self, firewall: FirewallHandle) {
        // Dropped outside the lock: closing the socket of tables takes a while.
        let old = {
            let mut held = self.held();
            held.has_firewall = true;
            held.firewall.replace(firewall)
        };
        drop(old);
    }

    /// Whether tables were made, whoever holds them now.
    pub(crate) fn has_firewall(&self) -> bool {
        self.held().has_firewall
    }

    pub(crate) fn take_firewall(&self) -> Option<FirewallHandle> {
        self.held().firewall.take()
    }

    /// Notes how a step of cleaning up ended; written with the next record.
    pub(crate) fn note_cleanup(&self, step: CleanupStep, result: &Result<(), Failure>) {
        let (status, error) = match result {
            Ok(()) => (CleanupStatus::Ok, None),
            Err(failure) => (CleanupStatus::Error, Some(failure.message.clone())),
        };
        let entry = CleanupEntry { status, error, updated_at: (self.deps.now)() };
        self.held().cleanup.insert(step.name().to_owned(), entry);
    }

    /// The noted steps that were not written yet.
    pub(crate) fn noted_cleanup(&self) -> Cleanup {
        self.held().cleanup.clone()
    }

    /// Forgets the noted steps that were written.
    pub(crate) fn cleanup_written(&self, written: &Cleanup) {
        self.held().cleanup.retain(|step, entry| written.get(step) != Some(entry));
    }

    /// The machine to launch. It takes the TAP's descriptor and what keeps the firewall there:
    /// whoever drops the specification after the launch leaves the hypervisor as the only one that
    /// has them.
    pub(crate) fn machine_spec(&self) -> MachineSpec {
        let mtu = self.create.spec.network.as_ref().map(|network| network.mtu);
        let firewall = self.take_firewall();
        let nic = self.take_tap().zip(mtu).map(|(tap, mtu)| Nic {
            mac: self.id.mac(),
            mtu,
            tap: Arc::new(tap.into_fd()),
            firewall: firewall.map(Arc::new),
        });
        MachineSpec {
            mark: self.deps.mark(self.id),
            paths: self.paths.clone(),
            kernel: self.create.kernel.clone(),
            initramfs: self.create.initramfs.clone(),
            base_disk: self.create.base_disk.clone(),
            vcpus: self.create.spec.vcpus(),
            memory_mb: self.create.spec.memory_mb,
            nic,
            start: match self.create.start {
                StartMode::Warm | StartMode::Cold => Start::Boot,
                StartMode::Template { .. } => Start::Hold,
            },
        }
    }

    /// Records how the VM's own command ended.
    ///
    /// # Errors
    /// When it could not be written: `Fenced` under another owner, `NotFound` once it is removed.
    pub async fn record_exit(&self, code: u8) -> Result<(), Failure> {
        let op = WriteOp::SetExit { vm: self.id, epoch: self.epoch, code };
        self.deps.db.write(op).await?;
        Ok(())
    }

    /// Changes the view that others watch.
    pub fn publish(&self, change: impl FnOnce(&mut VmView)) {
        self.view.send_modify(change);
    }

    /// Notes how long a step took.
    pub(crate) fn time(&self, change: impl FnOnce(&mut Timings)) {
        self.view.send_modify(|view| change(&mut view.timings));
    }

    /// Watches the VM.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<VmView> {
        self.view.subscribe()
    }

    /// Tells those who follow the VM a phase that is committed, or that another life goes on in it.
    pub(crate) fn note_phase(&self, phase: Phase, cause: Option<Failure>) {
        self.phases.add(phase, self.generation(), cause);
    }

    /// Follows the VM's phases, from the first.
    #[must_use]
    pub fn follow_phases(&self) -> PhaseFollower {
        self.phases.follow()
    }

    /// The life of the actor that publishes now.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.view.borrow().generation
    }
}
