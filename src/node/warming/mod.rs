//! Makes snapshots beside VMs that had none to start from, so that the next ones do.
//!
//! ```text
//!   a VM that may start from a snapshot ─┬─ did ─► nothing to make
//!                                        └─ booted ─► its command has started ─► make
//!
//!   make: a template VM of the same shape ─► (claim, boot, hold, save: actors/src/vm/snapshot.rs) ─► gone
//!                       └─ end: taken down by force
//! ```
//!
//! # Invariants
//! 1. At most one template at a time in a node, and after one that came to nothing none of its shape for
//!    [`TRY_AGAIN`].
//! 2. A template is a VM of the node like any other, and does not outlive it: [`Warming::end`] is called
//!    before the VMs are taken down, [`Warming::ended`] waits for what was begun.
//! 3. What becomes of a template changes nothing for whoever runs a VM: no error, no exit code, no word
//!    on stderr, unless something of it is left on this host.
//!
//! # On error, on a stop, on a crash
//! Whatever keeps a snapshot from being made is one line for those who debug, and the next VM boots. What a
//! template has made is taken down with it. A crash leaves a VM and half a snapshot: `matchlock gc` removes
//! both.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use matchlock_actors::vm::{CreateVm, StartMode};
use matchlock_host::facts;
use matchlock_host::guest_bundle::BundleLease;
use matchlock_host::guest_link::ExecSession;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::ImageConfig;
use matchlock_model::spec::{MIN_DISK_SIZE_MB, NetworkInput, SpecError, VmSpec, VmSpecInput};
use matchlock_model::view::Timings;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{NodeClient, not_cleaned_up, settled};
use super::detach::when_started;

/// How long the VM has the host to itself. Whoever is done by then would not have waited for a snapshot,
/// and would pay for a part of one each time.
const HEAD_START: Duration = Duration::from_millis(500);

/// How long what kept a snapshot from being made is given to pass.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// What the record of a template says instead of an image.
const NO_IMAGE: &str = "matchlock-warm";

/// What VMs must have in common to start from one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shape {
    vcpus: u32,
    memory_mb: u64,
    nic: bool,
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// A template that may be made.
#[derive(Debug)]
pub struct Template {
    shape: Shape,
    guest_lease: Option<Arc<BundleLease>>,
}

/// Makes the snapshots of a node. Clones are the same.
#[derive(Debug, Clone)]
pub struct Warming(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: NodeClient,
    is_on: bool,
    state: Mutex<State>,
    ending: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    is_making: bool,
    /// When each was last tried in vain.
    tried: HashMap<Shape, Instant>,
}

/// What a template is, of so many CPUs and so much memory.
///
/// # Errors
/// The first thing that no VM can have.
pub fn template_spec(cpus: f64, memory_mb: u64, no_network: bool) -> Result<VmSpec, Failure> {
    let failed = |kind, error: &(dyn std::error::Error + 'static)| Failure::from_error(kind, error);
    let host_cpus = facts::cpus().map_err(|e| failed(FailureKind::Host, &e))?;
    let spec = VmSpec::check(VmSpecInput {
        image: NO_IMAGE.to_owned(),
        command: Vec::new(),
        entrypoint: None,
        env: Vec::new(),
        workdir: None,
        user: None,
        hostname: None,
        add_hosts: Vec::new(),
        network: NetworkInput { no_network, ..NetworkInput::default() },
        cpus,
        memory_mb,
        disk_size_mb: MIN_DISK_SIZE_MB,
        timeout: None,
        graceful_shutdown: None,
        stdin: false,
        terminal: None,
        privileged: false,
        remove: true,
        host_cpus: u32::try_from(host_cpus).unwrap_or(u32::MAX),
    });
    spec.map_err(|e: SpecError| failed(FailureKind::Input, &e))
}

/// The template VM of this guest; `anew`: also where there is a snapshot of its kind already.
#[must_use]
pub fn template(
    spec: VmSpec,
    kernel: PathBuf,
    initramfs: PathBuf,
    guest_lease: Option<Arc<BundleLease>>,
    anew: bool,
) -> CreateVm {
    CreateVm {
        spec,
        image: ImageConfig::default(),
        // It is never looked into. Readable, and nobody's secret.
        base_disk: kernel.clone(),
        lease: None,
        guest_lease,
        kernel,
        initramfs,
        start: StartMode::Template { anew },
    }
}

impl Template {
    /// The one for this VM, unless it started from a snapshot.
    #[must_use]
    pub fn if_booted(self, vm: &Timings) -> Option<Self> {
        vm.restore.is_none().then_some(self)
    }

    fn create(self) -> Result<CreateVm, Failure> {
        let Shape { vcpus, memory_mb, nic, kernel, initramfs } = self.shape;
        let spec = template_spec(vcpus.into(), memory_mb, !nic)?;
        Ok(template(spec, kernel, initramfs, self.guest_lease, false))
    }
}

impl Warming {
    /// For the node behind this door. Off, it makes nothing.
    #[must_use]
    pub fn new(client: NodeClient, is_on: bool) -> Self {
        let state = Mutex::default();
        let (ending, tasks) = (CancellationToken::new(), TaskTracker::new());
        Self(Arc::new(Inner { client, is_on, state, ending, tasks }))
    }

    // A poisoned lock holds whole values.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template for a VM that is about to be created; `None` for one that needs none.
    #[must_use]
    pub fn template_for(&self, create: &CreateVm) -> Option<Template> {
        let is_wanted = self.0.is_on && create.start == StartMode::Warm;
        is_wanted.then(|| Template {
            shape: Shape {
                vcpus: create.spec.vcpus(),
                memory_mb: create.spec.memory_mb,
                nic: create.spec.network.is_some(),
                kernel: create.kernel.clone(),
                initramfs: create.initramfs.clone(),
            },
            guest_lease: create.guest_lease.clone(),
        })
    }

    /// The same session; once its command has started, the snapshot is made.
    #[must_use]
    pub fn once_started(&self, session: ExecSession, template: Option<Template>) -> ExecSession {
        let Some(template) = template else { return session };
        let warming = self.clone();
        when_started(session, async move { warming.make(Some(template)) })
    }

    /// Begins to make a snapshot, unless another is being made or this one was tried already.
    pub fn make(&self, template: Option<Template>) {
        let Some(template) = template else { return };
        let mut state = self.state();
        let is_ending = self.0.ending.is_cancelled();
        let last = state.tried.get(&template.shape);
        let is_too_soon = last.is_some_and(|last| last.elapsed() < TRY_AGAIN);
        if is_ending || state.is_making || is_too_soon {
            return;
        }
        state.tried.insert(template.shape.clone(), Instant::now());
        state.is_making = true;
        drop(state);
        let this = self.clone();
        self.0.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = this.0.ending.cancelled() => {}
                () = sleep(HEAD_START) => this.made(template).await,
            }
            this.state().is_making = false;
        });
    }

    /// Sees a template up and gone.
    async fn made(&self, template: Template) {
        let client = &self.0.client;
        let shape = template.shape.clone();
        // Once it is asked for, it is waited for: it would be there, and nobody would know.
        let created = async { client.create_vm(template.create()?).await };
        let handle = match created.await {
            Ok(handle) => handle,
            Err(failure) => return tracing::debug!(%failure, "no snapshot is made"),
        };
        let id = handle.id;
        let view = tokio::select! {
            view = settled(handle.clone()) => view,
            () = self.0.ending.cancelled() => {
                tracing::debug!(vm_id = %id, "a template is given up");
                client.take_down(handle).await
            }
        };
        let view = match view {
            Ok(view) => view,
            Err(failure) => return tracing::error!(vm_id = %id, %failure, "of a template"),
        };
        if let Some(left) = not_cleaned_up(&view) {
            tracing::error!(vm_id = %id, "of a template: {left}");
        }
        match (view.timings.saved, view.cause) {
            (Some(_), _) => {
                // Whatever becomes of it, another may be made.
                self.state().tried.remove(&shape);
                tracing::info!(vm_id = %id, "made a snapshot for the next VMs");
            }
            (None, Some(failure)) => tracing::debug!(vm_id = %id, %failure, "no snapshot is made"),
            (None, None) => tracing::debug!(vm_id = %id, "no snapshot is made"),
        }
    }

    /// Begins nothing any more, and has what is being made taken down.
    pub fn end(&self) {
        self.0.ending.cancel();
        self.0.tasks.close();
    }

    /// Waits until what was begun has come to its end, after [`Self::end`].
    pub async fn ended(&self) {
        self.0.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests;
