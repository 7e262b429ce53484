//! What a VM actor knows, and what can happen to it.

use std::time::Duration;

use crate::failure::Failure;
use crate::phase::Phase;

/// What a VM actor knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmState {
    /// The phase that was committed last, as far as the actor knows; during an operation, the
    /// one that its first record announces.
    pub phase: Phase,
    /// The operation in flight.
    pub op: Option<Op>,
    /// A stop that waits for the operation in flight to end.
    pub stop: Option<StopMode>,
    /// Why the VM ends, if it was not simply asked to.
    pub cause: Option<Failure>,
    /// What was heard of a running VM's guest during an operation, to be noted after it.
    pub unnoted: Option<Heard>,
    /// Whether it is brought up only to be saved, for others to go on from.
    pub template: bool,
    /// Whether the VM is removed once it is clean.
    pub ephemeral: bool,
    /// Whether its directory and row are gone too.
    pub forgotten: bool,
    /// Whether everything is done.
    pub settled: bool,
}

impl VmState {
    /// Whether everything that should be gone once it is settled is gone.
    #[must_use]
    pub fn is_cleaned_up(&self) -> bool {
        self.phase == Phase::Cleaned && (!self.ephemeral || self.forgotten)
    }

    /// A VM whose row was just inserted.
    #[must_use]
    pub const fn new(ephemeral: bool) -> Self {
        Self {
            phase: Phase::Creating,
            op: None,
            stop: None,
            cause: None,
            unnoted: None,
            template: false,
            ephemeral,
            forgotten: false,
            settled: false,
        }
    }
}

/// What was heard of a guest last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Nothing for too long.
    Silence(Failure),
    /// It answers again.
    Answer,
}

/// An operation: effects that are carried out in order, as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Directory and disk.
    Create,
    /// Hypervisor and agent; of a template, hypervisor and snapshot.
    Boot,
    /// See that a running VM is still there, whose actor was restarted or whose link was lost.
    Reattach,
    /// Commit what happened to a running VM.
    Note,
    /// Take guest and hypervisor down.
    Stop(StopMode),
    /// Remove what the VM holds.
    Clean,
    /// Remove its directory and row.
    Forget,
    /// Record a failed phase.
    Conclude,
}

/// How to take a VM down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// The guest is asked first and gets this long.
    Graceful(Duration),
    /// The hypervisor is killed at once.
    Force,
}

/// How an operation ended.
pub type OpResult = Result<(), Failure>;

/// What can happen to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// Its row is there; bring it up.
    Begin,
    /// Its actor was restarted and has read this phase from the row: a running VM goes on if it is
    /// still there; in any other phase the shutdown is finished.
    Recover {
        /// The phase in the row.
        phase: Phase,
        /// Why the actor was restarted.
        cause: Failure,
    },
    /// The operation in flight has ended.
    OpDone {
        /// The phase that was committed last.
        recorded: Phase,
        /// How it ended.
        result: OpResult,
    },
    /// The operation in flight was cancelled and does not end.
    OpStuck {
        /// The phase that was committed last.
        recorded: Phase,
        /// The effect that hangs.
        effect: &'static str,
    },
    /// Somebody wants it down.
    Stop(StopMode),
    /// Its hypervisor has ended by itself.
    MachineExited(Failure),
    /// The link to its guest is lost; the hypervisor is there.
    LinkLost(Failure),
    /// Its guest does not answer, or does so again.
    Heard(Heard),
}

/// An event that cannot happen in this state: a fault of our own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("event {event} is impossible in phase {phase} with operation {op:?}")]
pub struct Denied {
    /// The event.
    pub event: &'static str,
    /// The phase.
    pub phase: Phase,
    /// The operation in flight.
    pub op: Option<Op>,
}
