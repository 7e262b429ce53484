//! What was found of a VM, and what was done.

use matchlock_model::failure::Failure;
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Finding;

/// What was found of a VM, and what was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmReport {
    /// Which.
    pub vm: VmId,
    /// What was done.
    pub outcome: Outcome,
    /// What was found, and what was decided; `None` if it was not looked at, or could not be.
    pub finding: Option<Finding>,
}

/// What was done for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its owner lives: left alone.
    Running,
    /// Another process cleans it up, still so after a while: left alone.
    BeingCleaned,
    /// There is no such VM, and nothing that carries its mark.
    Unknown,
    /// Nothing: it was only looked at.
    Planned,
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

/// The step that has failed when a VM could not be looked at.
pub const OBSERVE: &str = "observe";

impl Outcome {
    /// Nobody could look at it, or it could not be taken over.
    pub(super) fn not_seen(failure: Failure) -> Self {
        Self::Failed { removed: Vec::new(), step: OBSERVE.to_owned(), error: failure.message }
    }
}

/// Something that looks like ours and cannot be told to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    /// What it is, e.g. `link fc-0badcafe`.
    pub what: String,
    /// Why nobody can tell whose it is.
    pub why: String,
}
