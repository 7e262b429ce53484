//! What was done for a VM.

use matchlock_model::id::VmId;

/// What was done for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmReport {
    /// Which.
    pub vm: VmId,
    /// What.
    pub outcome: Outcome,
}

/// What was done for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its owner lives: left alone.
    Running,
    /// There is no such VM, and nothing that carries its mark.
    Unknown,
    /// These things were removed (none: there was nothing to do).
    Cleaned {
        /// What was removed, in order.
        removed: Vec<String>,
    },
    /// Something could not be done; the VM's row stays and says so.
    Failed {
        /// What was removed all the same.
        removed: Vec<String>,
        /// The step that failed.
        step: String,
        /// Why.
        error: String,
    },
}
