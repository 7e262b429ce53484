//! The door of the node: one async method per request, each with a deadline.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use matchlock_actors::fleet::{FleetMsg, RunningVm, VmHandle};
use matchlock_actors::images::{ImagesMsg, ImportInput, Pulled, RemovedImage, TaggedImport};
use matchlock_actors::reconciler::{ReconcilerMsg, Target, VmReport};
use matchlock_actors::root::Services;
use matchlock_actors::vm::{CreateVm, VmContext};
use matchlock_host::guest_link::ExecSession;
use matchlock_host::image::{Garbages, ImportWish, PullRequest, TellPull};
use matchlock_model::exec::ExecSpec;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::file::FileOp;
use matchlock_model::id::VmId;
use matchlock_model::image::ImageRecord;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::view::VmView;
use matchlock_model::vm::StopMode;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::points::{EXEC, injected};

/// How long a request that only passes a message may take: longer than a write to a database that
/// another process has locked.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// How long a reconciliation of everything may take.
const RECONCILE_LIMIT: Duration = Duration::from_secs(600);

/// How long an import or a pull may take.
const IMPORT_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// A VM's own command as it runs.
#[derive(Debug)]
pub struct OwnCommand {
    /// Its streams.
    pub session: ExecSession,
    /// Whose it is, also once the VM is not running any more.
    pub of: Arc<VmContext>,
}

/// Asks the node.
#[derive(Debug, Clone)]
pub struct NodeClient {
    services: Services,
}

impl NodeClient {
    /// Asks these services.
    #[must_use]
    pub const fn new(services: Services) -> Self {
        Self { services }
    }

    /// Brings a VM up. Returns once its row is there; the handle's view says what comes then.
    ///
    /// # Errors
    /// When it is not admitted or could not be registered; then nothing was made.
    pub async fn create_vm(&self, create: CreateVm) -> Result<VmHandle, Failure> {
        let create = Box::new(create);
        self.services.fleet.call(|reply| FleetMsg::CreateVm { create, reply }, CALL_LIMIT).await?
    }

    /// Takes a VM down and waits until it is settled: it holds nothing any more, or the view's
    /// cause says what it still holds.
    ///
    /// # Errors
    /// When there is no such VM, or it could not be cleaned up.
    pub async fn stop_vm(&self, id: VmId, mode: StopMode) -> Result<VmView, Failure> {
        let handle = self
            .services
            .fleet
            .call(|reply| FleetMsg::StopVm { id, mode, reply }, CALL_LIMIT)
            .await??;
        cleaned_up(settled(handle).await?)
    }

    /// Takes a VM down by force that its caller has made, and that may have ended by itself meanwhile.
    ///
    /// # Errors
    /// When it could not be cleaned up.
    pub async fn take_down(&self, vm: VmHandle) -> Result<VmView, Failure> {
        match self.stop_vm(vm.id, StopMode::Force).await {
            Err(failure) if failure.kind == FailureKind::NotFound => cleaned_up(settled(vm).await?),
            stopped => stopped,
        }
    }

    /// Runs a further command in a VM.
    ///
    /// # Errors
    /// When the VM does not run, or the command has no form of one.
    pub async fn exec(&self, id: VmId, request: ExecSpec) -> Result<ExecSession, Failure> {
        let running = self.running_vm(id).await?;
        let create = &running.context.create;
        let spec = create
            .spec
            .further_command(&create.image, request)
            .map_err(|e| Failure::from_error(FailureKind::Input, &e))?;
        self.start(&running, &spec).await
    }

    /// Runs a VM's own command.
    ///
    /// # Errors
    /// When the VM does not run.
    pub async fn exec_own(&self, id: VmId, spec: &ExecSpec) -> Result<OwnCommand, Failure> {
        let running = self.running_vm(id).await?;
        let session = self.start(&running, spec).await?;
        Ok(OwnCommand { session, of: running.context })
    }

    /// Records how a VM's own command ended.
    ///
    /// # Errors
    /// When it could not be written. A VM that was removed or taken over meanwhile is none: nobody
    /// asks, or another owner knows how it ended.
    pub async fn record_exit(&self, vm: &VmContext, code: u8) -> Result<(), Failure> {
        EXEC.before("record_exit").map_err(injected)?;
        match vm.record_exit(code).await {
            Err(failure) if matches!(failure.kind, FailureKind::NotFound | FailureKind::Fenced) => {
                tracing::debug!(vm_id = %vm.id, %failure, "an exit code that nobody wants");
            }
            recorded => recorded?,
        }
        EXEC.after("record_exit").map_err(injected)
    }

    /// Reads, writes or lists files of a VM.
    ///
    /// # Errors
    /// When the VM does not run.
    pub async fn file(&self, id: VmId, op: &FileOp) -> Result<ExecSession, Failure> {
        let running = self.running_vm(id).await?;
        running.link.file(op).await.map_err(|e| Failure::from_error(FailureKind::Guest, &e))
    }

    async fn start(&self, running: &RunningVm, spec: &ExecSpec) -> Result<ExecSession, Failure> {
        EXEC.before("start").map_err(injected)?;
        let started = running.link.exec(spec).await;
        let session = started.map_err(|e| Failure::from_error(FailureKind::Guest, &e))?;
        EXEC.after("start").map_err(injected)?;
        Ok(session)
    }

    async fn running_vm(&self, id: VmId) -> Result<RunningVm, Failure> {
        self.services.fleet.call(|reply| FleetMsg::OpenLink { id, reply }, CALL_LIMIT).await?
    }

    /// How long a graceful stop of this VM waits for its guest.
    ///
    /// # Errors
    /// When there is no such VM in this process.
    pub async fn grace(&self, id: VmId) -> Result<Duration, Failure> {
        match self.running_vm(id).await {
            Ok(running) => Ok(running.context.create.spec.grace),
            // Not running (any more, or yet): there is no guest to wait for.
            Err(failure) if failure.kind == FailureKind::Guest => Ok(Duration::ZERO),
            Err(failure) => Err(failure),
        }
    }

    /// Takes all VMs down, admits no more, and waits until all are settled.
    ///
    /// # Errors
    /// When the fleet does not answer.
    pub async fn stop_all(&self, mode: StopMode) -> Result<(), Failure> {
        let handles =
            self.services.fleet.call(|reply| FleetMsg::StopAll { mode, reply }, CALL_LIMIT).await?;
        for handle in handles {
            settled(handle).await?;
        }
        Ok(())
    }

    /// Looks at one VM or all, and removes what nobody owns.
    ///
    /// # Errors
    /// When it could not look at all; what could not be done for one VM is in its report.
    pub async fn reconcile(
        &self,
        target: Option<VmId>,
        goal: Goal,
    ) -> Result<Vec<VmReport>, Failure> {
        self.reconcile_watched(target, goal, None).await
    }

    /// The same, and tells how many VMs are done, of how many.
    ///
    /// # Errors
    /// As [`Self::reconcile`].
    pub async fn reconcile_watched(
        &self,
        target: Option<VmId>,
        goal: Goal,
        progress: Option<watch::Sender<(u64, u64)>>,
    ) -> Result<Vec<VmReport>, Failure> {
        let target = target.map_or(Target::All, Target::One);
        let message = |reply| ReconcilerMsg::Reconcile { target, goal, progress, reply };
        self.services.reconciler.call(message, RECONCILE_LIMIT).await?
    }

    /// Cleans up after a VM whose owner, or whoever cleans it up, lives and does not answer.
    ///
    /// # Errors
    /// When it could not look at all; what could not be done is in the report.
    pub async fn take_over(&self, vm: VmId, goal: Goal) -> Result<Vec<VmReport>, Failure> {
        let target = Target::TakeOver(vm);
        let message = |reply| ReconcilerMsg::Reconcile { target, goal, progress: None, reply };
        self.services.reconciler.call(message, RECONCILE_LIMIT).await?
    }

    /// Notes that a VM is to be removed: whoever cleans it up then removes it.
    ///
    /// # Errors
    /// When there is no such VM, or it could not be written.
    pub async fn want_removal(&self, vm: VmId) -> Result<(), Failure> {
        let message = |reply| ReconcilerMsg::WantRemoval { vm, reply };
        self.services.reconciler.call(message, CALL_LIMIT).await?
    }

    /// Removes the VMs that somebody wanted removed and whose owner is gone.
    ///
    /// # Errors
    /// When it could not look at all; what could not be done for one VM is in its report.
    pub async fn finish_removals(&self) -> Result<Vec<VmReport>, Failure> {
        let message = |reply| ReconcilerMsg::Reconcile {
            target: Target::Wanted,
            goal: Goal::Remove,
            progress: None,
            reply,
        };
        self.services.reconciler.call(message, RECONCILE_LIMIT).await?
    }

    /// Drops the history of VMs that were removed before this moment; of how many.
    ///
    /// # Errors
    /// When it could not be written.
    pub async fn prune_history(&self, before: Timestamp) -> Result<usize, Failure> {
        let message = |reply| ReconcilerMsg::PruneHistory { before, reply };
        self.services.reconciler.call(message, CALL_LIMIT).await?
    }

    /// Removes what imports and removals of images left that did not end, or only looks.
    ///
    /// # Errors
    /// When nobody could look; what could not be looked at or removed is in the answer.
    pub async fn sweep_images(&self, dry_run: bool) -> Result<Garbages, Failure> {
        let message = |reply| ImagesMsg::Sweep { dry_run, reply };
        self.services.images.call(message, RECONCILE_LIMIT).await?
    }

    /// Imports images.
    ///
    /// # Errors
    /// What is wrong with the archive, or with this host.
    pub async fn import_images(
        &self,
        input: ImportInput,
        wish: ImportWish,
        cancel: CancellationToken,
    ) -> Result<Vec<TaggedImport>, Failure> {
        self.services
            .images
            .call(|reply| ImagesMsg::Import { input, wish, cancel, reply }, IMPORT_LIMIT)
            .await?
    }

    /// Gives an image another tag.
    ///
    /// # Errors
    /// When there is none, or it could not be written.
    pub async fn tag_image(&self, source: String, tag: String) -> Result<ImageRecord, Failure> {
        self.services.images.call(|reply| ImagesMsg::Tag { source, tag, reply }, CALL_LIMIT).await?
    }

    /// Pulls an image from its registry.
    ///
    /// # Errors
    /// What is wrong with its name, the registry, the image or this host.
    pub async fn pull_image(
        &self,
        request: PullRequest,
        tell: TellPull,
        cancel: CancellationToken,
    ) -> Result<Pulled, Failure> {
        self.services
            .images
            .call(|reply| ImagesMsg::Pull { request, tell, cancel, reply }, IMPORT_LIMIT)
            .await?
    }

    /// Removes an image's tag, and its blob if nothing else uses it.
    ///
    /// # Errors
    /// When there is none, or a VM runs from it.
    pub async fn remove_image(&self, tag: String) -> Result<RemovedImage, Failure> {
        self.services.images.call(|reply| ImagesMsg::Remove { tag, reply }, CALL_LIMIT).await?
    }
}

/// What a settled VM still holds and what to do about it; `None` if it is cleaned up, or was taken over:
/// whoever did that cleans it up, and tells what he could not.
#[must_use]
pub fn not_cleaned_up(view: &VmView) -> Option<String> {
    let is_anothers = view.cause.as_ref().is_some_and(|cause| cause.kind == FailureKind::Fenced);
    if view.cleaned_up || is_anothers {
        return None;
    }
    let id = view.id;
    let why = view.cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
    Some(match view.phase {
        Phase::Cleaned => {
            format!("VM {id} was cleaned, but not removed{why}; run `matchlock rm {id}`")
        }
        phase => {
            format!("VM {id} was not cleaned up (phase {phase}){why}; run `matchlock gc {id}`")
        }
    })
}

/// Waits until a VM is settled.
///
/// # Errors
/// When its view ended before that: the fleet is gone.
pub async fn settled(mut handle: VmHandle) -> Result<VmView, Failure> {
    let view = handle.view.wait_for(|view| view.settled).await;
    view.map(|view| view.clone()).map_err(|_| {
        let text = format!("nobody looks after VM {} any more; run `matchlock gc`", handle.id);
        Failure::new(FailureKind::Internal, text)
    })
}

/// The last view of a VM that holds nothing any more.
fn cleaned_up(view: VmView) -> Result<VmView, Failure> {
    match not_cleaned_up(&view) {
        None => Ok(view),
        Some(text) => Err(Failure::new(FailureKind::Host, text)),
    }
}

/// Waits until a VM runs.
///
/// # Errors
/// Why it does not and will not.
pub async fn running(handle: &mut VmHandle) -> Result<VmView, Failure> {
    let id = handle.id;
    let reached =
        |view: &VmView| view.settled || view.cause.is_some() || view.phase == Phase::Running;
    let view = handle.view.wait_for(reached).await.map(|view| view.clone()).map_err(|_| {
        Failure::new(FailureKind::Internal, format!("nobody looks after VM {id} any more"))
    })?;
    match view.cause {
        Some(cause) => Err(cause),
        None if view.phase == Phase::Running => Ok(view),
        None => Err(Failure::new(FailureKind::Cancelled, format!("VM {id} was stopped"))),
    }
}

#[cfg(test)]
mod tests {
    use matchlock_model::id::Generation;
    use matchlock_model::view::Timings;

    use super::*;

    fn left(kind: FailureKind) -> Option<String> {
        not_cleaned_up(&VmView {
            id: VmId::new(7),
            generation: Generation::default(),
            phase: Phase::Running,
            cause: Some(Failure::new(kind, "so")),
            settled: true,
            cleaned_up: false,
            timings: Timings::default(),
        })
    }

    #[test]
    fn what_was_taken_over_is_anothers_to_tell() {
        let ours = left(FailureKind::Host).unwrap_or_default();
        assert!(ours.contains("(phase running): so; run `matchlock gc vm-00000007`"), "{ours}");
        assert_eq!(left(FailureKind::Fenced), None);
    }
}
