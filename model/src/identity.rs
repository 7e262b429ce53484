//! Which process exactly: a pid alone is reused, a pid with its start time and boot is not.

use serde::{Deserialize, Serialize};

/// A process, told apart from every other process this machine has run or will run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The pid, in the pid namespace of the process that recorded it.
    pub pid: i32,
    /// The start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_ticks: u64,
    /// The kernel's boot id (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// The namespaces in which a VM's kernel objects live: device and inode of each, `dev:inode`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Namespaces {
    /// The network namespace.
    pub net: String,
    /// The pid namespace.
    pub pid: String,
}
