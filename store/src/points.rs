//! The failpoints of the store: one before each kind of write is begun, one after its commit and
//! before its answer.
//!
//! Migrations have none: their tests stop the process at each system call that changes a file
//! (`migrate/tests`), which is finer than any point here could be. The boot's `home.open_state` lies
//! around them all.

use matchlock_failpoints::{Area, Injected};

use crate::error::{DbFault, WriteError};
use crate::op::WriteOp;

/// The kinds of writes.
pub const DB: Area = Area::new(
    "db",
    &[
        "insert_vm",
        "set_phase",
        "set_hypervisor",
        "set_exit",
        "raise_epoch",
        "allocate_subnet",
        "release_subnet",
        "want_removal",
        "remove_vm",
        "prune_history",
    ],
);

/// The writes to the images' metadata.
pub const IMAGES: Area =
    Area::new("images_db", &["put_image", "tag_image", "remove_shared", "remove_image"]);

pub(crate) const fn step(op: &WriteOp) -> &'static str {
    match op {
        WriteOp::InsertVm { .. } => "insert_vm",
        WriteOp::SetPhase { .. } => "set_phase",
        WriteOp::SetHypervisor { .. } => "set_hypervisor",
        WriteOp::SetExit { .. } => "set_exit",
        WriteOp::RaiseEpoch { .. } => "raise_epoch",
        WriteOp::AllocateSubnet { .. } => "allocate_subnet",
        WriteOp::ReleaseSubnet { .. } => "release_subnet",
        WriteOp::WantRemoval { .. } => "want_removal",
        WriteOp::RemoveVm { .. } => "remove_vm",
        WriteOp::PruneHistory { .. } => "prune_history",
    }
}

impl From<Injected> for WriteError {
    fn from(injected: Injected) -> Self {
        Self::Database {
            path: std::path::PathBuf::new(),
            fault: DbFault::Other,
            message: injected.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use matchlock_model::id::{OwnerEpoch, VmId};
    use matchlock_model::identity::{Namespaces, ProcessIdentity};
    use matchlock_model::phase::Phase;
    use matchlock_model::record::{Resources, Started};
    use matchlock_model::subnet::SubnetPool;

    use super::*;
    use crate::op::NewVm;

    /// One of each kind: a new kind does not compile in [`step`], and fails here until it is listed.
    fn one_of_each() -> Vec<WriteOp> {
        let (vm, epoch, at) = (VmId::new(1), OwnerEpoch(1), Timestamp::UNIX_EPOCH);
        let owner = ProcessIdentity { pid: 1, start_ticks: 1, boot_id: String::new() };
        let record = NewVm {
            id: vm,
            image: String::new(),
            config_json: String::new(),
            owner: owner.clone(),
            namespaces: Namespaces { net: String::new(), pid: String::new() },
            ephemeral: false,
            backend: String::new(),
            resources: Resources::default(),
            created_at: at,
        };
        let phase = WriteOp::SetPhase {
            vm,
            epoch,
            phase: Phase::Running,
            last_error: None,
            backend: None,
            resources: None,
            cleanup: Vec::new(),
            at,
        };
        let pool = SubnetPool::default().into();
        vec![
            WriteOp::InsertVm { record: Box::new(record) },
            phase,
            WriteOp::SetHypervisor {
                vm,
                epoch,
                hypervisor: owner.clone(),
                started: Started::Booted,
                at,
            },
            WriteOp::SetExit { vm, epoch, code: 0 },
            WriteOp::RaiseEpoch { vm, pid: 1, at },
            WriteOp::AllocateSubnet { vm, epoch, pool, avoid: Vec::new(), at },
            WriteOp::ReleaseSubnet { vm, epoch },
            WriteOp::WantRemoval { vm, at },
            WriteOp::RemoveVm { vm, epoch },
            WriteOp::PruneHistory { before: at },
        ]
    }

    #[test]
    fn every_kind_of_write_has_its_points() {
        let steps: Vec<_> = one_of_each().iter().map(step).collect();
        assert_eq!(steps, DB.steps());
    }
}
