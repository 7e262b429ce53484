//! A new VM: its id, its lock, its row.

use matchlock_host::firewall::{filter_table, nat_table};
use matchlock_host::owner_lock::{HeldLock, OwnerLockError};
use matchlock_host::tap::tap_name;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{Generation, OwnerEpoch, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::record::Resources;
use matchlock_model::view::VmView;
use matchlock_store::{NewVm, WriteError, WriteOp};
use tokio::sync::watch;

use crate::db_writer::DbError;
use crate::deps::Deps;
use crate::vm::{CreateVm, VmContext};

/// How many ids are tried before the id space is called full.
const ID_TRIES: usize = 16;

/// A VM whose lock is held and whose row is there.
pub struct RegisteredVm {
    pub(super) context: VmContext,
    pub(super) lock: HeldLock,
}

/// Takes an id that nobody uses: its lock first, then its row. Nothing else exists yet.
pub(super) async fn register(deps: Deps, create: CreateVm) -> Result<RegisteredVm, Failure> {
    for _ in 0..ID_TRIES {
        let id = VmId::new((deps.random_u32)()?);
        let lock = match deps.locks.try_acquire(id) {
            Ok(lock) => lock,
            Err(OwnerLockError::Held { .. }) => continue,
            Err(error) => return Err(Failure::from_error(FailureKind::Host, &error)),
        };
        let record = new_vm(&deps, id, &create)?;
        match deps.db.write(WriteOp::InsertVm { record: Box::new(record) }).await {
            Ok(_) => {
                let view = watch::Sender::new(VmView {
                    id,
                    generation: Generation::default(),
                    phase: Phase::Creating,
                    cause: None,
                    settled: false,
                    cleaned_up: false,
                    timings: matchlock_model::view::Timings::default(),
                });
                let context = VmContext::new(id, create, OwnerEpoch::FIRST, deps, view);
                return Ok(RegisteredVm { context, lock });
            }
            Err(DbError::Write(WriteError::VmExists { .. })) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::new(FailureKind::Internal, format!("{ID_TRIES} random VM ids were all in use")))
}

/// Everything the VM will hold, named before any of it exists.
fn new_vm(deps: &Deps, id: VmId, create: &CreateVm) -> Result<NewVm, Failure> {
    let paths = deps.paths(id);
    let look = |e| Failure::from_error(FailureKind::Host, &e);
    let owner = deps.processes.own_identity().map_err(look)?;
    let namespaces = deps.processes.own_namespaces().map_err(look)?;
    let text = |path: std::path::PathBuf| Some(path.to_string_lossy().into_owned());
    let tap = create.spec.network.as_ref().map(|_| tap_name(id));
    let resources = Resources {
        firewall_table: tap.as_deref().map(filter_table),
        nat_table: tap.as_deref().map(nat_table),
        tap_name: tap,
        state_dir: text(paths.dir.clone()),
        rootfs_path: text(paths.rootfs()),
        base_disk: text(create.base_disk.clone()),
        link_socket: text(paths.link_socket()),
        qmp_socket: text(paths.qmp_socket()),
        owner_socket: text(paths.owner_socket()),
        owner: Some(owner.clone()),
        namespaces: Some(namespaces.clone()),
        ..Resources::default()
    };
    Ok(NewVm {
        id,
        image: create.spec.image.clone(),
        config_json: create.spec.redacted_json(),
        owner,
        namespaces,
        ephemeral: create.spec.ephemeral,
        backend: deps.hypervisor.backend().to_owned(),
        resources,
        created_at: (deps.now)(),
    })
}
