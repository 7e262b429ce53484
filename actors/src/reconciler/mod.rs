//! Compensates: looks at what VMs left on this host and removes what nobody owns.
//!
//! ```text
//!  Reconcile ─► (task per VM) lock ─► epoch raised ─► observe: row, processes, network, files
//!                   │                                        │
//!                   │ held: its owner lives, left alone      ▼
//!                   └────────────────────────── model::reconcile::plan ─► actions, in order,
//!                                                each verified on the host and recorded
//!  PruneHistory ─► (task) one write: the history of VMs removed before a moment is dropped
//! ```
//!
//! # Invariants
//! 1. A VM is touched only with its owner lock held by us, so two reconcilers, or a reconciler
//!    and an owner, never interleave.
//! 2. The actor's handlers only spawn; a slow host never blocks them.
//! 3. A failed step is recorded in the row with its error, and the row stays (`rm` and `prune`
//!    abort).
//! 4. "Could not look" is a failed step named `observe`, never "clean".

mod actor;
mod network;
mod report;
mod work;

pub use actor::{Reconciler, ReconcilerMsg, Target};
pub use report::{Outcome, VmReport};
