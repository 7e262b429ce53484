//! The phases of a VM's life and the changes between them that are allowed.
//!
//! ```text
//! creating ─► created ─► starting ─► running ─► stopping ─► stopped
//!    │           │           │          │          │ │         │
//!    ▼           │           ▼          │          │ ▼         ▼
//! create_failed  └─────► start_failed ◄─┘  stop_failed └─► cleaning ─► cleaned
//!    └───────────────────────┴─────────────────┴────────────►  │
//!                                                        cleanup_failed
//! ```
//!
//! The table in [`Phase::successors`] is the law; the picture shows its main lines. A phase may
//! always be written again (a new error, new cleanup entries) without changing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A phase of a VM's life, as the column `vm_lifecycle.phase` holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its row is there, its disks are being made.
    Creating,
    /// Its disks are there.
    Created,
    /// Its hypervisor is being started and its agent awaited.
    Starting,
    /// Its agent has answered.
    Running,
    /// Guest and hypervisor are being stopped.
    Stopping,
    /// Its hypervisor has ended; its disks are kept.
    Stopped,
    /// What it holds on the host is being removed.
    Cleaning,
    /// It holds nothing on the host any more but its directory with logs.
    Cleaned,
    /// Its disks could not be made.
    CreateFailed,
    /// It could not be started.
    StartFailed,
    /// Its hypervisor could not be stopped.
    StopFailed,
    /// Something that it holds could not be removed.
    CleanupFailed,
}

impl Phase {
    /// All phases, in the order of a life, failures last.
    pub const ALL: [Self; 12] = [
        Self::Creating,
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Stopping,
        Self::Stopped,
        Self::Cleaning,
        Self::Cleaned,
        Self::CreateFailed,
        Self::StartFailed,
        Self::StopFailed,
        Self::CleanupFailed,
    ];

    /// The phase's name in the database and on the screen.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Cleaning => "cleaning",
            Self::Cleaned => "cleaned",
            Self::CreateFailed => "create_failed",
            Self::StartFailed => "start_failed",
            Self::StopFailed => "stop_failed",
            Self::CleanupFailed => "cleanup_failed",
        }
    }

    /// The phases that may follow this one; the phase itself is always allowed.
    #[must_use]
    pub const fn successors(self) -> &'static [Self] {
        match self {
            Self::Creating => &[Self::Created, Self::CreateFailed, Self::Cleaning],
            Self::Created => &[Self::Starting, Self::Stopping, Self::Cleaning],
            Self::Starting => &[Self::Running, Self::StartFailed, Self::Stopping, Self::Cleaning],
            Self::Running => &[Self::Stopping, Self::Cleaning],
            Self::Stopping => &[Self::Stopped, Self::StopFailed, Self::Cleaning],
            Self::Stopped => &[Self::Cleaning, Self::Cleaned],
            Self::Cleaning => &[Self::Cleaned, Self::CleanupFailed],
            Self::Cleaned => &[],
            Self::CreateFailed | Self::StopFailed => &[Self::Cleaning, Self::CleanupFailed],
            Self::StartFailed => &[Self::Stopping, Self::Cleaning, Self::CleanupFailed],
            Self::CleanupFailed => &[Self::Cleaning, Self::Cleaned],
        }
    }

    /// Whether a VM in this phase may be written into that one.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        self == next || self.successors().contains(&next)
    }

    /// Checks a change.
    ///
    /// # Errors
    /// Names both phases when the change is not in the table.
    pub fn check_transition(self, next: Self) -> Result<(), InvalidTransition> {
        if self.may_become(next) {
            return Ok(());
        }
        Err(InvalidTransition { from: self, to: next })
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A change of phase that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid lifecycle phase transition \"{from}\" -> \"{to}\"")]
pub struct InvalidTransition {
    /// The phase that the VM is in.
    pub from: Phase,
    /// The phase that it was to become.
    pub to: Phase,
}

/// A text that is not a phase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown lifecycle phase {text:?}")]
pub struct UnknownPhase {
    /// What was found.
    pub text: String,
}

impl FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(text: &str) -> Result<Self, UnknownPhase> {
        Self::ALL
            .into_iter()
            .find(|phase| phase.name() == text)
            .ok_or_else(|| UnknownPhase { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for phase in Phase::ALL {
            assert_eq!(phase.name().parse(), Ok(phase));
        }
    }

    /// The reference's table, written down once more: what may follow each phase but itself.
    const TABLE: &[(&str, &[&str])] = &[
        ("creating", &["created", "create_failed", "cleaning"]),
        ("created", &["starting", "stopping", "cleaning"]),
        ("starting", &["running", "start_failed", "stopping", "cleaning"]),
        ("running", &["stopping", "cleaning"]),
        ("stopping", &["stopped", "stop_failed", "cleaning"]),
        ("stopped", &["cleaning", "cleaned"]),
        ("cleaning", &["cleaned", "cleanup_failed"]),
        ("cleaned", &[]),
        ("create_failed", &["cleaning", "cleanup_failed"]),
        ("start_failed", &["stopping", "cleaning", "cleanup_failed"]),
        ("stop_failed", &["cleaning", "cleanup_failed"]),
        ("cleanup_failed", &["cleaning", "cleaned"]),
    ];

    #[test]
    fn each_of_all_pairs_is_allowed_or_refused_as_the_table_says() {
        let names: Vec<_> = TABLE.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, Phase::ALL.map(Phase::name));
        for (from, to) in TABLE {
            let phase: Phase = from.parse().unwrap();
            for next in Phase::ALL {
                let allowed = *from == next.name() || to.contains(&next.name());
                let checked = phase.check_transition(next);
                assert_eq!(checked.is_ok(), allowed, "{from} -> {next}");
                if let Err(refused) = checked {
                    let text = refused.to_string();
                    assert!(text.contains(&format!("\"{from}\" -> \"{next}\"")), "{text}");
                }
            }
        }
    }

    #[test]
    fn cleaned_is_final_and_reachable_from_everywhere() {
        assert!(Phase::Cleaned.successors().is_empty());
        for start in Phase::ALL {
            let mut reached = vec![start];
            let mut next = 0;
            while let Some(phase) = reached.get(next).copied() {
                next += 1;
                for successor in phase.successors() {
                    if !reached.contains(successor) {
                        reached.push(*successor);
                    }
                }
            }
            assert!(reached.contains(&Phase::Cleaned), "{start} never gets cleaned");
        }
    }

    #[test]
    fn a_refused_change_names_both_phases() {
        let refused = Phase::Running.check_transition(Phase::Created).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "invalid lifecycle phase transition \"running\" -> \"created\""
        );
    }
}
