//! A VM's rows: what it is, what it holds, what was done to clean up after it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{OwnerEpoch, VmId};
use crate::identity::{Namespaces, ProcessIdentity};
use crate::phase::Phase;

/// How a VM's machine began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Started {
    /// It booted.
    Booted,
    /// It went on from a snapshot.
    Restored,
}

/// Everything a VM holds or will hold on the host; the JSON in `vm_lifecycle.resources_json`.
///
/// Written before the first of them exists, so that each can be found from its row.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// The VM's directory, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<String>,
    /// The writable disk, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rootfs_path: Option<String>,
    /// The image's root filesystem, absolute, which is shared and not the VM's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_disk: Option<String>,
    /// The socket of the guest link, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_socket: Option<String>,
    /// The socket of the hypervisor's control channel, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp_socket: Option<String>,
    /// The socket on which the owner answers, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner_socket: Option<String>,
    /// The gateway's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway_ip: Option<String>,
    /// The guest's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_ip: Option<String>,
    /// The subnet, `a.b.c.d/n`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet_cidr: Option<String>,
    /// The TAP interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap_name: Option<String>,
    /// The filter table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firewall_table: Option<String>,
    /// The NAT table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nat_table: Option<String>,
    /// The hypervisor's process, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<ProcessIdentity>,
    /// How the hypervisor's machine began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Started>,
    /// The owner's process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<ProcessIdentity>,
    /// The namespaces that the kernel objects live in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Namespaces>,
}

/// A step of cleaning up, as it is named in `vm_lifecycle.cleanup_json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CleanupStep {
    /// The guest was asked to sync, unmount and power off.
    GuestSync,
    /// The hypervisor's process is gone.
    MachineClose,
    /// The TAP is gone.
    TapDelete,
    /// The firewall tables are gone.
    NftablesCleanup,
    /// The VM's sockets are gone.
    SocketsRemove,
    /// The VM's writable disk is gone.
    RootfsRemove,
    /// The subnet may be given to another VM.
    SubnetRelease,
    /// The VM's directory is gone.
    StateDirRemove,
}

impl CleanupStep {
    /// The step's name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::GuestSync => "guest_sync",
            Self::MachineClose => "machine_close",
            Self::TapDelete => "tap_delete",
            Self::NftablesCleanup => "nftables_cleanup",
            Self::SocketsRemove => "sockets_remove",
            Self::RootfsRemove => "rootfs_remove",
            Self::SubnetRelease => "subnet_release",
            Self::StateDirRemove => "state_dir_remove",
        }
    }
}

/// How a step of cleaning up ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanupEntry {
    /// `ok` or `error`.
    pub status: CleanupStatus,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When.
    pub updated_at: Timestamp,
}

/// Whether a step of cleaning up succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CleanupStatus {
    /// What it removes was looked for afterwards and is gone.
    Ok,
    /// It is still there, or it could not be looked at.
    Error,
}

/// All steps of cleaning up so far, by name; the JSON in `vm_lifecycle.cleanup_json`.
pub type Cleanup = BTreeMap<String, CleanupEntry>;

/// A row of `vm_lifecycle`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifecycleRecord {
    /// Counts the rows of one VM, from 1.
    pub version: i64,
    /// Whose row it is.
    pub vm_id: VmId,
    /// The hypervisor: `qemu`, `firecracker`, `fake`.
    pub backend: String,
    /// The phase.
    pub phase: Phase,
    /// When the row was written.
    pub updated_at: Timestamp,
    /// The last error, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_error: String,
    /// What it holds.
    pub resources: Resources,
    /// What was cleaned.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cleanup: Cleanup,
}

/// What a list shows of a VM's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSummary {
    /// The VM.
    pub id: VmId,
    /// The owner's pid; 0 once it has no owner.
    pub pid: i32,
    /// The phase in its latest lifecycle row; `creating` before it has one.
    pub phase: Phase,
    /// The image's tag.
    pub image: String,
    /// When the VM was made.
    pub created_at: Timestamp,
    /// The last error in its latest lifecycle row, or empty.
    pub last_error: String,
    /// The hypervisor's process, if it is known and can be read.
    pub hypervisor: Option<ProcessIdentity>,
    /// The namespaces that its kernel objects live in, if they can be read.
    pub namespaces: Option<Namespaces>,
    /// Whether somebody wants it removed.
    pub removal_wanted: bool,
    /// How its own command ended, as a shell says it; `None` if it has not, or nobody knows.
    pub exit_code: Option<u8>,
}

/// What cleaning up needs to know of a VM's rows, and no more: what else in them cannot be read
/// keeps no VM from being removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRemains {
    /// The phase in its latest lifecycle row; `creating` before it has one, or when nobody can read
    /// it: then anything may be left.
    pub phase: Phase,
    /// The process that made the VM, if it can be read. Who owns it now may be another, of a later
    /// boot: what the VM has is of this one.
    pub maker: Option<ProcessIdentity>,
    /// The hypervisor's process, once it is known.
    pub hypervisor: Option<ProcessIdentity>,
    /// The namespaces that its kernel objects live in.
    pub namespaces: Option<Namespaces>,
    /// Whether the VM is removed when its command has ended.
    pub ephemeral: bool,
    /// Whether somebody wants it removed, whatever became of whoever was to do it.
    pub removal_wanted: bool,
    /// Whether it holds a subnet.
    pub holds_subnet: bool,
    /// Whether it has, or may have had, a TAP and firewall tables.
    pub had_network: bool,
}

/// A row of `vms`, with our additions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRecord {
    /// The VM.
    pub id: VmId,
    /// The owner's pid; 0 once it has no owner.
    pub pid: i32,
    /// The status as written; what is shown is derived, see [`crate::view`].
    pub status: String,
    /// The phase in its latest lifecycle row; `creating` before it has one.
    pub phase: Phase,
    /// The last error in that row, or empty.
    pub last_error: String,
    /// The image's tag.
    pub image: String,
    /// The specification, redacted, as JSON.
    pub config_json: String,
    /// When the VM was made.
    pub created_at: Timestamp,
    /// When the row was last written.
    pub updated_at: Timestamp,
    /// Which owner may write.
    pub owner_epoch: OwnerEpoch,
    /// The owner's process.
    pub owner: Option<ProcessIdentity>,
    /// The hypervisor's process, once it is known.
    pub hypervisor: Option<ProcessIdentity>,
    /// The namespaces that its kernel objects live in.
    pub namespaces: Option<Namespaces>,
    /// Whether the VM is removed when its command has ended.
    pub ephemeral: bool,
    /// Whether somebody wants it removed.
    pub removal_wanted: bool,
    /// Whether it holds a subnet.
    pub holds_subnet: bool,
    /// How its own command ended, as a shell says it; `None` if it has not, or nobody knows.
    pub exit_code: Option<u8>,
    /// How its machine began; `None` before it was launched, or when nobody knows.
    pub started: Option<Started>,
}
