//! Compensates: looks at what VMs left on this host and removes what nobody owns.
//!
//! ```text
//!  Reconcile ─► (some VMs at a time) lock ─► observe: row, processes, network, files
//!                   │                                        │
//!                   │ held: left alone                       ▼
//!                   └────────────────────────── model::reconcile::plan ─► epoch raised ─► actions,
//!                                          in order, each verified on the host and recorded
//!  TakeOver  ─► as above, but from an owner that holds its lock: looked at once before its epoch is
//!               raised, so that what cannot be looked at is not fenced for nothing; then again
//!  survey    ─► (no actor) observe and plan alone: nothing is locked or written
//!  WantRemoval ─► (task) one write: from then on every reconciliation of that VM removes it
//!  PruneHistory ─► (task) one write: the history of VMs removed before a moment is dropped
//! ```
//!
//! # Invariants
//! 1. A VM is touched only with its owner lock held by us, so two reconcilers, or a reconciler
//!    and an owner, never interleave; a take-over does without, once the owner is fenced by its epoch.
//!    Who else cleans it up is waited for a moment.
//! 2. The actor's handlers only spawn; a slow host never blocks them.
//! 3. A failed step is recorded in the row with its error, and the row stays (`rm` and `prune`
//!    abort).
//! 4. "Could not look" is a failed step named `observe`, never "clean".

mod actor;
mod carry;
mod network;
mod report;
mod sight;
mod work;

pub use actor::{Reconciler, ReconcilerMsg, Target};
pub use report::{OBSERVE, Outcome, Stranger, VmReport};
pub use sight::{NoRows, Sight, strangers, survey};
