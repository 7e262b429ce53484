//! What can be written to `state.db`: one variant, one change of the stored state.
//!
//! # Invariants
//! * An op is written whole or not at all.
//! * An op of an owner carries its epoch, and is refused once another owner has taken the VM over.
//! * The rows of `vm_lifecycle` of one VM are numbered from 1 without gaps, and each phase may
//!   follow the one before it.

use std::sync::Arc;

use jiff::Timestamp;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::record::{CleanupEntry, Resources, Started};
use matchlock_model::subnet::{Ipv4Cidr, Subnet, SubnetPool};

/// A VM that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVm {
    /// Its id.
    pub id: VmId,
    /// Its image's tag.
    pub image: String,
    /// Its specification, redacted, as JSON.
    pub config_json: String,
    /// The process that owns it.
    pub owner: ProcessIdentity,
    /// The namespaces in which its kernel objects will live.
    pub namespaces: Namespaces,
    /// Whether it is removed when its command has ended.
    pub ephemeral: bool,
    /// Its hypervisor.
    pub backend: String,
    /// What it will hold on the host.
    pub resources: Resources,
    /// When.
    pub created_at: Timestamp,
}

/// One change of the stored state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOp {
    /// Makes a VM: its row in `vms`, its owner with epoch 1, its first lifecycle row, phase
    /// `creating`. Answers [`WriteOutcome::Version`] 1.
    ///
    /// Refused with `VmExists` when the id is taken, or was: history is kept after removal.
    InsertVm {
        /// The VM.
        record: Box<NewVm>,
    },
    /// Writes what is so now as the next lifecycle row, and the status and pid in `vms`. Answers
    /// [`WriteOutcome::Version`]: the new row's, or the latest row's if that says the same already.
    ///
    /// A VM of the reference that has no lifecycle row yet counts as `creating`.
    SetPhase {
        /// The VM.
        vm: VmId,
        /// Whose write it is.
        epoch: OwnerEpoch,
        /// The phase; the one it is in already is fine.
        phase: Phase,
        /// `None` keeps the last error, an empty text clears it.
        last_error: Option<String>,
        /// `None` keeps the hypervisor's name.
        backend: Option<String>,
        /// `None` keeps what it holds.
        resources: Option<Box<Resources>>,
        /// Steps of cleaning up to be added or replaced, by name.
        cleanup: Vec<(String, CleanupEntry)>,
        /// When.
        at: Timestamp,
    },
    /// Records the hypervisor's process, beside the VM and in the next lifecycle row, and there how its
    /// machine begins. Answers as `SetPhase` does.
    SetHypervisor {
        /// The VM.
        vm: VmId,
        /// Whose write it is.
        epoch: OwnerEpoch,
        /// The hypervisor's process.
        hypervisor: ProcessIdentity,
        /// How its machine begins.
        started: Started,
        /// When.
        at: Timestamp,
    },
    /// Notes how the VM's own command ended; a later end replaces it. Answers
    /// [`WriteOutcome::ExitNoted`].
    SetExit {
        /// The VM.
        vm: VmId,
        /// Whose write it is.
        epoch: OwnerEpoch,
        /// The exit code, as a shell says it: 128+n for signal n.
        code: u8,
    },
    /// Takes a VM over: from now on only writes with the answered [`WriteOutcome::Epoch`] count.
    RaiseEpoch {
        /// The VM.
        vm: VmId,
        /// The new owner's pid. Who made what the VM holds stays as it is recorded: a new owner makes
        /// nothing.
        pid: i32,
        /// When.
        at: Timestamp,
    },
    /// Gives a VM the lowest free subnet of the pool, or the one that it has already, and names it
    /// in the next lifecycle row. Answers [`WriteOutcome::Subnet`].
    ///
    /// Refused with `NoFreeSubnet` when none is left, and with `NotCreating` in any other phase than
    /// `creating`.
    AllocateSubnet {
        /// The VM.
        vm: VmId,
        /// Whose write it is.
        epoch: OwnerEpoch,
        /// Where it is taken from.
        pool: Arc<SubnetPool>,
        /// Ranges that are in use on this host: a subnet that overlaps one is not given.
        avoid: Vec<Ipv4Cidr>,
        /// When.
        at: Timestamp,
    },
    /// Takes a VM's subnet back, so that it can be given again; one that is free already is fine.
    /// What the history says of it stays. Answers [`WriteOutcome::Released`].
    ReleaseSubnet {
        /// The VM.
        vm: VmId,
        /// Whose write it is.
        epoch: OwnerEpoch,
    },
    /// Notes that a VM is to be removed, whoever does it; one of which that is noted already is fine.
    /// Answers [`WriteOutcome::RemovalWanted`].
    ///
    /// It is a user's wish, not an owner's write: it has no epoch.
    WantRemoval {
        /// The VM.
        vm: VmId,
        /// When.
        at: Timestamp,
    },
    /// Removes a cleaned VM; its history stays. Answers [`WriteOutcome::Removed`].
    ///
    /// Refused with `NotCleaned` in any other phase, and with `SubnetHeld` while it has a subnet.
    RemoveVm {
        /// The VM.
        vm: VmId,
        /// Whose write it is.
        epoch: OwnerEpoch,
    },
    /// Drops the history of removed VMs that was last added to before this moment. Answers
    /// [`WriteOutcome::Pruned`].
    PruneHistory {
        /// The moment.
        before: Timestamp,
    },
}

/// What a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The number of the VM's latest lifecycle row.
    Version(i64),
    /// How the VM's own command ended is written.
    ExitNoted,
    /// The epoch of the new owner.
    Epoch(OwnerEpoch),
    /// The subnet that the VM has now.
    Subnet(Subnet),
    /// The VM has no subnet any more.
    Released {
        /// Whether it had one.
        held: bool,
    },
    /// Whoever cleans the VM up removes it.
    RemovalWanted,
    /// The VM has no row any more.
    Removed,
    /// The history of this many VMs was dropped.
    Pruned {
        /// How many.
        vms: usize,
        /// The history of how many stays because its time cannot be read.
        unreadable: usize,
    },
}
